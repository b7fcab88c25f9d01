//! The block device (virtio 1.2, section 5.2): a disk on a file or a block device of the host.
//!
//! ```text
//! readable   +----------+----------+--------+  +------------------------+
//!            | type u32 | reserved | sector |  | data of a write, or    |
//!            |          | u32      | u64    |  | ranges of a discard    |
//!            +----------+----------+--------+  +------------------------+
//! writable   +------------------------+--------+
//!            | data of a read, or id  | status |
//!            +------------------------+--------+
//! ```
//!
//! Requests are served one after the other by the thread that drives the queue, without a copy
//! between guest memory and the file. What the host's disk cannot do is an I/O error for the
//! guest; what breaks the format above breaks the device.
//!
//! A disk file is locked before it is read ([`DiskLock`]): by the machine that runs on it, and by
//! the one that is about to.

mod backend;
mod device;
mod file;
mod lock;
mod metrics;
mod persist;
mod request;
#[cfg(test)]
mod test_utils;
#[cfg(test)]
mod tests;

pub use backend::BlockBackend;
pub use device::{Block, Cache, ID_BYTES, QUEUE_SIZE, SECTOR};
pub use file::{DiskError, DiskFile};
pub use lock::{DiskLock, LockError, LockMode, LockRange};
pub use metrics::BlockMetrics;
pub use persist::BlockState;
