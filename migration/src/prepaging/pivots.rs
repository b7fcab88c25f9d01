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
//! Pivots take turns. A new one comes first and has a few turns as a head start. The pivot of a walk is at its head: its
//! window mostly grows the way that the walk goes, at a stride of several units by single units first.

use std::collections::VecDeque;
use std::ops::Range;

use super::unsent::Unsent;
use crate::address::PageRange;

/// Pivots that are kept. The oldest is dropped; what it had left goes in ascending order at the end.
const MAX_PIVOTS: usize = 16;
/// Turns that a new pivot has before all others: both of its sides, twice.
const HEAD_START: u64 = 4;
/// Steps of a longer stride that a pivot pushes, one page each, before it goes on with whole runs: the
/// guest's next faults renew it, and a walk that ended leaves no more than this in pieces.
const STEPS: u64 = 64;
/// Of so many turns of a pivot with a stride one goes the other way.
const TURNS_FOR_ONE_BACK: u64 = 4;

#[derive(Debug, Clone)]
struct Pivot {
    fault: u64,
    /// Where its window grows from: the fault, or the end of what was sent ahead with it.
    at: u64,
    /// Of the walk that it belongs to, or 0; the window mostly grows that way.
    stride: i64,
    /// How far it still goes by the stride alone.
    steps: u64,
    /// Turns that it had.
    turns: u64,
    /// When it came, counted in pivots.
    born: u64,
}

impl Pivot {
    /// The side of the next turn.
    fn goes_up(&self) -> bool {
        let back = self.turns % TURNS_FOR_ONE_BACK == TURNS_FOR_ONE_BACK - 1;
        match self.stride {
            0 => self.turns % 2 == 0,
            stride => (stride > 0) != back,
        }
    }

    fn claim(&mut self, units: &mut u64, unsent: &mut Unsent, runs: &mut Vec<PageRange>) {
        let region = unsent.region(self.at);
        let up = self.goes_up();
        if self.stride.unsigned_abs() > 1 && up == (self.stride > 0) {
            self.at = unsent.claim_along(self.at, self.stride, &mut self.steps, units, runs);
        }
        for up in [up, !up] {
            if up {
                unsent.claim_up(self.at..region.end, units, runs);
            } else {
                unsent.claim_down(region.start..self.at, units, runs);
            }
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
    /// Makes a fault the newest pivot, whose window grows from `at`. With a `stride` other than 0 it
    /// belongs to a walk, and takes over from the pivot of the fault `before`.
    pub(super) fn add(
        &mut self,
        fault: u64,
        at: u64,
        stride: i64,
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
        self.queue.push_front(Pivot { fault, at, stride, steps: STEPS, turns: 0, born: self.born });
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
            pivot.claim(&mut units, unsent, runs);
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
