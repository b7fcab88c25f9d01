//! Which pages of this process' memory are there, without touching them: PAGEMAP_SCAN (Linux 6.7), or
//! /proc/self/pagemap before (Documentation/admin-guide/mm/pagemap.rst of the kernel).
#![allow(unsafe_code)] // one ioctl

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::address::PAGE_SIZE;

/// Of `struct pm_scan_arg` and `struct page_region` (linux/fs.h).
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`, linux/fs.h.
const PAGEMAP_SCAN: libc::Ioctl = libc::_IOWR::<PmScanArg>(b'f' as u32, 16);

/// Ranges found by one call.
const RANGES: usize = 512;
/// Entries of /proc/self/pagemap that are read at once, and bits 62 and 63 of them.
const ENTRIES: usize = 8192;
const ENTRY_PRESENT_OR_SWAPPED: u8 = 0b11 << 6;

/// The ranges of `start..start + len` that are populated, in memory or swapped out: (offset, length)
/// in bytes, whole pages, ascending, merged. What was only read, and reads as zeros, may be left out.
///
/// # Errors
/// As open(2) and ioctl(2) or read(2).
pub fn populated(start: u64, len: u64) -> io::Result<Vec<(u64, u64)>> {
    let file = File::open("/proc/self/pagemap")?;
    match scan(&file, start, len) {
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => read(&file, start, len),
        found => found,
    }
}

fn scan(file: &File, start: u64, len: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut regions = [PageRegion::default(); RANGES];
    let mut found = Vec::new();
    let mut at = start;
    while at < start + len {
        let mut arg = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            start: at,
            end: start + len,
            vec: regions.as_mut_ptr() as u64,
            vec_len: RANGES as u64,
            category_inverted: PAGE_IS_PFNZERO,
            category_mask: PAGE_IS_PFNZERO,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            // Never set in what is found, so that neighbours are one range.
            return_mask: PAGE_IS_PFNZERO,
            ..PmScanArg::default()
        };
        // SAFETY: the kernel reads and writes `arg` and writes at most `vec_len` elements to `vec`,
        // which is `regions`; both live through the call.
        let count = unsafe { libc::ioctl(file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for region in regions.iter().take(count) {
            add(&mut found, region.start - start, region.end - region.start);
        }
        if arg.walk_end <= at {
            return Err(io::Error::other("the scan does not advance"));
        }
        at = arg.walk_end;
    }
    Ok(found)
}

fn read(file: &File, start: u64, len: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut bytes = vec![0; ENTRIES * 8];
    let pages = len / PAGE_SIZE;
    let mut page = 0;
    while page < pages {
        let count = ((pages - page) as usize).min(ENTRIES);
        let entries = &mut bytes[..count * 8];
        file.read_exact_at(entries, (start / PAGE_SIZE + page) * 8)?;
        for entry in entries.chunks_exact(8) {
            // Its highest byte is its last one: this program is for x86-64.
            if entry[7] & ENTRY_PRESENT_OR_SWAPPED != 0 {
                add(&mut found, page * PAGE_SIZE, PAGE_SIZE);
            }
            page += 1;
        }
    }
    Ok(found)
}

fn add(found: &mut Vec<(u64, u64)>, offset: u64, len: u64) {
    match found.last_mut() {
        Some((start, before)) if *start + *before == offset => *before += len,
        _ => found.push((offset, len)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::volatile_io::discard;
    use vm_memory::{Bytes, MmapRegion, VolatileMemory};

    #[test]
    fn both_ways_find_the_same_and_touch_nothing() {
        const PAGES: usize = 2048;
        const PAGE: usize = PAGE_SIZE as usize;
        let region: MmapRegion = MmapRegion::new(PAGES * PAGE).unwrap();
        let all = region.as_volatile_slice();
        let (start, len) = (region.as_ptr() as u64, (PAGES * PAGE) as u64);
        let file = File::open("/proc/self/pagemap").unwrap();
        assert_eq!(read(&file, start, len).unwrap(), []);
        // More ranges than one call finds, whatever the size of the host's pages.
        for page in (0..PAGES - 1).step_by(2) {
            all.write(&[1], page * PAGE).unwrap();
            discard(&all.subslice((page + 1) * PAGE, PAGE).unwrap()).unwrap();
        }
        let found = read(&file, start, len).unwrap();
        assert_eq!(found[..3], [(0, 4096), (8192, 4096), (16384, 4096)]);
        assert_eq!(found.len(), PAGES / 2);
        assert!(found.len() > 2 * RANGES - 2, "{}", found.len());
        match scan(&file, start, len) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {}
            scanned => assert_eq!(scanned.unwrap(), found),
        }
        assert_eq!(populated(start, len).unwrap(), found);
    }
}
