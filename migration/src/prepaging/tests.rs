//! What must hold of a plan, whatever is asked of it in whatever order.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::layout::MemoryLayout;

const ALL: [Prepaging; 3] = [Prepaging::Off, Prepaging::Linear, Prepaging::Bubble];

fn range(start: u64, pages: u64) -> PageRange {
    PageRange::new(Gfn(start), pages).unwrap()
}

/// Two regions that touch and one beyond a hole; the last units of 8 are short.
fn layout() -> Arc<MemoryLayout> {
    Arc::new(MemoryLayout::new([range(0, 300), range(300, 150), range(1000, 501)]).unwrap())
}

fn plan(pages: u64, unit: u64, prepaging: Prepaging) -> Plan {
    let layout = Arc::new(MemoryLayout::new([range(0, pages)]).unwrap());
    Plan::new(PageSet::full(&layout), unit, prepaging)
}

fn frames(runs: &[PageRange]) -> Vec<u64> {
    runs.iter().flat_map(|run| run.start().0..run.end().0).collect()
}

/// A run of whole units within one region of [`layout`].
fn is_whole(run: PageRange, unit: u64) -> bool {
    let layout = layout();
    let mut regions = layout.regions().filter(|region| region.contains(run));
    regions.next().is_some_and(|region| {
        let (start, end) = (run.start().0 - region.start().0, run.end().0 - region.start().0);
        start % unit == 0 && (end % unit == 0 || run.end() == region.end())
    })
}

#[derive(Debug, Clone)]
enum Ask {
    Demand(u64),
    /// Several faults at a distance.
    Walk(u64, i64, u8),
    Push(u64),
}

fn asks() -> impl Strategy<Value = Vec<Ask>> {
    let ask = prop_oneof![
        (0..1600u64).prop_map(Ask::Demand),
        (0..1600u64, -20..20i64, 1..20u8).prop_map(|(at, by, steps)| Ask::Walk(at, by, steps)),
        (0..100u64).prop_map(Ask::Push),
    ];
    prop::collection::vec(ask, 1..40)
}

proptest! {
    #[test]
    fn every_page_is_claimed_once_in_whole_units(
        unsent in prop::collection::vec((0..1501u64, 1..200u64), 0..8),
        unit in prop_oneof![Just(1u64), Just(8), Just(512)],
        prepaging in prop::sample::select(&ALL[..]),
        asks in asks(),
    ) {
        let layout = layout();
        let mut set = PageSet::empty(&layout);
        let mut expected = BTreeSet::new();
        for (start, pages) in unsent {
            for gfn in start..start + pages {
                if set.insert(range(gfn, 1)).is_err() {
                    continue;
                }
                for region in layout.regions().filter(|region| region.contains(range(gfn, 1))) {
                    let first = gfn - (gfn - region.start().0) % unit;
                    expected.extend(first..(first + unit).min(region.end().0));
                }
            }
        }
        let mut plan = Plan::new(set, unit, prepaging);
        prop_assert_eq!(plan.left() as usize, expected.len());

        let claim = |plan: &Plan, runs: Vec<PageRange>, expected: &mut BTreeSet<u64>| {
            for run in runs {
                prop_assert!(is_whole(run, unit), "{run} is not of whole units of a region");
                for gfn in run.start().0..run.end().0 {
                    prop_assert!(expected.remove(&gfn), "{gfn:#x} was claimed before");
                }
            }
            prop_assert_eq!(plan.left() as usize, expected.len());
            Ok(())
        };
        for ask in asks {
            let faults: Vec<u64> = match ask {
                Ask::Demand(gfn) => vec![gfn],
                Ask::Walk(from, by, steps) => (0..i64::from(steps))
                    .filter_map(|step| from.checked_add_signed(by * step))
                    .collect(),
                Ask::Push(pages) => {
                    let left = plan.left();
                    let runs = plan.push(pages);
                    let claimed = runs.iter().map(|run| run.pages()).sum::<u64>();
                    prop_assert!(claimed <= pages.max(unit));
                    prop_assert_eq!(claimed == 0, left == 0);
                    claim(&plan, runs, &mut expected)?;
                    continue;
                }
            };
            for gfn in faults {
                let runs = plan.demand(Gfn(gfn));
                prop_assert_eq!(runs.is_empty(), !expected.contains(&gfn));
                if let Some(first) = runs.first() {
                    prop_assert!((first.start()..first.end()).contains(&Gfn(gfn)));
                    prop_assert!(first.pages() <= unit, "the page's unit and no more");
                }
                claim(&plan, runs, &mut expected)?;
            }
        }
        loop {
            let runs = plan.push(64);
            if runs.is_empty() {
                break;
            }
            claim(&plan, runs, &mut expected)?;
        }
        prop_assert!(expected.is_empty(), "push alone empties the plan");
    }
}

#[test]
fn off_is_ascending_whatever_faults() {
    let mut plan = plan(1000, 1, Prepaging::Off);
    assert_eq!(plan.demand(Gfn(500)), [range(500, 1)]);
    assert_eq!(plan.demand(Gfn(500)), []);
    assert_eq!(plan.demand(Gfn(5)), [range(5, 1)]);
    assert_eq!(plan.demand(Gfn(1000)), [], "no memory");
    assert_eq!(plan.push(8), [range(0, 5), range(6, 3)]);
    assert_eq!(plan.push(8), [range(9, 8)]);
}

#[test]
fn linear_goes_on_behind_the_latest_fault_and_wraps() {
    let mut plan = plan(100, 1, Prepaging::Linear);
    assert_eq!(plan.demand(Gfn(80)), [range(80, 1), range(81, 8)]);
    assert_eq!(plan.push(8), [range(89, 8)]);
    assert_eq!(plan.push(8), [range(97, 3), range(0, 5)]);
    assert_eq!(plan.demand(Gfn(75)), [range(75, 1), range(76, 4)], "81 was sent");
}

#[test]
fn a_window_bubbles_both_ways_and_the_newest_pivot_has_a_head_start() {
    let mut plan = plan(10_000, 1, Prepaging::Bubble);
    plan.demand(Gfn(5000));
    let up = plan.push(64)[0];
    let down = plan.push(64)[0];
    assert_eq!((up, down), (range(5005, 64), range(4932, 64)));
    plan.push(64);
    plan.push(64);
    plan.demand(Gfn(9000));
    let turns: Vec<bool> = (0..8).map(|_| plan.push(16)[0].start() > Gfn(7000)).collect();
    assert_eq!(turns, [true, true, true, true, false, true, false, true], "then in turn");
}

#[test]
fn a_window_at_the_end_of_memory_grows_the_other_way() {
    let mut plan = plan(10_000, 1, Prepaging::Bubble);
    plan.demand(Gfn(9998));
    assert_eq!(plan.push(16), [range(9978, 16)]);
}

#[test]
fn pivots_that_meet_become_one() {
    let mut plan = plan(10_000, 1, Prepaging::Bubble);
    plan.demand(Gfn(5000));
    plan.demand(Gfn(5100));
    plan.demand(Gfn(9000));
    let is_low = |plan: &mut Plan| plan.push(16)[0].start() < Gfn(7000);
    // Once they have met, the two take as many turns as the one.
    (0..40).for_each(|_| {
        is_low(&mut plan);
    });
    let low = (0..40).filter(|_| is_low(&mut plan)).count();
    assert_eq!(low, 20);
}

#[test]
fn a_walk_is_served_ahead_and_bends_the_window() {
    for stride in [1i64, -1, 7, -7] {
        let mut plan = plan(100_000, 1, Prepaging::Bubble);
        let mut faults = 0;
        let mut sent = BTreeSet::new();
        let page = |step: i64| (50_000 + stride * step) as u64;
        for step in 0..2000 {
            if !sent.contains(&page(step)) {
                faults += 1;
                sent.extend(frames(&plan.demand(Gfn(page(step)))));
                assert!(sent.contains(&page(step)));
            }
        }
        assert!(faults < 2000 / 25, "{faults} faults at a stride of {stride}");
        let ahead = (0..4).filter(|_| {
            let runs = plan.push(16);
            let farthest = if stride > 0 { sent.last() } else { sent.first() }.copied();
            sent.extend(frames(&runs));
            farthest.is_some_and(|sent| (runs[0].start().0 > sent) == (stride > 0))
        });
        assert_eq!(ahead.count(), 3, "pushes in the direction of stride {stride}");
    }
}

#[test]
fn a_descending_walk_gets_the_nearest_pages_first() {
    let mut plan = plan(10_000, 1, Prepaging::Bubble);
    plan.demand(Gfn(5000));
    let runs = plan.demand(Gfn(4995));
    assert_eq!(runs, [range(4995, 1), range(4987, 8)]);
    assert_eq!(plan.demand(Gfn(4986)), [range(4986, 1), range(4978, 8), range(4970, 8)]);
}

#[test]
fn a_fault_with_huge_pages_brings_one_and_a_walk_the_next_one() {
    let mut plan = plan(512 * 100, 512, Prepaging::Bubble);
    assert_eq!(plan.demand(Gfn(512 * 10 + 7)), [range(512 * 10, 512)]);
    assert_eq!(plan.demand(Gfn(512 * 11)), [range(512 * 11, 512), range(512 * 12, 512)]);
    assert_eq!(plan.push(16), [range(512 * 13, 512)]);
}
