//! The reset line of an i8042 keyboard controller, without keyboard and without mouse.
//!
//! Kernels reset a PC by writing 0xFE to its command port, and the machine's ACPI tables name the
//! same port as reset register.

mod device;
mod metrics;
mod persist;
#[cfg(test)]
mod test_utils;

pub use device::{I8042, SIZE};
pub use metrics::I8042Metrics;
pub use persist::I8042State;
