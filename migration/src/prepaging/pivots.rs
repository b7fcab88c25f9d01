//! Bubbling: active push grows windows both ways around the latest faults, the *pivots*.
//!
//! After Hines and Gopalan, "Post-copy based live virtual machine migration using adaptive
//! pre-paging and dynamic self-ballooning", VEE 2009, section 3, with several pivots. A pivot is a place;
//! its window is what has been claimed around it, and its edges are the nearest unsent units on both sides:
//!
//! ```text
//!   unsent     | claimed                     | unsent    | claimed       | unsent
//!          <---|-------- pivot -- pivot -----|-->     <--|---- pivot ----|-->
//!                        one bubble: the older pivot is dropped
//! ```
//!
//! Pivots take turns. A new one comes first and has a few turns as a head start.

use std::collections::VecDeque;
use std::ops::Range;

use super::unsent::Unsent;
use crate::address::PageRange;

/// Pivots that are kept. The oldest is dropped; what it had left goes in ascending order at the end.
const MAX_PIVOTS: usize = 16;
/// Turns that a new pivot has before all others: both of its sides, twice.
const HEAD_START: u64 = 4;
/// Of so many turns of a pivot with a direction one goes the other way.
const TURNS_PER_TURN_BACK: u64 = 4;

/// Which way a pivot's window grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bend {
    /// To both sides alike.
    Even,
    /// Mostly to higher units.
    Up,
    /// Mostly to lower units.
    Down,
}

#[derive(Debug, Clone)]
struct Pivot {
    fault: u64,
    /// Where its window grows from: the fault, or the end of what was sent ahead with it.
    at: u64,
    bend: Bend,
    /// Turns that it had.
    turns: u64,
    /// When it came, counted in pivots.
    born: u64,
}

impl Pivot {
    /// The side of the next turn.
    fn goes_up(&self) -> bool {
        match self.bend {
            Bend::Even => self.turns % 2 == 0,
            Bend::Up => self.turns % TURNS_PER_TURN_BACK != TURNS_PER_TURN_BACK - 1,
            Bend::Down => self.turns % TURNS_PER_TURN_BACK == TURNS_PER_TURN_BACK - 1,
        }
    }
}

/// The pivots; the one at the front has the next turn.
#[derive(Debug, Default)]
pub(super) struct Pivots {
    queue: VecDeque<Pivot>,
    born: u64,
}

impl Pivots {
    /// Makes a fault the newest pivot, whose window grows from `at`. It takes over from the pivot
    /// of the fault `before`, if that is one.
    pub(super) fn add(
        &mut self,
        fault: u64,
        at: u64,
        bend: Bend,
        before: Option<u64>,
        unsent: &Unsent,
    ) {
        let bubble = bubble(at, unsent);
        self.queue.retain(|pivot| Some(pivot.fault) != before && !bubble.contains(&pivot.at));
        if self.queue.len() == MAX_PIVOTS {
            let oldest = (0..MAX_PIVOTS).min_by_key(|i| self.queue[*i].born);
            oldest.and_then(|i| self.queue.remove(i));
        }
        self.born += 1;
        self.queue.push_front(Pivot { fault, at, bend, turns: 0, born: self.born });
    }

    /// One turn: claims at most `units` units beside one pivot, beside others only where that one has no more.
    /// Gives how many of them were not found.
    pub(super) fn claim(
        &mut self,
        mut units: u64,
        unsent: &mut Unsent,
        runs: &mut Vec<PageRange>,
    ) -> u64 {
        while let Some(mut pivot) = self.queue.pop_front() {
            let region = unsent.region(pivot.at);
            let up = pivot.goes_up();
            for up in [up, !up] {
                if up {
                    unsent.claim_up(pivot.at..region.end, &mut units, runs);
                } else {
                    unsent.claim_down(region.start..pivot.at, &mut units, runs);
                }
            }
            if units == 0 {
                pivot.turns += 1;
                self.put_back(pivot, unsent);
                break;
            }
            // Its region is empty, and so it is dropped.
        }
        units
    }

    /// Queues a pivot that had a turn, unless its window has met a newer one's.
    fn put_back(&mut self, pivot: Pivot, unsent: &Unsent) {
        let bubble = bubble(pivot.at, unsent);
        let newer = |other: &Pivot| other.born > pivot.born && bubble.contains(&other.at);
        if self.queue.iter().any(newer) {
            return;
        }
        if pivot.turns < HEAD_START {
            self.queue.push_front(pivot);
        } else {
            self.queue.push_back(pivot);
        }
    }
}

/// The units around `at` among which none is unsent, in its region.
fn bubble(at: u64, unsent: &Unsent) -> Range<u64> {
    let region = unsent.region(at);
    let start = unsent.previous(region.start..at).map_or(region.start, |edge| edge + 1);
    start..unsent.next(at + 1..region.end).unwrap_or(region.end)
}
