//! Guest addresses in units that cannot be mixed up: bytes, page frames, ranges of pages, and
//! claims about ranges that nobody has checked yet.

use std::fmt;

use crate::layout::MemoryLayout;

/// Size of a page, the unit of everything that moves, bytes.
///
/// Huge pages are a matter of how the host maps memory; the stream always counts small pages.
pub const PAGE_SIZE: u64 = 4096;

/// [`PAGE_SIZE`] as a length in this process's memory.
pub const PAGE_BYTES: usize = PAGE_SIZE as usize;

/// Number of page frames that x86-64 can address: 52 bits of physical address (AMD64 Architecture
/// Programmer's Manual volume 2, section 5.3), less the 12 bits inside a page.
pub const MAX_FRAMES: u64 = 1 << (52 - 12);

/// A guest-physical address, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

impl Gpa {
    /// The page frame that this address lies in.
    pub fn gfn(self) -> Gfn {
        Gfn(self.0 / PAGE_SIZE)
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A guest page frame number: a guest-physical address divided by [`PAGE_SIZE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gfn(pub u64);

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Why a range of pages was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// No page in it.
    #[error("a range at page frame {0} has no pages")]
    Empty(Gfn),
    /// Ends beyond what the architecture can address.
    #[error(
        "{pages} pages at page frame {start:#x} end beyond the architecture's {MAX_FRAMES} frames"
    )]
    TooHigh {
        /// First page frame.
        start: u64,
        /// Number of pages.
        pages: u64,
    },
    /// Not within one region of the VM's memory.
    #[error("{0} is not within one region of guest memory")]
    Outside(PageRange),
    /// An address or a size is not a multiple of [`PAGE_SIZE`].
    #[error("{bytes} bytes at {start} are not whole pages of {PAGE_SIZE} bytes")]
    Unaligned {
        /// First byte.
        start: Gpa,
        /// Size, bytes.
        bytes: u64,
    },
}

/// Consecutive guest pages: at least one, and none beyond [`MAX_FRAMES`], so that no arithmetic
/// on a range can overflow. Whether a VM has these pages is for its [`MemoryLayout`] to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    start: Gfn,
    pages: u64,
}

impl PageRange {
    /// A range of `pages` pages from `start`.
    ///
    /// # Errors
    /// [`RangeError::Empty`] and [`RangeError::TooHigh`].
    pub fn new(start: Gfn, pages: u64) -> Result<Self, RangeError> {
        if pages == 0 {
            return Err(RangeError::Empty(start));
        }
        match start.0.checked_add(pages) {
            Some(end) if end <= MAX_FRAMES => Ok(Self { start, pages }),
            _ => Err(RangeError::TooHigh { start: start.0, pages }),
        }
    }

    /// The pages of `bytes` bytes at `start`, both multiples of [`PAGE_SIZE`].
    ///
    /// # Errors
    /// As [`PageRange::new`], and [`RangeError::Unaligned`].
    pub fn from_bytes(start: Gpa, bytes: u64) -> Result<Self, RangeError> {
        if start.0 % PAGE_SIZE != 0 || bytes % PAGE_SIZE != 0 {
            return Err(RangeError::Unaligned { start, bytes });
        }
        Self::new(start.gfn(), bytes / PAGE_SIZE)
    }

    /// For arithmetic on ranges and layouts that are known to be good.
    pub(crate) fn trusted(start: Gfn, pages: u64) -> Self {
        debug_assert!(pages > 0 && start.0 + pages <= MAX_FRAMES);
        Self { start, pages }
    }

    /// First page frame.
    pub fn start(self) -> Gfn {
        self.start
    }

    /// Number of pages, at least 1.
    pub fn pages(self) -> u64 {
        self.pages
    }

    /// First page frame after the range.
    pub fn end(self) -> Gfn {
        Gfn(self.start.0 + self.pages)
    }

    /// Address of the first byte.
    pub fn gpa(self) -> Gpa {
        Gpa(self.start.0 * PAGE_SIZE)
    }

    /// Size, bytes.
    pub fn bytes(self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// Whether `other` lies wholly within this range.
    pub fn contains(self, other: PageRange) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// The same pages in pieces of at most `max_pages` (at least 1), in order.
    pub fn chunks(self, max_pages: u64) -> impl Iterator<Item = PageRange> {
        let max_pages = max_pages.max(1);
        let end = self.end().0;
        let mut next = self.start.0;
        std::iter::from_fn(move || {
            let pages = max_pages.min(end - next);
            let start = Gfn(next);
            next += pages;
            (pages > 0).then(|| PageRange::trusted(start, pages))
        })
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages at page frame {}", self.pages, self.start)
    }
}

/// What a peer or a file says about a range: nothing but a claim until it was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClaimedRange {
    /// Claimed first page frame.
    pub gfn: u64,
    /// Claimed number of pages.
    pub pages: u64,
}

impl ClaimedRange {
    /// The range, if `layout` has all its pages in one region.
    ///
    /// # Errors
    /// [`RangeError::Empty`], [`RangeError::TooHigh`], [`RangeError::Outside`].
    pub fn check(self, layout: &MemoryLayout) -> Result<PageRange, RangeError> {
        let range = PageRange::new(Gfn(self.gfn), self.pages)?;
        layout.index_range(range).map(|_| range)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ranges_that_would_overflow_are_refused() {
        assert_eq!(PageRange::new(Gfn(7), 0), Err(RangeError::Empty(Gfn(7))));
        for (start, pages) in
            [(u64::MAX, 1), (u64::MAX, u64::MAX), (MAX_FRAMES, 1), (1, MAX_FRAMES)]
        {
            assert_eq!(
                PageRange::new(Gfn(start), pages),
                Err(RangeError::TooHigh { start, pages })
            );
        }
        assert_eq!(PageRange::new(Gfn(0), MAX_FRAMES).unwrap().bytes(), 1 << 52);
    }

    #[test]
    fn only_whole_pages_make_a_range() {
        let range = PageRange::from_bytes(Gpa(0x3000), 0x2000).unwrap();
        assert_eq!((range.start(), range.pages(), range.end()), (Gfn(3), 2, Gfn(5)));
        assert_eq!(range.gpa(), Gpa(0x3000));
        assert!(PageRange::from_bytes(Gpa(0x3001), 0x1000).is_err());
        assert!(PageRange::from_bytes(Gpa(0x3000), 0x1001).is_err());
    }

    #[test]
    fn chunks_cover_the_range_once_and_in_order() {
        let range = PageRange::new(Gfn(10), 7).unwrap();
        let chunks: Vec<_> = range.chunks(3).map(|c| (c.start().0, c.pages())).collect();
        assert_eq!(chunks, [(10, 3), (13, 3), (16, 1)]);
        assert_eq!(range.chunks(0).count(), 7);
    }

    #[test]
    fn a_claim_becomes_a_range_only_inside_the_layout() {
        let layout = MemoryLayout::new([
            PageRange::new(Gfn(0), 16).unwrap(),
            PageRange::new(Gfn(16), 16).unwrap(),
            PageRange::new(Gfn(100), 4).unwrap(),
        ])
        .unwrap();
        let check = |gfn, pages| ClaimedRange { gfn, pages }.check(&layout);
        assert_eq!(check(100, 4).unwrap(), PageRange::new(Gfn(100), 4).unwrap());
        assert!(matches!(check(100, 5), Err(RangeError::Outside(_))));
        assert!(matches!(check(32, 1), Err(RangeError::Outside(_))));
        assert!(matches!(check(15, 2), Err(RangeError::Outside(_))), "crosses two regions");
        assert!(matches!(check(u64::MAX, 2), Err(RangeError::TooHigh { .. })));
        assert!(matches!(check(0, 0), Err(RangeError::Empty(_))));
    }
}
