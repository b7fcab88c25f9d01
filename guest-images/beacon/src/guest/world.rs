//! What all vCPUs share. Each counter has one writer, the vCPU that it belongs to.

use core::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

use beacon_core::config::{Config, Rate, Registers};
use beacon_core::memory::Placement;
use beacon_core::stats::{Gap, TopGaps, BUCKETS, TOP};
use beacon_core::time::TscScale;

use crate::clock;

/// A number that one vCPU writes and others read.
#[repr(transparent)]
pub struct Counter(AtomicU64);

impl Counter {
    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    /// Replaces the value.
    pub fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// Adds; not atomic, since there is one writer.
    pub fn add(&self, value: u64) {
        self.set(self.get().wrapping_add(value));
    }

    /// Raises the value to `value`.
    pub fn raise(&self, value: u64) {
        if value > self.get() {
            self.set(value);
        }
    }
}

/// Counters that `mark` sets back to zero.
#[repr(C)]
pub struct Window {
    /// Turns of the loop.
    pub beats: Counter,
    /// Beats in which the VM was stopped.
    pub switches: Counter,
    /// Length of the last one by the TSC, in nanoseconds.
    pub switch_last: Counter,
    /// The same by kvmclock.
    pub switch_last_clock: Counter,
    /// TSC at its end.
    pub switch_last_tsc: Counter,
    /// Length of the longest, in nanoseconds.
    pub switch_max: Counter,
    /// Other beats by length.
    pub histogram: [Counter; BUCKETS],
    /// The longest of them: nanoseconds and TSC.
    pub top: [[Counter; 2]; TOP],
    /// Pages written.
    pub writes: Counter,
    /// Pages that should have been written at the rate asked for.
    pub intended: Counter,
    /// Pages verified.
    pub verified: Counter,
    /// Timer interrupts.
    pub ticks: Counter,
    /// Timer interrupts that the time outside of switches should have brought.
    pub ticks_expected: Counter,
}

impl Window {
    /// Sets all counters to zero.
    pub fn clear(&self) {
        for counter in [
            &self.beats,
            &self.switches,
            &self.switch_last,
            &self.switch_last_clock,
            &self.switch_last_tsc,
            &self.switch_max,
            &self.writes,
            &self.intended,
            &self.verified,
            &self.ticks,
            &self.ticks_expected,
        ] {
            counter.set(0);
        }
        self.histogram.iter().for_each(|counter| counter.set(0));
        self.top.as_flattened().iter().for_each(|counter| counter.set(0));
    }

    /// Publishes the list of the longest gaps.
    pub fn set_top(&self, top: &TopGaps) {
        for (slot, gap) in self.top.iter().zip(top.as_slice()) {
            slot[0].set(gap.nanoseconds);
            slot[1].set(gap.tsc);
        }
    }

    /// Adds the longest gaps of vCPU `cpu` to `top`.
    pub fn add_top(&self, cpu: u64, top: &mut TopGaps) {
        for slot in &self.top {
            top.add(Gap { nanoseconds: slot[0].get(), tsc: slot[1].get(), cpu });
        }
    }
}

/// What went wrong, for the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Notice {
    /// page, address, expected generation, first word, offset, expected, found; then the kind.
    Corrupt,
    /// sum that the table should have, sum that it has.
    Generations,
    /// class, register, word, expected, found.
    Fpu,
    /// ticks so far, nanoseconds since the last.
    TimerStalled,
    /// nanoseconds back, 1 if against another vCPU.
    TscBack,
    /// nanoseconds back.
    ClockBack,
    /// nanoseconds by TSC, by kvmclock, TSC at the end.
    Switch,
}

impl Notice {
    const ALL: [Self; 7] = [
        Self::Corrupt,
        Self::Generations,
        Self::Fpu,
        Self::TimerStalled,
        Self::TscBack,
        Self::ClockBack,
        Self::Switch,
    ];
}

const NOTICES: usize = 8;

/// Notices on their way to vCPU 0: one writer, one reader; when full, new ones are only counted.
#[repr(C)]
pub struct Notices {
    slots: [[AtomicU64; 9]; NOTICES],
    head: AtomicU64,
    tail: AtomicU64,
}

impl Notices {
    /// Adds a notice if there is room.
    pub fn put(&self, kind: Notice, values: [u64; 8]) {
        let head = self.head.load(Relaxed);
        if head - self.tail.load(Acquire) == NOTICES as u64 {
            return;
        }
        let slot = &self.slots[head as usize % NOTICES];
        slot[0].store(kind as u64, Relaxed);
        for (place, value) in slot[1..].iter().zip(values) {
            place.store(value, Relaxed);
        }
        self.head.store(head + 1, Release);
    }

    /// Takes the oldest notice.
    pub fn take(&self) -> Option<(Notice, [u64; 8])> {
        let tail = self.tail.load(Relaxed);
        if self.head.load(Acquire) == tail {
            return None;
        }
        let slot = &self.slots[tail as usize % NOTICES];
        let kind = Notice::ALL[slot[0].load(Relaxed) as usize % Notice::ALL.len()];
        let values = core::array::from_fn(|index| slot[index + 1].load(Relaxed));
        self.tail.store(tail + 1, Release);
        Some((kind, values))
    }
}

/// What belongs to one vCPU and others may read. All-zero bytes are a valid value.
#[repr(C)]
pub struct Shared {
    /// kvmclock.
    pub clock: clock::Page,
    /// The vCPU runs.
    pub alive: AtomicBool,
    /// Its slice of the working set is populated.
    pub ready: AtomicBool,
    /// Counters since the last `mark`.
    pub window: Window,
    /// The `mark` that the counters belong to.
    pub mark: Counter,
    /// Passes of the background verifier over the whole slice.
    pub passes: Counter,
    /// The last full pass that was asked for and is done.
    pub full_pass: Counter,
    /// Wrong pages that the full pass found.
    pub full_pass_errors: Counter,
    /// Wrong pages since boot.
    pub errors: Counter,
    /// Register checks since boot, and those that failed.
    pub fpu_checks: Counter,
    /// See `fpu_checks`.
    pub fpu_errors: Counter,
    /// Times that the timer was silent for a second.
    pub timer_stalls: Counter,
    /// Times that the TSC went back, and the largest step in nanoseconds.
    pub tsc_back: Counter,
    /// See `tsc_back`.
    pub tsc_back_max: Counter,
    /// Times that kvmclock went back, and the largest step in nanoseconds.
    pub clock_back: Counter,
    /// See `clock_back`.
    pub clock_back_max: Counter,
    /// What the console should know.
    pub notices: Notices,
}

/// Everything that the vCPUs share.
pub struct World {
    /// The command line.
    pub config: Config,
    /// The TSC's frequency.
    pub scale: TscScale,
    /// TSC when beacon was entered.
    pub tsc_entry: u64,
    /// The registers that are checked.
    pub registers: Registers,
    /// Whether kvmclock runs, which tells stops of the VM.
    pub kvmclock: bool,
    /// Where the working set lies.
    pub placement: Placement,
    /// The generation that each page should have.
    pub generations: &'static [AtomicU32],
    /// One for each vCPU.
    pub shared: &'static [Shared],
    /// The highest TSC that any vCPU has seen.
    pub latest_tsc: AtomicU64,
    /// What the console asked for.
    pub control: Control,
}

/// What vCPU 0 asks of all vCPUs.
pub struct Control {
    rate: AtomicU64,
    /// The window that counters belong to.
    pub mark: AtomicU64,
    /// The last full pass that was asked for.
    pub full_pass: AtomicU64,
    /// All vCPUs are there, and may begin.
    pub begin: AtomicBool,
    /// All vCPUs shall stop for good.
    pub stop: AtomicBool,
}

const RATE_MAX: u64 = u64::MAX;

impl Control {
    /// Nothing asked for yet but the dirty rate.
    pub fn new(rate: Rate) -> Self {
        let control = Self {
            rate: AtomicU64::new(0),
            mark: AtomicU64::new(0),
            full_pass: AtomicU64::new(0),
            begin: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        };
        control.set_rate(rate);
        control
    }

    /// How many pages each vCPU writes now.
    pub fn rate(&self) -> Rate {
        match self.rate.load(Relaxed) {
            RATE_MAX => Rate::Max,
            rate => Rate::PerSecond(rate),
        }
    }

    /// Changes the dirty rate.
    pub fn set_rate(&self, rate: Rate) {
        let rate = match rate {
            Rate::Max => RATE_MAX,
            Rate::PerSecond(rate) => rate,
        };
        self.rate.store(rate, Relaxed);
    }
}

impl World {
    /// vCPUs that run.
    pub fn cpus(&self) -> u64 {
        self.shared.len() as u64
    }
}
