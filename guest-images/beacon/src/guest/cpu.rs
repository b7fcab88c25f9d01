//! Single instructions.
#![allow(unsafe_code)]

use core::arch::asm;
use core::arch::x86_64::{__cpuid_count, CpuidResult};

/// The time stamp counter, read after everything before it.
pub fn tsc() -> u64 {
    let (low, high): (u64, u64);
    // SAFETY: reads a counter; ring 3 may, since CR4.TSD is clear.
    unsafe {
        asm!("lfence", "rdtsc", out("rax") low, out("rdx") high, options(nostack));
    }
    high << 32 | low
}

/// Waits until the counter has reached `deadline`.
pub fn wait_until(deadline: u64) {
    while tsc() < deadline {
        core::hint::spin_loop();
    }
}

/// Reads a CPUID leaf.
pub fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    __cpuid_count(leaf, subleaf)
}

/// Reads a byte from a port.
pub fn inb(port: u16) -> u8 {
    let value: u8;
    // SAFETY: port accesses reach devices only; no device of beacon's writes to memory.
    unsafe { asm!("in al, dx", out("al") value, in("dx") port, options(nostack)) };
    value
}

/// Writes a byte to a port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: as for `inb`.
    unsafe { asm!("out dx, al", in("al") value, in("dx") port, options(nostack)) };
}

/// Reads 16 bits from a port.
pub fn inw(port: u16) -> u16 {
    let value: u16;
    // SAFETY: as for `inb`.
    unsafe { asm!("in ax, dx", out("ax") value, in("dx") port, options(nostack)) };
    value
}

/// Writes 16 bits to a port.
pub fn outw(port: u16, value: u16) {
    // SAFETY: as for `inb`.
    unsafe { asm!("out dx, ax", in("ax") value, in("dx") port, options(nostack)) };
}
