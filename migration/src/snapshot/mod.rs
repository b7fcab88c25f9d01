//! A VM in a file.
//!
//! The file is a stream ([`crate::stream`]) of kind snapshot, whose records come in this order:
//!
//! ```text
//!   MACHINE  CONFIG  BLOB*  LAYOUT  PAGES*  ZERO*  ABSENT*  STATE*  END
//!   `------ before any memory -----'`----- memory --------' `-- state -'
//! ```
//!
//! - Only pages with contents take room. Pages that were never touched are not even looked at, so
//!   that a large VM of which little is in use costs what is in use. But every page of the layout
//!   is named exactly once, in PAGES, ZERO or ABSENT: a page that is missing is noticed.
//! - The file appears under its name only when it is complete and on the disk: [`PendingSnapshot`]
//!   is a temporary file in the same directory until [`PendingSnapshot::commit`], and an older
//!   file of the same name stays untouched until then.
//! - Reading has three steps, each of which consumes the one before: [`SnapshotReader::open`] gives
//!   all that is needed to refuse the machine or to build it, [`SnapshotReader::load_memory`] fills
//!   its memory, [`SnapshotState::sections`] gives the states and checks the end of the file. Only
//!   after the last one is anything known to be whole.

mod file;
mod restore;
mod save;

pub(crate) use restore::take_chunk;
pub(crate) use save::{check_sections, write_blob, write_runs, Stop};

pub use restore::{Blob, SnapshotHeader, SnapshotReader, SnapshotState};
pub use save::{BlobSource, PendingSnapshot, SaveProgress, SaveSummary, SnapshotSource};

use std::io;
use std::path::PathBuf;

use crate::stream::StreamError;
use crate::vm::VmError;

/// Most STATE records.
pub(crate) const MAX_SECTIONS: usize = 4096;
/// Most bytes of state in all STATE records.
pub(crate) const MAX_STATE_BYTES: u64 = 256 << 20;

/// Why a VM was not saved or not restored.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// An operation on the file or its directory failed.
    #[error("cannot {what} {}: {error}", path.display())]
    File {
        /// What was attempted.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// The path is something else than a file.
    #[error("{} is not a regular file: name a file for the snapshot", .0.display())]
    NotAFile(PathBuf),
    /// Writing the stream failed.
    #[error("the VM was not saved to {}, and what was there before is untouched: {error}", path.display())]
    Save {
        /// The file.
        path: PathBuf,
        /// What failed.
        error: StreamError,
    },
    /// The file is damaged, incomplete, or of another version.
    #[error("{} cannot be restored: {error}", path.display())]
    Restore {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and where.
        error: StreamError,
    },
    /// A file of [`PendingSnapshot::write_remains`].
    #[error(
        "{} is no VM but memory that one left behind when it moved to another host, as it was then: there is no state of \
         vCPUs and devices that it could go on with, and the VM went on without it",
        .0.display()
    )]
    Remains(PathBuf),
    /// The VM did not give what is to be saved.
    #[error("the VM cannot be saved: {0}")]
    Vm(#[from] VmError),
    /// The memory at hand is not that of the snapshot.
    #[error(
        "the snapshot's memory is [{saved}], the machine's is [{here}]: \
         build the machine with the snapshot's layout"
    )]
    LayoutDiffers {
        /// Regions in the file.
        saved: String,
        /// Regions of the machine.
        here: String,
    },
    /// What was to be saved is too much for the format, or is not what was announced.
    #[error("the VM cannot be saved: {0}")]
    Content(String),
    /// The caller asked to stop.
    #[error("saving was cancelled")]
    Cancelled,
}

#[cfg(test)]
mod tests;
