//! The network device (virtio 1.2, section 5.1): a card on a tap, or whatever moves frames.
//!
//! ```text
//! +-------+----------+---------+----------+------------+-------------+-------------+---------+
//! | flags | gso_type | hdr_len | gso_size | csum_start | csum_offset | num_buffers | frame   |
//! | u8    | u8       | u16     | u16      | u16        | u16         | u16         | ...     |
//! +-------+----------+---------+----------+------------+-------------+-------------+---------+
//! ```
//!
//! The header of 12 bytes is the tap's as well, so that checksums and segmentation are left to
//! whoever is last. A received frame goes straight into the guest's first buffer; only what does
//! not fit there is copied, into further ones (mergeable buffers). A frame that finds no buffers
//! stays with the backend, one that finds too few is dropped, as by a card that is out of them.

mod backend;
mod control;
mod device;
mod metrics;
mod persist;
#[cfg(test)]
mod test_utils;
#[cfg(test)]
mod tests;

pub use backend::{FdBackend, NetBackend, Offloads};
pub use device::{MacAddress, Net, NetConfig, CONTROL, HEADER, QUEUE_SIZE, RECEIVE, TRANSMIT};
pub use metrics::NetMetrics;
pub use persist::NetState;
