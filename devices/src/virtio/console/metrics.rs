//! What the console counts.

use crate::metrics::Counter;

/// Counters of one console.
#[derive(Debug, Default)]
pub struct ConsoleMetrics {
    /// Bytes that the guest sent and the output took.
    pub bytes_out: Counter,
    /// Writes of the guest that the output refused: they are lost.
    pub output_errors: Counter,
    /// Bytes that entered the guest's buffers from outside.
    pub bytes_in: Counter,
}
