//! The entropy device (virtio 1.2, section 5.4): fills the guest's buffers with random bytes.
//!
//! One queue, no features, no configuration, no state.

mod device;
mod metrics;
mod persist;
#[cfg(test)]
mod test_utils;

pub use device::{EntropySource, HostEntropy, Rng, MAX_REQUEST, QUEUE_SIZE};
pub use metrics::RngMetrics;
pub use persist::RngState;
