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

mod announce;
mod backlog;
mod cards;
mod disk;
mod port;
mod set;
mod slot;
mod tap;
mod worker;

use std::io;

use devices::virtio::block::{DiskError, LockError};

pub use cards::Cards;
pub use set::{DiskOwnership, VirtioParts, VirtioSet};
pub use tap::TapError;

use crate::network::NetworkError;

/// Why a virtio device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A disk is used by another VM of this host.
    #[error("disk {path} is in use by the VM {vm} (process {pid}): stop that VM, or use the disk readonly in all of them")]
    DiskInUse {
        /// The disk.
        path: std::path::PathBuf,
        /// The VM.
        vm: String,
        /// Its process.
        pid: u32,
    },
    /// Two disks of this VM are one, and not only to be read.
    #[error("the disks {first} and {second} are the same file, {path}: give each its own, or make both readonly")]
    DiskTwice {
        /// Id of one.
        first: String,
        /// Id of the other.
        second: String,
        /// Path of the other.
        path: std::path::PathBuf,
    },
    /// A network card.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A network card on a bridge or a declared network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Anything else that a device needs of the host.
    #[error("cannot set up {device}: {error}")]
    Setup {
        /// The device.
        device: String,
        /// What the system said.
        error: io::Error,
    },
}

impl VirtioError {
    /// Whether it would work if some other program gave something up.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        if let Self::Network(error) = self {
            return error.is_refused();
        }
        matches!(
            self,
            Self::DiskInUse { .. }
                | Self::Disk(DiskError::Lock { error: LockError::Held(_), .. })
                | Self::Tap(TapError::Busy { .. })
        )
    }

    /// Whether another command line may do.
    #[must_use]
    pub fn is_about_what_was_asked(&self) -> bool {
        match self {
            Self::Disk(error) => !matches!(error, DiskError::Lock { .. }),
            Self::Tap(error) => matches!(
                error,
                TapError::Missing { .. } | TapError::NotATap { .. } | TapError::Permission { .. }
            ),
            Self::Network(error) => error.is_about_what_was_asked(),
            Self::DiskTwice { .. } => true,
            Self::DiskInUse { .. } | Self::Setup { .. } => false,
        }
    }
}
