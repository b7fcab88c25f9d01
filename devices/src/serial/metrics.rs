//! What the serial port counts.

use crate::metrics::Counter;

/// Counters of one serial port.
#[derive(Debug, Default)]
pub struct SerialMetrics {
    /// Bytes that the guest sent and the output took.
    pub bytes_out: Counter,
    /// Bytes that the guest sent and the output refused: they are lost.
    pub output_errors: Counter,
    /// Bytes that entered the receive FIFO from outside.
    pub bytes_in: Counter,
    /// Interrupts that could not be raised.
    pub interrupt_errors: Counter,
    /// Accesses of more than one byte, which a UART does not have: ignored.
    pub odd_accesses: Counter,
}
