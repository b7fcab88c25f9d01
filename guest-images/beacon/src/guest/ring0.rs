//! The border to ring 0: its assembly, the tables it uses, and the calls into it.
#![allow(unsafe_code)]

use core::arch::{asm, global_asm};
use core::mem::offset_of;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering::Relaxed};

use beacon_core::config::MAX_CPUS;

use crate::exception::Frame;

global_asm!(include_str!("ring0.s"), idt = sym IDT);

/// Size and alignment of [`Area`] with the ring-3 stack above it.
pub const AREA_SIZE: u64 = 0x2_0000;
/// Vector of the LAPIC timer.
pub const TIMER_VECTOR: u32 = 0x40;
/// Vector of the first device interrupt; the others follow.
const FIRST_DEVICE_VECTOR: usize = 0x50;
/// Device interrupts that are told apart.
pub const DEVICE_LINES: usize = 16;
/// Vector of the LAPIC's spurious interrupt.
pub const SPURIOUS_VECTOR: u32 = 0xFF;

/// Selectors of `ring0.s`.
const CODE0: u64 = 0x10;
const FIRST_TSS: u64 = 0x30;
/// Where the ring-0 stack ends and the ring-3 stack begins: exceptions are written out on the former.
const RING0_STACK: u64 = 0x8000;
/// Bytes of an I/O permission bitmap for all ports, and the byte that must follow it.
const IO_BITMAP: usize = 8192 + 1;

/// The lower part of a vCPU's area; the layout is known to `ring0.s`.
#[repr(C)]
pub struct Area {
    /// Index of the vCPU.
    pub cpu: AtomicU64,
    /// Timer interrupts so far.
    pub ticks: AtomicU64,
    /// TSC ticks between two timer interrupts.
    pub timer_period: AtomicU64,
    /// TSC at the next timer interrupt, 0 if the LAPIC repeats them by itself.
    pub timer_deadline: AtomicU64,
    /// 1 if the LAPIC is in x2APIC mode.
    pub x2apic: AtomicU32,
    _pad: u32,
    tss: Tss,
}

const _: () = assert!(offset_of!(Area, ticks) == 8);
const _: () = assert!(offset_of!(Area, timer_period) == 16);
const _: () = assert!(offset_of!(Area, timer_deadline) == 24);
const _: () = assert!(offset_of!(Area, x2apic) == 32);
const _: () = assert!(offset_of!(Area, tss) == 40);
// What is left is the ring-0 stack.
const _: () = assert!(size_of::<Area>() + 16384 <= RING0_STACK as usize);

/// 64-bit TSS with an I/O bitmap that stays all-zero: ring 3 may use every port.
#[repr(C)]
struct Tss {
    _reserved0: u32,
    /// RSP0, in two halves because the field is not aligned to 8.
    rsp0: [AtomicU32; 2],
    _unused: [u32; 22],
    _reserved1: u16,
    io_bitmap_base: AtomicU16,
    _io_bitmap: [AtomicU8; IO_BITMAP],
}

const _: () = assert!(offset_of!(Tss, _io_bitmap) == 104);

#[repr(C, align(16))]
struct Gate([AtomicU64; 2]);

static IDT: [Gate; 256] = [const { Gate([AtomicU64::new(0), AtomicU64::new(0)]) }; 256];

extern "C" {
    static gdt_tss: [AtomicU64; 2 * MAX_CPUS as usize];
    static page_directory_pointers: [AtomicU64; 512];
    static exception_stubs: [u8; 32 * 16];
    static device_stubs: [u8; DEVICE_LINES * 16];
    static device_counts: [AtomicU64; DEVICE_LINES];
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
    static ap_stack: AtomicU64;
    static ap_selector: AtomicU64;
    static ap_argument: AtomicU64;
    static __image_end: u8;
    fn timer_interrupt();
    fn spurious_interrupt();
    fn invalid_opcode();
}

/// One past the last byte of the image, bss included.
pub fn image_end() -> u64 {
    &raw const __image_end as u64
}

/// The area of the vCPU that runs this.
pub fn area() -> &'static Area {
    let stack: u64;
    // SAFETY: reads a register. Each stack lies in the area of its vCPU, which is zeroed or set up,
    // never freed, and made of atomics.
    unsafe {
        asm!("mov {}, rsp", out(reg) stack, options(nomem, nostack, preserves_flags));
        &*((stack & !(AREA_SIZE - 1)) as *const Area)
    }
}

/// Fills in the interrupt table. Until then any exception resets the machine.
pub fn fill_idt() {
    for vector in 0..32 {
        // SAFETY: the address of the stub is computed, not read.
        set_gate(vector, unsafe { (&raw const exception_stubs).cast::<u8>().add(vector * 16) }
            as u64);
    }
    for line in 0..DEVICE_LINES {
        // SAFETY: as above.
        let stub = unsafe { (&raw const device_stubs).cast::<u8>().add(line * 16) };
        set_gate(FIRST_DEVICE_VECTOR + line, stub as u64);
    }
    set_gate(6, invalid_opcode as *const () as u64);
    set_gate(TIMER_VECTOR as usize, timer_interrupt as *const () as u64);
    set_gate(SPURIOUS_VECTOR as usize, spurious_interrupt as *const () as u64);
}

fn set_gate(vector: usize, handler: u64) {
    const PRESENT_INTERRUPT_GATE: u64 = 0x8E00;
    let low = handler & 0xFFFF
        | CODE0 << 16
        | PRESENT_INTERRUPT_GATE << 32
        | (handler & 0xFFFF_0000) << 32;
    IDT[vector].0[0].store(low, Relaxed);
    IDT[vector].0[1].store(handler >> 32, Relaxed);
}

/// The vector of a device interrupt; `line` < [`DEVICE_LINES`].
pub fn device_vector(line: usize) -> u32 {
    (FIRST_DEVICE_VECTOR + line) as u32
}

/// Counts the interrupts of a device.
pub fn device_irqs(line: usize) -> &'static AtomicU64 {
    // SAFETY: the counters are part of the image and atomics.
    unsafe { &device_counts[line] }
}

/// Fills in this vCPU's TSS, with which ring 3 may use ports and the gate. `cpu` < [`MAX_CPUS`].
pub fn fill_tss(cpu: u32) {
    let area = area();
    area.cpu.store(u64::from(cpu), Relaxed);
    let stack = &raw const *area as u64 + RING0_STACK;
    area.tss.rsp0[0].store(stack as u32, Relaxed);
    area.tss.rsp0[1].store((stack >> 32) as u32, Relaxed);
    area.tss.io_bitmap_base.store(offset_of!(Tss, _io_bitmap) as u16, Relaxed);
}

/// The entries of the page table level that maps 1 GiB each.
pub fn gigabyte_entries() -> &'static [AtomicU64; 512] {
    // SAFETY: the table is part of the image and made of atomics.
    unsafe { &page_directory_pointers }
}

/// The real-mode code with which an application processor begins.
pub fn trampoline() -> &'static [u8] {
    let (start, end) = (&raw const ap_trampoline, &raw const ap_trampoline_end);
    // SAFETY: both symbols delimit code of the image, which is never written.
    unsafe { core::slice::from_raw_parts(start, end as usize - start as usize) }
}

/// Prepares the next application processor: its index, its zeroed area, and what to hand to
/// `beacon_ap`. `cpu` < [`MAX_CPUS`].
pub fn set_ap(cpu: u32, area: u64, argument: u64) {
    const AVAILABLE_TSS: u64 = 0x89;
    let base = area + offset_of!(Area, tss) as u64;
    let limit = offset_of!(Tss, _io_bitmap) as u64 + IO_BITMAP as u64 - 1;
    let low = limit | (base & 0xFF_FFFF) << 16 | AVAILABLE_TSS << 40 | (base & 0xFF00_0000) << 32;
    // SAFETY: all of them are part of the image and atomics.
    let (descriptors, stack, selector, handed) =
        unsafe { (&gdt_tss, &ap_stack, &ap_selector, &ap_argument) };
    descriptors[2 * cpu as usize].store(low, Relaxed);
    descriptors[2 * cpu as usize + 1].store(base >> 32, Relaxed);
    stack.store(area + AREA_SIZE, Relaxed);
    selector.store(FIRST_TSS + 16 * u64::from(cpu), Relaxed);
    handed.store(argument, Relaxed);
}

/// Reads a model-specific register; one that does not exist ends in an `exception` event.
pub fn rdmsr(register: u32) -> u64 {
    gate(0, u64::from(register), 0, 0)
}

/// Writes a model-specific register.
pub fn wrmsr(register: u32, value: u64) {
    gate(1, u64::from(register), value & 0xFFFF_FFFF, value >> 32);
}

/// Allows XSAVE's instructions and sets XCR0.
pub fn set_xcr0(value: u64) {
    gate(2, 0, value & 0xFFFF_FFFF, value >> 32);
}

/// Lets interrupts in.
pub fn enable_interrupts() {
    gate(3, 0, 0, 0);
}

/// Faults without an interrupt table.
pub fn triple_fault() -> ! {
    gate(4, 0, 0, 0);
    hang()
}

/// Stops this vCPU: interrupts off, HLT.
pub fn hang() -> ! {
    loop {
        gate(5, 0, 0, 0);
    }
}

/// Halts this vCPU until its next interrupt.
pub fn wait_for_interrupt() {
    gate(6, 0, 0, 0);
}

fn gate(which: u64, a: u64, b: u64, c: u64) -> u64 {
    let (low, high): (u64, u64);
    // SAFETY: the handlers in ring0.s touch these registers only. `call` writes below rsp, which
    // the compiler does not use there since the block is not marked `nostack`.
    unsafe {
        asm!(
            "call ring0_gate",
            inlateout("rax") which => low,
            inlateout("rdx") c => high,
            in("rdi") a,
            in("rsi") b,
            out("rcx") _,
        );
    }
    high << 32 | low & 0xFFFF_FFFF
}

/// What `ring0.s` calls after an exception, in ring 3.
#[no_mangle]
extern "C" fn exception_report(frame: &Frame, cr2: u64) -> ! {
    crate::exception::report(frame, cr2)
}
