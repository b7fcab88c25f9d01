//! What the keyboard controller counts.

use crate::metrics::Counter;

/// Counters of the keyboard controller.
#[derive(Debug, Default)]
pub struct I8042Metrics {
    /// Resets that the guest asked for.
    pub resets: Counter,
    /// Writes that are no reset: ignored.
    pub ignored_writes: Counter,
}
