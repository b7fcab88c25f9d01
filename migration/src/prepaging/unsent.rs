//! Which units of memory nobody has claimed yet: a bitmap of two levels.
//!
//! ```text
//!   summary   one bit per word: is it not zero          16 GiB of small pages: 1024 words
//!   words     one bit per unit: is it unsent                                  65 536 words
//! ```
//!
//! Whether a search is for the next unit or for the one before, it looks at one word, then at the summary: however
//! empty the map has become, a claim costs less than a microsecond.
//!
//! A *unit* is what goes together: a page, or the 512 of a huge page. Units are counted from each
//! region's start; the last one of a region may be shorter. They are numbered across regions without holes.

use std::ops::Range;

use crate::address::{Gfn, PageRange};
use crate::page_set::PageSet;

const WORD_BITS: u64 = u64::BITS as u64;

/// A region of guest memory, and the numbers of its units.
#[derive(Debug, Clone)]
struct Region {
    range: PageRange,
    units: Range<u64>,
}

/// The units that are still to be claimed.
#[derive(Debug)]
pub(super) struct Unsent {
    regions: Vec<Region>,
    unit: u64,
    words: Vec<u64>,
    summary: Vec<u64>,
    pages: u64,
}

impl Unsent {
    /// All units of `unit` pages (at least 1) that have a page in `unsent`.
    pub(super) fn new(unsent: &PageSet, unit: u64) -> Self {
        let unit = unit.max(1);
        let mut regions: Vec<Region> = Vec::new();
        let mut total = 0;
        for range in unsent.layout().regions() {
            let units = total..total + range.pages().div_ceil(unit);
            total = units.end;
            regions.push(Region { range, units });
        }
        let words = vec![0; total.div_ceil(WORD_BITS) as usize];
        let summary = vec![0; words.len().div_ceil(WORD_BITS as usize)];
        let mut new = Self { regions, unit, words, summary, pages: 0 };
        for run in unsent.runs() {
            let last = Gfn(run.end().0 - 1);
            if let (Some(first), Some(last)) = (new.unit_at(run.start()), new.unit_at(last)) {
                new.insert(first..last + 1);
            }
        }
        for i in 0..new.regions.len() {
            let mut from = new.regions[i].units.clone();
            while let Some(start) = new.next(from.clone()) {
                from.start = new.run_from(start..from.end);
                new.pages += new.range(start..from.start).pages();
            }
        }
        new
    }

    /// Pages of all units that are left.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages of a unit.
    pub(super) fn unit_pages(&self) -> u64 {
        self.unit
    }

    /// Number of units of memory, claimed or not.
    pub(super) fn total(&self) -> u64 {
        self.regions.last().map_or(0, |region| region.units.end)
    }

    /// The unit of a page, if the page is memory.
    pub(super) fn unit_at(&self, gfn: Gfn) -> Option<u64> {
        let after = self.regions.partition_point(|region| region.range.start() <= gfn);
        let region = self.regions[..after].last()?;
        let inside = (gfn.0 - region.range.start().0) / self.unit;
        (gfn < region.range.end()).then_some(region.units.start + inside)
    }

    /// The units of the region that `unit` is in.
    pub(super) fn region(&self, unit: u64) -> Range<u64> {
        self.region_of(unit).units.clone()
    }

    /// Whether a unit is left.
    pub(super) fn contains(&self, unit: u64) -> bool {
        self.words[(unit / WORD_BITS) as usize] >> (unit % WORD_BITS) & 1 == 1
    }

    /// The first unit of `range` that is left.
    pub(super) fn next(&self, range: Range<u64>) -> Option<u64> {
        let edge = (range.start / WORD_BITS + 1) * WORD_BITS;
        first_one(&self.words, range.start..range.end.min(edge)).or_else(|| {
            let word = first_one(&self.summary, edge / WORD_BITS..range.end.div_ceil(WORD_BITS))?;
            let bit = self.words[word as usize].trailing_zeros();
            let found = word * WORD_BITS + u64::from(bit);
            (found < range.end).then_some(found)
        })
    }

    /// The last unit of `range` that is left.
    pub(super) fn previous(&self, range: Range<u64>) -> Option<u64> {
        if range.is_empty() {
            return None;
        }
        let edge = (range.end - 1) / WORD_BITS * WORD_BITS;
        last_one(&self.words, range.start.max(edge)..range.end).or_else(|| {
            let word = last_one(&self.summary, range.start / WORD_BITS..edge / WORD_BITS)?;
            let bit = WORD_BITS - 1 - u64::from(self.words[word as usize].leading_zeros());
            let found = word * WORD_BITS + bit;
            (found >= range.start).then_some(found)
        })
    }

    /// Where the units that are left without a gap from the start of `range` on end.
    pub(super) fn run_from(&self, range: Range<u64>) -> u64 {
        let mut at = range.start;
        while at < range.end {
            let word = self.words[(at / WORD_BITS) as usize] >> (at % WORD_BITS);
            let ones = u64::from(word.trailing_ones());
            at += ones;
            if ones == 0 || at % WORD_BITS != 0 {
                break;
            }
        }
        at.min(range.end)
    }

    /// Where the units that are left without a gap up to the end of `range` begin.
    pub(super) fn run_until(&self, range: Range<u64>) -> u64 {
        let mut at = range.end;
        while at > range.start {
            let below = WORD_BITS - 1 - (at - 1) % WORD_BITS;
            let word = self.words[((at - 1) / WORD_BITS) as usize] << below;
            let ones = u64::from(word.leading_ones());
            at -= ones;
            if ones == 0 || at % WORD_BITS != 0 {
                break;
            }
        }
        at.max(range.start)
    }

    /// Claims units of one region that are all left; gives their pages.
    pub(super) fn claim(&mut self, units: Range<u64>) -> PageRange {
        debug_assert!(self.run_from(units.clone()) == units.end, "{units:?} claimed twice");
        let mut at = units.start;
        while at < units.end {
            let (word, mask, next) = word_of(at, units.end);
            self.words[word] &= !mask;
            if self.words[word] == 0 {
                self.summary[word / WORD_BITS as usize] &= !(1 << (word as u64 % WORD_BITS));
            }
            at = next;
        }
        let range = self.range(units);
        self.pages -= range.pages();
        range
    }

    /// Claims the first `units` units that are left in `range`, which lies in one region; takes what it found off
    /// `units`. Gives the last one.
    pub(super) fn claim_up(
        &mut self,
        mut range: Range<u64>,
        units: &mut u64,
        runs: &mut Vec<PageRange>,
    ) -> Option<u64> {
        let mut last = None;
        while *units > 0 {
            let Some(start) = self.next(range.clone()) else { break };
            let end = self.run_from(start..range.end.min(start + *units));
            runs.push(self.claim(start..end));
            *units -= end - start;
            range.start = end;
            last = Some(end - 1);
        }
        last
    }

    /// As [`Unsent::claim_up`], the last units of `range`, downwards. Gives the lowest one.
    pub(super) fn claim_down(
        &mut self,
        mut range: Range<u64>,
        units: &mut u64,
        runs: &mut Vec<PageRange>,
    ) -> Option<u64> {
        let mut lowest = None;
        while *units > 0 {
            let Some(last) = self.previous(range.clone()) else { break };
            let end = last + 1;
            let start = self.run_until(range.start.max(end.saturating_sub(*units))..end);
            runs.push(self.claim(start..end));
            *units -= end - start;
            range.end = start;
            lowest = Some(start);
        }
        lowest
    }

    /// Claims the first `units` units that are left at `from + stride`, `from + 2 * stride` and so on, in the region
    /// of `from`, within so many `steps`; takes what it found and went off both. Gives where it came to.
    pub(super) fn claim_along(
        &mut self,
        from: u64,
        stride: i64,
        steps: &mut u64,
        units: &mut u64,
        runs: &mut Vec<PageRange>,
    ) -> u64 {
        let region = self.region(from);
        let mut at = from;
        while *steps > 0 && *units > 0 {
            let next = at.checked_add_signed(stride).filter(|next| region.contains(next));
            let Some(next) = next else { break };
            at = next;
            *steps -= 1;
            if self.contains(at) {
                runs.push(self.claim(at..at + 1));
                *units -= 1;
            }
        }
        at
    }

    fn insert(&mut self, units: Range<u64>) {
        let mut at = units.start;
        while at < units.end {
            let (word, mask, next) = word_of(at, units.end);
            self.words[word] |= mask;
            self.summary[word / WORD_BITS as usize] |= 1 << (word as u64 % WORD_BITS);
            at = next;
        }
    }

    fn region_of(&self, unit: u64) -> &Region {
        let after = self.regions.partition_point(|region| region.units.start <= unit);
        &self.regions[after.saturating_sub(1)]
    }

    /// The pages of units of one region.
    fn range(&self, units: Range<u64>) -> PageRange {
        let Region { range, units: all } = self.region_of(units.start);
        let start = range.start().0 + (units.start - all.start) * self.unit;
        let end = range.start().0 + (units.end - all.start) * self.unit;
        PageRange::trusted(Gfn(start), end.min(range.end().0) - start)
    }
}

/// The word of `at`, which of its bits lie in `at..end`, and the bit after them.
fn word_of(at: u64, end: u64) -> (usize, u64, u64) {
    let bit = at % WORD_BITS;
    let bits = (WORD_BITS - bit).min(end - at);
    ((at / WORD_BITS) as usize, (u64::MAX >> (WORD_BITS - bits)) << bit, at + bits)
}

fn first_one(words: &[u64], range: Range<u64>) -> Option<u64> {
    let mut at = range.start;
    while at < range.end {
        let (word, mask, next) = word_of(at, range.end);
        let bits = words[word] & mask;
        if bits != 0 {
            return Some(word as u64 * WORD_BITS + u64::from(bits.trailing_zeros()));
        }
        at = next;
    }
    None
}

fn last_one(words: &[u64], range: Range<u64>) -> Option<u64> {
    let mut end = range.end;
    while end > range.start {
        let start = ((end - 1) / WORD_BITS * WORD_BITS).max(range.start);
        let (word, mask, _) = word_of(start, end);
        let bits = words[word] & mask;
        if bits != 0 {
            return Some((word as u64 + 1) * WORD_BITS - 1 - u64::from(bits.leading_zeros()));
        }
        end = start;
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::layout::MemoryLayout;

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::new(Gfn(start), pages).unwrap()
    }

    #[test]
    fn units_are_counted_from_each_regions_start_and_are_whole() {
        let layout = Arc::new(MemoryLayout::new([range(3, 10), range(100, 8)]).unwrap());
        let mut pages = PageSet::empty(&layout);
        pages.insert(range(8, 1)).unwrap();
        pages.insert(range(12, 1)).unwrap();
        pages.insert(range(103, 2)).unwrap();
        let mut unsent = Unsent::new(&pages, 4);
        assert_eq!(unsent.total(), 3 + 2);
        assert_eq!(unsent.unit_at(Gfn(12)), Some(2));
        assert_eq!(unsent.unit_at(Gfn(13)), None);
        assert_eq!(unsent.region(4), 3..5);
        assert_eq!(unsent.pages(), 4 + 2 + 8, "the first region's last unit has two pages");
        assert_eq!(unsent.claim(1..3), range(7, 6));
        assert_eq!(unsent.claim(3..5), range(100, 8));
        assert_eq!(unsent.pages(), 0);
    }

    proptest! {
        /// Against the standard library's set, over more words than one word of the summary has.
        #[test]
        fn finds_what_a_set_finds(
            gone in prop::collection::vec((0..6000u64, 1..2000u64), 0..12),
            a in 0..6000u64,
            b in 0..6000u64,
        ) {
            let layout = Arc::new(MemoryLayout::new([range(0, 6000)]).unwrap());
            let mut unsent = Unsent::new(&PageSet::full(&layout), 1);
            let mut model: BTreeSet<u64> = (0..6000).collect();
            for (start, pages) in gone {
                for at in start..(start + pages).min(6000) {
                    if model.remove(&at) {
                        unsent.claim(at..at + 1);
                    }
                }
            }
            prop_assert_eq!(unsent.pages() as usize, model.len());
            let within = a.min(b)..a.max(b);
            prop_assert_eq!(unsent.next(within.clone()), model.range(within.clone()).next().copied());
            prop_assert_eq!(
                unsent.previous(within.clone()),
                model.range(within.clone()).next_back().copied()
            );
            let end = within.clone().find(|at| !model.contains(at)).unwrap_or(within.end);
            prop_assert_eq!(unsent.run_from(within.clone()), end);
            let start = within.clone().rev().find(|at| !model.contains(at));
            prop_assert_eq!(unsent.run_until(within.clone()), start.map_or(within.start, |at| at + 1));
        }
    }
}
