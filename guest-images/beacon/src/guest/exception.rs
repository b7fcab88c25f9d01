//! The end: exceptions and panics.
//!
//! Only vCPU 0 writes to the console. Another vCPU leaves its last words in [`LAST_WORDS`], where
//! vCPU 0 finds them at its next turn.
#![allow(unsafe_code)]

use core::panic::PanicInfo;
use core::sync::atomic::{
    AtomicU64, AtomicUsize,
    Ordering::{Acquire, Relaxed, Release},
};

use beacon_core::json::Line;

use crate::{console, ring0};

/// What `ring0.s` and the processor push.
#[repr(C)]
pub struct Frame {
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

const NOTHING: u64 = 0;
const WRITING: u64 = 1;
const EXCEPTION: u64 = 2;
const PANIC: u64 = 3;

struct LastWords {
    state: AtomicU64,
    cpu: AtomicU64,
    /// vector, error, rip, cr2, cs, rsp; or for a panic the line.
    values: [AtomicU64; 6],
    /// The file of a panic.
    file: AtomicUsize,
    file_length: AtomicUsize,
}

static LAST_WORDS: LastWords = LastWords {
    state: AtomicU64::new(NOTHING),
    cpu: AtomicU64::new(0),
    values: [const { AtomicU64::new(0) }; 6],
    file: AtomicUsize::new(0),
    file_length: AtomicUsize::new(0),
};

/// Reports an exception and stops.
pub fn report(frame: &Frame, cr2: u64) -> ! {
    die(EXCEPTION, [frame.vector, frame.error, frame.rip, cr2, frame.cs, frame.rsp], "")
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    let (file, line) = info.location().map_or(("", 0), |at| (at.file(), at.line()));
    die(PANIC, [u64::from(line), 0, 0, 0, 0, 0], file)
}

fn die(state: u64, values: [u64; 6], file: &str) -> ! {
    let cpu = ring0::area().cpu.load(Relaxed);
    // The first one speaks.
    if LAST_WORDS.state.compare_exchange(NOTHING, WRITING, Acquire, Relaxed).is_ok() {
        LAST_WORDS.cpu.store(cpu, Relaxed);
        for (slot, value) in LAST_WORDS.values.iter().zip(values) {
            slot.store(value, Relaxed);
        }
        LAST_WORDS.file.store(file.as_ptr() as usize, Relaxed);
        LAST_WORDS.file_length.store(file.len(), Relaxed);
        LAST_WORDS.state.store(state, Release);
    }
    if cpu == 0 {
        speak_if_dying();
    }
    ring0::hang()
}

/// On vCPU 0: if any vCPU died, says so and stops.
pub fn speak_if_dying() {
    let state = LAST_WORDS.state.load(Acquire);
    if state < EXCEPTION {
        return;
    }
    let value = |index: usize| LAST_WORDS.values[index].load(Relaxed);
    let mut line;
    if state == EXCEPTION {
        line = Line::event("exception");
        line.number("vector", value(0));
        line.hex("rip", value(2));
        line.hex("error", value(1));
        line.hex("cr2", value(3));
        line.number("cpu", LAST_WORDS.cpu.load(Relaxed));
        line.hex("cs", value(4));
        line.hex("rsp", value(5));
    } else {
        line = Line::event("panic");
        // SAFETY: both come from one string of the compiler's (in `panic`), which lies in the image.
        let file = unsafe {
            core::slice::from_raw_parts(
                LAST_WORDS.file.load(Relaxed) as *const u8,
                LAST_WORDS.file_length.load(Relaxed),
            )
        };
        line.bytes("file", file);
        line.number("line", value(0));
        line.number("cpu", LAST_WORDS.cpu.load(Relaxed));
    }
    // Make room: whatever waits comes first.
    console::flush();
    console::send(&mut line);
    console::flush();
    ring0::hang()
}

/// Ends beacon with one `error` event, before there is a work loop. vCPU 0 only.
pub fn fatal(text: &str) -> ! {
    let mut line = Line::event("error");
    line.text("text", text);
    line.flag("fatal", true);
    console::flush();
    console::send(&mut line);
    console::flush();
    ring0::hang()
}
