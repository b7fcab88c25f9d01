//! The console device (virtio 1.2, section 5.3): one port, with a size.

mod device;
mod metrics;
mod persist;
#[cfg(test)]
mod test_utils;

pub use device::{Console, QUEUE_SIZE, RECEIVE, TRANSMIT};
pub use metrics::ConsoleMetrics;
pub use persist::ConsoleState;
