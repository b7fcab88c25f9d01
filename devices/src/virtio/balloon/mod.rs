//! The memory balloon (virtio 1.2, section 5.5): the guest gives memory back, and asks for it.
//!
//! The host sets a target; the driver inflates or deflates the balloon towards it by lists of
//! 4 KiB page numbers on two queues. A page in the balloon is discarded through [`Discard`]; the
//! guest does not use it until it deflates, and finds it zero then.

mod device;
mod metrics;
mod persist;
#[cfg(test)]
mod test_utils;

pub use device::{Balloon, Discard, PAGE, QUEUE_SIZE};
pub use metrics::BalloonMetrics;
pub use persist::BalloonState;
