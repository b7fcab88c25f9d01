//! Guest physical memory, which is identity-mapped.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use beacon_core::boot::{BootInfo, Bytes};
use beacon_core::memory::FreeRam;
use beacon_core::pages::Words;
use beacon_core::queue::Ram;

use crate::ring0;

/// All memory that is mapped. Accesses are volatile, so that they happen once and where they stand.
pub struct Memory;

/// Where RAM that beacon uses may end: the first level-4 entry maps 512 GiB.
const CEILING: u64 = 512 << 30;
const GIB: u64 = 1 << 30;

impl Bytes for Memory {
    fn byte(&self, address: u64) -> u8 {
        // SAFETY: the first 4 GiB are mapped, and reading them has no effect on anything that
        // beacon keeps there; boot.rs and acpi.rs read no address above.
        unsafe { (address as *const u8).read_volatile() }
    }
}

impl Words for Memory {
    fn load(&self, address: u64) -> u64 {
        // SAFETY: the callers pass aligned addresses in the working set, which nothing else uses,
        // or of devices.
        unsafe { (address as *const u64).read_volatile() }
    }

    fn store(&self, address: u64, value: u64) {
        // SAFETY: as for `load`.
        unsafe { (address as *mut u64).write_volatile(value) }
    }
}

impl Ram for Memory {
    fn get16(&self, address: u64) -> u16 {
        // SAFETY: the queue passes aligned addresses in the memory that it was given.
        unsafe { (address as *const u16).read_volatile() }
    }

    fn put16(&self, address: u64, value: u16) {
        // SAFETY: as for `get16`.
        unsafe { (address as *mut u16).write_volatile(value) }
    }

    fn get32(&self, address: u64) -> u32 {
        // SAFETY: as for `get16`.
        unsafe { (address as *const u32).read_volatile() }
    }

    fn put32(&self, address: u64, value: u32) {
        // SAFETY: as for `get16`.
        unsafe { (address as *mut u32).write_volatile(value) }
    }

    fn put64(&self, address: u64, value: u64) {
        // SAFETY: as for `get16`.
        unsafe { (address as *mut u64).write_volatile(value) }
    }
}

/// Reads an 8-bit device register.
pub fn read8(address: u64) -> u8 {
    // SAFETY: as for `read32`.
    unsafe { (address as *const u8).read_volatile() }
}

/// Reads a 32-bit device register.
pub fn read32(address: u64) -> u32 {
    // SAFETY: the first 4 GiB are mapped; the callers pass addresses of devices.
    unsafe { (address as *const u32).read_volatile() }
}

/// Writes a 32-bit device register.
pub fn write32(address: u64, value: u32) {
    // SAFETY: as for `read32`.
    unsafe { (address as *mut u32).write_volatile(value) }
}

/// Writes an 8-bit device register.
pub fn write8(address: u64, value: u8) {
    // SAFETY: as for `read32`.
    unsafe { (address as *mut u8).write_volatile(value) }
}

/// Writes 16 bits to a device at any address, aligned or not.
pub fn write16_anywhere(address: u64, value: u16) {
    // SAFETY: as for `read32`; one store instruction, since the compiler must not split it.
    unsafe {
        core::arch::asm!("mov word ptr [{}], {:x}", in(reg) address, in(reg) value, options(nostack));
    }
}

/// Copies code to low memory, which is not used for anything else after boot.
pub fn copy_to(address: u64, bytes: &[u8]) {
    for (index, &byte) in bytes.iter().enumerate() {
        write8(address + index as u64, byte);
    }
}

/// Zeroed memory for the rest of the guest's life.
///
/// # Safety
/// All-zero bytes must be a valid `T`, and `T` must not ask for more alignment than a page.
pub unsafe fn allocate<T>(ram: &mut FreeRam, count: usize) -> Option<&'static mut [T]> {
    let bytes = count.checked_mul(size_of::<T>())?;
    let address = ram.take(bytes as u64, align_of::<T>() as u64)?;
    // SAFETY: `take` gives each byte of RAM away once, aligned as asked; the caller vouches for T.
    unsafe {
        core::ptr::write_bytes(address as *mut u8, 0, bytes);
        Some(core::slice::from_raw_parts_mut(address as *mut T, count))
    }
}

/// Memory for one value, for the rest of the guest's life.
pub fn keep<T>(ram: &mut FreeRam, value: T) -> Option<&'static mut T> {
    // SAFETY: it is written before it is read.
    let [place] = (unsafe { allocate::<core::mem::MaybeUninit<T>>(ram, 1)? }) else { return None };
    Some(place.write(value))
}

/// Memory for bytes that a device or a driver fills.
pub fn bytes(ram: &mut FreeRam, count: usize) -> Option<&'static mut [u8]> {
    // SAFETY: zero is a valid byte.
    unsafe { allocate(ram, count) }
}

/// Collects the free RAM of the memory map, above the image, and maps what lies above 4 GiB.
pub fn free_ram(info: &BootInfo) -> Option<FreeRam> {
    let mut ram = FreeRam::default();
    for entry in info.ram() {
        ram.add(entry.start, entry.length, ring0::image_end(), CEILING);
    }
    let top = ram.regions().iter().map(|region| region.end).max().unwrap_or(0);
    for (index, entry) in ring0::gigabyte_entries().iter().enumerate().skip(4) {
        let start = index as u64 * GIB;
        if !ram.regions().iter().any(|region| region.start < start + GIB && region.end > start) {
            continue;
        }
        entry.store(page_directory(&mut ram, start)? | 7, Relaxed);
    }
    (top != 0).then_some(ram)
}

/// A table of 2 MiB pages for the GiB at `start`, in the lowest region, which is mapped from the
/// beginning. Not a 1 GiB page: a KVM was seen to announce them and to refuse them.
fn page_directory(ram: &mut FreeRam, start: u64) -> Option<u64> {
    // SAFETY: zero is a valid atomic.
    let table = unsafe { allocate::<AtomicU64>(ram, 512)? };
    for (index, entry) in table.iter().enumerate() {
        entry.store((start + ((index as u64) << 21)) | 0xE7, Relaxed);
    }
    Some(table.as_ptr() as u64)
}
