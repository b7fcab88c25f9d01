//! Virtual devices: state machines without KVM and without sockets.
//!
//! A device sees the rest of the machine through small traits only: [`InterruptLine`] towards the
//! interrupt controller, [`PowerRequests`] towards the machine, `std::io::Write` towards a console.
//! The guest reaches it through [`BusDevice`], and it saves and restores itself by [`Persist`].
//! Every device is a folder of the same files:
//!
//! | file | content |
//! |---|---|
//! | `mod.rs` | what the device is; re-exports |
//! | `device.rs` | the live state machine and its registers |
//! | `persist.rs` | its frozen state structure |
//! | `metrics.rs` | what it counts |
//! | `test_utils.rs` | what its tests need |
//!
//! Virtio devices share their transport and queues: see [`virtio`].
//!
//! Restoring a device raises no interrupt, since the interrupt controllers may be restored after
//! it. When all state is in place, `raise_pending` of each device repeats the edge of an interrupt
//! that is still unserved: what was on its way in an eventfd is in nobody's state.

pub mod acpi_pm;
pub mod bus;
pub mod i8042;
pub mod interrupt;
pub mod metrics;
pub mod persist;
pub mod power;
pub mod serial;
#[cfg(any(test, feature = "test-utils"))]
pub mod test_utils;
pub mod virtio;

pub use acpi_pm::AcpiPm;
pub use bus::{Bus, BusDevice, BusError};
pub use i8042::I8042;
pub use interrupt::InterruptLine;
pub use persist::{Payload, Persist, PersistError};
pub use power::PowerRequests;
pub use serial::Serial;
