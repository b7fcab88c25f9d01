//! Which guest page frames have memory behind them.

use std::ops::Range;

use crate::address::{Gfn, PageRange, RangeError};

/// Most regions that a layout may have. The machine of this project has two; the rest is room.
pub const MAX_REGIONS: usize = 64;

/// Why regions do not make a layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No memory at all.
    #[error("a memory layout needs at least one region")]
    Empty,
    /// More than [`MAX_REGIONS`].
    #[error("a memory layout of {0} regions exceeds the limit of {MAX_REGIONS}")]
    TooManyRegions(usize),
    /// Regions overlap or are not in ascending order.
    #[error("region of {second} does not lie above the one before it, {first}")]
    Order {
        /// The region before.
        first: PageRange,
        /// The offending region.
        second: PageRange,
    },
}

/// One region: its pages, and the dense index of the first of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Region {
    range: PageRange,
    first_index: u64,
}

/// The guest's memory: regions of pages, ascending, without overlap.
///
/// Pages also have a *dense index*: 0 for the lowest page, counting up across regions without the
/// holes between them. Bitmaps are laid over the dense index, so that the hole below 4 GiB costs
/// nothing.
///
/// ```text
///   page frames   | region 0 |      hole      |    region 1    |
///   dense index   0 ........ n-1              n .............. m
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryLayout {
    regions: Vec<Region>,
    total_pages: u64,
}

impl MemoryLayout {
    /// A layout of these regions, which must be in ascending order. Regions may touch; they stay
    /// apart all the same, since no [`PageRange`] that is used with a layout may cross from one
    /// region into another.
    ///
    /// # Errors
    /// See [`LayoutError`].
    pub fn new(ranges: impl IntoIterator<Item = PageRange>) -> Result<Self, LayoutError> {
        let mut regions: Vec<Region> = Vec::new();
        let mut total_pages = 0;
        for range in ranges {
            if let Some(last) = regions.last() {
                if range.start() < last.range.end() {
                    return Err(LayoutError::Order { first: last.range, second: range });
                }
            }
            regions.push(Region { range, first_index: total_pages });
            if regions.len() > MAX_REGIONS {
                return Err(LayoutError::TooManyRegions(regions.len()));
            }
            total_pages += range.pages();
        }
        if regions.is_empty() {
            return Err(LayoutError::Empty);
        }
        Ok(Self { regions, total_pages })
    }

    /// The regions, ascending.
    pub fn regions(&self) -> impl ExactSizeIterator<Item = PageRange> + '_ {
        self.regions.iter().map(|region| region.range)
    }

    /// Number of pages in all regions.
    pub fn total_pages(&self) -> u64 {
        self.total_pages
    }

    /// Dense index of a page frame, if it is memory.
    pub fn index(&self, gfn: Gfn) -> Option<u64> {
        let after = self.regions.partition_point(|region| region.range.start() <= gfn);
        let region = self.regions[..after].last()?;
        (gfn < region.range.end()).then(|| region.first_index + (gfn.0 - region.range.start().0))
    }

    /// Page frame of a dense index, if it is below [`MemoryLayout::total_pages`].
    pub fn gfn(&self, index: u64) -> Option<Gfn> {
        let region = self.region_at(index)?;
        Some(Gfn(region.range.start().0 + (index - region.first_index)))
    }

    /// Dense indices of a range that lies within one region.
    ///
    /// # Errors
    /// [`RangeError::Outside`].
    pub fn index_range(&self, range: PageRange) -> Result<Range<u64>, RangeError> {
        let outside = RangeError::Outside(range);
        let start = self.index(range.start()).ok_or(outside)?;
        let region = self.region_at(start).ok_or(outside)?;
        if range.end() > region.range.end() {
            return Err(outside);
        }
        Ok(start..start + range.pages())
    }

    /// The pages from dense index `start` on, up to dense index `end` or the end of the region,
    /// whichever comes first.
    pub(crate) fn range_from(&self, start: u64, end: u64) -> Option<PageRange> {
        let region = self.region_at(start)?;
        let inside = start - region.first_index;
        let pages = (end.checked_sub(start)?).min(region.range.pages() - inside);
        (pages > 0).then(|| PageRange::trusted(Gfn(region.range.start().0 + inside), pages))
    }

    fn region_at(&self, index: u64) -> Option<&Region> {
        if index >= self.total_pages {
            return None;
        }
        let after = self.regions.partition_point(|region| region.first_index <= index);
        self.regions[..after].last()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::new(Gfn(start), pages).unwrap()
    }

    #[test]
    fn dense_indices_skip_the_hole_and_come_back() {
        let layout = MemoryLayout::new([range(0, 10), range(100, 5)]).unwrap();
        assert_eq!(layout.total_pages(), 15);
        assert_eq!(layout.index(Gfn(9)), Some(9));
        assert_eq!(layout.index(Gfn(10)), None);
        assert_eq!(layout.index(Gfn(99)), None);
        assert_eq!(layout.index(Gfn(100)), Some(10));
        assert_eq!(layout.index(Gfn(105)), None);
        for index in 0..15 {
            assert_eq!(layout.index(layout.gfn(index).unwrap()), Some(index));
        }
        assert_eq!(layout.gfn(15), None);
        assert_eq!(layout.range_from(8, 15), Some(range(8, 2)), "stops at the region's end");
        assert_eq!(layout.range_from(15, 16), None);
    }

    #[test]
    fn regions_out_of_order_or_overlapping_are_refused() {
        assert!(MemoryLayout::new([range(0, 10), range(10, 5)]).is_ok());
        assert!(matches!(
            MemoryLayout::new([range(0, 10), range(9, 5)]),
            Err(LayoutError::Order { .. })
        ));
        assert!(matches!(
            MemoryLayout::new([range(100, 10), range(0, 5)]),
            Err(LayoutError::Order { .. })
        ));
        assert_eq!(MemoryLayout::new([]), Err(LayoutError::Empty));
        assert_eq!(
            MemoryLayout::new((0..65).map(|i| range(i * 2, 1))),
            Err(LayoutError::TooManyRegions(65))
        );
    }
}
