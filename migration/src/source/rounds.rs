//! Copying memory while the guest runs.

use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::address::PAGE_SIZE;
use crate::handover::{Cause, SourceEvent};
use crate::page_set::PageSet;
use crate::report::RoundReport;
use crate::snapshot::write_runs;
use crate::source::engine::{Engine, Failure};
use crate::source::pause::whole_units;
use crate::source::predict::{Measured, Next, OnStall, Predictor};
use crate::source::sender::Pass;
use crate::source::throttle::Throttle;
use crate::stream::RecordType;
use crate::vm::{Mode, SourceVm, VmError};

/// What a pause costs besides what is measured: kicking vCPUs, waking threads.
const PAUSE_OVERHEAD: Duration = Duration::from_micros(500);
/// A disk flush that took longer is followed by another round.
const SHORT_FLUSH: Duration = Duration::from_millis(1);

impl Engine<'_, '_, '_> {
    /// Rounds until the rest is small enough.
    pub(super) fn copy(&mut self) -> Result<SourceEvent, Failure> {
        let mode = self.mode();
        if !mode.is_live() {
            self.around.vm.flush_disks()?;
            self.switching = mode == Mode::Postcopy;
            return Ok(SourceEvent::Converged);
        }
        let fixed = self.fixed_cost();
        let mut predictor = Predictor::new(self.around.options.limits, fixed);
        let mut pages = self.begin()?;
        let used_bytes = pages.count() * PAGE_SIZE;
        let mut flushed = false;
        let mut before = u64::MAX;
        let vm = self.around.vm;
        let mut writes = Writes::begin(vm);
        loop {
            let number = u32::try_from(self.rounds.len()).unwrap_or(u32::MAX);
            let started = Instant::now();
            let pass = Pass { number, pages: Arc::new(pages), live: true, last: false };
            let stats = self.pass(&pass)?;
            let busy = started.elapsed().saturating_sub(stats.waited);
            let mut dirty = self.collect()?;
            if let Some(left) = &stats.left {
                dirty.union(left);
            }
            let duration = started.elapsed();
            predictor.sample(stats.bytes, busy);
            let remaining = dirty.count();
            let seconds = duration.as_secs_f64().max(1e-6);
            let round = RoundReport {
                number,
                data_pages: stats.data_pages,
                zero_pages: stats.zero_pages,
                bytes: stats.bytes,
                dirty_pages: remaining,
                dirty_pages_per_second: remaining as f64 / seconds,
                duration,
                predicted_pause: predictor.pause(remaining),
                vcpu_run: self.throttle.as_ref().map_or(Vec::new(), |t| t.run().to_vec()),
                vcpu_dirty_pages_per_second: writes.since(vm).iter().map(|n| n / seconds).collect(),
            };
            let measured = Measured {
                rounds: number.saturating_add(1),
                remaining,
                before,
                bytes: self.shared.bytes.load(Ordering::Relaxed),
                used_bytes,
            };
            let mut next = predictor.decide(&measured, self.downtime());
            if next == Next::Stall || !predictor.shrinks(&measured) {
                next = self.stalled(next, &round, &measured)?;
            }
            before = remaining;
            self.rounds.push(round);
            self.tell(None);
            pages = dirty;
            if next != Next::Pause && self.is_to_switch() {
                let unit = self.around.vm.unit_pages();
                self.retract(&whole_units(pages.clone(), unit)?)?;
                self.switching = true;
            } else if next == Next::Round {
                continue;
            }
            if !flushed {
                flushed = true;
                let started = Instant::now();
                self.around.vm.flush_disks()?;
                if started.elapsed() > SHORT_FLUSH && next == Next::Pause && !self.switching {
                    continue;
                }
            }
            self.pending = Some(pages);
            self.predictor = Some(predictor);
            return Ok(SourceEvent::Converged);
        }
    }

    /// Whether the guest is to move now, and the rest of its memory to follow it.
    fn is_to_switch(&self) -> bool {
        if self.mode() != Mode::Hybrid {
            return false;
        }
        let rounds = self.around.options.postcopy.rounds;
        let enough = rounds.is_some_and(|rounds| self.rounds.len() as u64 >= u64::from(rounds));
        let asked = self.around.options.mode == Mode::Hybrid && enough;
        asked || self.shared.cut.load(Ordering::Relaxed)
    }

    /// Cuts the round short when its time is over.
    pub(super) fn cut_when_due(&self) {
        let after = self.around.options.postcopy.after;
        if self.mode() == Mode::Hybrid && after.is_some_and(|after| self.started.elapsed() >= after)
        {
            self.shared.cut.store(true, Ordering::Relaxed);
        }
    }

    /// What to do about a round that left too much, or hardly less than the one before it.
    fn stalled(
        &mut self,
        next: Next,
        round: &RoundReport,
        measured: &Measured,
    ) -> Result<Next, Failure> {
        if next == Next::Pause {
            return Ok(next);
        }
        let sent =
            (round.data_pages + round.zero_pages) as f64 / round.duration.as_secs_f64().max(1e-6);
        match self.around.options.on_stall {
            OnStall::Throttle => {
                let vm = self.around.vm;
                let throttle = self.throttle.get_or_insert_with(|| Throttle::new(vm.vcpus()));
                let slower = throttle.step(
                    &round.vcpu_dirty_pages_per_second,
                    round.dirty_pages_per_second,
                    sent,
                );
                vm.throttle(throttle.run());
                self.stall.get_or_insert_with(|| why(round, sent));
                // As long as something changes it may still converge.
                let shrinks = measured.remaining < measured.before;
                Ok(if slower || shrinks { Next::Round } else { next })
            }
            _ if next == Next::Round => Ok(next),
            // What is left then follows the guest.
            _ if self.mode() == Mode::Hybrid => {
                self.stall = Some(why(round, sent));
                self.shared.cut.store(true, Ordering::Relaxed);
                Ok(next)
            }
            OnStall::Stop | OnStall::Postcopy => {
                self.stall = Some(why(round, sent));
                Ok(next)
            }
            OnStall::Cancel => {
                let (rounds, pause) = (measured.rounds, round.predicted_pause);
                let reason = format!(
                    "it does not converge: after {rounds} rounds {} pages are left, a pause of \
                     {pause:?}: {}; --on-stall throttle slows the guest down",
                    measured.remaining,
                    why(round, sent)
                );
                Err(Failure::new(Cause::NotConverging, reason))
            }
        }
    }

    fn downtime(&self) -> Duration {
        let changed = self.around.control.state().downtime;
        changed.unwrap_or(self.around.options.downtime)
    }

    /// What the pause costs without any page; an estimate.
    fn fixed_cost(&self) -> Duration {
        let vm = self.around.vm;
        // Last pages, LOADED, COMMIT each cross the network once: one round trip and a half.
        PAUSE_OVERHEAD + vm.expected_save() + self.expected_load + self.round_trip * 3 / 2
    }

    /// Finds out what round 0 sends. Tracking is on, and everything counts as dirty.
    ///
    /// The log is cleared for what has no memory, and only then is asked again what has: a page
    /// that is touched in between is found populated, one that is touched after that is dirty.
    fn begin(&mut self) -> Result<PageSet, Failure> {
        let vm = self.around.vm;
        let mut absent = PageSet::full(vm.layout());
        absent.minus(&vm.populated()?);
        for run in absent.runs() {
            vm.clear(run)?;
        }
        let populated = vm.populated()?;
        self.announce(&populated)?;
        self.known = Some(populated.clone());
        Ok(populated)
    }

    /// Tells the destination what round 0 will look at.
    pub(super) fn announce(&mut self, pages: &PageSet) -> Result<(), Failure> {
        self.skipped_pages = pages.layout().total_pages() - pages.count();
        let sent = self.link()?.write(|out| write_runs(out, RecordType::Announce, pages));
        sent.map_err(|error| self.explained(error.into()))
    }

    /// What was written since it was last cleared, without pages that never had memory: some logs
    /// report more than was written, and to look at those would give them memory.
    pub(super) fn collect(&mut self) -> Result<PageSet, Failure> {
        let vm = self.around.vm;
        let mut dirty = PageSet::empty(vm.layout());
        vm.collect(&mut dirty)?;
        let Some(known) = &mut self.known else { return Ok(dirty) };
        let mut fresh = dirty.clone();
        fresh.minus(known);
        if !fresh.is_empty() {
            clear_all(vm, &fresh)?;
            known.union(&vm.populated()?);
            fresh.minus(known);
            dirty.minus(&fresh);
        }
        Ok(dirty)
    }
}

/// Why a guest does not converge.
fn why(round: &RoundReport, sent: f64) -> String {
    let mib = |pages: f64| pages * PAGE_SIZE as f64 / f64::from(1 << 20);
    let dirty = round.dirty_pages_per_second;
    format!(
        "the guest writes {dirty:.0} pages/s ({:.0} MiB/s), {sent:.0} pages/s ({:.0} MiB/s) go out",
        mib(dirty),
        mib(sent)
    )
}

/// What each vCPU writes.
struct Writes(Vec<u64>);

impl Writes {
    fn begin(vm: &dyn SourceVm) -> Self {
        Self(vm.write_counts().unwrap_or_default())
    }

    /// Since the last call; empty where nobody counts.
    fn since(&mut self, vm: &dyn SourceVm) -> Vec<f64> {
        let now = vm.write_counts().unwrap_or_default();
        let before = std::mem::replace(&mut self.0, now);
        self.0.iter().zip(before).map(|(now, before)| now.wrapping_sub(before) as f64).collect()
    }
}

fn clear_all(vm: &dyn SourceVm, pages: &PageSet) -> Result<(), VmError> {
    for run in pages.runs() {
        vm.clear(run)?;
    }
    Ok(())
}
