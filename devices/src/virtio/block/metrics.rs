//! What the block device counts.

use crate::metrics::Counter;

/// Counters of one block device.
#[derive(Debug, Default)]
pub struct BlockMetrics {
    /// Reads that succeeded.
    pub reads: Counter,
    /// Bytes that they read.
    pub bytes_read: Counter,
    /// Writes that succeeded.
    pub writes: Counter,
    /// Bytes that they wrote.
    pub bytes_written: Counter,
    /// Flushes that succeeded.
    pub flushes: Counter,
    /// Discards and write-zeroes that succeeded.
    pub clears: Counter,
    /// Requests that ended with an I/O error for the guest.
    pub errors: Counter,
    /// Requests of a type or with flags that this device does not have.
    pub unsupported: Counter,
}
