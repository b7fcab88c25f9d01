//! The engine from the switch on: what it tells the destination, and how it sees to it that all memory arrives.

use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::address::{Gfn, PageRange};
use crate::handover::Cause;
use crate::link::{MainLink, LAST_WORD};
use crate::page_set::PageSet;
use crate::prepaging::Plan;
use crate::snapshot::write_runs;
use crate::source::engine::{unexpected, Engine, Failure, Waited};
use crate::source::passes::pass_failed;
use crate::source::peer::{read_continued, Message};
use crate::source::postcopy::demand;
use crate::source::postcopy::outflow::Outflow;
use crate::source::postcopy::{FaultReport, PostcopyReport};
use crate::source::sender::{Pass, PassStats, Shared, Work};
use crate::stream::session::{Done, Echo, Hello, Recover, Switch};
use crate::stream::{RecordType, StreamError, StreamKind};
use crate::transport::Connector;
use crate::vm::Section;

/// First and longest wait between two tries to connect again.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LONGEST: Duration = Duration::from_secs(5);
/// How often it is looked whether an operator wants it to go on.
const LOOK: Duration = Duration::from_millis(20);
/// How often progress is told.
const INTERVAL: Duration = Duration::from_millis(100);
/// A link that is to be kept busy, bytes per second: 10 Gbit/s.
const FASTEST_LINK: f64 = 1.25e9;
/// Bytes that the kernel may keep of what is pushed, where the round trip is short.
const LEAST_BACKLOG: usize = 128 << 10;
/// The number of the only question of its kind.
const RETRACT: u32 = 0;

impl Engine<'_, '_, '_> {
    /// Tells the destination, while the guest runs, which pages it has in vain: to give their memory back takes time.
    pub(in crate::source) fn retract(&mut self, pages: &PageSet) -> Result<(), Failure> {
        let started = Instant::now();
        let sent = self.link()?.write(|out| {
            write_runs(out, RecordType::Missing, pages)?;
            out.send(&Echo { number: RETRACT })
        });
        sent.map_err(|error: StreamError| self.explained(error.into()))?;
        match self.wait_for_message(self.around.options.timing.ready, "give memory back")? {
            Message::Echo(RETRACT) => {
                self.retracted = started.elapsed();
                Ok(())
            }
            other => Err(unexpected(&other)),
        }
    }

    /// With the guest paused: what is missing is certain. Requests are answered from here on; what comes before
    /// COMMIT is KVM's, as it loads `sections`.
    pub(in crate::source) fn switch(
        &mut self,
        missing: PageSet,
        sections: &[Section],
    ) -> Result<(), Failure> {
        let vm = self.around.vm;
        let (pages, unit) = (missing.count(), vm.unit_pages());
        let number = u32::try_from(self.rounds.len()).unwrap_or(u32::MAX);
        let nothing = Arc::new(PageSet::empty(vm.layout()));
        self.begin_pass(&Pass { number, pages: nothing, live: false, last: true })?;
        let sent = self.link()?.write(|out| {
            write_runs(out, RecordType::Missing, &missing)?;
            out.send(&Switch { pages, unit: u32::try_from(unit).unwrap_or(u32::MAX) })
        });
        sent.map_err(|error: StreamError| self.explained(error.into()))?;
        let options = self.around.options.postcopy;
        self.postcopy = Some(PostcopyReport {
            missing_pages: pages,
            first_pages: 0,
            push: self.push_wanted(),
            prepaging: options.prepaging,
            retract: self.retracted,
            interruptions: 0,
            incomplete: None,
            faults: None,
            destination: None,
        });
        let first = vm.first_pages(sections);
        self.supply(missing, &first)
    }

    fn push_wanted(&self) -> bool {
        let changed = self.around.control.state().push;
        changed.unwrap_or(self.around.options.postcopy.push)
    }

    /// Answers requests, on the connection that has joined for them, after it has sent the `first` pages there.
    fn supply(&mut self, missing: PageSet, first: &[Gfn]) -> Result<(), Failure> {
        let vm = self.around.vm;
        let mut plan = Plan::new(missing, vm.unit_pages(), self.around.options.postcopy.prepaging);
        let first: Vec<PageRange> = first.iter().filter_map(|gfn| plan.claim(*gfn)).collect();
        if let Some(postcopy) = &mut self.postcopy {
            postcopy.first_pages += first.iter().map(|run| run.pages()).sum::<u64>();
        }
        let outflow = Arc::new(Outflow::new(plan, self.push_wanted()));
        let link = self.requests.take();
        let link = link.ok_or_else(|| Failure::new(Cause::Lost, "no connection for requests"))?;
        self.requests_transport = Some(Arc::clone(&link.transport));
        let (inbox, shared) = (self.sender.clone(), Arc::clone(&self.shared));
        let server = Arc::clone(&outflow);
        self.spawn("mig-demand", move || {
            demand::serve(link, vm, &first, &server, &shared, &inbox)
        })?;
        self.around.control.state().outflow = Some(Arc::clone(&outflow));
        self.outflow = Some(outflow);
        Ok(())
    }

    /// From now on what is missing is pushed.
    pub(in crate::source) fn start_push(&mut self) {
        let Some(outflow) = &self.outflow else { return };
        self.shared.pacer.restrain();
        self.pushing = self.senders.len();
        // Pages that are on their way are what a request may have to wait for: as few as keep the link busy.
        let in_flight = (self.round_trip.as_secs_f64() * FASTEST_LINK) as usize;
        let backlog = in_flight.max(LEAST_BACKLOG) / self.senders.len().max(1);
        for sender in &self.senders {
            sender.transport.bound_backlog(backlog);
            // A sender that ended has told why.
            let _ = sender.passes.send(Work::Push(Arc::clone(outflow)));
        }
    }

    /// Sees to it that the destination gets everything, over as many connections as it takes.
    pub(in crate::source) fn drain(&mut self) {
        let mut wait = RETRY_FIRST;
        let mut elsewhere: Option<Box<dyn Connector>> = None;
        // Since when nothing is left to be sent.
        let mut all_sent = None;
        if self.link.is_none() {
            // Before RESUMED.
            self.count_interruption();
        }
        while !self.detached {
            if self.link.is_none() {
                match self.reconnect(elsewhere.as_deref()) {
                    Ok(()) => (wait, all_sent) = (RETRY_FIRST, None),
                    Err(failure) => {
                        self.disconnect();
                        let reason = failure.reasons.join("; ");
                        if failure.cause == Cause::Refused {
                            return self.incomplete(reason);
                        }
                        self.pause_drain(&reason);
                        self.wait_for_operator(wait, &mut elsewhere);
                        wait = (wait * 2).min(RETRY_LONGEST);
                        continue;
                    }
                }
            }
            match self.wait(Instant::now() + INTERVAL) {
                Ok(Waited::Peer(Message::Drained { report, cpu })) => match self.left() {
                    0 => {
                        self.await_push();
                        return self.drained(*report, cpu);
                    }
                    left => self.lost(&format!("it says that it has all and lacks {left} pages")),
                },
                Ok(Waited::Peer(other)) => self.lost(&format!("{other:?} came too early")),
                Ok(Waited::PassDone(index, Ok(stats))) => self.push_done(index, &stats),
                Ok(Waited::PassDone(index, Err(error))) => {
                    self.lost(&pass_failed(index, error).reasons.join("; "));
                }
                Ok(Waited::Nothing) if self.left() > 0 => all_sent = None,
                Ok(Waited::Nothing) => {
                    let since = *all_sent.get_or_insert_with(Instant::now);
                    if since.elapsed() > self.around.options.timing.dead * LAST_WORD {
                        all_sent = None;
                        self.lost("it was sent everything and does not say that it has it");
                    }
                }
                Err(failure) if failure.cause == Cause::PeerAborted => {
                    self.disconnect();
                    return self.incomplete(failure.reasons.join("; "));
                }
                Err(failure) => self.lost(&failure.reasons.join("; ")),
            }
            self.tell(None);
        }
        self.incomplete("given up here".to_owned());
    }

    pub(in crate::source) fn push_done(&mut self, index: u16, stats: &PassStats) {
        self.pushing = self.pushing.saturating_sub(1);
        self.count(index, stats);
    }

    /// All pages went out, and those who push may still wait for the cap: has them say what they sent.
    fn await_push(&mut self) {
        self.shared.pacer.release();
        let deadline = Instant::now() + self.around.options.timing.alive;
        while self.pushing > 0 {
            match self.wait(deadline) {
                Ok(Waited::PassDone(index, Ok(stats))) => self.push_done(index, &stats),
                Ok(Waited::Nothing) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }

    /// Pages that were not sent.
    fn left(&self) -> u64 {
        self.outflow.as_ref().map_or(0, |outflow| outflow.left())
    }

    fn drained(&mut self, report: crate::destination::DrainReport, cpu: Duration) {
        self.ended = Some(Instant::now());
        self.finish_late();
        // The destination needs nothing more, whether it gets this or not.
        if let Err(failure) = self.link().and_then(|link| Ok(link.send(&Done {})?)) {
            tracing::debug!(?failure, "DONE was not sent");
        }
        self.cpu_destination = Some(cpu);
        let unit = self.around.vm.unit_pages();
        if let Some(postcopy) = &mut self.postcopy {
            let (missing, first) = (postcopy.missing_pages, postcopy.first_pages);
            postcopy.faults = Some(FaultReport::new(missing, first, unit, &report));
            postcopy.destination = Some(report);
        }
    }

    fn incomplete(&mut self, why: String) {
        tracing::error!(why, "the destination does not have all of its memory");
        if let Some(postcopy) = &mut self.postcopy {
            postcopy.incomplete = Some(why);
        }
    }

    fn lost(&mut self, why: &str) {
        self.disconnect();
        self.count_interruption();
        self.pause_drain(why);
    }

    fn count_interruption(&mut self) {
        if let Some(postcopy) = &mut self.postcopy {
            postcopy.interruptions += 1;
            self.around.control.state().interruptions = postcopy.interruptions;
        }
    }

    fn pause_drain(&mut self, why: &str) {
        tracing::warn!(why, "memory does not go out any more");
        self.around.control.state().interrupted = true;
        self.tell(Some(format!(
            "postcopy-paused: {why}; trying again; if the VM is gone there, it is lost"
        )));
    }

    /// Waits, unless an operator wants it to go on now, perhaps to another address.
    fn wait_for_operator(&mut self, limit: Duration, elsewhere: &mut Option<Box<dyn Connector>>) {
        let deadline = Instant::now() + limit;
        while !self.detached && self.recover_to.is_none() && Instant::now() < deadline {
            // Connections that are lost have nothing to say any more.
            let _ = self.wait(deadline.min(Instant::now() + LOOK));
        }
        if let Some(Some(address)) = self.recover_to.take() {
            *elsewhere = self.around.connector.elsewhere(&address);
        }
    }

    /// Connects again: asks what is missing, and goes on with that.
    fn reconnect(&mut self, elsewhere: Option<&dyn Connector>) -> Result<(), Failure> {
        let connector = elsewhere.unwrap_or(self.around.connector);
        let token = self.token.ok_or_else(|| Failure::new(Cause::Failed, "no token"))?;
        let bandwidth = self.around.control.state().bandwidth;
        let shared = Shared::new(bandwidth.unwrap_or(self.around.options.bandwidth));
        shared.bytes.store(self.shared.bytes.load(Ordering::Relaxed), Ordering::Relaxed);
        self.shared = Arc::new(shared);
        self.around.control.state().shared = Some(Arc::clone(&self.shared));
        let timing = self.around.options.timing;
        let transport = self.connect_to(connector)?;
        let link = Arc::new(MainLink::open(Arc::clone(&transport), StreamKind::Continue)?);
        self.link = Some(Arc::clone(&link));
        let id = self.around.control.id();
        let connections = self.connections;
        link.write(|out| -> Result<(), StreamError> {
            out.send(&Hello { id: id.0, program: env!("CARGO_PKG_VERSION"), features: 0 })?;
            out.send(&Recover { token: token.bytes(), connections })
        })?;
        let (layout, inbox) = (Arc::clone(self.around.vm.layout()), self.sender.clone());
        self.spawn("mig-main-in", move || {
            read_continued(id, connections, &layout, transport, &inbox);
        })?;
        self.spawn("mig-alive", move || link.keep_alive(timing.alive))?;
        let message = self.wait_for_message(timing.accept, "say what is missing")?;
        let Message::Recovered { missing, connections } = message else {
            return Err(unexpected(&message));
        };
        self.connections = connections;
        self.join_all(connector)?;
        tracing::info!(missing = missing.count(), "memory goes out again");
        self.supply(missing, &[])?;
        self.start_push();
        self.around.control.state().interrupted = false;
        Ok(())
    }
}
