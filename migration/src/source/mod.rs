//! The source of a live migration.
//!
//! ```text
//!   migrate_to (the caller's thread): phases, rounds, the pause
//!      |-- mig-main-in    reads the main connection       |
//!      |-- mig-alive      keepalive                       |--> one inbox
//!      |-- mig-send-N     one per page connection         |
//!      `-- mig-frames     with post-copy: frames of the network that came late
//! ```
//!
//! Who owns the VM is decided by [`crate::handover`] only; `engine` does what it says. `rounds` copies
//! memory while the guest runs, `pause` does all that happens while it stands, `sender` is a page connection, `predict`
//! decides when to pause.

mod engine;
mod handshake;
mod late;
mod pacer;
mod passes;
mod pause;
mod peer;
mod postcopy;
mod predict;
mod resolve;
mod rounds;
mod sender;
#[cfg(test)]
mod tests;
mod throttle;

use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::handover::{Cause, Owner, SourcePhase};
use crate::identity::MigrationId;
use crate::journal::Journal;
use crate::link::Timing;
use crate::report::{Progress, Report};
use crate::snapshot::BlobSource;
use crate::stream::{Config, Machine};
use crate::transport::Connector;
use crate::vm::{Mode, SourceVm};

pub(crate) use late::LONGEST as LONGEST_LATE;
pub use late::{LateOptions, LateReport};
pub use postcopy::{FaultReport, PostcopyOptions, PostcopyReport};
pub use predict::{Limits, OnStall};
pub use resolve::{ask_verdict, AskError};

use postcopy::outflow::Outflow;
use sender::{PassStats, SendError, Shared};

/// How to migrate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SourceOptions {
    /// Pre-copy, cold, post-copy, or both after one another.
    pub mode: Mode,
    /// How memory follows its guest, where it does.
    pub postcopy: PostcopyOptions,
    /// Page connections, 1 to 64.
    pub connections: u16,
    /// Whether both ends hash memory in the pause and compare.
    pub verify: bool,
    /// How long the guest may be paused.
    pub downtime: Duration,
    /// Limits on the live rounds.
    pub limits: Limits,
    /// What to do at a limit.
    pub on_stall: OnStall,
    /// Bytes per second on all page connections together while the guest runs. The pause does
    /// not wait for it.
    pub bandwidth: Option<u64>,
    /// Frames that reach this host after its guest has left.
    pub late: LateOptions,
    /// Time limits.
    pub timing: Timing,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self {
            mode: Mode::Precopy,
            postcopy: PostcopyOptions::default(),
            connections: 1,
            verify: false,
            downtime: Duration::from_millis(20),
            limits: Limits::default(),
            on_stall: OnStall::default(),
            bandwidth: None,
            late: LateOptions::default(),
            timing: Timing::default(),
        }
    }
}

/// What the destination is told about the VM; opaque to this crate but for the blobs.
pub struct Offering<'a> {
    /// Name of the VM.
    pub name: String,
    /// Identity of the machine.
    pub machine: Machine,
    /// Its configuration.
    pub config: Config,
    /// What is true of its backends: disks, networks.
    pub resources: Config,
    /// Kernel and initrd, where a later reboot needs them.
    pub blobs: Vec<BlobSource<'a>>,
}

/// Steers a migration from other threads. Takes no lock that a running transfer holds.
#[derive(Clone)]
pub struct SourceControl {
    inner: Arc<ControlInner>,
}

struct ControlInner {
    id: MigrationId,
    state: Mutex<ControlState>,
}

struct ControlState {
    inbox: Option<mpsc::Sender<Input>>,
    /// The senders' shared part, while there is one.
    shared: Option<Arc<Shared>>,
    phase: SourcePhase,
    /// Asked before the migration ran.
    early: Option<Cause>,
    bandwidth: Option<Option<u64>>,
    push: Option<bool>,
    /// The rest of memory is to follow the guest.
    switch: bool,
    /// What the destination lacks, while it does.
    outflow: Option<Arc<Outflow>>,
    /// Connections are lost while memory follows.
    interrupted: bool,
    /// How often that has happened.
    interruptions: u64,
    downtime: Option<Duration>,
    latest: Option<Progress>,
}

impl SourceControl {
    /// For one migration of this id.
    pub fn new(id: MigrationId) -> Self {
        let state = ControlState {
            inbox: None,
            shared: None,
            phase: SourcePhase::Offering,
            early: None,
            bandwidth: None,
            push: None,
            switch: false,
            outflow: None,
            interrupted: false,
            interruptions: 0,
            downtime: None,
            latest: None,
        };
        Self { inner: Arc::new(ControlInner { id, state: Mutex::new(state) }) }
    }

    /// Which migration.
    pub fn id(&self) -> MigrationId {
        self.inner.id
    }

    /// Asks to give up. `false`: it is too late, the VM is being handed over or was. `true` is no
    /// promise: the report tells how it ended.
    pub fn cancel(&self) -> bool {
        self.give_up(Cause::Cancelled)
    }

    /// Tells that the guest powered off or crashed, or that an operator ends it. `false`: it is too
    /// late, the VM is not this process's any more.
    pub fn guest_ended(&self) -> bool {
        self.give_up(Cause::GuestEnded)
    }

    /// Changes the bandwidth cap, bytes per second.
    pub fn set_bandwidth(&self, bandwidth: Option<u64>) {
        let mut state = self.state();
        state.bandwidth = Some(bandwidth);
        if let Some(shared) = &state.shared {
            shared.pacer.set(bandwidth);
        }
    }

    /// Lets the guest move now and the rest of memory follow it. Without effect in a migration that was not begun
    /// with that possibility, or that is beyond its live rounds.
    pub fn start_postcopy(&self) {
        let mut state = self.state();
        state.switch = true;
        if let Some(shared) = &state.shared {
            shared.cut.store(true, Ordering::Relaxed);
        }
    }

    /// Whether pages are sent that nobody asked for, once the guest runs at the destination.
    pub fn set_push(&self, push: bool) {
        let mut state = self.state();
        state.push = Some(push);
        if let Some(outflow) = &state.outflow {
            outflow.set_push(push);
        }
    }

    /// Lets a post-copy migration that lost its connections try again now, to another address of the destination if
    /// one is given.
    pub fn recover(&self, address: Option<String>) {
        self.tell(Input::Recover(address));
    }

    /// Whether the guest runs at the destination, and connections for the rest of its memory are lost.
    pub fn is_interrupted(&self) -> bool {
        self.state().interrupted
    }

    /// How often connections for the rest of the memory were lost.
    pub fn interruptions(&self) -> u64 {
        self.state().interruptions
    }

    /// Changes how long the guest may be paused.
    pub fn set_downtime(&self, downtime: Duration) {
        self.state().downtime = Some(downtime);
    }

    /// An operator's word on an unresolved migration. The caller has written it to the journal
    /// ([`Journal::resolve`]) first.
    pub fn resolve(&self, owner: Owner) {
        self.tell(Input::Resolved(owner));
    }

    /// Stops waiting for a verdict, for disks that cannot be taken back, or for a destination that
    /// lacks pages: [`migrate_to`] returns. The VM stays paused. Before that, it does nothing; nor does it when what is
    /// waited for comes at the same moment.
    pub fn detach(&self) {
        self.tell(Input::Detach(self.phase()));
    }

    /// How far it is.
    pub fn phase(&self) -> SourcePhase {
        self.state().phase
    }

    /// The latest progress.
    pub fn progress(&self) -> Option<Progress> {
        self.state().latest.clone()
    }

    fn give_up(&self, cause: Cause) -> bool {
        let mut state = self.state();
        if !state.phase.can_cancel() {
            return false;
        }
        match &state.inbox {
            Some(inbox) => drop(inbox.send(Input::GiveUp(cause))),
            None => state.early = Some(cause),
        }
        true
    }

    fn tell(&self, input: Input) {
        if let Some(inbox) = &self.state().inbox {
            // Fails when the migration has just ended.
            let _ = inbox.send(input);
        }
    }

    fn state(&self) -> MutexGuard<'_, ControlState> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What comes to the engine's inbox.
#[derive(Debug)]
enum Input {
    Peer(peer::Message),
    /// A connection is lost, or the peer broke the protocol.
    Lost(Cause, String),
    PassDone {
        index: u16,
        result: Result<PassStats, SendError>,
    },
    GiveUp(Cause),
    Resolved(Owner),
    Recover(Option<String>),
    /// In this phase.
    Detach(SourcePhase),
}

/// Migrates a VM. Returns when the destination owns it, when it is here again as before, or when
/// nobody knows and [`SourceControl::detach`] was called; the report tells which. `progress` is called often,
/// from this thread, and must be quick.
///
/// While it runs, an operator's requests that end the guest or change its memory from outside go
/// through [`SourceControl::guest_ended`] first; pausing and resuming see [`crate::VmControl::paused_by_operator`].
pub fn migrate_to(
    vm: &dyn SourceVm,
    offering: Offering<'_>,
    connector: &dyn Connector,
    journal: &Journal,
    options: &SourceOptions,
    control: &SourceControl,
    progress: &dyn Fn(&Progress),
) -> Report {
    let (sender, inbox) = mpsc::channel();
    let span = tracing::info_span!("migrate", id = %control.id(), vm = %offering.name);
    let _entered = span.enter();
    thread::scope(|scope| {
        engine::Engine::new(
            engine::Surroundings { scope, vm, connector, journal, options, control, progress },
            offering,
            sender,
            inbox,
        )
        .run()
    })
}
