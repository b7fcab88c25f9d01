//! The runner: does the work of each phase, and what [`crate::handover`] says between them.

use std::sync::atomic::AtomicU64;
use std::sync::{mpsc, Arc};
use std::thread::Scope;
use std::time::{Duration, Instant};

use crate::clock::process_cpu_time;
use crate::destination::door::Door;
use crate::destination::failure::Failure;
use crate::destination::postcopy::drain::Drain;
use crate::destination::receiver::{PageCount, ReceiverStats};
use crate::destination::{
    Arrival, ArrivalReport, Arriving, DestinationControl, DestinationOptions, Input, Stage,
};
use crate::handover::{
    step_destination, Cause, DestinationAction, DestinationEvent, DestinationPhase, Owner,
};
use crate::identity::Token;
use crate::journal::{DestinationEntry, Journal};
use crate::link::MainLink;
use crate::page_set::PageSet;
use crate::report::as_micros;
use crate::source::LONGEST_LATE;
use crate::stream::session::{Echo, Loaded, Resumed};
use crate::stream::{RecordReader, RecordWriter};
use crate::threads;
use crate::transport::{Stream, Transport};
use crate::userfault::Userfault;
use crate::verify::{first_difference, hash_memory};
use crate::vm::{DestinationHost, DestinationVm, Offer, Section};

/// How often an undecided destination looks into the journal.
pub(super) const JOURNAL_INTERVAL: Duration = Duration::from_millis(200);
/// Between two tries to take disks or to resume.
const RETRY_INTERVAL: Duration = Duration::from_millis(200);
/// How long an explanation may come after a connection broke.
const EXPLANATION: Duration = Duration::from_millis(500);
/// How often progress is told.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// What the caller gave.
pub(super) struct Surroundings<'scope, 'env> {
    pub(super) scope: &'scope Scope<'scope, 'env>,
    pub(super) host: &'env dyn DestinationHost,
    pub(super) journal: &'env Journal,
    pub(super) options: &'env DestinationOptions,
    pub(super) control: &'env DestinationControl,
    pub(super) progress: &'env dyn Fn(&Arriving),
}

/// Waits for an offer and sees to it until its end.
pub(super) fn wait_for_offer(
    around: Surroundings<'_, '_>,
    door: &Door,
    sender: mpsc::Sender<Input>,
    inbox: mpsc::Receiver<Input>,
) -> ArrivalReport {
    while let Ok(input) = inbox.recv() {
        match input {
            Input::Offer { offer, transport, stage } => {
                let session = Session::new(around, door, sender, inbox, *offer, transport, stage);
                return session.run();
            }
            Input::Stop | Input::Detach => break,
            _ => {}
        }
    }
    ArrivalReport {
        id: String::new(),
        vm: String::new(),
        peer: String::new(),
        outcome: Arrival::Stopped,
        confirmed: false,
        data_pages: 0,
        zero_pages: 0,
        load: Duration::ZERO,
        own: Duration::ZERO,
        resume: Duration::ZERO,
        cpu: Duration::ZERO,
        drain: None,
    }
}

/// A page connection that has joined.
pub(super) struct Joined {
    pub(super) index: u16,
    pub(super) records: RecordReader<Stream>,
    pub(super) out: RecordWriter<Stream>,
}

/// The connection for requests: both directions.
pub(super) type RequestsJoined = (RecordReader<Stream>, RecordWriter<Stream>, Arc<dyn Transport>);

pub(super) struct Session<'scope, 'env, 'door> {
    pub(super) around: Surroundings<'scope, 'env>,
    pub(super) door: &'door Door,
    pub(super) sender: mpsc::Sender<Input>,
    pub(super) inbox: mpsc::Receiver<Input>,
    pub(super) offer: Offer,
    pub(super) main: Arc<dyn Transport>,
    pub(super) stage: Arc<Stage>,
    pub(super) link: Option<Arc<MainLink>>,
    pub(super) phase: DestinationPhase,
    pub(super) connections: u16,
    pub(super) entry: Option<DestinationEntry>,
    pub(super) vm: Option<Arc<dyn DestinationVm>>,
    pub(super) joined: Vec<Joined>,
    pub(super) page_transports: Vec<Arc<dyn Transport>>,
    pub(super) pages: PageCount,
    pub(super) sections: Option<Vec<Section>>,
    /// Since when the guest stands.
    pub(super) paused: Instant,
    pub(super) hashes: Option<Vec<u64>>,
    pub(super) token: Option<Token>,
    /// With post-copy, until memory is registered.
    pub(super) userfault: Option<Userfault>,
    /// What comes after the guest runs, in units of so many pages.
    pub(super) missing: Option<(u64, PageSet)>,
    pub(super) requests_joined: Option<RequestsJoined>,
    /// Page connections that pages are pushed on later.
    pub(super) synced: Vec<RecordReader<Stream>>,
    pub(super) drain: Option<Drain<'scope>>,
    /// How often connections were made anew.
    pub(super) generation: u32,
    pub(super) all_received: Instant,
    pub(super) committed: Instant,
    pub(super) run_guest: bool,
    pub(super) confirmed: bool,
    pub(super) detached: bool,
    pub(super) cause: Cause,
    pub(super) reasons: Vec<String>,
    pub(super) stats: ReceiverStats,
    pub(super) load: Duration,
    pub(super) own: Duration,
    pub(super) resume: Duration,
    pub(super) cpu_started: Duration,
    pub(super) cpu: Duration,
}

impl<'scope, 'env, 'door> Session<'scope, 'env, 'door> {
    fn new(
        around: Surroundings<'scope, 'env>,
        door: &'door Door,
        sender: mpsc::Sender<Input>,
        inbox: mpsc::Receiver<Input>,
        offer: Offer,
        main: Arc<dyn Transport>,
        stage: Arc<Stage>,
    ) -> Self {
        let now = Instant::now();
        Self {
            connections: offer.connections.min(around.options.max_connections).max(1),
            around,
            door,
            sender,
            inbox,
            offer,
            main,
            stage,
            link: None,
            phase: DestinationPhase::Negotiating,
            entry: None,
            vm: None,
            joined: Vec::new(),
            page_transports: Vec::new(),
            pages: Arc::new(AtomicU64::new(0)),
            sections: None,
            paused: Instant::now(),
            hashes: None,
            token: None,
            userfault: None,
            missing: None,
            requests_joined: None,
            synced: Vec::new(),
            drain: None,
            generation: 0,
            all_received: now,
            committed: now,
            run_guest: true,
            confirmed: false,
            detached: false,
            cause: Cause::Failed,
            reasons: Vec::new(),
            stats: ReceiverStats::default(),
            load: Duration::ZERO,
            own: Duration::ZERO,
            resume: Duration::ZERO,
            cpu_started: process_cpu_time(),
            cpu: Duration::ZERO,
        }
    }

    fn run(mut self) -> ArrivalReport {
        let span = tracing::info_span!("receive", id = %self.offer.id, vm = %self.offer.name);
        let _entered = span.enter();
        self.tell(None);
        while !self.phase.is_final() && !self.detached {
            let event = self.work().unwrap_or_else(|failure| self.note(failure));
            self.handle(event);
        }
        if self.phase == DestinationPhase::Running && self.drain.is_some() {
            self.drain();
        }
        self.end()
    }

    /// What there is to do in a phase; its outcome is an event.
    fn work(&mut self) -> Result<DestinationEvent, Failure> {
        match self.phase {
            DestinationPhase::Negotiating => self.negotiate(),
            DestinationPhase::Preparing => self.prepare(),
            DestinationPhase::Receiving => self.receive(),
            DestinationPhase::Loading => Ok(DestinationEvent::StateLoaded),
            DestinationPhase::Loaded => self.await_commit(),
            DestinationPhase::Unresolved => Ok(self.await_decision()),
            // The actions that lead here have an event as their outcome.
            DestinationPhase::Deciding | DestinationPhase::Withdrawing => {
                Ok(DestinationEvent::NotDecided)
            }
            DestinationPhase::Owning => Ok(self.take_ownership()),
            DestinationPhase::Resuming => Ok(self.resume_guest()),
            DestinationPhase::Running | DestinationPhase::Discarded => {
                Ok(DestinationEvent::DecidedNotHere)
            }
        }
    }

    pub(super) fn note(&mut self, failure: Failure) -> DestinationEvent {
        tracing::debug!(phase = ?self.phase, cause = ?failure.cause, reasons = ?failure.reasons);
        self.cause = failure.cause;
        self.reasons = failure.reasons;
        DestinationEvent::Failed(failure.cause)
    }

    fn handle(&mut self, event: DestinationEvent) {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            let (phase, actions) = step_destination(self.phase, event);
            if phase != self.phase {
                tracing::debug!(from = ?self.phase, to = ?phase, ?event);
            }
            self.phase = phase;
            self.around.control.state().phase = Some(phase);
            for action in actions {
                let outcome = self.perform(action);
                if self.detached {
                    return;
                }
                next = outcome.unwrap_or_else(|failure| Some(self.note(failure)));
                if next.is_some() {
                    break;
                }
            }
        }
    }

    /// Does one thing; some have an outcome.
    fn perform(&mut self, action: DestinationAction) -> Result<Option<DestinationEvent>, Failure> {
        match action {
            DestinationAction::Accept => self.accept()?,
            DestinationAction::SendRefuse => self.refuse(),
            DestinationAction::SendReady => self.send_ready()?,
            DestinationAction::LoadState => self.load_state()?,
            DestinationAction::SendLoaded => {
                self.stage.set(Stage::LOADED);
                self.load = self.all_received.elapsed();
                self.link()?.send(&Loaded { load_us: as_micros(self.load) })?;
            }
            DestinationAction::DecideHere => return Ok(Some(self.decide(Owner::Here))),
            DestinationAction::DecideNotHere => return Ok(Some(self.decide(Owner::There))),
            DestinationAction::TakeOwnership => return Ok(Some(self.take_ownership())),
            DestinationAction::TellStuck => {
                let note = format!("the VM is owned here and paused: {}", self.reasons.join("; "));
                tracing::warn!("{note}; trying again");
                self.tell(Some(note));
                let deadline = Instant::now() + RETRY_INTERVAL;
                while !self.detached && self.next(deadline).is_some() {}
            }
            DestinationAction::ResumeGuest => return Ok(Some(self.resume_guest())),
            DestinationAction::SendResumed => {
                self.cpu = process_cpu_time().saturating_sub(self.cpu_started);
                let resumed = Resumed {
                    load_us: as_micros(self.load),
                    own_us: as_micros(self.own),
                    resume_us: as_micros(self.resume),
                    cpu_us: as_micros(self.cpu),
                };
                // From here on frames may come.
                if let Some(vm) = &self.vm {
                    let _ = self.stage.running.set(Arc::clone(vm));
                }
                // The guest runs whether the source gets this or not.
                if let Err(failure) = self.link().and_then(|link| Ok(link.send(&resumed)?)) {
                    tracing::info!(reasons = ?failure.reasons, "the source must ask");
                }
            }
            DestinationAction::JournalUnresolved => {
                self.close_connections();
                if let Some(Err(error)) = self.entry.as_mut().map(DestinationEntry::unresolved) {
                    tracing::error!(%error, "the journal does not say that it is unresolved");
                }
                let note = "kept, whole and paused, until it is known who owns it".to_owned();
                self.tell(Some(format!("{note}: {}", self.reasons.join("; "))));
            }
            DestinationAction::SendAbort => {
                if let Some(link) = &self.link {
                    link.abort(self.cause.abort_reason(), &self.reasons.join("; "));
                }
            }
            DestinationAction::Discard => {
                self.close_connections();
                self.abandon_drain();
                if self.vm.take().is_some() {
                    self.around.host.discarded(self.offer.id);
                }
                // It never will run here: whoever asks later, or looks, is told so.
                if let Some(Err(error)) = self.entry.as_mut().map(|e| e.decide(Owner::There)) {
                    tracing::warn!(%error, "the journal does not say that the VM did not come");
                }
            }
        }
        Ok(None)
    }

    fn receive(&mut self) -> Result<DestinationEvent, Failure> {
        let mut synced = 0;
        while synced < self.connections || self.sections.is_none() {
            let input = self.next_or_end(Instant::now() + PROGRESS_INTERVAL);
            match input.map_err(|failure| self.explained(failure))? {
                Some(Input::Synced { stats, records }) => {
                    synced += 1;
                    self.synced.push(records);
                    self.stats.data_pages += stats.data_pages;
                    self.stats.zero_pages += stats.zero_pages;
                }
                Some(Input::Retract { pages, number }) => {
                    self.retract(&pages)?;
                    self.link()?.send(&Echo { number })?;
                }
                Some(Input::State { sections, hashes, paused, missing }) => {
                    self.paused = paused;
                    self.missing = missing;
                    self.sections = Some(sections);
                    self.hashes = hashes;
                }
                Some(_) => {}
                None => self.tell(None),
            }
        }
        self.all_received = Instant::now();
        Ok(DestinationEvent::AllReceived)
    }

    fn load_state(&mut self) -> Result<(), Failure> {
        let vm = Arc::clone(self.vm()?);
        if let Some(theirs) = self.hashes.take() {
            let mine = hash_memory(vm.as_ref())?;
            if let Some(range) = first_difference(vm.layout(), &mine, &theirs) {
                let reason = format!("memory differs from the source's, first within {range}");
                return Err(Failure::new(Cause::Failed, reason));
            }
        }
        let sections = self.sections.take().unwrap_or_default();
        match self.missing.take() {
            Some((unit, missing)) => {
                self.switch(unit, missing)?;
                self.load_beside(sections)?;
            }
            None => vm.load_state(&sections, self.paused)?,
        }
        Ok(vm.check_ownership()?)
    }

    fn await_commit(&mut self) -> Result<DestinationEvent, Failure> {
        let deadline = Instant::now() + self.around.options.timing.resumed;
        while Instant::now() < deadline {
            match self.next_or_end(Instant::now() + JOURNAL_INTERVAL)? {
                Some(Input::Commit { run }) => {
                    self.committed = Instant::now();
                    self.run_guest = run;
                    return Ok(DestinationEvent::Commit);
                }
                Some(_) => {}
                None if self.decision() == Some(Owner::There) => {
                    return Ok(DestinationEvent::DecidedNotHere);
                }
                None => {}
            }
        }
        Err(Failure::new(Cause::Deadline, "the source neither commits nor gives up"))
    }

    pub(super) fn vm(&self) -> Result<&Arc<dyn DestinationVm>, Failure> {
        self.vm.as_ref().ok_or_else(|| Failure::new(Cause::Failed, "there is no VM"))
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

    /// The next input, or `None` at the deadline. What ends the migration is an error.
    pub(super) fn next_or_end(&mut self, deadline: Instant) -> Result<Option<Input>, Failure> {
        match self.next(deadline) {
            Some(Input::Lost { cause, text, .. }) => Err(Failure::new(cause, text)),
            Some(Input::Aborted(text)) => {
                let reason = format!("the source gave up: {text}");
                Err(Failure::new(Cause::PeerAborted, reason))
            }
            Some(Input::Cancel) => {
                Err(Failure::new(Cause::Cancelled, "cancelled at the destination"))
            }
            other => Ok(other),
        }
    }

    /// The source's own reason for what looks like a lost connection, if it comes soon.
    fn explained(&mut self, failure: Failure) -> Failure {
        if failure.cause != Cause::Lost {
            return failure;
        }
        let deadline = Instant::now() + EXPLANATION;
        loop {
            match self.next_or_end(deadline) {
                Err(better) if better.cause != Cause::Lost => return better,
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return failure,
            }
        }
    }

    pub(super) fn next(&mut self, deadline: Instant) -> Option<Input> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left).ok()? {
                Input::Detach => {
                    // Who detaches wants the thread back, but not to lose the VM: only from phases that wait
                    // for somebody else.
                    self.detached = matches!(
                        self.phase,
                        DestinationPhase::Unresolved
                            | DestinationPhase::Owning
                            | DestinationPhase::Resuming
                    );
                    return Some(Input::Detach);
                }
                // Of a connection that was closed here, in place of which there may be another.
                Input::Lost { generation, .. } if generation != self.generation => {}
                input => return Some(input),
            }
        }
    }

    pub(super) fn tell(&self, note: Option<String>) {
        (self.around.progress)(&Arriving {
            phase: self.phase,
            id: self.offer.id.to_string(),
            vm: self.offer.name.clone(),
            peer: self.offer.peer.clone(),
            note,
        });
    }

    /// Ends all connections, and with them the threads.
    pub(super) fn close_connections(&mut self) {
        self.door.expect(None);
        for transport in self.page_transports.drain(..) {
            transport.shutdown();
        }
        match self.link.take() {
            Some(link) => link.close(),
            None => self.main.shutdown(),
        }
    }

    fn end(mut self) -> ArrivalReport {
        // Who came by an operator's word, or the journal's, has no connection any more.
        let drained = self.drain.as_ref().map(Drain::report);
        if self.phase == DestinationPhase::Running && self.link.is_some() && drained.is_none() {
            // Until the source says that it knows, somebody must be there to be asked.
            let deadline = Instant::now() + self.offer.dead + LONGEST_LATE;
            while let Some(input) = self.next(deadline) {
                self.confirmed = matches!(input, Input::Done);
                if self.confirmed || matches!(input, Input::Lost { .. } | Input::Aborted(_)) {
                    break;
                }
            }
        }
        if self.phase == DestinationPhase::Discarded {
            // Only after LOADED can the source have gone further than this end.
            let may_ask = self.stage.reached(Stage::LOADED);
            self.confirmed = !may_ask || self.cause == Cause::PeerAborted;
        }
        self.close_connections();
        // Who gives an unresolved VM up wants its threads to end.
        self.stop_faults();
        // What joined too late.
        while let Ok(input) = self.inbox.try_recv() {
            if let Input::Joined { transport, .. } = input {
                transport.shutdown();
            }
        }
        self.tell(None);
        let outcome = match self.phase {
            DestinationPhase::Running => Arrival::RunningHere,
            DestinationPhase::Discarded => {
                Arrival::NotHere { cause: self.cause, reasons: self.reasons }
            }
            DestinationPhase::Owning | DestinationPhase::Resuming => {
                Arrival::OwnedHere { reasons: self.reasons }
            }
            _ => Arrival::Unresolved { reasons: self.reasons },
        };
        tracing::info!(?outcome, confirmed = self.confirmed);
        ArrivalReport {
            id: self.offer.id.to_string(),
            vm: self.offer.name,
            peer: self.offer.peer,
            outcome,
            confirmed: self.confirmed,
            data_pages: self.stats.data_pages,
            zero_pages: self.stats.zero_pages,
            load: self.load,
            own: self.own,
            resume: self.resume,
            cpu: self.cpu,
            drain: drained,
        }
    }
}
