//! What the ACPI fixed hardware counts.

use crate::metrics::Counter;

/// Counters of the ACPI fixed hardware.
#[derive(Debug, Default)]
pub struct AcpiPmMetrics {
    /// Presses of the power button.
    pub button_presses: Counter,
    /// Edges of the SCI.
    pub sci_raised: Counter,
    /// Edges of the SCI that did not get through.
    pub interrupt_errors: Counter,
    /// Requests to sleep in a state that is not S5: ignored.
    pub ignored_sleeps: Counter,
    /// Accesses that the register block does not have: ignored.
    pub odd_accesses: Counter,
}
