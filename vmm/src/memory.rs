//! Guest memory: one memfd, mapped once, with a bitmap of what the VMM itself wrote.
//!
//! Writes through [`GuestRam::memory`] mark the device bitmap after the write (`vm-memory` does
//! so, for raw reads into guest memory too); what the guest writes is in KVM's dirty log.
#![allow(unsafe_code)] // slices of the mapping, mincore, madvise

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::Path;

use devices::virtio::balloon::Discard;
use rustix::fs::{memfd_create, FallocateFlags, MemfdFlags, SeekFrom};
use rustix::io::Errno;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, VolatileSlice,
};

use crate::layout;

/// Size of a guest page.
pub const PAGE_SIZE: u64 = 4096;
/// Size of a huge page.
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;

const MEMFD_NAME: &CStr = c"minivmm-guest-ram";
const FREE_HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// Why guest memory could not be made or inspected.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No memfd.
    #[error("cannot create {size} bytes of guest memory (memfd): {error}")]
    Memfd {
        /// Bytes wanted.
        size: u64,
        /// What the kernel said.
        error: io::Error,
    },
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
    /// Where it starts in the memfd.
    pub file_offset: u64,
    /// Where it is mapped in this process.
    pub hva: u64,
}

/// Memory with the device bitmap.
pub type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Gives pages of guest memory back to the host, for the balloon.
#[derive(Debug)]
pub struct RamDiscard {
    memory: Memory,
    file: File,
    regions: Vec<RamRegion>,
    hugepages: bool,
}

impl Discard for RamDiscard {
    fn discard(&mut self, gpa: u64, len: u64) -> io::Result<()> {
        if self.hugepages {
            // A hole in hugetlbfs is whole huge pages; a balloon's pages are 4 KiB.
            return Err(io::ErrorKind::Unsupported.into());
        }
        // A run of pages may cross from one region to the next.
        let end = gpa + len;
        for region in &self.regions {
            let from = gpa.max(region.gpa);
            let to = end.min(region.gpa + region.len);
            if from >= to {
                continue;
            }
            let punched = punch(&self.file, region.file_offset + (from - region.gpa), to - from);
            // Whatever came of it: what failed half-way discarded half.
            if let Some(mapped) = self.memory.find_region(GuestAddress(region.gpa)) {
                let len = usize::try_from(to - from).map_err(io::Error::other)?;
                let at = usize::try_from(from - region.gpa).map_err(io::Error::other)?;
                mapped.get_mmap().bitmap().set_addr_range(at, len);
            }
            punched?;
        }
        Ok(())
    }
}

fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, mode, offset, len)?)
}

/// The guest's RAM.
#[derive(Debug)]
pub struct GuestRam {
    memory: Memory,
    file: File,
    regions: Vec<RamRegion>,
    hugepages: bool,
}

impl GuestRam {
    /// Makes `size` bytes of guest memory. Nothing is populated by this.
    pub fn new(size: u64, hugepages: bool) -> Result<Self, MemoryError> {
        if hugepages {
            check_huge_pages(size)?;
        }
        let file = memfd(size, hugepages)?;
        let (low, high) = layout::split_ram(size);
        let mut regions = Vec::new();
        let mut mapped = Vec::new();
        let mut file_offset = 0;
        for (gpa, len) in [(0, low), (layout::HOLE_END, high)] {
            if len == 0 {
                continue;
            }
            let region = map(&file, file_offset, gpa, len, hugepages)?;
            regions.push(RamRegion { gpa, len, file_offset, hva: region.as_ptr() as u64 });
            mapped.push(region);
            file_offset += len;
        }
        let memory = Memory::from_regions(mapped).map_err(|e| MemoryError::Map {
            size,
            gpa: 0,
            error: e.to_string(),
        })?;
        Ok(Self { memory, file, regions, hugepages })
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
    /// Guest memory is not read: a hole in the memfd stays one.
    pub fn populated(&self, index: usize) -> Result<Vec<(u64, u64)>, MemoryError> {
        let Some(region) = self.regions.get(index) else { return Ok(Vec::new()) };
        if self.hugepages {
            return self.populated_by_mincore(region).map_err(MemoryError::Populated);
        }
        let end = region.file_offset + region.len;
        let mut found = Vec::new();
        let mut at = region.file_offset;
        while at < end {
            let Some(data) = self.seek(SeekFrom::Data(at))? else { break };
            if data >= end {
                break;
            }
            let hole = self.seek(SeekFrom::Hole(data))?.unwrap_or(end).min(end);
            found.push((data - region.file_offset, hole - data));
            at = hole;
        }
        Ok(found)
    }

    /// Bytes of guest memory that are populated.
    pub fn populated_bytes(&self) -> u64 {
        // st_blocks counts 512-byte units whatever the file system; no need to walk the file.
        use std::os::unix::fs::MetadataExt;
        self.file.metadata().map_or(0, |m| m.blocks() * 512)
    }

    /// Writes `data` at `offset` of the memfd by pwrite(2): fresh pages need not be zeroed first,
    /// as they are when they are written through the mapping. False, and nothing is done, where
    /// the memory cannot be written in this way (hugetlbfs).
    pub fn write_to_file(&self, offset: u64, data: &[u8]) -> io::Result<bool> {
        if self.hugepages {
            return Ok(false);
        }
        self.file.write_all_at(data, offset)?;
        Ok(true)
    }

    /// Gives back `len` bytes at `offset` of the memfd: they read as zeros afterwards.
    pub fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        punch(&self.file, offset, len)
    }

    /// What gives pages of this memory back.
    ///
    /// # Errors
    /// The file cannot be duplicated.
    pub fn discarder(&self) -> io::Result<RamDiscard> {
        Ok(RamDiscard {
            memory: self.memory.clone(),
            file: self.file.try_clone()?,
            regions: self.regions.clone(),
            hugepages: self.hugepages,
        })
    }

    /// Offset of the next data or hole; `None` where nothing but a hole is left.
    fn seek(&self, to: SeekFrom) -> Result<Option<u64>, MemoryError> {
        match rustix::fs::seek(&self.file, to) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(MemoryError::Populated(error.into())),
        }
    }

    /// hugetlbfs knows no SEEK_DATA; all accesses go through this process' mapping, so its page
    /// tables know.
    fn populated_by_mincore(&self, region: &RamRegion) -> io::Result<Vec<(u64, u64)>> {
        let pages = usize::try_from(region.len / PAGE_SIZE).map_err(io::Error::other)?;
        let mut resident = vec![0_u8; pages];
        // SAFETY: the range is our own mapping and `resident` has a byte for each of its pages.
        let rc = unsafe {
            libc::mincore(region.hva as *mut _, pages * PAGE_SIZE as usize, resident.as_mut_ptr())
        };
        if rc != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut found: Vec<(u64, u64)> = Vec::new();
        for (page, _) in resident.iter().enumerate().filter(|(_, r)| **r & 1 == 1) {
            let offset = page as u64 * PAGE_SIZE;
            match found.last_mut() {
                Some((start, len)) if *start + *len == offset => *len += PAGE_SIZE,
                _ => found.push((offset, PAGE_SIZE)),
            }
        }
        Ok(found)
    }
}

fn memfd(size: u64, hugepages: bool) -> Result<File, MemoryError> {
    let failed = |error| MemoryError::Memfd { size, error };
    let mut flags = MemfdFlags::CLOEXEC;
    if hugepages {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let file = File::from(memfd_create(MEMFD_NAME, flags).map_err(|e| failed(e.into()))?);
    file.set_len(size).map_err(failed)?;
    Ok(file)
}

fn map(
    file: &File,
    offset: u64,
    gpa: u64,
    len: u64,
    hugepages: bool,
) -> Result<GuestRegionMmap<AtomicBitmap>, MemoryError> {
    let failed = |error: String| MemoryError::Map { size: len, gpa, error };
    let size = usize::try_from(len).map_err(|e| failed(e.to_string()))?;
    // Huge pages are reserved when they are mapped, so that a shortage shows here and not as a
    // signal later; ordinary memory is overcommitted as everywhere.
    let reserve = if hugepages { 0 } else { libc::MAP_NORESERVE };
    let page = NonZeroUsize::new(PAGE_SIZE as usize).ok_or_else(|| failed("page size".into()))?;
    let region = MmapRegionBuilder::new_with_bitmap(size, AtomicBitmap::new(size, page))
        .with_file_offset(FileOffset::new(
            file.try_clone().map_err(|e| failed(e.to_string()))?,
            offset,
        ))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | reserve)
        .with_hugetlbfs(hugepages)
        .build()
        .map_err(|e| failed(e.to_string()))?;
    // A core dump of the VMM need not hold the guest.
    // SAFETY: advice on our own fresh mapping; failing to give it harms nothing.
    unsafe { libc::madvise(region.as_ptr().cast(), size, libc::MADV_DONTDUMP) };
    GuestRegionMmap::new(region, GuestAddress(gpa)).ok_or_else(|| failed("address overflow".into()))
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
        ram.memory().write_slice(&[1], GuestAddress(5 * PAGE_SIZE + 7)).unwrap();
        ram.memory().write_slice(&[1], GuestAddress((64 << 20) - 1)).unwrap();
        let want = vec![(5 * PAGE_SIZE, PAGE_SIZE), ((64 << 20) - PAGE_SIZE, PAGE_SIZE)];
        assert_eq!(ram.populated(0).unwrap(), want);
        assert_eq!(ram.populated_bytes(), 2 * PAGE_SIZE);
    }

    #[test]
    fn what_is_written_to_the_file_is_in_the_mapping_and_not_in_the_device_bitmap() {
        let ram = GuestRam::new(16 << 20, false).unwrap();
        assert!(ram.write_to_file(3 * PAGE_SIZE, &[7; PAGE_SIZE as usize]).unwrap());
        let mut found = [0; 3];
        ram.memory().read_slice(&mut found, GuestAddress(4 * PAGE_SIZE - 2)).unwrap();
        assert_eq!(found, [7, 7, 0]);
        ram.punch(4 * PAGE_SIZE, PAGE_SIZE).unwrap();
        assert_eq!(ram.populated(0).unwrap(), vec![(3 * PAGE_SIZE, PAGE_SIZE)]);
        assert!(ram.take_device_dirty(0).iter().all(|w| *w == 0));
    }

    #[test]
    fn memory_above_the_hole_is_a_second_region() {
        let ram = GuestRam::new(layout::HOLE_START + (64 << 20), false).unwrap();
        let above = layout::HOLE_END + PAGE_SIZE;
        ram.memory().write_slice(&[9], GuestAddress(above)).unwrap();
        assert!(ram.populated(0).unwrap().is_empty());
        assert_eq!(ram.populated(1).unwrap(), vec![(PAGE_SIZE, PAGE_SIZE)]);
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
        let mut discard = ram.discarder().unwrap();
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
        assert_eq!(ram.populated_bytes(), 0);
        // It fails, perhaps after a part was done.
        discard.file = File::open("/dev/null").unwrap();
        assert!(discard.discard(above, PAGE_SIZE).is_err());
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
