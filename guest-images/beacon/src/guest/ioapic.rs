//! The I/O APICs: where interrupts of devices go.
//!
//! Source: Intel 82093AA data sheet; the second one is at the place that QEMU's microvm gives it.

use crate::apic;
use crate::phys::write32;

const FIRST: u64 = 0xFEC0_0000;
const SECOND: u64 = 0xFEC1_0000;
/// Inputs of the first.
const INPUTS: u32 = 24;

const DATA: u64 = 0x10;
const REDIRECTION: u32 = 0x10;

/// Sends an edge-triggered, active-high interrupt to this vCPU.
pub fn route(irq: u32, vector: u32) {
    let (base, entry) = entry(irq);
    write(base, entry + 1, apic::id() << 24);
    // Fixed delivery, physical destination, not masked.
    write(base, entry, vector);
}

/// Lets an interrupt go nowhere, for tests of what notices.
pub fn mask(irq: u32) {
    const MASKED: u32 = 1 << 16;
    let (base, entry) = entry(irq);
    write(base, entry, MASKED);
}

fn entry(irq: u32) -> (u64, u32) {
    let (base, input) = if irq < INPUTS { (FIRST, irq) } else { (SECOND, irq - INPUTS) };
    (base, REDIRECTION + 2 * input)
}

fn write(base: u64, register: u32, value: u32) {
    write32(base, register);
    write32(base + DATA, value);
}
