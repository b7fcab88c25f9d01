//! Virtio devices behind memory-mapped registers (virtio 1.2, section 4.2, modern only).
//!
//! ```text
//!   vCPU thread                          worker thread of the device
//!       | registers                          | "queue n", "tap readable", ...
//!       v                                    v
//!   MmioTransport ---------+     +------ Handle
//!   (on the MMIO bus)      v     v
//!                        +----------------------+
//!                        | device + its queues  |  one lock
//!                        +----------------------+
//!                        | interrupt, counters  |  no lock
//!                        +----------------------+
//! ```
//!
//! - [`mmio`] is the transport: registers, negotiation, status, queue set-up.
//! - A device implements [`VirtioDevice`]; it sees guest memory as [`Buffers`] of a [`Chain`] only,
//!   and every write through them is marked in the device bitmap after it.
//! - [`Handle`] is for whoever drives the device: notifications of queues (an ioeventfd), events of
//!   the backend, quiescing before a save, forced notifications after a restore.
//!
//! A guest that breaks the rules of its queues breaks the device it broke them with: the device
//! stops with DEVICE_NEEDS_RESET, it is counted, and the driver may reset it and begin again.

#[cfg(test)]
mod attacks;
pub mod balloon;
pub mod block;
mod buffers;
pub mod console;
mod device;
mod gate;
pub mod ids;
mod interrupt;
pub mod mmio;
pub mod net;
mod queue;
pub mod rng;
#[cfg(test)]
mod test_utils;
pub mod volatile_io;

pub use buffers::Buffers;
pub use device::{Context, DeviceError, Progress, VirtioDevice};
pub use interrupt::VirtioInterrupt;
pub use mmio::{Handle, MmioTransport, QueueNotifier, VirtioControl};
pub use queue::{Chain, QueueError, VirtQueue, MAX_CHAIN};
