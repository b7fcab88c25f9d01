//! ACPI fixed hardware: power button and power-off.
//!
//! ```text
//! port   0        1        2        3        4        5
//!        +-----------------+-----------------+-----------------+
//!        | PM1a status     | PM1a enable     | PM1a control    |
//!        +-----------------+-----------------+-----------------+
//! bit 8  power button: write 1 to clear      |
//!                          power button      |
//! bit 0                                      SCI_EN, always set
//! bits 10-12                                 SLP_TYP
//! bit 13                                     SLP_EN, write only
//! ```
//!
//! The registers are those of the ACPI specification 6.5, section 4.8.3. A press of the power
//! button sets its status bit; while that is enabled it raises the system control interrupt (SCI),
//! an edge here. The guest turns the machine off by SLP_TYP 5 with SLP_EN, 5 being what the `\_S5`
//! package of the machine's DSDT says.

mod device;
mod metrics;
mod persist;
#[cfg(test)]
mod test_utils;

pub use device::{AcpiPm, CONTROL_OFFSET, SIZE, SLEEP_TYPE_S5};
pub use metrics::AcpiPmMetrics;
pub use persist::AcpiPmState;
