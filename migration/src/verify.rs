//! Hashes of memory, for migrations that compare it before the state is loaded.
//!
//! One number per [`HASH_PAGES`] pages, so that a difference has a place. Pages of zeros count
//! nothing, whether they have memory or not. `docs/PROTOCOL.md`, section 7.4, has the formula.

use crc32c::crc32c;

use crate::address::{Gfn, PageRange, PAGE_BYTES};
use crate::layout::MemoryLayout;
use crate::vm::{GuestMemory, VmError};
use crate::volatile_io::is_zero_page;

/// Pages that one hash is over.
pub(crate) const HASH_PAGES: u64 = 512;

/// 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
fn mix(mut x: u64) -> u64 {
    x ^= x >> 30;
    x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^= x >> 27;
    x = x.wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// The ranges that the hashes of a layout are over, in order.
pub(crate) fn hash_ranges(layout: &MemoryLayout) -> impl Iterator<Item = PageRange> + '_ {
    layout.regions().flat_map(|region| region.chunks(HASH_PAGES))
}

/// How many there are. A layout that nobody has checked may claim so many that they cannot be counted one by one.
pub(crate) fn hash_count(layout: &MemoryLayout) -> u64 {
    layout.regions().map(|region| region.pages().div_ceil(HASH_PAGES)).sum()
}

/// Hashes all of memory, which nobody writes to. Only populated pages are looked at.
pub(crate) fn hash_memory<M: GuestMemory + ?Sized>(memory: &M) -> Result<Vec<u64>, VmError> {
    let populated = memory.populated()?;
    let mut page = [0; PAGE_BYTES];
    let mut words = Vec::new();
    let mut hashes = Vec::new();
    for range in hash_ranges(memory.layout()) {
        let mut hash = 0u64;
        if populated.bitmap(range, &mut words)? > 0 {
            let slice = memory.slice(range)?;
            for at in 0..range.pages() {
                let offset = at as usize * PAGE_BYTES;
                if words[(at / 64) as usize] >> (at % 64) & 1 == 0 || is_zero_page(&slice, offset) {
                    continue;
                }
                slice
                    .subslice(offset, PAGE_BYTES)
                    .map_err(|error| VmError::Other(format!("no memory for {range}: {error}")))?
                    .copy_to(&mut page);
                let gfn = Gfn(range.start().0 + at);
                hash =
                    hash.wrapping_add(mix(gfn.0.wrapping_mul(GOLDEN) ^ u64::from(crc32c(&page))));
            }
        }
        hashes.push(hash);
    }
    Ok(hashes)
}

/// The first range whose hashes differ.
pub(crate) fn first_difference(
    layout: &MemoryLayout,
    mine: &[u64],
    theirs: &[u64],
) -> Option<PageRange> {
    hash_ranges(layout)
        .enumerate()
        .find(|(at, _)| mine.get(*at) != theirs.get(*at))
        .map(|(_, range)| range)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::simulated::SimulatedVm;

    fn vm() -> SimulatedVm {
        let regions = [(0, 1000), (1 << 20, 3)];
        let ranges = regions.map(|(start, pages)| PageRange::new(Gfn(start), pages).unwrap());
        SimulatedVm::new(MemoryLayout::new(ranges).unwrap()).unwrap()
    }

    #[test]
    fn hashes_are_counted_without_looking_at_each() {
        let layout = |regions: &[(u64, u64)]| {
            let range = |(gfn, pages): &(u64, u64)| PageRange::new(Gfn(*gfn), *pages).unwrap();
            MemoryLayout::new(regions.iter().map(range)).unwrap()
        };
        for regions in [&[(0, 1)][..], &[(0, 512), (512, 513)], &[(3, 1024), (4096, 511)]] {
            let layout = layout(regions);
            assert_eq!(hash_count(&layout), hash_ranges(&layout).count() as u64);
        }
        assert_eq!(hash_count(&layout(&[(0, 1 << 40)])), 1 << 31);
    }

    #[test]
    fn a_difference_has_a_place_and_zeros_are_as_good_as_nothing() {
        let (a, b) = (vm(), vm());
        for gfn in [0, 511, 512, (1 << 20) + 2] {
            a.guest_write(Gfn(gfn), b"same").unwrap();
            b.guest_write(Gfn(gfn), b"same").unwrap();
        }
        a.guest_write(Gfn(7), &[0]).unwrap();
        let difference = || {
            let hashes = [&a, &b].map(|vm| hash_memory(vm).unwrap());
            first_difference(a.layout(), &hashes[0], &hashes[1])
        };
        assert_eq!(difference(), None);
        b.guest_write(Gfn(600), &[1]).unwrap();
        assert_eq!(difference(), Some(PageRange::new(Gfn(512), 488).unwrap()));
        a.guest_write(Gfn(601), &[1]).unwrap();
        assert!(difference().is_some(), "the same page at another place is not the same");
    }

    #[test]
    fn the_formula_does_not_change() {
        let vm = vm();
        vm.guest_write(Gfn(1), &[0xa5; PAGE_BYTES]).unwrap();
        // Computed by another program from the formula in docs/PROTOCOL.md.
        assert_eq!(hash_memory(&vm).unwrap()[0], 15470382957341726177);
    }
}
