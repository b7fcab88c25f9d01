//! A set of guest pages: one bit per page over the layout's dense index.
//!
//! A VM of 16 GiB has 4 Mi pages, hence a set of 512 KiB; every operation works on words of 64
//! pages, so that walking a nearly empty or nearly full set costs about 64 Ki steps.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::address::{Gfn, PageRange, RangeError};
use crate::layout::MemoryLayout;

const WORD_BITS: u64 = u64::BITS as u64;

/// A set of pages of one [`MemoryLayout`].
///
/// Operations on two sets demand that both are over the same layout: to mix the pages of two
/// different machines is a mistake in the program, and panics.
#[derive(Clone, PartialEq, Eq)]
pub struct PageSet {
    layout: Arc<MemoryLayout>,
    /// Bits beyond the last page are always zero.
    words: Vec<u64>,
}

impl PageSet {
    /// The empty set.
    pub fn empty(layout: &Arc<MemoryLayout>) -> Self {
        let words = layout.total_pages().div_ceil(WORD_BITS) as usize;
        Self { layout: Arc::clone(layout), words: vec![0; words] }
    }

    /// The set of all pages.
    pub fn full(layout: &Arc<MemoryLayout>) -> Self {
        let mut set = Self::empty(layout);
        set.update(0..layout.total_pages(), |word, mask| *word |= mask);
        set
    }

    /// The layout that the set is over.
    pub fn layout(&self) -> &Arc<MemoryLayout> {
        &self.layout
    }

    /// Adds a range; returns how many of its pages were not in the set before.
    ///
    /// # Errors
    /// [`RangeError::Outside`], and the set is as it was.
    pub fn insert(&mut self, range: PageRange) -> Result<u64, RangeError> {
        let mut added = 0;
        self.update(self.layout.index_range(range)?, |word, mask| {
            added += u64::from((mask & !*word).count_ones());
            *word |= mask;
        });
        Ok(added)
    }

    /// Takes a range out; returns how many of its pages were in the set.
    ///
    /// # Errors
    /// [`RangeError::Outside`], and the set is as it was.
    pub fn remove(&mut self, range: PageRange) -> Result<u64, RangeError> {
        let mut removed = 0;
        self.update(self.layout.index_range(range)?, |word, mask| {
            removed += u64::from((mask & *word).count_ones());
            *word &= !mask;
        });
        Ok(removed)
    }

    /// Adds the pages of a bitmap as KVM_GET_DIRTY_LOG gives it: bit 0 of the first word is page
    /// frame `start`, and words are in ascending order. The bitmap may not cross a region's end
    /// except by zero bits (KVM rounds its size up to whole words).
    ///
    /// # Errors
    /// [`RangeError::Outside`] when a bit is set where there is no memory; the set is then as it
    /// was.
    pub fn insert_bitmap(&mut self, start: Gfn, bitmap: &[u64]) -> Result<(), RangeError> {
        let Some(last) = bitmap.iter().rposition(|word| *word != 0) else {
            return Ok(());
        };
        let bits = (last as u64 + 1) * WORD_BITS - u64::from(bitmap[last].leading_zeros());
        let indices = self.layout.index_range(PageRange::new(start, bits)?)?;
        let first_word = (indices.start / WORD_BITS) as usize;
        let shift = indices.start % WORD_BITS;
        for (i, bits) in bitmap[..=last].iter().enumerate() {
            self.words[first_word + i] |= bits << shift;
            if shift != 0 {
                let carry = bits >> (WORD_BITS - shift);
                // The last carry may belong to a word that does not exist; it is zero then.
                if carry != 0 {
                    self.words[first_word + i + 1] |= carry;
                }
            }
        }
        Ok(())
    }

    /// The pages of a range as a bitmap, bit 0 of the first word being its first page, into
    /// `words`, whose old contents are lost; bits beyond the range are zero. Returns how many
    /// there are.
    ///
    /// # Errors
    /// [`RangeError::Outside`].
    pub fn bitmap(&self, range: PageRange, words: &mut Vec<u64>) -> Result<u64, RangeError> {
        let indices = self.layout.index_range(range)?;
        let shift = indices.start % WORD_BITS;
        let first = (indices.start / WORD_BITS) as usize;
        words.clear();
        let mut count = 0;
        let mut left = range.pages();
        let mut at = first;
        while left > 0 {
            let low = self.words[at] >> shift;
            let high = match (shift, self.words.get(at + 1)) {
                (0, _) | (_, None) => 0,
                (_, Some(next)) => next << (WORD_BITS - shift),
            };
            let bits = left.min(WORD_BITS);
            let word = (low | high) & (u64::MAX >> (WORD_BITS - bits));
            count += u64::from(word.count_ones());
            words.push(word);
            left -= bits;
            at += 1;
        }
        Ok(count)
    }

    /// Whether all pages of a range are in the set; `false` for a range outside the layout.
    pub fn contains(&self, range: PageRange) -> bool {
        self.layout
            .index_range(range)
            .is_ok_and(|indices| self.next_clear(indices.start, indices.end) == indices.end)
    }

    /// Whether at least one page of a range is in the set.
    pub fn intersects(&self, range: PageRange) -> bool {
        self.layout
            .index_range(range)
            .is_ok_and(|indices| self.next_set(indices.start, indices.end).is_some())
    }

    /// Number of pages in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether the set has no pages.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Takes all pages out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds all pages of `other`.
    ///
    /// # Panics
    /// When `other` is over another layout.
    pub fn union(&mut self, other: &PageSet) {
        self.combine(other, |mine, theirs| mine | theirs);
    }

    /// Takes out all pages of `other`.
    ///
    /// # Panics
    /// When `other` is over another layout.
    pub fn minus(&mut self, other: &PageSet) {
        self.combine(other, |mine, theirs| mine & !theirs);
    }

    /// Keeps only the pages that are in `other` too.
    ///
    /// # Panics
    /// When `other` is over another layout.
    pub fn intersect(&mut self, other: &PageSet) {
        self.combine(other, |mine, theirs| mine & theirs);
    }

    /// The set as ranges, ascending, each as long as it can be without crossing a region's end.
    pub fn runs(&self) -> impl Iterator<Item = PageRange> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = self.next_set(next, self.layout.total_pages())?;
            let room = self.layout.range_from(start, self.layout.total_pages())?;
            next = self.next_clear(start, start + room.pages());
            self.layout.range_from(start, next)
        })
    }

    fn combine(&mut self, other: &PageSet, f: impl Fn(u64, u64) -> u64) {
        assert!(
            Arc::ptr_eq(&self.layout, &other.layout) || self.layout == other.layout,
            "page sets of different memory layouts were combined"
        );
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine = f(*mine, *theirs);
        }
    }

    /// Calls `f` with each word that `indices` touch, and the bits of it that they touch.
    fn update(&mut self, indices: Range<u64>, mut f: impl FnMut(&mut u64, u64)) {
        let mut at = indices.start;
        while at < indices.end {
            let bit = at % WORD_BITS;
            let bits = (WORD_BITS - bit).min(indices.end - at);
            let mask = (u64::MAX >> (WORD_BITS - bits)) << bit;
            f(&mut self.words[(at / WORD_BITS) as usize], mask);
            at += bits;
        }
    }

    /// First index in the set at or after `from`, and before `limit`.
    fn next_set(&self, from: u64, limit: u64) -> Option<u64> {
        let mut word = (from / WORD_BITS) as usize;
        let last = (limit.div_ceil(WORD_BITS) as usize).min(self.words.len());
        let mut bits = self.words[..last].get(word)? & (u64::MAX << (from % WORD_BITS));
        while bits == 0 {
            word += 1;
            bits = *self.words[..last].get(word)?;
        }
        let found = word as u64 * WORD_BITS + u64::from(bits.trailing_zeros());
        (found < limit).then_some(found)
    }

    /// First index not in the set at or after `from`, but at most `limit`.
    fn next_clear(&self, from: u64, limit: u64) -> u64 {
        let mut at = from;
        while at < limit {
            let ones = (self.words[(at / WORD_BITS) as usize] >> (at % WORD_BITS)).trailing_ones();
            let rest = WORD_BITS - at % WORD_BITS;
            at += u64::from(ones);
            if u64::from(ones) < rest {
                break;
            }
        }
        at.min(limit)
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSet({} of {} pages)", self.count(), self.layout.total_pages())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::new(Gfn(start), pages).unwrap()
    }

    /// 100 pages, a hole, 27 pages that touch 73 more: the last region begins inside a word.
    fn layout() -> Arc<MemoryLayout> {
        Arc::new(MemoryLayout::new([range(0, 100), range(1000, 27), range(1027, 73)]).unwrap())
    }

    fn frames(set: &PageSet) -> BTreeSet<u64> {
        set.runs().flat_map(|run| run.start().0..run.end().0).collect()
    }

    #[test]
    fn runs_are_maximal_but_never_cross_a_region() {
        let set = PageSet::full(&layout());
        let runs: Vec<_> = set.runs().collect();
        assert_eq!(runs, [range(0, 100), range(1000, 27), range(1027, 73)]);
        assert_eq!(set.count(), 200);
        assert!(PageSet::empty(&layout()).is_empty());
        assert_eq!(PageSet::empty(&layout()).runs().count(), 0);
    }

    #[test]
    fn ranges_outside_are_refused_and_change_nothing() {
        let mut set = PageSet::empty(&layout());
        assert!(set.insert(range(99, 2)).is_err());
        assert!(set.insert(range(1026, 2)).is_err(), "crosses two regions");
        assert!(set.remove(range(500, 1)).is_err());
        assert!(!set.contains(range(500, 1)));
        assert!(set.is_empty());
    }

    #[test]
    fn a_dirty_log_bitmap_lands_on_its_pages() {
        let mut set = PageSet::empty(&layout());
        // The region's dense index is 127: every word straddles two words of the set.
        set.insert_bitmap(Gfn(1027), &[1 | 1 << 63, 1 << 8]).unwrap();
        assert_eq!(frames(&set), BTreeSet::from([1027, 1090, 1099]));
        assert!(set.insert_bitmap(Gfn(1027), &[0, 1 << 9]).is_err(), "page 1100 does not exist");
        set.insert_bitmap(Gfn(0), &[0, 0, 0, 0]).unwrap();
        assert_eq!(set.count(), 3);
    }

    #[test]
    #[should_panic(expected = "different memory layouts")]
    fn sets_of_different_machines_do_not_mix() {
        let other = Arc::new(MemoryLayout::new([range(0, 200)]).unwrap());
        PageSet::empty(&layout()).union(&PageSet::empty(&other));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u64, u64),
        Remove(u64, u64),
        Bitmap(Vec<u64>),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..100u64, 1..100u64).prop_map(|(a, n)| Step::Insert(a, n.min(100 - a))),
            (1027..1100u64, 1..73u64).prop_map(|(a, n)| Step::Insert(a, n.min(1100 - a))),
            (0..100u64, 1..100u64).prop_map(|(a, n)| Step::Remove(a, n.min(100 - a))),
            (any::<u64>(), any::<u8>()).prop_map(|(a, b)| Step::Bitmap(vec![a, u64::from(b)])),
        ];
        prop::collection::vec(step, 1..20)
    }

    /// The same steps on a page set and on the standard library's set.
    fn run(steps: &[Step]) -> (PageSet, BTreeSet<u64>) {
        let mut set = PageSet::empty(&layout());
        let mut model = BTreeSet::new();
        for step in steps {
            match step {
                Step::Insert(start, pages) => {
                    let added = set.insert(range(*start, *pages)).unwrap();
                    let before = model.len();
                    model.extend(*start..start + pages);
                    assert_eq!(added as usize, model.len() - before);
                }
                Step::Remove(start, pages) => {
                    let removed = set.remove(range(*start, *pages)).unwrap();
                    let before = model.len();
                    model.retain(|frame| !(*start..start + pages).contains(frame));
                    assert_eq!(removed as usize, before - model.len());
                }
                Step::Bitmap(words) => {
                    set.insert_bitmap(Gfn(1027), words).unwrap();
                    model.extend(
                        (0..128u64)
                            .filter(|bit| words[(bit / 64) as usize] >> (bit % 64) & 1 == 1)
                            .map(|bit| 1027 + bit),
                    );
                }
            }
        }
        (set, model)
    }

    proptest! {
        #[test]
        fn behaves_as_a_set(a in steps(), b in steps(), start in 0..100u64, pages in 1..20u64) {
            let ((set_a, model_a), (set_b, model_b)) = (run(&a), run(&b));
            prop_assert_eq!(frames(&set_a), model_a.clone());
            prop_assert_eq!(set_a.count() as usize, model_a.len());
            let probe = range(start, pages.min(100 - start));
            let in_probe = model_a.range(start..probe.end().0).count() as u64;
            prop_assert_eq!(set_a.contains(probe), in_probe == probe.pages());
            prop_assert_eq!(set_a.intersects(probe), in_probe > 0);

            let mut words = Vec::new();
            let pages_there = set_a.bitmap(probe, &mut words).unwrap();
            prop_assert_eq!(pages_there, in_probe);
            let mut copy = PageSet::empty(&layout());
            copy.insert_bitmap(probe.start(), &words).unwrap();
            let mut expected = PageSet::empty(&layout());
            expected.insert(probe).unwrap();
            expected.intersect(&set_a);
            prop_assert_eq!(&copy, &expected);
            let far = range(1027 + start.min(60), pages.min(10));
            set_a.bitmap(far, &mut words).unwrap();
            let mut copy = PageSet::empty(&layout());
            copy.insert_bitmap(far.start(), &words).unwrap();
            let mut expected = PageSet::empty(&layout());
            expected.insert(far).unwrap();
            expected.intersect(&set_a);
            prop_assert_eq!(&copy, &expected);

            let mut both = set_a.clone();
            both.union(&set_b);
            prop_assert_eq!(frames(&both), &model_a | &model_b);
            let mut rest = set_a.clone();
            rest.minus(&set_b);
            prop_assert_eq!(frames(&rest), &model_a - &model_b);
            let mut shared = set_a;
            shared.intersect(&set_b);
            prop_assert_eq!(frames(&shared), &model_a & &model_b);
        }
    }
}
