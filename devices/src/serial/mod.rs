//! A 16550A UART: the guest's console.
//!
//! The registers are those of [`vm_superio::Serial`]; here they become a device with an interrupt,
//! an output, flow control towards whoever feeds it, and a state. Output goes to any
//! `std::io::Write`; a write that fails costs the byte and is counted, the guest notices nothing.

mod device;
mod metrics;
mod persist;
#[cfg(test)]
mod test_utils;

pub use device::{Serial, FIFO_SIZE, SIZE};
pub use metrics::SerialMetrics;
pub use persist::SerialState;
