//! COM1: lines go out byte by byte between turns of the work loop, so that output makes no gap.

use core::sync::atomic::{AtomicU64, AtomicU8, AtomicUsize, Ordering::Relaxed};

use beacon_core::json::Line;

use crate::cpu::{inb, outb};

// 16550 registers on COM1.
const DATA: u16 = 0x3F8;
const INTERRUPT_ENABLE: u16 = DATA + 1;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_CONTROL: u16 = DATA + 3;
const MODEM_CONTROL: u16 = DATA + 4;
/// The line status register, which `mode=exits` reads.
pub const LINE_STATUS: u16 = DATA + 5;
const DATA_READY: u8 = 1 << 0;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
/// Bytes that the transmitter takes once it is empty.
const FIFO_LENGTH: u64 = 16;

const BUFFER: usize = 16384;

/// Output that waits; only vCPU 0 uses it. `HEAD` moves by whole lines, `TAIL` by bytes.
static OUTPUT: [AtomicU8; BUFFER] = [const { AtomicU8::new(0) }; BUFFER];
static HEAD: AtomicUsize = AtomicUsize::new(0);
static TAIL: AtomicUsize = AtomicUsize::new(0);
/// Bytes that may be sent before the line status has to be read again.
static CREDIT: AtomicU64 = AtomicU64::new(0);
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Sets the port up: 115200 8N1, FIFOs on, no interrupts.
pub fn init() {
    outb(INTERRUPT_ENABLE, 0);
    outb(LINE_CONTROL, 0x80);
    outb(DATA, 1);
    outb(INTERRUPT_ENABLE, 0);
    outb(LINE_CONTROL, 3);
    outb(FIFO_CONTROL, 7);
    outb(MODEM_CONTROL, 3);
}

/// Queues a line. One that does not fit is dropped as a whole and counted.
pub fn send(line: &mut Line) {
    let bytes = line.finish();
    let (head, tail) = (HEAD.load(Relaxed), TAIL.load(Relaxed));
    if bytes.len() > BUFFER - head.wrapping_sub(tail) {
        DROPPED.store(dropped() + 1, Relaxed);
        return;
    }
    for (index, &byte) in bytes.iter().enumerate() {
        OUTPUT[head.wrapping_add(index) % BUFFER].store(byte, Relaxed);
    }
    HEAD.store(head.wrapping_add(bytes.len()), Relaxed);
}

/// Queues a line that nobody asked for, if that leaves room for those that somebody did.
pub fn offer(line: &mut Line) {
    if has_room() {
        send(line);
    }
}

/// Lines that were dropped since boot.
pub fn dropped() -> u64 {
    DROPPED.load(Relaxed)
}

/// Bytes that wait.
pub fn waiting() -> usize {
    HEAD.load(Relaxed).wrapping_sub(TAIL.load(Relaxed))
}

/// Whether half of the buffer is free, so that an answer still fits after one more line.
pub fn has_room() -> bool {
    waiting() < BUFFER / 2
}

/// Sends at most one byte, with at most one exit: either the status is read, or the byte goes out.
pub fn pump() {
    if waiting() == 0 {
        return;
    }
    let credit = CREDIT.load(Relaxed);
    if credit == 0 {
        if inb(LINE_STATUS) & TRANSMITTER_EMPTY != 0 {
            CREDIT.store(FIFO_LENGTH, Relaxed);
        }
        return;
    }
    CREDIT.store(credit - 1, Relaxed);
    let tail = TAIL.load(Relaxed);
    outb(DATA, OUTPUT[tail % BUFFER].load(Relaxed));
    TAIL.store(tail.wrapping_add(1), Relaxed);
}

/// Sends everything that waits, and waits until the transmitter has taken it.
pub fn flush() {
    while waiting() != 0 {
        pump();
    }
    while inb(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
    CREDIT.store(0, Relaxed);
}

/// A byte that came in, if there is one.
pub fn receive() -> Option<u8> {
    (inb(LINE_STATUS) & DATA_READY != 0).then(|| inb(DATA))
}
