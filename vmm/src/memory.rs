//! Guest memory: anonymous, in huge pages where the kernel has them to give, mapped once, with a
//! bitmap of what the VMM itself wrote.
//!
//! Writes through [`GuestRam::memory`] mark the device bitmap after the write (`vm-memory` does
//! so, for raw reads into guest memory too); what the guest writes is in KVM's dirty log.
#![allow(unsafe_code)] // slices of the mapping, madvise

use std::io;
use std::num::NonZeroUsize;
use std::path::Path;

use devices::virtio::balloon::Discard;
use migration::pagemap;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion, VolatileSlice,
};

use crate::layout;

/// Size of a guest page.
pub const PAGE_SIZE: u64 = 4096;
/// Size of a huge page.
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;

const FREE_HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// Why guest memory could not be made or inspected.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No mapping.
    #[error("cannot map {size} bytes of guest memory at guest address {gpa:#x}: {error}")]
    Map {
        /// Bytes wanted.
        size: u64,
        /// Where in the guest.
        gpa: u64,
        /// What the kernel said.
        error: String,
    },
    /// Too few huge pages are reserved.
    #[error(
        "{wanted} huge pages of 2 MiB are needed and {free} are free: \
         reserve more (sysctl vm.nr_hugepages) or leave --hugepages out"
    )]
    HugePages {
        /// Pages wanted.
        wanted: u64,
        /// Pages free.
        free: u64,
    },
    /// The populated map could not be read.
    #[error("cannot find out which guest pages are populated: {0}")]
    Populated(io::Error),
    /// A range outside guest memory.
    #[error("guest memory has no range {gpa:#x}+{len:#x}")]
    OutOfRange {
        /// Start of the range.
        gpa: u64,
        /// Its length, bytes.
        len: u64,
    },
}

/// One contiguous piece of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest-physical start.
    pub gpa: u64,
    /// Length, bytes.
    pub len: u64,
    /// Where it is mapped in this process.
    pub hva: u64,
}

/// Memory with the device bitmap.
pub type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Gives pages of guest memory back to the host, for the balloon.
#[derive(Debug)]
pub struct RamDiscard {
    memory: Memory,
    hugepages: bool,
}

impl Discard for RamDiscard {
    fn discard(&mut self, gpa: u64, len: u64) -> io::Result<()> {
        if self.hugepages {
            // hugetlbfs gives back whole huge pages only; a balloon's pages are 4 KiB.
            return Err(io::ErrorKind::Unsupported.into());
        }
        // A run of pages may cross from one region to the next.
        let end = gpa + len;
        for region in self.memory.iter() {
            let start = region.start_addr().0;
            let from = gpa.max(start);
            let to = end.min(start + region.len());
            if from >= to {
                continue;
            }
            let len = usize::try_from(to - from).map_err(io::Error::other)?;
            let at = usize::try_from(from - start).map_err(io::Error::other)?;
            let discarded = discard(region, at, len);
            // Whatever came of it: what failed half-way discarded half.
            region.get_mmap().bitmap().set_addr_range(at, len);
            discarded?;
        }
        Ok(())
    }
}

/// Gives `len` bytes at offset `at` of a region back (MADV_DONTNEED): they read as zeros afterwards.
fn discard(region: &GuestRegionMmap<AtomicBitmap>, at: usize, len: usize) -> io::Result<()> {
    let mapped = region.get_mmap();
    if at > mapped.size() || len > mapped.size() - at {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: just checked to be within the mapping.
    let start = unsafe { mapped.as_ptr().add(at) };
    // SAFETY: the range is within our own mapping, which `region` keeps. Nobody has a Rust reference
    // into guest memory; what reads it meanwhile gets the old bytes or zeros, as if the guest wrote.
    match unsafe { libc::madvise(start.cast(), len, libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The guest's RAM.
#[derive(Debug)]
pub struct GuestRam {
    memory: Memory,
    regions: Vec<RamRegion>,
    hugepages: bool,
}

impl GuestRam {
    /// Makes `size` bytes of guest memory. Nothing is populated by this.
    pub fn new(size: u64, hugepages: bool) -> Result<Self, MemoryError> {
        if hugepages {
            check_huge_pages(size)?;
        }
        let (low, high) = layout::split_ram(size);
        let mut regions = Vec::new();
        let mut mapped = Vec::new();
        for (gpa, len) in [(0, low), (layout::HOLE_END, high)] {
            if len == 0 {
                continue;
            }
            let region = map(gpa, len, hugepages)?;
            regions.push(RamRegion { gpa, len, hva: region.as_ptr() as u64 });
            mapped.push(region);
        }
        let memory = Memory::from_regions(mapped).map_err(|e| MemoryError::Map {
            size,
            gpa: 0,
            error: e.to_string(),
        })?;
        Ok(Self { memory, regions, hugepages })
    }

    /// The memory, for reads and writes by the VMM (writes are marked in the device bitmap).
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The regions, lowest first; their position is their KVM slot.
    #[must_use]
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Whether it consists of 2 MiB pages.
    #[must_use]
    pub fn hugepages(&self) -> bool {
        self.hugepages
    }

    /// Size in all, bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.regions.iter().map(|r| r.len).sum()
    }

    /// The bytes of `gpa..gpa+len` as they lie in this process, without the device bitmap: for
    /// who moves pages, not for devices.
    pub fn slice(&self, gpa: u64, len: u64) -> Result<VolatileSlice<'_>, MemoryError> {
        let out = || MemoryError::OutOfRange { gpa, len };
        let region =
            self.regions.iter().find(|r| gpa >= r.gpa && gpa - r.gpa < r.len).ok_or_else(out)?;
        let offset = gpa - region.gpa;
        if len > region.len - offset {
            return Err(out());
        }
        let len = usize::try_from(len).map_err(|_| out())?;
        // SAFETY: the range lies inside the mapping of this region, which lives as long as
        // `self`; the guest may change it at any time, which is what a volatile slice is for.
        Ok(unsafe { VolatileSlice::new((region.hva + offset) as *mut u8, len) })
    }

    /// Takes and clears the device bitmap of region `index`: bit n is page n of the region.
    #[must_use]
    pub fn take_device_dirty(&self, index: usize) -> Vec<u64> {
        self.regions
            .get(index)
            .and_then(|r| self.memory.find_region(GuestAddress(r.gpa)))
            .map(|r| r.get_mmap().bitmap().get_and_reset())
            .unwrap_or_default()
    }

    /// Populated ranges of region `index`: (offset, length) in bytes, page-aligned, ascending.
    /// Guest memory is not read: what was never touched stays so.
    pub fn populated(&self, index: usize) -> Result<Vec<(u64, u64)>, MemoryError> {
        let Some(region) = self.regions.get(index) else { return Ok(Vec::new()) };
        pagemap::populated(region.hva, region.len).map_err(MemoryError::Populated)
    }

    /// Bytes of guest memory that are populated; 0 where the kernel does not say.
    #[must_use]
    pub fn populated_bytes(&self) -> u64 {
        let ranges = (0..self.regions.len()).filter_map(|index| self.populated(index).ok());
        ranges.flatten().map(|(_, len)| len).sum()
    }

    /// Gives back `len` bytes at `gpa`, within one region: they read as zeros afterwards. The device
    /// bitmap does not have them.
    pub fn discard(&self, gpa: u64, len: u64) -> io::Result<()> {
        let region = self.memory.find_region(GuestAddress(gpa));
        let region = region.ok_or(io::ErrorKind::InvalidInput)?;
        let at = usize::try_from(gpa - region.start_addr().0).map_err(io::Error::other)?;
        discard(region, at, usize::try_from(len).map_err(io::Error::other)?)
    }

    /// What gives pages of this memory back.
    #[must_use]
    pub fn discarder(&self) -> RamDiscard {
        RamDiscard { memory: self.memory.clone(), hugepages: self.hugepages }
    }
}

fn map(gpa: u64, len: u64, hugepages: bool) -> Result<GuestRegionMmap<AtomicBitmap>, MemoryError> {
    let failed = |error: String| MemoryError::Map { size: len, gpa, error };
    let size = usize::try_from(len).map_err(|e| failed(e.to_string()))?;
    let region = map_aligned(size, hugepages).map_err(failed)?;
    let at = region.as_ptr().cast();
    // A core dump of the VMM need not hold the guest.
    // SAFETY: advice on our own fresh mapping; failing to give it harms nothing.
    unsafe { libc::madvise(at, size, libc::MADV_DONTDUMP) };
    if !hugepages {
        // One fault for 512 pages instead of 512 faults, here and in the guest.
        // SAFETY: as above; a kernel without them goes on with small pages.
        unsafe { libc::madvise(at, size, libc::MADV_HUGEPAGE) };
    }
    GuestRegionMmap::new(region, GuestAddress(gpa)).ok_or_else(|| failed("address overflow".into()))
}

/// Maps memory where it can consist of huge pages: KVM gives the guest a huge page only where guest
/// and host addresses are aligned alike. Linux has done so by itself since 6.7.
fn map_aligned(size: usize, hugepages: bool) -> Result<MmapRegion<AtomicBitmap>, String> {
    let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // Huge pages are reserved when they are mapped, so that a shortage shows here and not as a
    // signal later; ordinary memory is overcommitted as everywhere.
    flags |= if hugepages { libc::MAP_HUGETLB | libc::MAP_HUGE_2MB } else { libc::MAP_NORESERVE };
    let map = |size, flags, prot| {
        let page = NonZeroUsize::new(PAGE_SIZE as usize).ok_or("page size")?;
        MmapRegionBuilder::new_with_bitmap(size, AtomicBitmap::new(size, page))
            .with_mmap_prot(prot)
            .with_mmap_flags(flags)
            .with_hugetlbfs(hugepages)
            .build()
            .map_err(|e| e.to_string())
    };
    let guest = || map(size, flags, libc::PROT_READ | libc::PROT_WRITE);
    let mut region = guest()?;
    let beyond = region.as_ptr() as usize % HUGE_PAGE_SIZE as usize;
    if beyond != 0 && size >= HUGE_PAGE_SIZE as usize {
        // Mappings come one below the other: with something small above it, it comes aligned. If
        // not, it works all the same, but slower.
        drop(region);
        let small = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let _above = map(beyond, small, libc::PROT_NONE)?;
        region = guest()?;
    }
    Ok(region)
}

fn check_huge_pages(size: u64) -> Result<(), MemoryError> {
    let free = std::fs::read_to_string(Path::new(FREE_HUGE_PAGES))
        .ok()
        .and_then(|s| s.trim().parse().ok())
        .unwrap_or(0);
    let wanted = size.div_ceil(HUGE_PAGE_SIZE);
    if wanted > free {
        return Err(MemoryError::HugePages { wanted, free });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn populated_follows_writes_and_reads_nothing() {
        let ram = GuestRam::new(64 << 20, false).unwrap();
        assert!(ram.populated(0).unwrap().is_empty());
        assert_eq!(ram.regions()[0].hva % HUGE_PAGE_SIZE, 0);
        ram.memory().write_slice(&[1], GuestAddress(5 * PAGE_SIZE + 7)).unwrap();
        ram.memory().write_slice(&[1], GuestAddress((64 << 20) - 1)).unwrap();
        assert_eq!(holding(&ram, 0), [5, (64 << 8) - 1]);
        // The kernel may have given huge pages.
        assert!((2 * PAGE_SIZE..=2 * HUGE_PAGE_SIZE).contains(&ram.populated_bytes()));
        ram.discard(5 * PAGE_SIZE, PAGE_SIZE).unwrap();
        assert_eq!(holding(&ram, 0), [(64 << 8) - 1]);
        assert!(ram.discard((64 << 20) - PAGE_SIZE, 2 * PAGE_SIZE).is_err());
    }

    /// The populated pages of a region that hold anything but zeros.
    fn holding(ram: &GuestRam, index: usize) -> Vec<u64> {
        let start = ram.regions()[index].gpa;
        let pages = |(offset, len): (u64, u64)| offset / PAGE_SIZE..(offset + len) / PAGE_SIZE;
        let holds = |page: &u64| {
            let mut bytes = [0; PAGE_SIZE as usize];
            ram.memory().read_slice(&mut bytes, GuestAddress(start + page * PAGE_SIZE)).unwrap();
            bytes.iter().any(|byte| *byte != 0)
        };
        ram.populated(index).unwrap().into_iter().flat_map(pages).filter(holds).collect()
    }

    #[test]
    fn memory_above_the_hole_is_a_second_region() {
        let ram = GuestRam::new(layout::HOLE_START + (64 << 20), false).unwrap();
        let above = layout::HOLE_END + PAGE_SIZE;
        ram.memory().write_slice(&[9], GuestAddress(above)).unwrap();
        assert!(ram.populated(0).unwrap().is_empty());
        assert_eq!(holding(&ram, 1), [1]);
        assert!(ram.memory().write_slice(&[9], GuestAddress(layout::HOLE_START)).is_err());
    }

    #[test]
    fn device_writes_are_marked_and_taken_once() {
        let ram = GuestRam::new(16 << 20, false).unwrap();
        ram.memory().write_slice(&[1; 5000], GuestAddress(64 * PAGE_SIZE)).unwrap();
        let bits = ram.take_device_dirty(0);
        assert_eq!(bits[1], 0b11);
        assert!(bits.iter().enumerate().all(|(i, w)| i == 1 || *w == 0));
        assert!(ram.take_device_dirty(0).iter().all(|w| *w == 0));
    }

    #[test]
    fn discarded_pages_are_marked_whatever_came_of_it() {
        let ram = GuestRam::new(layout::HOLE_START + (64 << 20), false).unwrap();
        let mut discard = ram.discarder();
        let marked = |region| {
            let bits = ram.take_device_dirty(region);
            let pages = (0..).zip(bits).flat_map(|(word, bits): (u64, u64)| {
                (0..64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| 64 * word + bit)
            });
            pages.collect::<Vec<_>>()
        };
        let above = layout::HOLE_END + 7 * PAGE_SIZE;
        ram.memory().write_slice(&[9; 3], GuestAddress(above)).unwrap();
        assert_eq!(marked(1), [7]);
        discard.discard(3 * PAGE_SIZE, 2 * PAGE_SIZE).unwrap();
        discard.discard(above, PAGE_SIZE).unwrap();
        assert_eq!((marked(0), marked(1)), (vec![3, 4], vec![7]));
        assert!(holding(&ram, 1).is_empty());
        // It fails, perhaps after a part was done: madvise(2) wants whole pages.
        assert!(discard.discard(above + 1, PAGE_SIZE - 1).is_err());
        assert_eq!((marked(0), marked(1)), (vec![], vec![7]));
    }

    #[test]
    fn slices_stay_inside_their_region() {
        let ram = GuestRam::new(16 << 20, false).unwrap();
        assert_eq!(ram.slice(0, 16 << 20).unwrap().len(), 16 << 20);
        assert!(ram.slice(PAGE_SIZE, 16 << 20).is_err());
        assert!(ram.slice(16 << 20, 1).is_err());
        assert!(ram.slice(u64::MAX, 2).is_err());
    }
}
