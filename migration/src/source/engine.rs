//! The runner: does the work of each phase, and what [`crate::handover`] says between them.

use std::sync::atomic::Ordering;
use std::sync::{mpsc, Arc};
use std::thread::Scope;
use std::time::{Duration, Instant};

use crate::clock::process_cpu_time;
use crate::handover::{step_source, Cause, Owner, SourceAction, SourceEvent, SourcePhase, Verdict};
use crate::identity::Token;
use crate::journal::{EntryState, Journal, SourceEntry};
use crate::link::MainLink;
use crate::page_set::PageSet;
use crate::report::{Outcome, PauseReport, Progress, Report, RoundReport};
use crate::source::late::{LateReport, LateThread};
use crate::source::peer::Message;
use crate::source::postcopy::outflow::Outflow;
use crate::source::postcopy::{Joint, PostcopyReport};
use crate::source::predict::{OnStall, Predictor};
use crate::source::resolve::ASK_FIRST;
use crate::source::sender::{PassStats, SendError, Shared, Work};
use crate::source::throttle::Throttle;
use crate::source::{Input, Offering, SourceControl, SourceOptions};
use crate::stream::session::{Commit, Done};
use crate::stream::{Problem, StreamError};
use crate::threads;
use crate::transport::{Connector, Transport};
use crate::vm::{Mode, PauseReason, SourceVm, VmError};

/// Between two tries to take disks back.
const RECLAIM_INTERVAL: Duration = Duration::from_millis(500);

/// What the caller gave.
pub(super) struct Surroundings<'scope, 'env> {
    pub(super) scope: &'scope Scope<'scope, 'env>,
    pub(super) vm: &'env dyn SourceVm,
    pub(super) connector: &'env dyn Connector,
    pub(super) journal: &'env Journal,
    pub(super) options: &'env SourceOptions,
    pub(super) control: &'env SourceControl,
    pub(super) progress: &'env dyn Fn(&Progress),
}

/// Why the work of a phase ended early.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) cause: Cause,
    pub(super) reasons: Vec<String>,
}

impl Failure {
    pub(super) fn new(cause: Cause, reason: impl Into<String>) -> Self {
        Self { cause, reasons: vec![reason.into()] }
    }
}

impl From<VmError> for Failure {
    fn from(error: VmError) -> Self {
        Failure::new(Cause::Failed, error.to_string())
    }
}

impl From<StreamError> for Failure {
    fn from(error: StreamError) -> Self {
        let cause = match &error.problem {
            Problem::Read(_) | Problem::Write(_) | Problem::Truncated => Cause::Lost,
            _ => Cause::Failed,
        };
        Failure::new(cause, error.problem.to_string())
    }
}

/// A page connection and the thread that sends on it.
pub(super) struct SenderHandle {
    pub(super) passes: mpsc::Sender<Work>,
    pub(super) transport: Arc<dyn Transport>,
}

/// What came in while waiting.
pub(super) enum Waited {
    Peer(Message),
    PassDone(u16, Result<PassStats, SendError>),
    Nothing,
}

pub(super) struct Engine<'scope, 'env, 'blob> {
    pub(super) around: Surroundings<'scope, 'env>,
    pub(super) offering: Offering<'blob>,
    pub(super) sender: mpsc::Sender<Input>,
    pub(super) inbox: mpsc::Receiver<Input>,
    pub(super) phase: SourcePhase,
    pub(super) link: Option<Arc<MainLink>>,
    pub(super) senders: Vec<SenderHandle>,
    pub(super) shared: Arc<Shared>,
    pub(super) entry: Option<SourceEntry>,
    pub(super) token: Option<Token>,
    /// Connections that the destination agreed to.
    pub(super) connections: u16,
    pub(super) cause: Cause,
    pub(super) reasons: Vec<String>,
    pub(super) started: Instant,
    pub(super) cpu_started: Duration,
    pub(super) setup: Duration,
    /// Measured when the page connections joined.
    pub(super) round_trip: Duration,
    /// The destination's estimate for loading state.
    pub(super) expected_load: Duration,
    pub(super) predictor: Option<Predictor>,
    /// Pages that were ever found populated.
    pub(super) known: Option<PageSet>,
    /// Dirty pages, collected and not sent.
    pub(super) pending: Option<PageSet>,
    pub(super) rounds: Vec<RoundReport>,
    /// The rest of memory is to follow the guest.
    pub(super) switching: bool,
    /// How long it took to take pages back that had been sent.
    pub(super) retracted: Duration,
    /// The connection for requests, until it is served.
    pub(super) requests: Option<Joint>,
    pub(super) requests_transport: Option<Arc<dyn Transport>>,
    /// Page connections that have not said what they pushed.
    pub(super) pushing: usize,
    /// What the destination lacks, once the rest follows.
    pub(super) outflow: Option<Arc<Outflow>>,
    pub(super) postcopy: Option<PostcopyReport>,
    /// An operator wants an interrupted migration to go on, perhaps to another address.
    pub(super) recover_to: Option<Option<String>>,
    /// How far vCPUs are slowed down, once they are.
    pub(super) throttle: Option<Throttle>,
    /// Why it did not converge by itself.
    pub(super) stall: Option<String>,
    pub(super) round_pages: u64,
    pub(super) connection_bytes: Vec<u64>,
    pub(super) data_pages: u64,
    pub(super) zero_pages: u64,
    pub(super) skipped_pages: u64,
    pub(super) pause: PauseReport,
    pub(super) pause_started: Option<Instant>,
    /// When the last part of the pause ended.
    pub(super) pause_mark: Instant,
    pub(super) cpu_destination: Option<Duration>,
    /// When COMMIT was about to be sent.
    pub(super) committed: Option<Instant>,
    /// The destination takes frames that come late.
    pub(super) takes_frames: bool,
    pub(super) late: Option<LateReport>,
    pub(super) late_thread: Option<LateThread<'scope>>,
    /// When all was over but for late frames.
    pub(super) ended: Option<Instant>,
    /// A message that came before it was waited for.
    pub(super) early: Option<Message>,
    pub(super) ask_wait: Duration,
    pub(super) resolved: Option<Owner>,
    pub(super) detached: bool,
    /// Bytes and time at the last progress.
    pub(super) told: (u64, Instant),
}

impl<'scope, 'env, 'blob> Engine<'scope, 'env, 'blob> {
    pub(super) fn new(
        around: Surroundings<'scope, 'env>,
        offering: Offering<'blob>,
        sender: mpsc::Sender<Input>,
        inbox: mpsc::Receiver<Input>,
    ) -> Self {
        let now = Instant::now();
        let shared = Arc::new(Shared::new(around.options.bandwidth));
        Self {
            around,
            offering,
            sender,
            inbox,
            phase: SourcePhase::Offering,
            link: None,
            senders: Vec::new(),
            shared,
            entry: None,
            token: None,
            connections: 0,
            cause: Cause::Failed,
            reasons: Vec::new(),
            started: now,
            cpu_started: process_cpu_time(),
            setup: Duration::ZERO,
            round_trip: Duration::ZERO,
            expected_load: Duration::ZERO,
            predictor: None,
            known: None,
            pending: None,
            rounds: Vec::new(),
            switching: false,
            retracted: Duration::ZERO,
            requests: None,
            requests_transport: None,
            pushing: 0,
            outflow: None,
            postcopy: None,
            recover_to: None,
            throttle: None,
            stall: None,
            round_pages: 0,
            connection_bytes: Vec::new(),
            data_pages: 0,
            zero_pages: 0,
            skipped_pages: 0,
            pause: PauseReport::default(),
            pause_started: None,
            pause_mark: now,
            cpu_destination: None,
            committed: None,
            takes_frames: false,
            late: None,
            late_thread: None,
            ended: None,
            early: None,
            ask_wait: ASK_FIRST,
            resolved: None,
            detached: false,
            told: (0, now),
        }
    }

    pub(super) fn run(mut self) -> Report {
        self.attach();
        while !self.phase.is_final() && !self.detached {
            let event = self.work().unwrap_or_else(|failure| self.note(failure));
            self.handle(event);
        }
        if self.phase == SourcePhase::HandedOver && self.postcopy.is_some() {
            self.drain();
        }
        self.end()
    }

    /// How it is migrated: what does not converge may end as post-copy.
    pub(super) fn mode(&self) -> Mode {
        let options = self.around.options;
        match (options.mode, options.on_stall) {
            (Mode::Precopy, OnStall::Postcopy) => Mode::Hybrid,
            (mode, _) => mode,
        }
    }

    /// What there is to do in a phase; its outcome is an event.
    fn work(&mut self) -> Result<SourceEvent, Failure> {
        match self.phase {
            SourcePhase::Offering => self.offer(),
            SourcePhase::Preparing => self.prepare(),
            SourcePhase::Copying => self.copy(),
            SourcePhase::Stopping => self.stop_and_send(),
            SourcePhase::Committing => self.await_resumed(),
            SourcePhase::Unresolved => Ok(self.await_verdict()),
            SourcePhase::HandedOver | SourcePhase::RolledBack => Ok(SourceEvent::NoVerdict),
        }
    }

    fn note(&mut self, failure: Failure) -> SourceEvent {
        tracing::debug!(phase = ?self.phase, cause = ?failure.cause, reasons = ?failure.reasons);
        if self.phase.can_cancel() || self.phase == SourcePhase::Committing {
            self.cause = failure.cause;
            self.reasons = failure.reasons;
        }
        SourceEvent::Failed(failure.cause)
    }

    pub(super) fn handle(&mut self, event: SourceEvent) {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            let (phase, actions) = step_source(self.phase, event);
            if phase != self.phase {
                tracing::debug!(from = ?self.phase, to = ?phase, ?event);
            }
            self.phase = phase;
            self.around.control.state().phase = phase;
            for action in actions {
                if let Err((event, reason)) = self.perform(action) {
                    self.note(Failure::new(Cause::Failed, reason));
                    next = Some(event);
                    break;
                }
            }
        }
    }

    /// Does one thing. An error is the event that it makes, and the reason for a person.
    fn perform(&mut self, action: SourceAction) -> Result<(), (SourceEvent, String)> {
        let vm = self.around.vm;
        let failed = |error: VmError| (SourceEvent::Failed(Cause::Failed), error.to_string());
        match action {
            SourceAction::StartTracking => {
                self.setup = self.started.elapsed();
                if let Some(entry) = &mut self.entry {
                    entry
                        .stage()
                        .map_err(|error| (SourceEvent::Failed(Cause::Failed), error.to_string()))?;
                }
                self.hold_frames();
                if self.mode().is_live() {
                    vm.start_tracking().map_err(failed)?;
                }
            }
            SourceAction::StopGuest => {
                let start = Instant::now();
                self.pause_started = Some(start);
                // Whatever the cap is: the guest waits.
                self.shared.pacer.release();
                let deadline = start + self.around.options.timing.pause;
                vm.pause(PauseReason::HandOver, deadline).map_err(failed)?;
                self.pause_mark = start;
                self.pause.stop = self.part_of_pause();
            }
            SourceAction::ReleaseOwnership => vm
                .release_ownership()
                .map_err(|error| (SourceEvent::NotCommitted, error.to_string()))?,
            SourceAction::JournalHandedOver => {
                if let Some(entry) = &mut self.entry {
                    entry
                        .hand_over()
                        .map_err(|error| (SourceEvent::NotCommitted, error.to_string()))?;
                }
            }
            SourceAction::SendCommit => {
                self.hold_frames();
                let run = !vm.paused_by_operator();
                self.committed = Some(Instant::now());
                self.link().and_then(|link| Ok(link.send(&Commit { run })?)).map_err(
                    |failure| (SourceEvent::Failed(Cause::Lost), failure.reasons.join("; ")),
                )?;
                self.pause.commit = self.part_of_pause();
                self.start_push();
            }
            // It is sent when all memory has followed.
            SourceAction::SendDone if self.postcopy.is_some() => self.forward_late(),
            SourceAction::SendDone => {
                self.ended = Some(Instant::now());
                self.forward_late();
                // The destination runs the guest whether it gets this or not.
                if let Err(failure) = self.link().and_then(|link| Ok(link.send(&Done {})?)) {
                    tracing::debug!(?failure, "DONE was not sent");
                }
            }
            SourceAction::JournalUnresolved => {
                let why = self.reasons.join("; ");
                tracing::warn!(
                    why,
                    "it is not known whether the destination has the VM; asking its host"
                );
                self.disconnect();
                self.journal(EntryState::Unresolved);
            }
            // The work of the phase.
            SourceAction::Ask => {}
            SourceAction::JournalConfirmed => self.journal(EntryState::HandedOver),
            SourceAction::SendAbort => {
                self.shared.stop.store(true, Ordering::Relaxed);
                if let Some(link) = &self.link {
                    link.abort(self.cause.abort_reason(), &self.reasons.join("; "));
                }
                self.close_connections();
            }
            SourceAction::StopTracking => {
                self.unthrottle();
                if self.mode().is_live() {
                    if let Err(error) = vm.stop_tracking() {
                        // The next start begins anew in any case.
                        tracing::warn!(%error, "writes are still tracked");
                    }
                }
            }
            SourceAction::JournalHere => self.journal(EntryState::RunningHere),
            SourceAction::ReclaimOwnership => self.reclaim(),
            SourceAction::ResumeGuest => self.resume(),
            SourceAction::Withdraw => {
                // Once, and the guest runs: who cannot be reached keeps the VM until an operator
                // says that it may go.
                if let Err(error) = self.ask().unwrap_or(Ok(Verdict::Unknown)) {
                    tracing::info!(%error, "the destination was not told");
                }
            }
        }
        Ok(())
    }

    /// Takes the disks back, however long it takes.
    fn reclaim(&mut self) {
        while let Err(error) = self.around.vm.reclaim_ownership() {
            let note = format!("the VM is here and paused: {error}; trying again");
            tracing::warn!("{note}");
            self.tell(Some(note));
            self.wait_ignoring(RECLAIM_INTERVAL);
            if self.detached {
                self.reasons.push(error.to_string());
                return;
            }
        }
    }

    fn resume(&mut self) {
        let vm = self.around.vm;
        // Without its disks it may not run.
        if self.detached || vm.paused_by_operator() {
            return;
        }
        if let Err(error) = vm.resume() {
            tracing::error!(%error, "the guest stays paused");
            self.reasons.push(format!("the guest stays paused: {error}"));
        }
    }

    fn journal(&mut self, state: EntryState) {
        if let Some(Err(error)) = self.entry.as_mut().map(|entry| entry.set(state)) {
            tracing::error!(%error, "the journal does not say what happened");
            self.reasons.push(error.to_string());
        }
    }

    /// Lets the control find this migration.
    fn attach(&mut self) {
        let mut state = self.around.control.state();
        state.inbox = Some(self.sender.clone());
        state.shared = Some(Arc::clone(&self.shared));
        if let Some(bandwidth) = state.bandwidth {
            self.shared.pacer.set(bandwidth);
        }
        self.shared.cut.store(state.switch, Ordering::Relaxed);
        if let Some(cause) = state.early.take() {
            // The inbox lives as long as the engine.
            let _ = self.sender.send(Input::GiveUp(cause));
        }
    }

    fn await_resumed(&mut self) -> Result<SourceEvent, Failure> {
        match self.wait_for_message(self.around.options.timing.resumed, "resume the guest")? {
            Message::Resumed { own, resume, cpu } => {
                self.pause.resume = self.part_of_pause();
                if let Some(started) = self.pause_started {
                    self.pause.total = self.pause_mark - started;
                }
                self.pause.destination_own = own;
                self.pause.destination_resume = resume;
                self.cpu_destination = Some(cpu);
                Ok(SourceEvent::Resumed)
            }
            other => Err(unexpected(&other)),
        }
    }

    pub(super) fn link(&self) -> Result<&Arc<MainLink>, Failure> {
        self.link.as_ref().ok_or_else(|| Failure::new(Cause::Lost, "there is no connection"))
    }

    pub(super) fn spawn(
        &self,
        name: &str,
        job: impl FnOnce() + Send + 'scope,
    ) -> Result<(), Failure> {
        threads::spawn(self.around.scope, name, job)
            .map(drop)
            .map_err(|error| Failure::new(Cause::Failed, format!("no thread {name}: {error}")))
    }

    /// The time since the last call, as a part of the pause.
    pub(super) fn part_of_pause(&mut self) -> Duration {
        let now = Instant::now();
        let part = now - self.pause_mark;
        self.pause_mark = now;
        part
    }

    pub(super) fn tell(&mut self, note: Option<String>) {
        let now = Instant::now();
        let bytes = self.shared.bytes.load(Ordering::Relaxed);
        let seconds = (now - self.told.1).as_secs_f64().max(1e-3);
        let done = self.shared.pages_done.load(Ordering::Relaxed);
        let last = self.rounds.last();
        let slowed = self.throttle.as_ref().map(Throttle::describe);
        let missing = self.outflow.as_ref().map(|outflow| outflow.left());
        let progress = Progress {
            phase: self.phase,
            missing_pages: missing.filter(|_| self.phase == SourcePhase::HandedOver),
            round: u32::try_from(self.rounds.len()).ok(),
            round_pages: self.round_pages,
            pages_left: self.round_pages.saturating_sub(done),
            bytes,
            bytes_per_second: bytes.saturating_sub(self.told.0) as f64 / seconds,
            dirty_pages_per_second: last.map_or(0.0, |round| round.dirty_pages_per_second),
            predicted_pause: last.map(|round| round.predicted_pause),
            elapsed: self.started.elapsed(),
            note: note.or(slowed),
        };
        self.told = (bytes, now);
        (self.around.progress)(&progress);
        self.around.control.state().latest = Some(progress);
    }

    /// Ends all connections, and with them the threads.
    pub(super) fn close_connections(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.pacer.release();
        if let Some(outflow) = self.outflow.take() {
            outflow.close();
        }
        for sender in self.senders.drain(..) {
            sender.transport.shutdown();
        }
        let requests = self.requests.take().map(|link| link.transport);
        for transport in requests.into_iter().chain(self.requests_transport.take()) {
            transport.shutdown();
        }
        if let Some(link) = self.link.take() {
            link.close();
        }
    }

    /// Ends all connections, and forgets what came on them: threads that are left speak to nobody any more.
    pub(super) fn disconnect(&mut self) {
        self.close_connections();
        self.early = None;
        let (sender, inbox) = mpsc::channel();
        let mut state = self.around.control.state();
        state.inbox = Some(sender.clone());
        let old = std::mem::replace(&mut self.inbox, inbox);
        drop(state);
        self.sender = sender;
        for input in old.try_iter() {
            if !matches!(input, Input::Peer(_) | Input::Lost(..) | Input::PassDone { .. }) {
                // The inbox lives as long as the engine.
                let _ = self.sender.send(input);
            }
        }
    }

    /// Lets all vCPUs run as they like again.
    fn unthrottle(&mut self) {
        if self.throttle.take().is_some() {
            self.around.vm.throttle(&[]);
        }
    }

    fn end(mut self) -> Report {
        self.close_connections();
        self.unthrottle();
        {
            let mut state = self.around.control.state();
            state.inbox = None;
            state.shared = None;
            state.outflow = None;
        }
        self.finish_late();
        self.let_frames_go();
        let ended = self.ended.unwrap_or_else(Instant::now);
        self.tell(None);
        let reasons = std::mem::take(&mut self.reasons);
        let outcome = match self.phase {
            SourcePhase::HandedOver => Outcome::HandedOver,
            SourcePhase::RolledBack => Outcome::RunningHere { cause: self.cause, reasons },
            _ => Outcome::Unresolved { reasons },
        };
        let moved = outcome == Outcome::HandedOver;
        tracing::info!(?outcome, total = ?(ended - self.started), pause = ?self.pause.total);
        Report {
            id: self.around.control.id().to_string(),
            vm: self.offering.name,
            peer: self.around.connector.address(),
            mode: self.around.options.mode,
            verify: self.around.options.verify,
            outcome,
            total: ended - self.started,
            setup: self.setup,
            rounds: self.rounds,
            stall: self.stall,
            pause: moved.then_some(self.pause),
            connection_bytes: self.connection_bytes,
            data_pages: self.data_pages,
            zero_pages: self.zero_pages,
            skipped_pages: self.skipped_pages,
            cpu_source: process_cpu_time().saturating_sub(self.cpu_started),
            cpu_destination: self.cpu_destination,
            postcopy: self.postcopy.filter(|_| moved),
            late_frames: self.late.filter(|_| moved),
        }
    }
}

pub(super) fn unexpected(message: &Message) -> Failure {
    Failure::new(Cause::Protocol, format!("the destination sent {message:?} too early"))
}
