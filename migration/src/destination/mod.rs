//! The destination of a live migration.
//!
//! ```text
//!   receive (the caller's thread): phases, loading, owning
//!      |-- mig-door       accepts connections: main, pages, verdict queries   |
//!      |-- mig-stranger   one per connection: what it is for; reads the main  |
//!      |                  connection and checks its order, answers queries    |--> one inbox
//!      |-- mig-alive      keepalive                                           |
//!      `-- mig-recv-N     one per page connection                             |
//! ```
//!
//! With post-copy [`receive`] goes on after the guest runs, until all of its memory is here (`postcopy`).
//!
//! Who owns the VM is decided by [`crate::handover`] only; `session` does what it says.

mod decision;
mod door;
#[cfg(test)]
mod door_tests;
mod failure;
mod handshake;
mod incoming;
mod postcopy;
mod receiver;
mod session;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{mpsc, Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::handover::{Cause, DestinationPhase, Owner};
use crate::identity::MigrationId;
use crate::journal::Journal;
use crate::link::Timing;
use crate::page_set::PageSet;
use crate::snapshot::Blob;
use crate::stream::{RecordReader, RecordWriter};
use crate::threads;
use crate::transport::{Listener, Stream, Transport};
use crate::vm::{DestinationHost, DestinationVm, Offer, Section, VmError};

pub use postcopy::DrainReport;

use door::Door;
use receiver::ReceiverStats;

/// How to receive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DestinationOptions {
    /// Most page connections, 1 to 64.
    pub max_connections: u16,
    /// Time limits. `alive` and `dead` come with the offer.
    pub timing: Timing,
}

impl Default for DestinationOptions {
    fn default() -> Self {
        Self { max_connections: 16, timing: Timing::default() }
    }
}

/// How an incoming migration ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "verdict")]
pub enum Arrival {
    /// The VM is owned here, and runs unless an operator had paused it.
    RunningHere,
    /// Nothing of it is here.
    NotHere {
        /// Why.
        cause: Cause,
        /// Every reason, for a person.
        reasons: Vec<String>,
    },
    /// The VM is here, whole and paused, and nobody knows who owns it.
    Unresolved {
        /// What led here, for a person.
        reasons: Vec<String>,
    },
    /// The VM is owned here, and was given up before it could run.
    OwnedHere {
        /// Why it could not.
        reasons: Vec<String>,
    },
    /// [`DestinationControl::stop`] was called before anything came.
    Stopped,
}

/// What a destination did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ArrivalReport {
    /// Migration id; empty if none came.
    pub id: String,
    /// Name of the VM.
    pub vm: String,
    /// Address of the source.
    pub peer: String,
    /// Who owns it.
    #[serde(flatten)]
    pub outcome: Arrival,
    /// Whether the source knows that the VM runs here, or that it does not, or need not be told. Otherwise
    /// it may still ask: go on answering ([`answer_queries`]).
    pub confirmed: bool,
    /// Pages that came with contents.
    pub data_pages: u64,
    /// Pages that came as zeros.
    pub zero_pages: u64,
    /// Loading the state.
    #[serde(rename = "load_us", serialize_with = "crate::report::micros::serialize")]
    pub load: Duration,
    /// From COMMIT until the disks were owned.
    #[serde(rename = "own_us", serialize_with = "crate::report::micros::serialize")]
    pub own: Duration,
    /// Resuming the guest.
    #[serde(rename = "resume_us", serialize_with = "crate::report::micros::serialize")]
    pub resume: Duration,
    /// CPU time of this process from the offer to the resumed guest.
    #[serde(rename = "cpu_us", serialize_with = "crate::report::micros::serialize")]
    pub cpu: Duration,
    /// How memory followed the guest, if it did.
    pub drain: Option<DrainReport>,
}

/// How far a destination is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Arriving {
    /// Its phase.
    pub phase: DestinationPhase,
    /// Migration id.
    pub id: String,
    /// Name of the VM.
    pub vm: String,
    /// Address of the source.
    pub peer: String,
    /// Why it does not go on, for a person.
    pub note: Option<String>,
}

/// How far memory is that follows its guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draining {
    /// Whether there is a connection to the source.
    pub connected: bool,
    /// Pages that are missing.
    pub missing_pages: u64,
    /// Where they are, while there is no connection.
    pub missing: Option<MissingRanges>,
    /// The guest needs one of them, and its vCPUs stand until it comes.
    pub frozen: bool,
    /// Why there is no connection, for a person.
    pub note: Option<String>,
}

/// Guest memory that is missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingRanges {
    /// In so many runs.
    pub runs: u64,
    /// The first of them, at most [`MissingRanges::MOST`].
    pub first: Vec<MissingRange>,
}

/// A run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingRange {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length, bytes.
    pub bytes: u64,
}

impl MissingRanges {
    /// Runs that are told one by one.
    pub const MOST: usize = 32;

    fn of(pages: &PageSet) -> Self {
        let mut found = Self { runs: 0, first: Vec::new() };
        for run in pages.runs() {
            found.runs += 1;
            if found.first.len() < Self::MOST {
                found.first.push(MissingRange { gpa: run.gpa().0, bytes: run.bytes() });
            }
        }
        found
    }
}

impl fmt::Display for MissingRanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, MissingRange { gpa, bytes }) in self.first.iter().enumerate() {
            write!(f, "{}{gpa:#x}+{bytes:#x}", if at > 0 { ", " } else { "" })?;
        }
        match self.runs.saturating_sub(self.first.len() as u64) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// Steers an incoming migration from other threads.
#[derive(Clone, Default)]
pub struct DestinationControl {
    state: Arc<Mutex<ControlState>>,
}

#[derive(Default)]
struct ControlState {
    inbox: Option<mpsc::Sender<Input>>,
    stopped: bool,
    phase: Option<DestinationPhase>,
    drain: Option<Draining>,
}

impl DestinationControl {
    /// For one call of [`receive`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives the incoming migration up. Without effect when the VM is owned here.
    pub fn cancel(&self) {
        self.tell(Input::Cancel);
    }

    /// The guest, which runs here, powered off or crashed, or an operator ended it: no more of its memory is
    /// needed.
    pub fn guest_ended(&self) {
        self.tell(Input::GuestEnded);
    }

    /// How memory follows its guest, while it does.
    pub fn drain(&self) -> Option<Draining> {
        self.state().drain.clone()
    }

    /// No longer waits for a migration; one that is under way goes on.
    pub fn stop(&self) {
        self.state().stopped = true;
        self.tell(Input::Stop);
    }

    /// An operator's word on an unresolved migration. [`Journal::resolve`] alone does as well.
    pub fn resolve(&self, owner: Owner) {
        self.tell(Input::Resolved(owner));
    }

    /// Stops waiting for a verdict, or for disks that cannot be had: [`receive`] returns.
    pub fn detach(&self) {
        self.tell(Input::Detach);
    }

    /// How far it is; `None` before an offer came.
    pub fn phase(&self) -> Option<DestinationPhase> {
        self.state().phase
    }

    fn tell(&self, input: Input) {
        if let Some(inbox) = &self.state().inbox {
            // Fails when the migration has just ended.
            let _ = inbox.send(input);
        }
    }

    fn state(&self) -> MutexGuard<'_, ControlState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How far the source may have gone on the main connection: what it sends earlier is a breach.
#[derive(Default)]
struct Stage {
    reached: AtomicU8,
    /// The VM, once its guest runs.
    running: OnceLock<Arc<dyn DestinationVm>>,
}

impl Stage {
    const ACCEPTED: u8 = 1;
    const READY: u8 = 2;
    const LOADED: u8 = 3;

    fn set(&self, stage: u8) {
        self.reached.store(stage, Ordering::Release);
    }

    fn reached(&self, stage: u8) -> bool {
        self.reached.load(Ordering::Acquire) >= stage
    }
}

/// What comes to the session's inbox. The order of what comes from the main connection was checked.
enum Input {
    Offer {
        offer: Box<Offer>,
        transport: Arc<dyn Transport>,
        stage: Arc<Stage>,
    },
    Blobs(Vec<Blob>),
    State {
        sections: Vec<Section>,
        hashes: Option<Vec<u64>>,
        paused: Instant,
        /// With post-copy: in units of so many pages, what comes later.
        missing: Option<(u64, PageSet)>,
    },
    /// What came of these pages is void; say so when that is done.
    Retract {
        pages: PageSet,
        number: u32,
    },
    Commit {
        run: bool,
    },
    Done,
    Aborted(String),
    /// A connection is of no use any more. They are numbered by how often they were made anew.
    Lost {
        generation: u32,
        cause: Cause,
        text: String,
    },
    /// A page connection of this index, or the connection for requests.
    Joined {
        index: Option<u16>,
        records: RecordReader<Stream>,
        out: RecordWriter<Stream>,
        transport: Arc<dyn Transport>,
    },
    Synced {
        stats: ReceiverStats,
        records: RecordReader<Stream>,
    },
    /// The state is loaded, or cannot be.
    Loaded(Result<(), VmError>),
    /// The source goes on with what was interrupted.
    Recover {
        connections: u16,
        records: RecordReader<Stream>,
        transport: Arc<dyn Transport>,
    },
    /// No page is missing any more.
    AllHere,
    GuestEnded,
    Cancel,
    Resolved(Owner),
    Detach,
    Stop,
}

/// Receives one migration. Returns when it is over, one way or the other; answers verdict queries
/// meanwhile. `progress` is called from this thread and must be quick.
///
/// # Errors
/// No thread could be started.
pub fn receive(
    host: &dyn DestinationHost,
    listener: &dyn Listener,
    journal: &Journal,
    options: &DestinationOptions,
    control: &DestinationControl,
    progress: &dyn Fn(&Arriving),
) -> io::Result<ArrivalReport> {
    let (sender, inbox) = mpsc::channel();
    {
        let mut state = control.state();
        state.inbox = Some(sender.clone());
        if state.stopped {
            // The inbox lives as long as the session.
            let _ = sender.send(Input::Stop);
        }
    }
    let door = Door::new(journal.clone(), options.timing, Some(sender.clone()));
    let mut report = thread::scope(|scope| {
        let started = threads::spawn(scope, "mig-door", || door.serve(scope, listener));
        let report = started.map(|_| {
            let around = session::Surroundings { scope, host, journal, options, control, progress };
            session::wait_for_offer(around, &door, sender, inbox)
        });
        door.close();
        report
    });
    control.state().inbox = None;
    if let Ok(report) = &mut report {
        // The answer may have been given when all else was over.
        report.confirmed |= door.told().iter().any(|id| id.to_string() == report.id);
    }
    report
}

/// Answers verdict queries until `stop` says so: what a process does whose VM came in, or was given up,
/// as long as the source may not know. `stop` is told which migrations' sources have got a verdict that
/// decides. Migrations are refused.
///
/// # Errors
/// No thread could be started.
pub fn answer_queries(
    listener: &dyn Listener,
    journal: &Journal,
    timing: Timing,
    stop: &dyn Fn(&[MigrationId]) -> bool,
) -> io::Result<()> {
    let door = Door::new(journal.clone(), timing, None);
    thread::scope(|scope| {
        let started = threads::spawn(scope, "mig-door", || door.serve(scope, listener));
        while started.is_ok() && !stop(&door.told()) {
            thread::park_timeout(door::ACCEPT_INTERVAL);
        }
        door.close();
        started.map(drop)
    })
}
