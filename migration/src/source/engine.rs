//! The runner: does the work of each phase, and what [`crate::handover`] says between them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{mpsc, Arc};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use crate::clock::process_cpu_time;
use crate::handover::{step_source, Cause, Owner, SourceAction, SourceEvent, SourcePhase, Verdict};
use crate::identity::Token;
use crate::journal::{EntryState, Journal, Side, SourceEntry};
use crate::link::MainLink;
use crate::page_set::PageSet;
use crate::report::{Outcome, PauseReport, Progress, Report, RoundReport};
use crate::snapshot::{write_blob, Stop};
use crate::source::pacer::Pacer;
use crate::source::peer::{read_main, Message};
use crate::source::predict::Predictor;
use crate::source::resolve::{ask_verdict, AskError};
use crate::source::sender::{Pass, PassStats, SendError, Sender, Shared};
use crate::source::{Input, Offering, SourceControl, SourceOptions};
use crate::stream::session::{Commit, Done, Hello, Join, Joined, OfferWire, ROLE_PAGES};
use crate::stream::{
    encode_layout, Problem, RecordReader, RecordType, RecordWriter, StreamError, StreamKind,
};
use crate::transport::{Connector, Stream, Transport};
use crate::vm::{Mode, PauseReason, SourceVm, VmError};

/// How often progress is told while pages are sent.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// First and longest wait between two questions for a verdict.
const ASK_FIRST: Duration = Duration::from_millis(50);
const ASK_LONGEST: Duration = Duration::from_secs(5);
/// Between two tries to take disks back.
const RECLAIM_INTERVAL: Duration = Duration::from_millis(500);
/// How long an explanation may come after a connection broke.
const EXPLANATION: Duration = Duration::from_millis(500);

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
struct SenderHandle {
    passes: mpsc::Sender<Pass>,
    transport: Arc<dyn Transport>,
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
    sender: mpsc::Sender<Input>,
    inbox: mpsc::Receiver<Input>,
    pub(super) phase: SourcePhase,
    link: Option<Arc<MainLink>>,
    senders: Vec<SenderHandle>,
    pub(super) shared: Arc<Shared>,
    entry: Option<SourceEntry>,
    token: Option<Token>,
    /// Connections that the destination agreed to.
    connections: u16,
    cause: Cause,
    reasons: Vec<String>,
    started: Instant,
    cpu_started: Duration,
    setup: Duration,
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
    pub(super) round_pages: u64,
    pub(super) connection_bytes: Vec<u64>,
    pub(super) data_pages: u64,
    pub(super) zero_pages: u64,
    pub(super) skipped_pages: u64,
    pub(super) pause: PauseReport,
    pub(super) pause_started: Option<Instant>,
    /// When the last part of the pause ended.
    pub(super) pause_mark: Instant,
    cpu_destination: Option<Duration>,
    /// A message that came before it was waited for.
    early: Option<Message>,
    ask_wait: Duration,
    resolved: Option<Owner>,
    detached: bool,
    /// Bytes and time at the last progress.
    told: (u64, Instant),
}

impl<'scope, 'env, 'blob> Engine<'scope, 'env, 'blob> {
    pub(super) fn new(
        around: Surroundings<'scope, 'env>,
        offering: Offering<'blob>,
        sender: mpsc::Sender<Input>,
        inbox: mpsc::Receiver<Input>,
    ) -> Self {
        let now = Instant::now();
        let shared = Arc::new(Shared {
            pacer: Pacer::new(around.options.bandwidth),
            stop: AtomicBool::new(false),
            pages_done: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        });
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
            round_pages: 0,
            connection_bytes: Vec::new(),
            data_pages: 0,
            zero_pages: 0,
            skipped_pages: 0,
            pause: PauseReport::default(),
            pause_started: None,
            pause_mark: now,
            cpu_destination: None,
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
        self.end()
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

    fn handle(&mut self, event: SourceEvent) {
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
                if self.around.options.mode == Mode::Precopy {
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
                let run = !vm.paused_by_operator();
                self.link().and_then(|link| Ok(link.send(&Commit { run })?)).map_err(
                    |failure| (SourceEvent::Failed(Cause::Lost), failure.reasons.join("; ")),
                )?;
                self.pause.commit = self.part_of_pause();
            }
            SourceAction::SendDone => {
                // The destination runs the guest whether it gets this or not.
                if let Err(failure) = self.link().and_then(|link| Ok(link.send(&Done {})?)) {
                    tracing::debug!(?failure, "DONE was not sent");
                }
            }
            SourceAction::JournalUnresolved => {
                self.close_connections();
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
                if self.around.options.mode == Mode::Precopy {
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
        if let Some(cause) = state.early.take() {
            // The inbox lives as long as the engine.
            let _ = self.sender.send(Input::GiveUp(cause));
        }
    }

    /// Connects, offers, waits for the answer.
    fn offer(&mut self) -> Result<SourceEvent, Failure> {
        let around = &self.around;
        let (options, id) = (around.options, around.control.id());
        let timing = options.timing;
        let address = around.connector.address();
        let entry = around.journal.begin_source(id, &self.offering.name, &address);
        self.entry = Some(entry.map_err(|error| Failure::new(Cause::Failed, error.to_string()))?);
        let transport = self.connect()?;
        let link = Arc::new(MainLink::open(Arc::clone(&transport))?);
        self.link = Some(Arc::clone(&link));
        let inbox = self.sender.clone();
        let offered = options.connections;
        self.spawn("mig-main-in", move || read_main(id, offered, transport, &inbox))?;
        self.send_offer(&link)?;
        self.spawn("mig-alive", move || link.keep_alive(timing.alive))?;
        match self.wait_for_message(timing.accept, "answer the offer")? {
            Message::Accept { token, connections } => {
                if let Some(entry) = &mut self.entry {
                    entry
                        .set_token(&token)
                        .map_err(|error| Failure::new(Cause::Failed, error.to_string()))?;
                }
                self.token = Some(token);
                self.connections = connections;
                Ok(SourceEvent::Accepted)
            }
            other => Err(unexpected(&other)),
        }
    }

    fn send_offer(&self, link: &MainLink) -> Result<(), Failure> {
        let around = &self.around;
        let options = around.options;
        let populated_pages = around.vm.populated()?.count();
        let offering = &self.offering;
        link.write(|out| -> Result<(), Failure> {
            out.send(&Hello {
                id: around.control.id().0,
                program: env!("CARGO_PKG_VERSION"),
                features: 0,
            })?;
            for (record_type, payload) in [
                (RecordType::Machine, offering.machine.encode()),
                (RecordType::Config, offering.config.encode()),
                (RecordType::Layout, encode_layout(around.vm.layout())),
            ] {
                let payload = payload.map_err(|problem| out.error(problem))?;
                out.write(record_type, &[&payload])?;
            }
            out.send(&OfferWire {
                name: &offering.name,
                mode: options.mode as u16,
                connections: options.connections,
                verify: options.verify,
                downtime_us: crate::report::as_micros(options.downtime),
                populated_pages,
                alive_ms: millis(options.timing.alive),
                dead_ms: millis(options.timing.dead),
                resources_version: offering.resources.version,
                resources: &offering.resources.data,
                blobs: offering.blobs.iter().map(|b| (b.kind as u16, b.length)).collect(),
            })?;
            Ok(())
        })
    }

    /// Joins the page connections, sends the blobs, waits until the VM is made.
    fn prepare(&mut self) -> Result<SourceEvent, Failure> {
        for index in 0..self.connections {
            if let Err(failure) = self.join(index) {
                return Err(self.explained(failure));
            }
        }
        let link = Arc::clone(self.link()?);
        for blob in std::mem::take(&mut self.offering.blobs) {
            let sent = link.write(|out| write_blob(out, blob));
            if let Err(stop) = sent {
                let failure = match stop {
                    Stop::Stream(error) => error.into(),
                    Stop::Other(error) => Failure::new(Cause::Failed, error.to_string()),
                };
                return Err(self.explained(failure));
            }
        }
        match self.wait_for_message(self.around.options.timing.ready, "make the VM")? {
            Message::Ready { load } => {
                self.expected_load = load;
                Ok(SourceEvent::Ready)
            }
            other => Err(unexpected(&other)),
        }
    }

    fn connect(&self) -> Result<Arc<dyn Transport>, Failure> {
        let timing = &self.around.options.timing;
        let connector = self.around.connector;
        connector
            .connect(timing.connect)
            .and_then(|transport| {
                // The peer speaks at least every `alive`, so silence is death.
                transport.set_timeouts(Some(timing.dead), Some(timing.dead))?;
                Ok(transport)
            })
            .map_err(|error| {
                let address = connector.address();
                Failure::new(Cause::Lost, format!("cannot connect to {address}: {error}"))
            })
    }

    fn join(&mut self, index: u16) -> Result<(), Failure> {
        let Some(token) = &self.token else {
            return Err(Failure::new(Cause::Failed, "no token"));
        };
        let transport = self.connect()?;
        let mut writer = RecordWriter::new(Stream(Arc::clone(&transport)), StreamKind::Pages)?;
        let started = Instant::now();
        let id = self.around.control.id().0;
        writer.send(&Join { id, role: ROLE_PAGES, index, token: token.bytes() })?;
        let mut answers = RecordReader::new(Stream(Arc::clone(&transport)), StreamKind::Pages)?;
        let joined: Joined = answers.next_record()?.decode("JOINED")?;
        if joined.index != index {
            return Err(Failure::new(Cause::Protocol, "another page connection was joined"));
        }
        let round_trip = started.elapsed();
        if index == 0 || round_trip < self.round_trip {
            self.round_trip = round_trip;
        }
        let (passes, work) = mpsc::channel();
        let inbox = self.sender.clone();
        let shared = Arc::clone(&self.shared);
        let sender = Sender::new(self.around.vm, shared, index, self.connections, writer);
        self.spawn(&format!("mig-send-{index}"), move || sender.run(&work, &inbox))?;
        self.senders.push(SenderHandle { passes, transport });
        self.connection_bytes.push(0);
        Ok(())
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

    /// Asks the destination's host once, then waits a little; or an operator decides.
    fn await_verdict(&mut self) -> SourceEvent {
        match self.ask() {
            Some(Ok(verdict @ (Verdict::RunningHere | Verdict::NotHere))) => {
                return SourceEvent::Verdict(verdict);
            }
            Some(Ok(verdict)) => {
                self.tell(Some(format!("the destination's host says {verdict:?}")));
            }
            Some(Err(error)) => self.tell(Some(error.to_string())),
            None => {}
        }
        self.wait_ignoring(self.ask_wait);
        self.ask_wait = (self.ask_wait * 2).min(ASK_LONGEST);
        let decided = self.resolved.or_else(|| self.entry.as_ref().and_then(|e| e.resolved()));
        decided.map_or(SourceEvent::NoVerdict, SourceEvent::Resolved)
    }

    /// Asks the destination's host, with reclaim. `None`: there was no token yet.
    fn ask(&self) -> Option<Result<Verdict, AskError>> {
        let token = self.token.as_ref()?;
        let (id, timeout) = (self.around.control.id(), self.around.options.timing.connect);
        Some(ask_verdict(self.around.connector, id, token, Side::Destination, true, timeout))
    }

    pub(super) fn link(&self) -> Result<&Arc<MainLink>, Failure> {
        self.link.as_ref().ok_or_else(|| Failure::new(Cause::Lost, "there is no connection"))
    }

    fn spawn(&self, name: &str, job: impl FnOnce() + Send + 'scope) -> Result<(), Failure> {
        thread::Builder::new()
            .name(name.to_owned())
            .spawn_scoped(self.around.scope, job)
            .map(drop)
            .map_err(|error| Failure::new(Cause::Failed, format!("no thread {name}: {error}")))
    }

    /// Hands a pass to all senders and waits until all have done it.
    pub(super) fn pass(&mut self, pass: &Pass) -> Result<PassStats, Failure> {
        self.begin_pass(pass)?;
        self.finish_pass()
    }

    pub(super) fn begin_pass(&mut self, pass: &Pass) -> Result<(), Failure> {
        self.round_pages = pass.pages.count();
        self.shared.pages_done.store(0, Ordering::Relaxed);
        for sender in &self.senders {
            // A sender that ended has told why.
            let _ = sender.passes.send(pass.clone());
        }
        Ok(())
    }

    pub(super) fn finish_pass(&mut self) -> Result<PassStats, Failure> {
        let mut total = PassStats::default();
        let mut left = self.senders.len();
        while left > 0 {
            match self.wait(Instant::now() + PROGRESS_INTERVAL)? {
                Waited::PassDone(index, Ok(stats)) => {
                    left -= 1;
                    total.data_pages += stats.data_pages;
                    total.zero_pages += stats.zero_pages;
                    total.bytes += stats.bytes;
                    total.waited = total.waited.max(stats.waited);
                    if let Some(bytes) = self.connection_bytes.get_mut(usize::from(index)) {
                        *bytes += stats.bytes;
                    }
                }
                Waited::PassDone(index, Err(error)) => {
                    let failure = match error {
                        SendError::Stopped => Failure::new(Cause::Cancelled, "stopped"),
                        SendError::Stream(error) => {
                            let mut failure = Failure::from(error);
                            for reason in &mut failure.reasons {
                                *reason = format!("page connection {index}: {reason}");
                            }
                            failure
                        }
                    };
                    return Err(self.explained(failure));
                }
                // The destination may be done before this side has noticed that all was sent.
                Waited::Peer(loaded @ Message::Loaded { .. })
                    if self.phase == SourcePhase::Stopping =>
                {
                    self.early = Some(loaded);
                }
                Waited::Peer(message) => return Err(unexpected(&message)),
                Waited::Nothing => {
                    self.check_time()?;
                    self.tell(None);
                }
            }
        }
        self.data_pages += total.data_pages;
        self.zero_pages += total.zero_pages;
        Ok(total)
    }

    fn check_time(&self) -> Result<(), Failure> {
        let options = self.around.options;
        match options.limits.time {
            Some(limit) if self.started.elapsed() > limit => {
                let reason = format!("it is not done after the limit of {limit:?}");
                Err(Failure::new(Cause::Deadline, reason))
            }
            _ => Ok(()),
        }
    }

    /// The destination's own reason for what looks like a lost connection, if it comes soon.
    pub(super) fn explained(&mut self, failure: Failure) -> Failure {
        if failure.cause != Cause::Lost {
            return failure;
        }
        let deadline = Instant::now() + EXPLANATION;
        loop {
            match self.wait(deadline) {
                Err(better) if better.cause != Cause::Lost => return better,
                Err(_) | Ok(Waited::Nothing) => return failure,
                Ok(Waited::Peer(_) | Waited::PassDone(..)) => {}
            }
        }
    }

    pub(super) fn wait_for_message(
        &mut self,
        limit: Duration,
        what: &str,
    ) -> Result<Message, Failure> {
        if let Some(message) = self.early.take() {
            return Ok(message);
        }
        let deadline = Instant::now() + limit;
        loop {
            match self.wait(deadline)? {
                Waited::Peer(message) => return Ok(message),
                Waited::PassDone(..) => {}
                Waited::Nothing => {
                    let reason = format!("the destination did not {what} within {limit:?}");
                    return Err(Failure::new(Cause::Deadline, reason));
                }
            }
        }
    }

    /// Waits for something to happen, until `deadline`. What ends the migration is an error.
    pub(super) fn wait(&mut self, deadline: Instant) -> Result<Waited, Failure> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(input) = self.inbox.recv_timeout(left) else { return Ok(Waited::Nothing) };
            match input {
                Input::Peer(Message::Abort(text)) => {
                    let reason = format!("the destination gave up: {text}");
                    return Err(Failure::new(Cause::PeerAborted, reason));
                }
                Input::Peer(Message::Refuse(reasons)) => {
                    return Err(Failure { cause: Cause::Refused, reasons });
                }
                Input::Peer(message) => return Ok(Waited::Peer(message)),
                Input::Lost(cause, text) => return Err(Failure::new(cause, text)),
                Input::PassDone { index, result } => return Ok(Waited::PassDone(index, result)),
                Input::GiveUp(cause) if self.phase.can_cancel() => {
                    let reason = match cause {
                        Cause::GuestEnded => "the guest ended",
                        _ => "cancelled at the source",
                    };
                    return Err(Failure::new(cause, reason));
                }
                Input::GiveUp(_) => {}
                Input::Resolved(owner) => self.resolved = Some(owner),
                Input::Detach => self.detached = true,
            }
        }
    }

    /// Waits when nothing that happens can end it.
    fn wait_ignoring(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while !self.detached && self.resolved.is_none() {
            if let Ok(Waited::Nothing) = self.wait(deadline) {
                return;
            }
        }
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
        let progress = Progress {
            phase: self.phase,
            round: u32::try_from(self.rounds.len()).ok(),
            round_pages: self.round_pages,
            pages_left: self.round_pages.saturating_sub(done),
            bytes,
            bytes_per_second: bytes.saturating_sub(self.told.0) as f64 / seconds,
            dirty_pages_per_second: last.map_or(0.0, |round| round.dirty_pages_per_second),
            predicted_pause: last.map(|round| round.predicted_pause),
            elapsed: self.started.elapsed(),
            note,
        };
        self.told = (bytes, now);
        (self.around.progress)(&progress);
        self.around.control.state().latest = Some(progress);
    }

    /// Ends all connections, and with them the threads.
    fn close_connections(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.pacer.release();
        for sender in self.senders.drain(..) {
            sender.transport.shutdown();
        }
        if let Some(link) = self.link.take() {
            link.close();
        }
    }

    fn end(mut self) -> Report {
        self.close_connections();
        {
            let mut state = self.around.control.state();
            state.inbox = None;
            state.shared = None;
        }
        self.tell(None);
        let reasons = std::mem::take(&mut self.reasons);
        let outcome = match self.phase {
            SourcePhase::HandedOver => Outcome::HandedOver,
            SourcePhase::RolledBack => Outcome::RunningHere { cause: self.cause, reasons },
            _ => Outcome::Unresolved { reasons },
        };
        let moved = outcome == Outcome::HandedOver;
        tracing::info!(?outcome, total = ?self.started.elapsed(), pause = ?self.pause.total);
        Report {
            id: self.around.control.id().to_string(),
            vm: self.offering.name,
            peer: self.around.connector.address(),
            mode: self.around.options.mode,
            verify: self.around.options.verify,
            outcome,
            total: self.started.elapsed(),
            setup: self.setup,
            rounds: self.rounds,
            pause: moved.then_some(self.pause),
            connection_bytes: self.connection_bytes,
            data_pages: self.data_pages,
            zero_pages: self.zero_pages,
            skipped_pages: self.skipped_pages,
            cpu_source: process_cpu_time().saturating_sub(self.cpu_started),
            cpu_destination: self.cpu_destination,
        }
    }
}

fn unexpected(message: &Message) -> Failure {
    Failure::new(Cause::Protocol, format!("the destination sent {message:?} too early"))
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
