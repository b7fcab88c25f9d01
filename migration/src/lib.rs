//! Live migration engine: what a VM must offer, the stream, snapshots.
//!
//! The engine knows nothing of KVM. A VM is what the traits of [`vm`] say, so that another VMM can
//! use this crate, and a simulated VM ([`simulated`]) can drive every path in an ordinary test.
//!
//! - [`address`], [`layout`], [`page_set`]: guest pages, which ones exist, and sets of them.
//! - [`pagemap`]: which pages of a mapping are populated.
//! - [`prepaging`]: which page of a post-copy migration goes next.
//! - [`vm`]: the traits that a VM implements.
//! - [`stream`]: the records that carry a VM, in a file or over a connection.
//! - [`snapshot`]: a VM in a file.
//! - [`threads`]: who is told when a thread of the engine starts.
//! - [`userfault`]: memory that is missing, and waited for.
//! - [`volatile_io`]: guest memory to and from sockets, without a copy.

pub mod address;
mod clock;
pub mod destination;
pub mod handover;
pub mod histogram;
pub mod identity;
pub mod journal;
pub mod layout;
mod link;
pub mod page_set;
pub mod pagemap;
pub mod prepaging;
pub mod report;
#[cfg(any(test, feature = "test-utils"))]
pub mod simulated;
pub mod snapshot;
pub mod source;
pub mod stream;
pub mod threads;
pub mod transport;
pub mod userfault;
mod verify;
pub mod vm;
pub mod volatile_io;

pub use address::{ClaimedRange, Gfn, Gpa, PageRange, RangeError, PAGE_BYTES, PAGE_SIZE};
pub use identity::{MigrationId, Token};
pub use layout::{LayoutError, MemoryLayout};
pub use link::Timing;
pub use page_set::PageSet;
pub use vm::{
    DestinationHost, DestinationMemory, DestinationVm, DirtySource, GuestMemory, LateFrame,
    LateFrames, Mode, Offer, PauseReason, Section, SourceVm, VmControl, VmError, VmState,
    MAX_LATE_FRAME,
};
