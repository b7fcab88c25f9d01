//! The local APIC: its timer, and the interrupts that start other processors.
//!
//! Source: Intel SDM volume 3, chapter 11.

use core::sync::atomic::Ordering::Relaxed;

use beacon_core::time::TscScale;

use crate::cpu::{cpuid, outb, tsc, wait_until};
use crate::phys::{read32, write32};
use crate::ring0::{self, rdmsr, wrmsr, SPURIOUS_VECTOR, TIMER_VECTOR};

/// Timer interrupts per second.
pub const TIMER_HZ: u64 = 100;

const BASE: u64 = 0xFEE0_0000;
const MSR_APIC_BASE: u32 = 0x1B;
const MSR_X2APIC: u32 = 0x800;
const MSR_TSC_DEADLINE: u32 = 0x6E0;

// Register offsets; in x2APIC mode the MSR is 0x800 + offset / 16.
const ID: u32 = 0x20;
const SPURIOUS: u32 = 0xF0;
const COMMAND: u32 = 0x300;
const COMMAND_HIGH: u32 = 0x310;
const LVT_TIMER: u32 = 0x320;
const LVT_LINT0: u32 = 0x350;
const TIMER_COUNT: u32 = 0x380;
const TIMER_CURRENT: u32 = 0x390;
const TIMER_DIVIDE: u32 = 0x3E0;

const MASKED: u32 = 1 << 16;
const PERIODIC: u32 = 1 << 17;
const DEADLINE: u32 = 2 << 17;
const DIVIDE_BY_1: u32 = 0xB;
const INIT_ASSERT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;
const DELIVERY_PENDING: u32 = 1 << 12;

fn read(offset: u32) -> u32 {
    if ring0::area().x2apic.load(Relaxed) == 1 {
        rdmsr(MSR_X2APIC + offset / 16) as u32
    } else {
        read32(BASE + u64::from(offset))
    }
}

fn write(offset: u32, value: u32) {
    if ring0::area().x2apic.load(Relaxed) == 1 {
        wrmsr(MSR_X2APIC + offset / 16, u64::from(value));
    } else {
        write32(BASE + u64::from(offset), value);
    }
}

/// Switches this vCPU's LAPIC on, in x2APIC mode when there is one.
pub fn init() {
    if cpuid(1, 0).ecx & 1 << 21 != 0 {
        // EXTD and EN.
        wrmsr(MSR_APIC_BASE, rdmsr(MSR_APIC_BASE) | 0xC00);
        ring0::area().x2apic.store(1, Relaxed);
    }
    write(SPURIOUS, 0x100 | SPURIOUS_VECTOR);
    write(LVT_LINT0, MASKED);
}

/// Masks both 8259s: firmware may have left the PIT's interrupt on, at the vector of an exception.
pub fn mask_pics() {
    outb(0x21, 0xFF);
    outb(0xA1, 0xFF);
}

/// This vCPU's APIC id.
pub fn id() -> u32 {
    let id = read(ID);
    if ring0::area().x2apic.load(Relaxed) == 1 {
        id
    } else {
        id >> 24
    }
}

/// Whether the timer can be set to a TSC value.
pub fn has_tsc_deadline() -> bool {
    cpuid(1, 0).ecx & 1 << 24 != 0
}

/// Starts this vCPU's timer.
pub fn start_timer(scale: TscScale) {
    let period = scale.ticks_of_micros(1_000_000 / TIMER_HZ);
    let area = ring0::area();
    if has_tsc_deadline() {
        area.timer_period.store(period, Relaxed);
        write(LVT_TIMER, DEADLINE | TIMER_VECTOR);
        let deadline = tsc() + period;
        area.timer_deadline.store(deadline, Relaxed);
        wrmsr(MSR_TSC_DEADLINE, deadline);
    } else {
        // How many counts pass in a millisecond?
        write(TIMER_DIVIDE, DIVIDE_BY_1);
        write(LVT_TIMER, MASKED);
        write(TIMER_COUNT, u32::MAX);
        wait_until(tsc() + scale.ticks_of_micros(1000));
        let counts = u64::from(u32::MAX - read(TIMER_CURRENT));
        write(LVT_TIMER, PERIODIC | TIMER_VECTOR);
        write(TIMER_COUNT, (counts * 1000 / TIMER_HZ) as u32);
    }
    ring0::enable_interrupts();
}

/// Masks this vCPU's timer, for tests of what notices.
pub fn stop_timer() {
    write(LVT_TIMER, MASKED);
}

fn command(destination: u32, value: u32) {
    if ring0::area().x2apic.load(Relaxed) == 1 {
        wrmsr(MSR_X2APIC + COMMAND / 16, u64::from(destination) << 32 | u64::from(value));
    } else {
        write(COMMAND_HIGH, destination << 24);
        write(COMMAND, value);
        while read(COMMAND) & DELIVERY_PENDING != 0 {}
    }
}

/// Puts another processor into wait-for-SIPI.
pub fn send_init(destination: u32) {
    command(destination, INIT_ASSERT);
}

/// Starts another processor in real mode at `page` << 12.
pub fn send_startup(destination: u32, page: u8) {
    command(destination, STARTUP | u32::from(page));
}
