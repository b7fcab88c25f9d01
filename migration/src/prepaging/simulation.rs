//! Post-copy in virtual time: what a guest that touches given pages would wait for, over a link of
//! given speed. Compares ways of pre-paging, reproducibly and in a second.
//!
//! ```text
//!   guest    think | touch a page that is not there | ............ waits ............ | goes on
//!                                    \                                       /
//!   source                            request: Plan::demand, put before bulk, but what
//!                                     is on the wire is finished first
//! ```
//!
//! It is a model: one guest with one touch after the other, also where several vCPUs are interleaved; the cost of
//! faults, of headers and of both hosts' CPUs is left out; pages arrive one by one.

use std::sync::Arc;
use std::time::Duration;

use super::{Plan, Prepaging};
use crate::address::{Gfn, PageRange, PAGE_SIZE};
use crate::layout::MemoryLayout;
use crate::page_set::PageSet;

/// What push puts on the link at once, pages: 64 KiB.
const BULK_PAGES: u64 = 16;

/// The guest's next use of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touch {
    /// The page. One that is not memory, or not unsent, is there from the beginning.
    pub gfn: Gfn,
    /// What the guest does before, by itself.
    pub think: Duration,
}

/// The way between source and destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// There and back, without the time that pages take.
    pub round_trip: Duration,
    /// Bytes of pages per second, at least 1.
    pub bytes_per_second: u64,
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Outcome {
    /// Touches that brought their page over the network: network faults.
    pub faults: u64,
    /// Touches of a page that was on its way when the request came to the source. A destination
    /// cannot know that and asks all the same (so does QEMU), but no page is sent for it.
    pub waits: u64,
    /// Time that the guest stood still in both.
    pub waited: Duration,
    /// From the first touch's thinking to the last touch.
    pub duration: Duration,
    /// Pages that were asked for, with the rest of their units.
    pub pages_by_demand: u64,
    /// Pages that went with them.
    pub pages_by_prepaging: u64,
    /// Pages that active push sent until the last touch.
    pub pages_by_push: u64,
}

/// Runs a guest that touches the pages of `trace` in order, while the destination lacks `unsent`;
/// `unit` as in [`Plan::new`]. `push`: whether active push sends whenever the link is free.
pub fn simulate(
    trace: &[Touch],
    unsent: PageSet,
    unit: u64,
    prepaging: Prepaging,
    push: bool,
    link: Link,
) -> Outcome {
    let mut outcome = Outcome::default();
    let mut source = Source::new(unsent, unit, prepaging, push, link);
    let mut now = 0;
    for touch in trace {
        now += nanoseconds(touch.think);
        outcome.pages_by_push += source.push_until(now);
        if source.arrival(touch.gfn) <= now {
            continue;
        }
        let asked = now + source.half_trip;
        outcome.pages_by_push += source.push_until(asked);
        let answer = source.plan.demand(touch.gfn);
        if let Some((first, others)) = answer.split_first() {
            outcome.faults += 1;
            outcome.pages_by_demand += first.pages();
            outcome.pages_by_prepaging += others.iter().map(|run| run.pages()).sum::<u64>();
            source.free = source.free.max(asked);
            source.send(&answer);
        } else {
            outcome.waits += 1;
        }
        let arrival = source.arrival(touch.gfn);
        outcome.waited += Duration::from_nanos(arrival - now);
        now = arrival;
    }
    outcome.duration = Duration::from_nanos(now);
    outcome
}

/// The source and its end of the link. Times are nanoseconds since the beginning.
struct Source {
    plan: Plan,
    layout: Arc<MemoryLayout>,
    unit: u64,
    push: bool,
    half_trip: u64,
    page_time: u64,
    /// When what is on the wire will have left.
    free: u64,
    /// When each page, by dense index, is at the destination.
    arrivals: Vec<u64>,
}

impl Source {
    fn new(unsent: PageSet, unit: u64, prepaging: Prepaging, push: bool, link: Link) -> Self {
        let layout = Arc::clone(unsent.layout());
        let arrivals = vec![0; layout.total_pages() as usize];
        let page_time = PAGE_SIZE * 1_000_000_000 / link.bytes_per_second.max(1);
        let half_trip = nanoseconds(link.round_trip) / 2;
        let unit = unit.max(1);
        // What is to be claimed is not there: a second plan tells, since units are made whole.
        let all = Plan::new(unsent.clone(), unit, Prepaging::Off).push(layout.total_pages());
        let plan = Plan::new(unsent, unit, prepaging);
        let free = 0;
        let mut new = Self { plan, layout, unit, push, half_trip, page_time, free, arrivals };
        for run in all {
            new.set_arrival(run, u64::MAX);
        }
        new
    }

    /// When a page is at the destination; `u64::MAX` while it is not sent.
    fn arrival(&self, gfn: Gfn) -> u64 {
        self.layout.index(gfn).map_or(0, |index| self.arrivals[index as usize])
    }

    fn set_arrival(&mut self, pages: PageRange, arrival: u64) {
        if let Ok(indices) = self.layout.index_range(pages) {
            self.arrivals[indices.start as usize..indices.end as usize].fill(arrival);
        }
    }

    /// Sends all batches of active push that begin before `time`; gives the number of their pages.
    fn push_until(&mut self, time: u64) -> u64 {
        let mut pages = 0;
        while self.push && self.free < time {
            let runs = self.plan.push(BULK_PAGES);
            self.push = !runs.is_empty();
            self.send(&runs);
            pages += runs.iter().map(|run| run.pages()).sum::<u64>();
        }
        pages
    }

    /// Puts runs on the wire, one after the other. A unit is there when all of it is.
    fn send(&mut self, runs: &[PageRange]) {
        for unit in runs.iter().flat_map(|run| run.chunks(self.unit)).collect::<Vec<_>>() {
            self.free += unit.pages() * self.page_time;
            self.set_arrival(unit, self.free + self.half_trip);
        }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    duration.as_nanos() as u64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::traces::{read, walks, Pattern, Recorded, Walks, RECORDED};
    use super::*;

    /// A page takes 40.96 µs at this speed, which makes figures easy to check.
    const LINK: Link =
        Link { round_trip: Duration::from_micros(200), bytes_per_second: 100_000_000 };
    const GIGABIT: Link =
        Link { round_trip: Duration::from_micros(200), bytes_per_second: 125_000_000 };
    const PAGE: u64 = 40_960;

    fn all(pages: u64) -> PageSet {
        let range = PageRange::new(Gfn(0), pages).unwrap();
        PageSet::full(&Arc::new(MemoryLayout::new([range]).unwrap()))
    }

    fn touches(gfns: &[u64], think: Duration) -> Vec<Touch> {
        gfns.iter().map(|gfn| Touch { gfn: Gfn(*gfn), think }).collect()
    }

    #[test]
    fn a_fault_costs_the_round_trip_and_its_page() {
        let trace = touches(&[5, 5, 7, 100], Duration::from_micros(10));
        let outcome = simulate(&trace, all(10), 1, Prepaging::Off, false, LINK);
        let wait = Duration::from_nanos(200_000 + PAGE);
        assert_eq!((outcome.faults, outcome.waits, outcome.waited), (2, 0, 2 * wait));
        assert_eq!(outcome.duration, 2 * wait + Duration::from_micros(40));
        assert_eq!((outcome.pages_by_demand, outcome.pages_by_push), (2, 0));
    }

    #[test]
    fn an_answer_waits_for_the_batch_on_the_wire_and_for_no_other() {
        let trace = touches(&[900], Duration::from_micros(10));
        let outcome = simulate(&trace, all(1000), 1, Prepaging::Off, true, LINK);
        // The first batch has 16 pages, which take longer than the request.
        let arrival = 17 * PAGE + 100_000;
        assert_eq!(outcome.duration, Duration::from_nanos(arrival));
        assert_eq!((outcome.faults, outcome.pages_by_push), (1, 16));
    }

    #[test]
    fn a_page_on_its_way_is_waited_for_and_not_sent_again() {
        let trace = touches(&[15], Duration::from_micros(10));
        let outcome = simulate(&trace, all(1000), 1, Prepaging::Off, true, LINK);
        assert_eq!((outcome.faults, outcome.waits), (0, 1));
        assert_eq!(outcome.duration, Duration::from_nanos(16 * PAGE + 100_000));
    }

    #[test]
    fn a_huge_page_is_there_when_all_of_it_is() {
        let trace = touches(&[512, 1023], Duration::ZERO);
        let outcome = simulate(&trace, all(2048), 512, Prepaging::Off, false, LINK);
        assert_eq!((outcome.faults, outcome.pages_by_demand), (1, 512));
        assert_eq!(outcome.duration, Duration::from_nanos(512 * PAGE + 200_000));
    }

    /// 64 MiB at work in 256 MiB that are all still to come, touched twice on average.
    fn at_work(
        (pattern, cpus): (Pattern, u64),
        think: Duration,
        prepaging: Prepaging,
        push: bool,
    ) -> Outcome {
        let (first, pages, touches) = (Gfn(16 << 10), 16 << 10, 32 << 10);
        let trace = walks(&Walks { pattern, cpus, first, pages, touches, think });
        simulate(&trace, all(64 << 10), 1, prepaging, push, GIGABIT)
    }

    fn recorded(guest: &Recorded, think: Duration, prepaging: Prepaging, push: bool) -> Outcome {
        let mut trace = read(guest.text.as_bytes()).unwrap();
        trace.iter_mut().for_each(|touch| touch.think = think);
        simulate(&trace, all(guest.memory_pages), 1, prepaging, push, GIGABIT)
    }

    /// Without push it may be three tenths. Windows of 4 pages to both sides of faults at random places leave nothing to fault
    /// on once 16 % of all pages have faulted (Rényi's parking problem), within a hot spot as everywhere; beacon's traces stop at 3/4
    /// of the working set, which makes that 0.16/0.75, 21 % of the faults of demand alone.
    #[test]
    fn bubbling_leaves_at_most_a_fifth_of_the_faults_of_recorded_guests() {
        for guest in RECORDED {
            for think in [FAST, SLOW] {
                let demand = recorded(&guest, think, Prepaging::Off, false);
                let bubble = recorded(&guest, think, Prepaging::Bubble, true);
                let counted = bubble.faults + if think == SLOW { bubble.waits } else { 0 };
                let name = guest.name;
                assert!(5 * counted <= demand.faults, "{name}: {bubble:?}, not {demand:?}");
                let alone = recorded(&guest, think, Prepaging::Bubble, false);
                assert!(10 * alone.faults <= 3 * demand.faults, "{name}: {alone:?} without push");
            }
        }
    }

    #[test]
    fn recorded_guests_with_little_order_lose_nothing_to_linear_order() {
        let guests = RECORDED.iter().filter(|guest| ["random", "Linux"].contains(&guest.name));
        for guest in guests {
            for (think, push) in [(FAST, false), (SLOW, false), (FAST, true), (SLOW, true)] {
                let linear = recorded(guest, think, Prepaging::Linear, push);
                let bubble = recorded(guest, think, Prepaging::Bubble, push);
                loses_nothing(bubble, linear, &format!("{}, push {push}", guest.name));
            }
        }
    }

    /// Neither in faults nor in time, within a twentieth.
    fn loses_nothing(bubble: Outcome, linear: Outcome, what: &str) {
        assert!(
            100 * bubble.faults <= 105 * linear.faults
                && 100 * bubble.waited <= 105 * linear.waited,
            "{what}: {bubble:?}, linear {linear:?}"
        );
    }

    /// Faster than the link brings pages, and slower.
    const FAST: Duration = Duration::from_micros(20);
    const SLOW: Duration = Duration::from_micros(100);

    #[test]
    fn bubbling_leaves_at_most_a_fifth_of_the_faults() {
        for pattern in [Pattern::Sequential, Pattern::Stride(7), Pattern::HotSpot] {
            for guest in [(pattern, 1), (pattern, 2)] {
                for think in [FAST, SLOW] {
                    let demand = at_work(guest, think, Prepaging::Off, false);
                    let bubble = at_work(guest, think, Prepaging::Bubble, true);
                    // A guest that is faster than the link has to wait for nearly every page.
                    let counted = bubble.faults + if think == SLOW { bubble.waits } else { 0 };
                    assert!(5 * counted <= demand.faults, "{guest:?}: {bubble:?}, not {demand:?}");
                }
            }
        }
    }

    #[test]
    fn walks_are_recognised_without_push() {
        for pattern in [Pattern::Sequential, Pattern::Stride(7)] {
            for guest in [(pattern, 1), (pattern, 2)] {
                let demand = at_work(guest, SLOW, Prepaging::Off, false);
                let bubble = at_work(guest, SLOW, Prepaging::Bubble, false);
                assert!(40 * bubble.faults <= demand.faults, "{guest:?}: {bubble:?}");
            }
        }
    }

    /// Push in whole runs would bring seven pages for each that is touched, too slowly.
    #[test]
    fn push_follows_a_stride() {
        for guest in [(Pattern::Stride(7), 1), (Pattern::Stride(7), 2)] {
            let linear = at_work(guest, SLOW, Prepaging::Linear, true);
            let bubble = at_work(guest, SLOW, Prepaging::Bubble, true);
            assert!(5 * bubble.waited <= linear.waited, "{guest:?}: {bubble:?}, not {linear:?}");
        }
    }

    #[test]
    fn random_access_loses_nothing_to_linear_order() {
        for guest in [(Pattern::Random, 1), (Pattern::Random, 2)] {
            for (think, push) in [(FAST, false), (SLOW, false), (FAST, true), (SLOW, true)] {
                let linear = at_work(guest, think, Prepaging::Linear, push);
                let bubble = at_work(guest, think, Prepaging::Bubble, push);
                loses_nothing(bubble, linear, &format!("{guest:?}, push {push}"));
            }
        }
    }
}
