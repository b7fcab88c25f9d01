//! What the balloon counts.

use crate::metrics::Counter;

/// Counters of a balloon.
#[derive(Debug, Default)]
pub struct BalloonMetrics {
    /// Pages of 4 KiB that the host wants in the balloon.
    pub target_pages: Counter,
    /// Pages of 4 KiB that the guest says are in it.
    pub actual_pages: Counter,
    /// Pages of 4 KiB that the guest put into the balloon.
    pub inflated: Counter,
    /// Pages of 4 KiB that the guest took out of it.
    pub deflated: Counter,
    /// Ranges that could not be discarded: the guest does without them, the host keeps them.
    pub discard_errors: Counter,
}
