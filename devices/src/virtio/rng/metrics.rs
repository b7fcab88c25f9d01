//! What the entropy device counts.

use crate::metrics::Counter;

/// Counters of one entropy device.
#[derive(Debug, Default)]
pub struct RngMetrics {
    /// Random bytes given to the guest.
    pub bytes: Counter,
    /// Requests that got nothing since the source failed.
    pub source_errors: Counter,
}
