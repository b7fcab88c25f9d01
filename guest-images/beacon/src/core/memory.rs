//! RAM from the memory map: what is free, what beacon takes, and where the working set lies.

use crate::config::Order;
use crate::pages::PAGE_SIZE;
use crate::permutation::Permutation;

/// Most regions of free RAM that are kept.
pub const MAX_REGIONS: usize = 16;

/// A range of guest physical memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl Region {
    const fn pages(&self) -> u64 {
        (self.end - self.start) / PAGE_SIZE
    }
}

/// The free RAM: page-aligned regions, taken from the bottom.
#[derive(Clone, Copy, Debug, Default)]
pub struct FreeRam {
    regions: [Region; MAX_REGIONS],
    count: usize,
}

impl FreeRam {
    /// Adds what of `start..start + length` lies in `floor..ceiling`, without partial pages.
    /// A region beyond the sixteenth is left out.
    pub fn add(&mut self, start: u64, length: u64, floor: u64, ceiling: u64) {
        let end = start.saturating_add(length).min(ceiling) & !(PAGE_SIZE - 1);
        let start = start.max(floor).min(ceiling).next_multiple_of(PAGE_SIZE);
        if start < end && self.count < MAX_REGIONS {
            self.regions[self.count] = Region { start, end };
            self.count += 1;
        }
    }

    /// The regions.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions[..self.count]
    }

    /// Pages in all regions.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.regions().iter().map(Region::pages).sum()
    }

    /// Takes `length` bytes with an alignment that is a power of two; `None` when no region has
    /// them. What is left below the alignment in the region is lost.
    pub fn take(&mut self, length: u64, alignment: u64) -> Option<u64> {
        let length = length.max(1).checked_next_multiple_of(PAGE_SIZE)?;
        let alignment = alignment.max(PAGE_SIZE);
        self.regions[..self.count].iter_mut().find_map(|region| {
            let start = region.start.checked_next_multiple_of(alignment)?;
            let end = start.checked_add(length)?;
            (end <= region.end).then(|| {
                region.start = end;
                start
            })
        })
    }
}

/// Where the pages of the working set lie: the first `pages` free pages, in the given order.
#[derive(Clone, Copy, Debug)]
pub struct Placement {
    ram: FreeRam,
    pages: u64,
    permutation: Option<Permutation>,
}

impl Placement {
    /// Places `pages` pages in `ram`, or as many as it has.
    #[must_use]
    pub fn new(ram: FreeRam, pages: u64, order: Order) -> Self {
        let pages = pages.min(ram.pages());
        let permutation = match order {
            Order::Scattered => Some(Permutation::new(pages)),
            Order::Linear => None,
        };
        Self { ram, pages, permutation }
    }

    /// Pages in the working set.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The guest physical address of a page, which must be below `pages()`.
    #[must_use]
    pub fn address(&self, page: u64) -> u64 {
        let mut frame = self.permutation.map_or(page, |permutation| permutation.apply(page));
        for region in self.ram.regions() {
            let pages = region.pages();
            if frame < pages {
                return region.start + frame * PAGE_SIZE;
            }
            frame -= pages;
        }
        // Only for a page that is not in the working set; page 0 is RAM on every PC.
        0
    }

    /// The pages of one of `cpus` vCPUs: the first page and how many.
    #[must_use]
    pub fn slice(&self, cpu: u64, cpus: u64) -> (u64, u64) {
        let first = self.pages * cpu / cpus;
        (first, self.pages * (cpu + 1) / cpus - first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> FreeRam {
        let mut ram = FreeRam::default();
        ram.add(0x10_0000, 0x20_0800, 0x20_0000, 1 << 39);
        ram.add(1 << 32, 0x3000, 0x20_0000, 1 << 39);
        ram
    }

    #[test]
    fn regions_are_clipped_to_whole_pages_in_bounds() {
        let mut ram = ram();
        assert_eq!(
            ram.regions(),
            [
                Region { start: 0x20_0000, end: 0x30_0000 },
                Region { start: 1 << 32, end: (1 << 32) + 0x3000 }
            ]
        );
        assert_eq!(ram.pages(), 256 + 3);
        ram.add(u64::MAX - 10, u64::MAX, 0, 1 << 39);
        ram.add(0x1001, 0xFFE, 0, 1 << 39);
        assert_eq!(ram.regions().len(), 2, "neither has a whole page");
    }

    #[test]
    fn take_aligns_and_moves_on_to_the_next_region() {
        let mut ram = ram();
        assert_eq!(ram.take(1, 1), Some(0x20_0000));
        assert_eq!(ram.take(0x1_0000, 0x1_0000), Some(0x21_0000));
        assert_eq!(ram.take(0xE_0000, 1), Some(0x22_0000));
        assert_eq!(ram.take(0x2000, 1), Some(1 << 32));
        assert_eq!(ram.take(0x2000, 1), None);
        assert_eq!(ram.take(u64::MAX, 1), None);
        assert_eq!(ram.pages(), 1);
    }

    #[test]
    fn every_page_has_its_own_place() {
        for order in [Order::Scattered, Order::Linear] {
            let placement = Placement::new(ram(), 1000, order);
            assert_eq!(placement.pages(), 259);
            let mut addresses: Vec<_> = (0..259).map(|page| placement.address(page)).collect();
            assert_eq!(addresses.is_sorted(), order == Order::Linear);
            addresses.sort_unstable();
            addresses.dedup();
            assert_eq!(addresses.len(), 259);
            assert_eq!((addresses[0], addresses[258]), (0x20_0000, (1 << 32) + 0x2000));
        }
    }

    #[test]
    fn slices_cover_the_working_set() {
        let placement = Placement::new(ram(), 100, Order::Linear);
        let mut next = 0;
        for cpu in 0..7 {
            let (first, count) = placement.slice(cpu, 7);
            assert_eq!(first, next);
            next += count;
        }
        assert_eq!(next, 100);
    }
}
