//! The session while memory follows its guest: from the switch until the last page is in.

use std::io::BufWriter;
use std::sync::Arc;
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use crate::address::PageRange;
use crate::clock::process_cpu_time;
use crate::destination::door::Guests;
use crate::destination::failure::Failure;
use crate::destination::incoming::read_continued;
use crate::destination::postcopy::arrivals::{Arrivals, Way};
use crate::destination::postcopy::faults::{self, Requests, StopFaults};
use crate::destination::postcopy::receivers::bring_all;
use crate::destination::postcopy::DrainReport;
use crate::destination::session::Session;
use crate::destination::{Draining, Input, MissingRanges};
use crate::handover::Cause;
use crate::journal::{DestinationEntry, JournalError};
use crate::link::{MainLink, LAST_WORD};
use crate::page_set::PageSet;
use crate::report::as_micros;
use crate::snapshot::write_runs;
use crate::stream::session::{Drained, Hello, Recovered, MAX_CONNECTIONS};
use crate::stream::{RecordReader, RecordType, StreamError, StreamKind};
use crate::threads;
use crate::transport::{Stream, Transport};
use crate::vm::Section;
use crate::volatile_io::discard;

/// How often it is looked whether a request is answered, and progress is told.
const INTERVAL: Duration = Duration::from_millis(200);
/// So long a source may come again that has lost its connection and does not know yet that all has arrived: longer than it
/// waits between two tries.
const LINGER: Duration = Duration::from_secs(10);
/// Requests that go out together, bytes.
const REQUEST_BUFFER: usize = 4096;
/// Most bytes of a thread's name in DRAINED, and most threads.
const MAX_BLOCKED: usize = 128;

/// What there is from the switch on.
pub(in crate::destination) struct Drain<'scope> {
    arrivals: Arc<Arrivals>,
    requests: Arc<Requests>,
    stop: Arc<StopFaults>,
    /// Threads that put pages in; they end with their connections.
    bringers: Vec<ScopedJoinHandle<'scope, ()>>,
    started: Instant,
    took: Option<Duration>,
    interruptions: u64,
    /// Where the missing pages are, while there is no connection.
    ranges: Option<MissingRanges>,
    /// The guest's vCPUs stand because one of them is needed.
    frozen: bool,
}

impl Drain<'_> {
    pub(in crate::destination) fn report(&self) -> DrainReport {
        DrainReport {
            drain: self.took.unwrap_or_else(|| self.started.elapsed()),
            interruptions: self.interruptions,
            ..self.arrivals.report()
        }
    }
}

/// A run that does not consist of whole units.
fn first_part(missing: &PageSet, unit: u64) -> Option<PageRange> {
    if unit == 1 {
        return None;
    }
    let mut units = missing.layout().regions().flat_map(|region| region.chunks(unit));
    units.find(|piece| missing.intersects(*piece) && !missing.contains(*piece))
}

impl Session<'_, '_, '_> {
    /// Gives back the memory of pages that are void.
    pub(in crate::destination) fn retract(&mut self, pages: &PageSet) -> Result<(), Failure> {
        let vm = Arc::clone(self.vm()?);
        let mut void = pages.clone();
        void.intersect(&vm.populated()?);
        for run in void.runs() {
            let slice = vm.slice(run)?;
            discard(&slice).map_err(|error| {
                Failure::new(Cause::Failed, format!("giving the memory of {run} back: {error}"))
            })?;
        }
        Ok(())
    }

    /// From now on whoever touches a missing page waits for it, and pages are asked for.
    pub(in crate::destination) fn switch(
        &mut self,
        unit: u64,
        missing: PageSet,
    ) -> Result<(), Failure> {
        let vm = Arc::clone(self.vm()?);
        let mine = vm.unit_pages();
        if unit != mine {
            let reason = format!("memory comes in units of {unit} pages, which are {mine} here");
            return Err(Failure::new(Cause::Failed, reason));
        }
        if let Some(part) = first_part(&missing, unit) {
            let reason =
                format!("{part} is missing, which is a part of {unit} pages that come together");
            return Err(Failure::new(Cause::Protocol, reason));
        }
        vm.set_draining(true);
        self.retract(&missing)?;
        let no = |what: &str| Failure::new(Cause::Failed, format!("post-copy without {what}"));
        let mut userfault = self.userfault.take().ok_or_else(|| no("userfaultfd"))?;
        userfault.register(vm.as_ref())?;
        let arrivals = Arc::new(Arrivals::new(userfault, unit, missing));
        let (requests, stop) = (Arc::new(Requests::default()), StopFaults::new()?);
        {
            let (arrivals, requests, stop) =
                (Arc::clone(&arrivals), Arc::clone(&requests), Arc::clone(&stop));
            self.spawn("mig-faults", move || faults::serve(&arrivals, &requests, &stop))?;
        }
        self.drain = Some(Drain {
            arrivals,
            requests,
            stop,
            bringers: Vec::new(),
            started: Instant::now(),
            took: None,
            interruptions: 0,
            ranges: None,
            frozen: false,
        });
        let pages = std::mem::take(&mut self.synced);
        self.connect_drain(pages)
    }

    /// Pages are brought by these connections, and asked for.
    fn connect_drain(&mut self, pages: Vec<RecordReader<Stream>>) -> Result<(), Failure> {
        let Some((records, out, transport)) = self.requests_joined.take() else {
            return Err(Failure::new(Cause::Lost, "there is no connection for requests"));
        };
        self.bring("mig-demand", records, Way::Demand)?;
        for (index, records) in pages.into_iter().enumerate() {
            self.bring(&format!("mig-bring-{index}"), records, Way::Push)?;
        }
        let Some(drain) = &self.drain else { return Ok(()) };
        let buffered = out.map(|stream| BufWriter::with_capacity(REQUEST_BUFFER, stream));
        drain.arrivals.restart_waits();
        drain.requests.connect(buffered, transport);
        drain.requests.ask(&drain.arrivals.outstanding());
        Ok(())
    }

    fn bring(
        &mut self,
        name: &str,
        records: RecordReader<Stream>,
        way: Way,
    ) -> Result<(), Failure> {
        let Some(drain) = &mut self.drain else { return Ok(()) };
        let (arrivals, inbox) = (Arc::clone(&drain.arrivals), self.sender.clone());
        let generation = self.generation;
        let thread = threads::spawn(self.around.scope, name, move || {
            bring_all(records, &arrivals, way, generation, &inbox);
        })?;
        drain.bringers.push(thread);
        Ok(())
    }

    /// Loads the state on a thread of its own: it may wait for pages, and this one has to notice when they will not come.
    pub(in crate::destination) fn load_beside(
        &mut self,
        sections: Vec<Section>,
    ) -> Result<(), Failure> {
        let (vm, paused, inbox) = (Arc::clone(self.vm()?), self.paused, self.sender.clone());
        let thread = threads::spawn(self.around.scope, "mig-load", move || {
            let loaded = vm.load_state(&sections, paused);
            // Fails when the session has ended.
            let _ = inbox.send(Input::Loaded(loaded));
        })?;
        let outcome = loop {
            match self.next_or_end(Instant::now() + INTERVAL) {
                Ok(Some(Input::Loaded(loaded))) => break loaded.map_err(Failure::from),
                Ok(_) => {}
                Err(failure) => break Err(failure),
            }
        };
        if outcome.is_err() {
            // Who waits for a page goes on with zeros, in a VM that will never run.
            if let Some(drain) = &self.drain {
                drain.arrivals.userfault().finish()?;
            }
        }
        if thread.join().is_err() {
            return Err(Failure::new(Cause::Failed, "the thread that loads the state panicked"));
        }
        outcome
    }

    /// Ends the thread that reads page faults, where it still does: nobody is served any more.
    pub(in crate::destination) fn stop_faults(&self) {
        if let Some(drain) = &self.drain {
            drain.stop.stop();
        }
    }

    /// Memory will not come: the VM is dropped without having run.
    pub(in crate::destination) fn abandon_drain(&mut self) {
        if let Some(drain) = self.drain.take() {
            drain.requests.disconnect();
            drain.arrivals.userfault().abandon();
            drain.stop.stop();
        }
    }

    /// Waits until all pages are in, over as many connections as it takes.
    pub(in crate::destination) fn drain(&mut self) {
        let Some(drain) = &mut self.drain else { return };
        drain.started = Instant::now();
        let arrivals = Arc::clone(&drain.arrivals);
        self.around.host.draining(self.offer.id);
        let mut connected = self.link.is_some();
        if connected {
            self.expect_guests(0, true);
        } else {
            self.interrupted("the connection was lost before the guest ran");
        }
        while arrivals.left() > 0 || self.is_frozen() {
            self.freeze_or_thaw(connected || arrivals.left() == 0);
            self.tell_draining(connected, None);
            match self.next(Instant::now() + INTERVAL) {
                Some(Input::Lost { text, .. }) => {
                    self.interrupted(&text);
                    connected = false;
                }
                Some(Input::Aborted(text)) => {
                    self.interrupted(&format!("the source gave up: {text}"));
                    connected = false;
                }
                // It would not be there any more to answer.
                Some(Input::Done) if connected => {
                    self.interrupted("the source said that it is done, and it is not");
                    connected = false;
                }
                Some(Input::Recover { connections, records, transport }) => {
                    if connected {
                        self.interrupted("the source lost a connection");
                    }
                    let recovered = self.recovered(connections, records, transport);
                    connected = recovered.is_ok();
                    if let Err(failure) = recovered {
                        self.interrupted(&failure.reasons.join("; "));
                    }
                }
                Some(Input::GuestEnded) => return self.end_drain("the guest ended"),
                Some(Input::Detach) => return self.end_drain("the destination ends"),
                Some(_) => {}
                None if connected => {
                    let patience = self.offer.dead.max(INTERVAL * 5);
                    if arrivals.oldest().is_some_and(|since| since.elapsed() > patience) {
                        self.interrupted("the source does not answer requests for pages");
                        connected = false;
                    }
                }
                None => {}
            }
        }
        self.complete_drain();
    }

    fn is_frozen(&self) -> bool {
        self.drain.as_ref().is_some_and(|drain| drain.frozen)
    }

    /// A guest that needs a page from a source that may be gone stands: a part of it would go on beside who waits. It goes
    /// on with the source, which may come back. Tried again where the VM is busy otherwise.
    fn freeze_or_thaw(&mut self, connected: bool) {
        let (Some(drain), Some(vm)) = (&mut self.drain, &self.vm) else { return };
        let waits = |since: Instant| drain.frozen || since.elapsed() > self.offer.dead;
        let freeze = !connected && drain.arrivals.oldest().is_some_and(waits);
        if freeze == drain.frozen || !vm.freeze(freeze) {
            return;
        }
        drain.frozen = freeze;
        let missing = drain.arrivals.left();
        match freeze {
            true => tracing::warn!(
                missing,
                "the guest needs a page that is at the source, and stands until it comes"
            ),
            false => tracing::info!("the guest goes on"),
        }
        self.journal(|entry| entry.set_missing(freeze.then_some(missing)));
    }

    /// Notes something that the migration does not depend on.
    fn journal(&mut self, note: impl FnOnce(&mut DestinationEntry) -> Result<(), JournalError>) {
        if let Some(Err(error)) = self.entry.as_mut().map(note) {
            tracing::warn!(%error, "the journal does not say what is missing");
        }
    }

    /// All pages are in.
    fn complete_drain(&mut self) {
        if let Some(drain) = &mut self.drain {
            drain.took = Some(drain.started.elapsed());
            if let Err(error) = drain.arrivals.userfault().finish() {
                tracing::error!(%error, "userfaultfd stays open");
            }
            drain.stop.stop();
        }
        self.tell_draining(true, None);
        self.around.control.state().drain = None;
        if let Some(vm) = &self.vm {
            vm.set_draining(false);
        }
        // So long it waits for DRAINED before it takes the connection for lost.
        let patience = self.offer.dead * LAST_WORD + LINGER;
        let connected = self.link.is_some();
        let mut deadline = Instant::now() + if connected { patience } else { LINGER };
        self.send_drained();
        self.journal(|entry| entry.drained(None));
        // A source that does not know it yet comes again.
        while let Some(input) = self.next(deadline) {
            match input {
                Input::Done => {
                    self.confirmed = true;
                    break;
                }
                Input::Recover { connections, records, transport } => {
                    self.interrupted("the source lost a connection");
                    if self.recovered(connections, records, transport).is_ok() {
                        self.send_drained();
                        deadline = Instant::now() + patience;
                    }
                }
                Input::Lost { .. } => deadline = Instant::now() + LINGER,
                Input::GuestEnded | Input::Detach => break,
                _ => {}
            }
        }
        self.disconnect();
    }

    fn send_drained(&self) {
        let (Some(drain), Some(link)) = (&self.drain, &self.link) else { return };
        let report = drain.report();
        let blocked = report.blocked_us.iter();
        let drained = Drained {
            demand_pages: report.demand_pages,
            prepaged_pages: report.prepaged_pages,
            pushed_pages: report.pushed_pages,
            zero_pages: report.zero_pages,
            local_pages: report.local_pages,
            duplicate_pages: report.duplicate_pages,
            requests: report.requests,
            drain_us: as_micros(report.drain),
            cpu_us: as_micros(process_cpu_time().saturating_sub(self.cpu_started)),
            latency: report.latency.buckets().to_vec(),
            blocked: blocked.take(MAX_BLOCKED).map(|(name, us)| (name.as_str(), *us)).collect(),
        };
        if let Err(error) = link.send(&drained) {
            tracing::debug!(%error, "DRAINED was not sent");
        }
    }

    /// The guest, or this process, ends before all pages are in.
    fn end_drain(&mut self, why: &str) {
        if let Some(link) = &self.link {
            link.abort(Cause::GuestEnded.abort_reason(), why);
        }
        self.stop_faults();
        if let Some(missing) = self.drain.as_ref().map(|drain| drain.arrivals.left()) {
            self.journal(|entry| entry.drained(Some(missing)));
        }
        self.reasons.push(why.to_owned());
        // Who loses another connection first would not know why.
        let deadline = Instant::now() + self.offer.alive;
        while self.link.is_some()
            && !matches!(self.next(deadline), None | Some(Input::Lost { .. } | Input::Done))
        {
        }
        self.disconnect();
        self.around.control.state().drain = None;
    }

    fn disconnect(&mut self) {
        self.close_connections();
        if let Some(drain) = &mut self.drain {
            drain.requests.disconnect();
            for thread in drain.bringers.drain(..) {
                // They only put pages in and end with their connection.
                if thread.join().is_err() {
                    tracing::error!("a thread that brings pages in panicked");
                }
            }
        }
        self.requests_joined = None;
        self.joined.clear();
    }

    /// The migration pauses, not the guest: it goes on with what is here until it needs more.
    fn interrupted(&mut self, why: &str) {
        self.disconnect();
        self.generation += 1;
        if let Some(drain) = &mut self.drain {
            drain.interruptions += 1;
            let missing = drain.arrivals.missing();
            let ranges = MissingRanges::of(&missing);
            tracing::warn!(
                why,
                pages = missing.count(),
                %ranges,
                "memory does not come any more; waiting for the source"
            );
            drain.ranges = Some(ranges);
        }
        self.expect_guests(0, true);
        self.tell_draining(false, Some(why.to_owned()));
        self.tell(Some(format!("memory is still at the source: {why}")));
    }

    fn expect_guests(&self, connections: u16, recover: bool) {
        let Some(token) = self.token else { return };
        self.door.expect(Some(Guests {
            id: self.offer.id,
            token,
            joined: vec![false; usize::from(connections)],
            requests: connections > 0,
            recover,
        }));
    }

    /// Tells the source what is missing, and goes on.
    fn recovered(
        &mut self,
        connections: u16,
        records: RecordReader<Stream>,
        transport: Arc<dyn Transport>,
    ) -> Result<(), Failure> {
        let connections =
            connections.clamp(1, self.around.options.max_connections.min(MAX_CONNECTIONS));
        let dead = self.offer.dead;
        transport.set_timeouts(Some(dead), Some(dead))?;
        let link = MainLink::open(Arc::clone(&transport), StreamKind::Continue)?;
        let link = Arc::new(link);
        self.link = Some(Arc::clone(&link));
        self.expect_guests(connections, true);
        let missing = match &self.drain {
            Some(drain) => drain.arrivals.missing(),
            None => return Err(Failure::new(Cause::Failed, "nothing is missing")),
        };
        let id = self.offer.id.0;
        link.write(|out| -> Result<(), StreamError> {
            out.send(&Hello { id, program: env!("CARGO_PKG_VERSION"), features: 0 })?;
            out.send(&Recovered { pages: missing.count(), connections })?;
            write_runs(out, RecordType::Missing, &missing)
        })?;
        let (generation, inbox) = (self.generation, self.sender.clone());
        self.spawn("mig-main-in", move || read_continued(records, generation, &inbox))?;
        let interval = self.offer.alive;
        self.spawn("mig-alive", move || link.keep_alive(interval))?;
        self.await_joins(connections)?;
        let pages = self.joined.drain(..).map(|joined| joined.records).collect();
        self.connect_drain(pages)
    }

    fn await_joins(&mut self, connections: u16) -> Result<(), Failure> {
        let deadline = Instant::now() + self.around.options.timing.accept;
        while self.joined.len() < usize::from(connections) || self.requests_joined.is_none() {
            match self.next(deadline) {
                Some(Input::Joined { index, records, out, transport }) => {
                    self.take_joined(index, records, out, transport);
                }
                Some(Input::Lost { text, cause, .. }) => return Err(Failure::new(cause, text)),
                // Looked at when this is over.
                Some(again @ (Input::GuestEnded | Input::Detach | Input::Recover { .. })) => {
                    // The inbox lives as long as the session.
                    let _ = self.sender.send(again);
                    return Err(Failure::new(Cause::Lost, "something else came first"));
                }
                Some(_) => {}
                None => {
                    return Err(Failure::new(Cause::Deadline, "the source did not join in time"));
                }
            }
        }
        Ok(())
    }

    fn tell_draining(&self, connected: bool, note: Option<String>) {
        let Some(drain) = &self.drain else { return };
        let mut state = self.around.control.state();
        let before = state.drain.take();
        // Why there is no connection stays true until there is one.
        let note = note.or(before.and_then(|before| before.note)).filter(|_| !connected);
        state.drain = Some(Draining {
            connected,
            missing_pages: drain.arrivals.left(),
            missing: drain.ranges.clone().filter(|_| !connected),
            frozen: drain.frozen,
            note,
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::address::Gfn;
    use crate::layout::MemoryLayout;

    #[test]
    fn what_is_missing_consists_of_whole_units() {
        let range = |start, pages| PageRange::new(Gfn(start), pages).unwrap();
        let layout = Arc::new(MemoryLayout::new([range(3, 10), range(100, 8)]).unwrap());
        let first = |runs: &[PageRange]| {
            let mut missing = PageSet::empty(&layout);
            for run in runs {
                missing.insert(*run).unwrap();
            }
            first_part(&missing, 4)
        };
        assert_eq!(first(&[range(3, 4), range(11, 2), range(104, 4)]), None);
        assert_eq!(first(&[range(3, 4), range(8, 1)]), Some(range(7, 4)));
        assert_eq!(first(&[range(12, 1)]), Some(range(11, 2)), "a short one must be whole too");
    }
}
