//! The virtio devices of a machine: each in a slot, driven by a thread of its own.
//!
//! ```text
//! slot n: registers at VIRTIO_MMIO + n * 4 KiB, one interrupt line of the I/O APIC
//!
//!   vCPU thread ---- registers ----> MmioTransport --+
//!       |                                            +--> device --- backend (file, tap, ...)
//!       +-- queue notification --> ioeventfd --> worker thread
//! ```
//!
//! A notification never leaves the kernel on the vCPU's side (an ioeventfd on the notify register);
//! the device's worker serves the queue. Interrupts are raised by a synchronous ioctl rather than
//! an irqfd: KVM delivers an irqfd of an I/O APIC pin from a work queue, which takes longer, and
//! what is on its way there is in nobody's state.

mod disk;
mod set;
mod slot;
mod tap;
mod worker;

use std::io;

use devices::virtio::block::DiskError;

pub use set::{DiskOwnership, VirtioParts, VirtioSet};
pub use tap::TapError;

/// Why a virtio device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A disk is used by another VM of this host.
    #[error("disk {path} is in use by the VM {vm} (process {pid}): stop that VM, or use the disk read-only in all of them")]
    DiskInUse {
        /// The disk.
        path: std::path::PathBuf,
        /// The VM.
        vm: String,
        /// Its process.
        pid: u32,
    },
    /// A network card.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// Anything else that a device needs of the host.
    #[error("cannot set up {device}: {error}")]
    Setup {
        /// The device.
        device: String,
        /// What the system said.
        error: io::Error,
    },
}
