//! The way from a device to the interrupt controller.

use std::io;

/// An edge-triggered interrupt line.
///
/// All interrupts of this machine are edges, so there is no level to save: the state of an
/// interrupt is in the device (its status register) and in the interrupt controller.
pub trait InterruptLine: Send + Sync {
    /// Raises the line and lowers it again.
    ///
    /// # Errors
    ///
    /// When the interrupt controller could not be reached; the edge is lost then.
    fn pulse(&self) -> io::Result<()>;
}
