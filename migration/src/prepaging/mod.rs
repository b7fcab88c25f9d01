//! Which page of a post-copy migration goes next: a pure structure, asked by whoever answers
//! faults and by whoever pushes.
//!
//! ```text
//!   fault    -> Plan::demand -> the page, and what the guest will want next (pre-paging)
//!   the link is free -> Plan::push -> what active push sends
//! ```
//!
//! Every page is *claimed* once, by one of them; who claimed it sends it. With [`Prepaging::Bubble`]:
//!
//! - `streams` recognises walks through memory; the answer to a fault then runs ahead of the guest;
//! - `pivots` has push grow windows around the latest faults, bent the way that a walk goes.
//!
//! [`simulation`] tells in virtual time what that is worth, with the walks of [`traces`]; the example `prepaging` prints it.

mod pivots;
pub mod simulation;
mod streams;
#[cfg(test)]
mod tests;
pub mod traces;
mod unsent;

use serde::{Deserialize, Serialize};

use self::pivots::Pivots;
use self::streams::{Heading, Streams};
use self::unsent::Unsent;
use crate::address::{Gfn, PageRange};
use crate::page_set::PageSet;

/// Pages that [`Prepaging::Linear`] sends behind the one that was asked for.
const LINEAR_WINDOW: u64 = 8;
/// Pages on each side that [`Prepaging::Bubble`] sends with a fault of no known stream.
const AROUND: u64 = 4;
/// A descending window goes out in such pieces, nearest first: pages within a run go out ascending. Units.
const DESCENDING_PIECE: u64 = 8;
/// A window of so many units is looked for in at most this many times as many.
const SEARCH: u64 = 4;

/// How faults change what is sent next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prepaging {
    /// Not at all: each fault brings its page, push goes in ascending order.
    Off,
    /// Push goes on behind the latest fault, whose answer carries the pages that follow.
    Linear,
    /// Push grows windows around the latest faults, answers run ahead of walks through memory.
    #[default]
    Bubble,
}

/// The pages that the destination lacks, and in which order they go.
#[derive(Debug)]
pub struct Plan {
    unsent: Unsent,
    prepaging: Prepaging,
    /// Where ascending push goes on, a unit.
    cursor: u64,
    streams: Streams,
    pivots: Pivots,
}

impl Plan {
    /// A plan for `unsent`, the pages that the destination lacks. `unit` is how many pages go
    /// together (1, or 512 with 2 MiB pages): all runs begin and end at multiples of it from their
    /// region's start, or at the region's end, and a unit with one unsent page is sent whole.
    pub fn new(unsent: PageSet, unit: u64, prepaging: Prepaging) -> Self {
        Self {
            unsent: Unsent::new(&unsent, unit),
            prepaging,
            cursor: 0,
            streams: Streams::default(),
            pivots: Pivots::default(),
        }
    }

    /// A guest waits for this page: claims it, and what is to go with it. The first run is the
    /// page's unit; further runs are pre-paging. Empty when the page was claimed before (it is
    /// there, or on its way) or is not memory.
    pub fn demand(&mut self, gfn: Gfn) -> Vec<PageRange> {
        let Some(at) = self.unsent.unit_at(gfn) else { return Vec::new() };
        let mut runs = Vec::new();
        let wanted = self.unsent.contains(at);
        if wanted {
            runs.push(self.unsent.claim(at..at + 1));
        }
        match self.prepaging {
            Prepaging::Off => {}
            Prepaging::Linear => {
                self.cursor = at + 1;
                if wanted {
                    let mut units = LINEAR_WINDOW / self.unsent.unit_pages();
                    let end = self.unsent.region(at).end.min(at + 1 + units);
                    self.unsent.claim_up(at + 1..end, &mut units, &mut runs);
                }
            }
            // A request for a page that is on its way also tells where the guest is.
            Prepaging::Bubble => self.bubble(at, wanted, &mut runs),
        }
        runs
    }

    /// Claims the unit of a page that goes out unasked. `None` when it was claimed before or is not memory.
    pub fn claim(&mut self, gfn: Gfn) -> Option<PageRange> {
        let at = self.unsent.unit_at(gfn)?;
        self.unsent.contains(at).then(|| self.unsent.claim(at..at + 1))
    }

    /// Claims what active push sends next: at most `pages` pages, but at least one unit. Empty
    /// when everything is claimed.
    pub fn push(&mut self, pages: u64) -> Vec<PageRange> {
        let mut units = (pages / self.unsent.unit_pages()).max(1);
        let mut runs = Vec::new();
        if self.prepaging == Prepaging::Bubble {
            units = self.pivots.claim(units, &mut self.unsent, &mut runs);
        }
        while units > 0 {
            let all = 0..self.unsent.total();
            let ahead = self.unsent.next(self.cursor..all.end);
            let Some(start) = ahead.or_else(|| self.unsent.next(0..self.cursor)) else { break };
            let end = self.unsent.region(start).end.min(start + units);
            self.cursor = self.unsent.run_from(start..end);
            units -= self.cursor - start;
            runs.push(self.unsent.claim(start..self.cursor));
        }
        runs
    }

    /// Pages that are not claimed yet.
    pub fn left(&self) -> u64 {
        self.unsent.pages()
    }

    /// A fault on a unit, which is claimed; `wanted`: it was not before.
    fn bubble(&mut self, at: u64, wanted: bool, runs: &mut Vec<PageRange>) {
        let heading = self.streams.fault(at, wanted, &self.unsent);
        let mut end = at;
        match heading {
            Some(heading) if wanted => {
                end = self.claim_ahead(at, heading, runs);
                self.streams.sent_ahead(at, end);
            }
            None if wanted => self.claim_around(at, runs),
            _ => {}
        }
        let (stride, before) = heading.map_or((0, None), |it| (it.stride, Some(it.before)));
        self.pivots.add(at, end, stride, before, &self.unsent);
    }

    fn claim_around(&mut self, at: u64, runs: &mut Vec<PageRange>) {
        let around = AROUND / self.unsent.unit_pages();
        let region = self.unsent.region(at);
        let (start, end) = (at.saturating_sub(around), at + 1 + around);
        self.unsent.claim_up(at + 1..end.min(region.end), &mut { around }, runs);
        self.unsent.claim_down(start.max(region.start)..at, &mut { around }, runs);
    }

    /// Claims a stream's window; gives its last unit.
    fn claim_ahead(&mut self, at: u64, heading: Heading, runs: &mut Vec<PageRange>) -> u64 {
        let region = self.unsent.region(at);
        let mut units = (heading.window / self.unsent.unit_pages()).max(1);
        let reach = units * SEARCH;
        let mut end = at;
        match heading.stride {
            1 => {
                let within = at + 1..region.end.min(at + 1 + reach);
                end = self.unsent.claim_up(within, &mut units, runs).unwrap_or(end);
            }
            -1 => {
                let within = region.start.max(at.saturating_sub(reach));
                while units > 0 {
                    let mut piece = units.min(DESCENDING_PIECE);
                    units -= piece;
                    end = self.unsent.claim_down(within..end, &mut piece, runs).unwrap_or(end);
                }
            }
            stride => {
                let mut steps = reach;
                end = self.unsent.claim_along(at, stride, &mut steps, &mut units, runs);
            }
        }
        end
    }
}
