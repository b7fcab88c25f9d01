//! What a virtual machine must offer to be saved, restored and migrated.
//!
//! The engine knows a VM only through these traits. They are object-safe, and every method takes
//! `&self` and may be called from any thread: page senders, the API and the fault server share
//! one VM. None of them may be implemented by taking a lock that `info` or `cancel` needs.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::VolatileSlice;

use crate::address::{Gfn, PageRange, RangeError};
use crate::identity::MigrationId;
use crate::layout::MemoryLayout;
use crate::page_set::PageSet;
use crate::snapshot::Blob;
use crate::stream::{BlobKind, Config, Machine};

/// Why the VM could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The pages are not in the VM's memory.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The deadline passed first.
    #[error("{0} did not finish before its deadline")]
    Deadline(String),
    /// The operating system refused.
    #[error("{what}: {error}")]
    Os {
        /// What was attempted, with its values.
        what: String,
        /// What the kernel said.
        error: io::Error,
    },
    /// Anything else, told for a person: what failed, with which value, what to do.
    #[error("{0}")]
    Other(String),
}

/// Guest memory, at the source and at the destination.
pub trait GuestMemory: Send + Sync {
    /// Which page frames there are. Never changes during the life of the VM.
    fn layout(&self) -> &Arc<MemoryLayout>;

    /// The bytes of a range, which lies within one region and hence is contiguous in this
    /// process. The guest may write to them at any time.
    ///
    /// # Errors
    /// [`VmError::Range`].
    fn slice(&self, range: PageRange) -> Result<VolatileSlice<'_>, VmError>;

    /// Pages that have memory behind them on the host; all others read as zeros and were never
    /// touched. Must not find out by reading: that would populate them (see [`crate::pagemap`]). With
    /// huge pages a whole huge page counts.
    ///
    /// # Errors
    /// [`VmError::Os`].
    fn populated(&self) -> Result<PageSet, VmError>;

    /// Pages that can only be missing together, counted from the start of a region: 1, or 512 where
    /// memory consists of huge pages of 2 MiB (hugetlbfs).
    fn unit_pages(&self) -> u64 {
        1
    }
}

/// Knows which pages were written, by the guest, by the hypervisor, or by a device.
///
/// The contract is that of KVM's dirty log with manual protection (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2):
/// reading the log and clearing it are two steps, so that a page can be cleared right before it
/// is read. For each page that is to be sent the engine goes in this order: *clear, look up,
/// test for zero, send*. A page written after it was cleared is in a later `collect` again.
pub trait DirtySource: Send + Sync {
    /// Starts tracking. Every write after the return is in some later [`DirtySource::collect`].
    /// More pages may be reported than were written; all of them are, with KVM's
    /// "initially all set".
    ///
    /// # Errors
    /// [`VmError::Os`]; tracking is then off.
    fn start_tracking(&self) -> Result<(), VmError>;

    /// Stops tracking and forgets what was tracked. Without effect when tracking is off.
    ///
    /// # Errors
    /// [`VmError::Os`].
    fn stop_tracking(&self) -> Result<(), VmError>;

    /// Adds to `dirty` the pages that were written since tracking started or since each was last
    /// cleared; does not clear the log.
    ///
    /// The implementer unites the guest's log with the pages that devices wrote. The latter may
    /// be drained here instead of by `clear`: the write came before the mark, the mark before
    /// this call, and the page is read after it.
    ///
    /// # Errors
    /// [`VmError::Os`].
    fn collect(&self, dirty: &mut PageSet) -> Result<(), VmError>;

    /// Clears the log for exactly this range and protects its pages again. KVM_CLEAR_DIRTY_LOG
    /// works on chunks of 64 pages but takes a bitmap of the pages in them: the implementer passes
    /// only the range's own bits, so that a neighbour written meanwhile stays reported. Cheapest
    /// for ranges that are multiples of 64 pages; all others are allowed.
    ///
    /// # Errors
    /// [`VmError::Range`], [`VmError::Os`].
    fn clear(&self, range: PageRange) -> Result<(), VmError>;

    /// Clears the log for those pages of `range` whose bit in `pages` is set, bit 0 of the first
    /// word being the first page of the range, and protects them again. The engine's ranges
    /// begin at a multiple of 64 pages from the start of their region, and bits beyond the range
    /// are zero, so that this can be one KVM_CLEAR_DIRTY_LOG.
    ///
    /// # Errors
    /// As [`DirtySource::clear`].
    fn clear_pages(&self, range: PageRange, pages: &[u64]) -> Result<(), VmError> {
        let mut start = None;
        for at in 0..=range.pages() {
            let word = pages.get((at / 64) as usize).copied().unwrap_or(0);
            let set = at < range.pages() && word >> (at % 64) & 1 == 1;
            match (set, start) {
                (true, None) => start = Some(at),
                (false, Some(from)) => {
                    self.clear(PageRange::new(Gfn(range.start().0 + from), at - from)?)?;
                    start = None;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Why the engine stops the guest; for logs and events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PauseReason {
    /// A snapshot is taken.
    Snapshot,
    /// The guest is about to be handed over to another process.
    HandOver,
}

/// Stops the guest and lets it go on.
pub trait VmControl: Send + Sync {
    /// Stops all vCPUs and drains the devices. On return no guest code runs and no device writes
    /// to guest memory. Pausing a paused VM is no error.
    ///
    /// # Errors
    /// [`VmError::Deadline`] when vCPUs or block requests do not come to rest in time; the VM
    /// then goes on as before the call.
    fn pause(&self, reason: PauseReason, deadline: Instant) -> Result<(), VmError>;

    /// Lets a paused VM go on: kicks every queue and raises pending interrupts again. Resuming a
    /// running VM is no error. Needs no deadline: it waits for nothing.
    ///
    /// # Errors
    /// [`VmError::Other`]; the VM stays paused.
    fn resume(&self) -> Result<(), VmError>;

    /// Whether an operator wants the guest paused, apart from the engine's own pause. While the
    /// engine holds the guest ([`VmControl::pause`] to [`VmControl::resume`]) an operator's pause
    /// or resume only changes this answer. The engine does not resume a guest that an operator
    /// paused, and tells the destination to leave it paused.
    fn paused_by_operator(&self) -> bool {
        false
    }
}

/// The state of one part of the machine, opaque to this crate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Which kind of part: `vcpu`, `serial`, `pit`, ...
    pub kind: String,
    /// Which one of its kind.
    pub instance: u32,
    /// Version of the encoding.
    pub version: u16,
    /// The encoded state.
    pub data: Vec<u8>,
}

/// Everything of the machine that is not memory.
pub trait VmState: Send + Sync {
    /// Takes the state of all parts. The VM is paused. Taking the state may write to guest memory
    /// (kvmclock, paravirtual end-of-interrupt), so the engine reads memory after this call.
    ///
    /// # Errors
    /// [`VmError`], and nothing has changed.
    fn save_sections(&self) -> Result<Vec<Section>, VmError>;

    /// Puts states into a machine that has not run yet. They come from a peer or a file: the
    /// implementer checks every value, and that every part has its section exactly once.
    ///
    /// # Errors
    /// [`VmError::Other`] naming the section; the machine is then unusable.
    fn load_sections(&self, sections: &[Section]) -> Result<(), VmError>;
}

/// Memory that receives a VM.
pub trait DestinationMemory: GuestMemory {
    /// Writes a range of a VM that does not run; `data` has its length.
    ///
    /// # Errors
    /// [`VmError`]; who loads the memory gives up.
    fn fill(&self, range: PageRange, data: &[u8]) -> Result<(), VmError> {
        self.slice(range)?.copy_from(data);
        Ok(())
    }

    /// Makes a range read as zeros, and gives its memory back where that is possible.
    ///
    /// # Errors
    /// [`VmError::Range`], [`VmError::Os`].
    fn zero(&self, range: PageRange) -> Result<(), VmError>;
}

/// A frame of the network that reached a guest's old host; its bytes are the VMM's own business.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LateFrame {
    /// Which network card, counted from 0.
    pub card: u16,
    /// The frame, at most [`MAX_LATE_FRAME`] bytes.
    pub bytes: Vec<u8>,
}

/// Longest frame that is forwarded, with what the VMM has before it, bytes.
pub const MAX_LATE_FRAME: usize = (64 << 10) + 64;

/// Frames for a guest that has stopped: kept from the pause on, for who runs the guest next. If it goes
/// on at the source, [`VmControl::resume`] gives them to it.
pub trait LateFrames: Send + Sync {
    /// While held, frames for the guest come here that are sent here, though the guest is announced elsewhere. Ends by `false`. Both
    /// may be said more than once; the guest stands when it is said again right before COMMIT, so that this is to be quick.
    fn hold(&self, held: bool) {
        let _ = held;
    }

    /// Takes frames, those of a card in the order in which they came; about 128 KiB at most. Waits until there
    /// are some, or until `deadline`. Of what came after `committed`, when the destination was about to
    /// run the guest, only frames that cannot have reached it by themselves.
    fn take(&self, committed: Instant, deadline: Instant) -> Vec<LateFrame>;
}

/// A VM that is migrated away. All but the supertraits has a default that does nothing.
pub trait SourceVm: GuestMemory + DirtySource + VmControl + VmState {
    /// How long [`VmState::save_sections`] will take; part of the predicted pause.
    fn expected_save(&self) -> Duration {
        Duration::from_millis(1)
    }

    /// Pages that a destination touches when it loads `sections`, and its guest right after: in post-copy they go
    /// out at once. It need not name all of them.
    fn first_pages(&self, sections: &[Section]) -> Vec<Gfn> {
        let _ = sections;
        Vec::new()
    }

    /// How many vCPUs it has.
    fn vcpus(&self) -> usize {
        1
    }

    /// How many first writes to a page since it was cleared each vCPU has made so far, roughly; `None`
    /// where nobody counts.
    fn write_counts(&self) -> Option<Vec<u64>> {
        None
    }

    /// Lets vCPU n run the share `run[n]` of the time, above 0 and at most 1; those beyond the end of
    /// `run`, with an empty one all, run without a limit.
    fn throttle(&self, run: &[f64]) {
        let _ = run;
    }

    /// Brings the disks' caches to the disk, during the last live round: so little is left for the
    /// pause.
    ///
    /// # Errors
    /// [`VmError`]; the migration is given up.
    fn flush_disks(&self) -> Result<(), VmError> {
        Ok(())
    }

    /// Gives up what only one process may own (disk locks), in the pause, before the hand-over. The
    /// VM is paused and its disks are at rest and flushed.
    ///
    /// # Errors
    /// [`VmError`]; the migration is given up, and [`SourceVm::reclaim_ownership`] is called.
    fn release_ownership(&self) -> Result<(), VmError> {
        Ok(())
    }

    /// Frames that reach this host after the pause, where the VM has network cards.
    fn late_frames(&self) -> Option<&dyn LateFrames> {
        None
    }

    /// Takes back what [`SourceVm::release_ownership`] gave up, all or part of it.
    ///
    /// # Errors
    /// [`VmError`]; the VM stays paused, and it is tried again.
    fn reclaim_ownership(&self) -> Result<(), VmError> {
        Ok(())
    }
}

/// A VM that was made for an incoming migration. It is paused, its memory reads as zeros, and its
/// disks are open but not owned.
///
/// The engine loads state through [`DestinationVm::load_state`] and never saves it here. Dropping
/// the last reference without [`DestinationVm::take_ownership`] must leave no trace.
pub trait DestinationVm: DestinationMemory + VmState {
    /// As [`VmState::load_sections`], for a guest that has been standing since `paused` while the
    /// world went on: its clocks are to include the time away.
    ///
    /// # Errors
    /// As there.
    fn load_state(&self, sections: &[Section], paused: Instant) -> Result<(), VmError> {
        let _ = paused;
        self.load_sections(sections)
    }

    /// How long [`DestinationVm::load_state`] will take; part of the source's predicted pause.
    fn expected_load(&self) -> Duration {
        Duration::from_millis(1)
    }

    /// From now on, before the state is loaded, a part of memory is missing, or no longer: meanwhile nobody may
    /// save the VM, migrate it, or take memory from it.
    fn set_draining(&self, draining: bool) {
        let _ = draining;
    }

    /// The guest, which runs here, needs memory that may never come: its vCPUs are to stand, as far as they can be stopped,
    /// or to go on. False when that cannot be done now, and is to be tried again. Must not wait, neither for the guest nor
    /// for who waits for its memory.
    fn freeze(&self, frozen: bool) -> bool {
        let _ = frozen;
        true
    }

    /// Whether the disks could be owned if the source gave them up now: the last check before the
    /// source may commit.
    ///
    /// # Errors
    /// [`VmError`] with the reason; the source goes on.
    fn check_ownership(&self) -> Result<(), VmError> {
        Ok(())
    }

    /// The VM belongs here now: takes the disks, and the name.
    ///
    /// # Errors
    /// [`VmError`]; the VM stays paused, and it is tried again.
    fn take_ownership(&self) -> Result<(), VmError> {
        Ok(())
    }

    /// Gives the guest a frame that reached its old host. From a peer: the card may not exist, and
    /// the bytes may be anything. Must not wait, not for the guest's memory either.
    ///
    /// # Errors
    /// [`VmError::Other`]: no such card, or not a frame.
    fn late_frame(&self, card: u16, bytes: &[u8]) -> Result<(), VmError> {
        Err(VmError::Other(format!("a frame of {} bytes for card {card}", bytes.len())))
    }

    /// Lets the guest run, or, without `run`, leaves it as an operator's pause does.
    ///
    /// # Errors
    /// [`VmError`]; the VM stays paused, and it is tried again.
    fn start(&self, run: bool) -> Result<(), VmError>;
}

/// Where VMs can come in.
pub trait DestinationHost: Send + Sync {
    /// Whether this host can run the VM: every reason why not. Nothing is made yet.
    fn check(&self, offer: &Offer) -> Vec<String>;

    /// Makes the VM.
    ///
    /// # Errors
    /// Every reason why it cannot be made; nothing is left of it.
    fn prepare(
        &self,
        offer: &Offer,
        blobs: Vec<Blob>,
    ) -> Result<Arc<dyn DestinationVm>, Vec<String>>;

    /// The VM that was made for this migration will not run here: drop it.
    fn discarded(&self, id: MigrationId) {
        let _ = id;
    }

    /// The guest runs here, and its memory still follows: [`crate::destination::receive`] returns when that is
    /// over. Called from the thread that receives; must be quick.
    fn draining(&self, id: MigrationId) {
        let _ = id;
    }
}

/// How a VM is migrated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u16)]
pub enum Mode {
    /// Memory is copied while the guest runs.
    Precopy = 1,
    /// The guest is paused first.
    Cold = 2,
    /// The guest goes on at the destination at once, and its memory follows.
    Postcopy = 3,
    /// Memory is copied while the guest runs, and what is left then follows it.
    Hybrid = 4,
}

impl Mode {
    /// Whether memory may follow the guest: the destination needs userfaultfd then.
    pub fn may_switch(self) -> bool {
        matches!(self, Mode::Postcopy | Mode::Hybrid)
    }

    /// Whether writes are tracked, and pages sent while the guest runs.
    pub fn is_live(self) -> bool {
        matches!(self, Mode::Precopy | Mode::Hybrid)
    }
}

/// What a source offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Which migration.
    pub id: MigrationId,
    /// The source's address, for a person.
    pub peer: String,
    /// Name of the VM.
    pub name: String,
    /// How it is migrated.
    pub mode: Mode,
    /// Page connections.
    pub connections: u16,
    /// Whether memory is compared before the state is loaded.
    pub verify: bool,
    /// How long the guest may be paused.
    pub downtime: Duration,
    /// Pages that the source expects to send in round 0.
    pub populated_pages: u64,
    /// Identity of the machine.
    pub machine: Machine,
    /// Its configuration.
    pub config: Config,
    /// What is true of its backends: disks, networks.
    pub resources: Config,
    /// Its memory: a claim, to be compared with what the configuration asks for.
    pub layout: MemoryLayout,
    /// Kind and length of the blobs that will follow.
    pub blobs: Vec<(BlobKind, u64)>,
    /// How often each side shows that it is there.
    pub alive: Duration,
    /// After how long silence the peer is dead.
    pub dead: Duration,
}
