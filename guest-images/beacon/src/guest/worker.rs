//! What each vCPU does, turn by turn.

use core::sync::atomic::{
    AtomicU32,
    Ordering::{Acquire, Relaxed, Release},
};

use beacon_core::config::Rate;
use beacon_core::pages::{self, Corruption};
use beacon_core::stats::{bucket, Gap, TopGaps};
use beacon_core::walk::Walk;

use crate::apic::TIMER_HZ;
use crate::cpu::tsc;
use crate::fpu::Check;
use crate::phys::Memory;
use crate::ring0;
use crate::world::{Notice, Shared, World};

/// Length of a turn in microseconds, if its work is done by then.
const TURN_US: u64 = 20;
/// Most of it that goes to writing pages, or to a full pass.
const WRITE_US: u64 = 12;
/// And to the background verifier.
const VERIFY_US: u64 = 4;
/// The same for `dirty=max`, where a turn is mostly writing.
const WRITE_MAX_US: u64 = 30;
/// Least time in the register check.
const HOLD_US: u64 = 1;
/// Writes that were missed for longer than this are not made up for.
const CATCH_UP_US: u64 = 10_000;
/// Steps back of a clock up to this are not counted: TSCs that KVM synchronised by writing them
/// can be apart by less than this.
const TOLERANCE_US: u64 = 1;

/// The times above in TSC ticks.
struct Ticks {
    turn: u64,
    write: u64,
    verify: u64,
    write_max: u64,
    hold: u64,
    catch_up: u64,
    tolerance: u64,
    second: u64,
}

/// Time between two turns.
#[derive(Clone, Copy)]
struct Beat {
    ticks: u64,
    end: u64,
    /// By kvmclock, in nanoseconds.
    clock: u64,
}

/// A full pass over the slice, which may take many turns.
struct FullPass {
    number: u64,
    next: u64,
    errors: u64,
    generations: u64,
}

/// One vCPU's state.
pub struct Worker<'a> {
    world: &'a World,
    shared: &'a Shared,
    registers: Check,
    ticks: Ticks,
    /// Its slice of the working set.
    first: u64,
    pages: u64,
    populated: u64,
    walk: Walk,
    /// Sum of all generations of the slice.
    generations: u64,
    verify_next: u64,
    full_pass: Option<FullPass>,
    /// TSC and kvmclock at the last beat.
    last: u64,
    last_clock: u64,
    /// The last beat, as long as it may turn out to be the switch.
    held: Option<Beat>,
    top: TopGaps,
    mark: u64,
    /// Pages owed and pages intended, in 1/second ticks.
    owed: u64,
    intended: u64,
    /// Ticks of the TSC outside of switches in this window.
    outside: u64,
    timer_base: u64,
    timer_count: u64,
    timer_last: u64,
}

impl<'a> Worker<'a> {
    /// The state of the vCPU that calls this. `cpu` is its index.
    pub fn new(world: &'a World, cpu: u64) -> Self {
        let shared = &world.shared[cpu as usize];
        let of = |microseconds| world.scale.ticks_of_micros(microseconds);
        let (first, pages) = world.placement.slice(cpu, world.cpus());
        Self {
            world,
            shared,
            registers: Check::new(world.registers, cpu),
            ticks: Ticks {
                turn: of(TURN_US),
                write: of(WRITE_US),
                verify: of(VERIFY_US),
                write_max: of(WRITE_MAX_US),
                hold: of(HOLD_US),
                catch_up: of(CATCH_UP_US),
                tolerance: of(TOLERANCE_US),
                second: of(1_000_000),
            },
            first,
            pages,
            populated: 0,
            walk: Walk::new(world.config.pattern, pages, world.config.stride, cpu),
            generations: 0,
            verify_next: 0,
            full_pass: None,
            last: tsc(),
            last_clock: 0,
            held: None,
            top: TopGaps::default(),
            mark: 0,
            owed: 0,
            intended: 0,
            outside: 0,
            timer_base: 0,
            timer_count: 0,
            timer_last: tsc(),
        }
    }

    /// One turn for a vCPU that does nothing else.
    pub fn turn(&mut self) {
        let now = self.work();
        self.rest(now);
        if self.world.control.stop.load(Relaxed) {
            ring0::hang();
        }
    }

    /// The first part of a turn; gives the TSC at its beginning.
    pub fn work(&mut self) -> u64 {
        let (now, elapsed) = self.beat();
        self.check_timer(now);
        let mark = self.world.control.mark.load(Relaxed);
        if mark != self.mark {
            self.start_window(mark);
        }
        if self.populated < self.pages {
            self.populate(now + self.ticks.write_max);
        } else if !self.continue_full_pass(now + self.ticks.write) {
            self.dirty(now, elapsed);
            if self.world.config.verify {
                self.verify(tsc() + self.ticks.verify);
            }
        }
        now
    }

    /// Has the next register check fail.
    pub fn damage_register(&mut self) {
        self.registers.damage();
    }

    /// The second part of a turn that began at `start`: the register check, for what is left of it.
    pub fn rest(&mut self, start: u64) {
        let deadline = (start + self.ticks.turn).max(tsc() + self.ticks.hold);
        self.shared.fpu_checks.add(1);
        if let Err(wrong) = self.registers.until(deadline) {
            self.shared.fpu_errors.add(1);
            self.shared.notices.put(
                Notice::Fpu,
                [wrong.class, wrong.register, wrong.word, wrong.expected, wrong.found, 0, 0, 0],
            );
        }
    }

    /// Reads the clocks, books the time since the last turn, and looks for steps back. Gives the
    /// TSC and how long the beat was.
    fn beat(&mut self) -> (u64, u64) {
        // The flag comes first: when the VM is stopped between the two, the long beat is this one
        // and the flag is seen at the next, which is why a beat is held back for one turn.
        let stopped = self.shared.clock.take_stopped();
        let latest = self.world.latest_tsc.load(Acquire);
        let now = tsc();
        self.check_tsc(now, latest);
        let clock = self.read_clock();
        let beat = Beat {
            ticks: now.saturating_sub(self.last),
            end: now,
            clock: clock.saturating_sub(self.last_clock),
        };
        self.last = now;
        self.last_clock = clock;
        self.shared.window.beats.add(1);
        if stopped {
            let held = self.held.take();
            let (switch, other) = match held {
                Some(held) if held.ticks > beat.ticks => (held, Some(beat)),
                held => (beat, held),
            };
            self.book_switch(switch);
            if let Some(other) = other {
                self.book(other);
            }
            self.timer_last = now;
        } else if let Some(held) = self.held.replace(beat) {
            self.book(held);
        }
        (now, beat.ticks)
    }

    fn check_tsc(&self, now: u64, latest: u64) {
        let own = self.last.saturating_sub(now);
        let other = latest.saturating_sub(now);
        let back = own.max(other);
        if back == 0 {
            self.world.latest_tsc.fetch_max(now, Release);
            return;
        }
        // From here on count from the lower value, or every turn would be one more step back.
        self.world.latest_tsc.store(now, Release);
        if back > self.ticks.tolerance {
            let nanoseconds = self.world.scale.nanoseconds(back);
            self.shared.tsc_back.add(1);
            self.shared.tsc_back_max.raise(nanoseconds);
            let against_other = u64::from(other > own);
            self.shared
                .notices
                .put(Notice::TscBack, [nanoseconds, against_other, now, 0, 0, 0, 0, 0]);
        }
    }

    fn read_clock(&self) -> u64 {
        let Some(clock) = self.shared.clock.now() else { return 0 };
        let back = self.last_clock.saturating_sub(clock);
        if back > TOLERANCE_US * 1000 {
            self.shared.clock_back.add(1);
            self.shared.clock_back_max.raise(back);
            self.shared.notices.put(Notice::ClockBack, [back, clock, 0, 0, 0, 0, 0, 0]);
        }
        clock
    }

    fn book_switch(&mut self, beat: Beat) {
        let window = &self.shared.window;
        let nanoseconds = self.world.scale.nanoseconds(beat.ticks);
        window.switches.add(1);
        window.switch_last.set(nanoseconds);
        window.switch_last_clock.set(beat.clock);
        window.switch_last_tsc.set(beat.end);
        window.switch_max.raise(nanoseconds);
        self.shared.notices.put(Notice::Switch, [nanoseconds, beat.clock, beat.end, 0, 0, 0, 0, 0]);
    }

    fn book(&mut self, beat: Beat) {
        let window = &self.shared.window;
        let nanoseconds = self.world.scale.nanoseconds(beat.ticks);
        window.histogram[bucket(nanoseconds)].add(1);
        if nanoseconds > self.top.threshold() {
            self.top.add(Gap { nanoseconds, tsc: beat.end, cpu: 0 });
            window.set_top(&self.top);
        }
        self.outside += beat.ticks;
        window.ticks_expected.set(self.outside * TIMER_HZ / self.ticks.second);
    }

    fn check_timer(&mut self, now: u64) {
        let count = ring0::area().ticks.load(Relaxed);
        if count != self.timer_count {
            self.timer_count = count;
            self.timer_last = now;
            self.shared.window.ticks.set(count - self.timer_base);
        } else if now.saturating_sub(self.timer_last) > self.ticks.second {
            let silent = self.world.scale.nanoseconds(now - self.timer_last);
            self.shared.timer_stalls.add(1);
            self.shared.notices.put(Notice::TimerStalled, [count, silent, 0, 0, 0, 0, 0, 0]);
            self.timer_last = now;
        }
    }

    fn start_window(&mut self, mark: u64) {
        self.mark = mark;
        self.shared.window.clear();
        self.top = TopGaps::default();
        self.held = None;
        self.outside = 0;
        self.intended = 0;
        self.timer_base = self.timer_count;
        self.shared.mark.set(mark);
    }

    fn generation(&self, page: u64) -> &'a AtomicU32 {
        &self.world.generations[page as usize]
    }

    /// Gives pages their first content until `deadline`.
    fn populate(&mut self, deadline: u64) {
        while self.populated < self.pages && tsc() < deadline {
            let page = self.first + self.populated;
            pages::write(&Memory, self.world.placement.address(page), page, 1);
            self.generation(page).store(1, Relaxed);
            self.generations += 1;
            self.populated += 1;
        }
        if self.populated == self.pages {
            self.shared.ready.store(true, Release);
        }
    }

    /// Writes as many pages as the rate asks for, as far as the turn has room.
    fn dirty(&mut self, now: u64, elapsed: u64) {
        if self.pages == 0 {
            return;
        }
        let second = self.ticks.second;
        match self.world.control.rate() {
            Rate::PerSecond(0) => (),
            Rate::Max => {
                let deadline = now + self.ticks.write_max;
                while tsc() < deadline {
                    self.rewrite();
                }
            }
            Rate::PerSecond(rate) => {
                let catch_up = self.ticks.catch_up;
                // All time counts, that of switches too: a guest that stood still did not do its work.
                let intended = u128::from(self.intended) + u128::from(elapsed) * u128::from(rate);
                self.shared.window.intended.add((intended / u128::from(second)) as u64);
                self.intended = (intended % u128::from(second)) as u64;
                self.owed =
                    (self.owed + elapsed.min(catch_up) * rate).min((catch_up * rate).max(second));
                let deadline = now + self.ticks.write;
                while self.owed >= second && tsc() < deadline {
                    self.owed -= second;
                    self.rewrite();
                }
            }
        }
    }

    fn rewrite(&mut self) {
        let page = self.first + self.walk.next_page();
        let address = self.world.placement.address(page);
        if self.world.config.verify {
            // A wrong page is stamped anew by this, so that each is counted once.
            if self.check(page, address) {
                self.stamp(page, address);
            }
        } else {
            self.stamp(page, address);
        }
        self.shared.window.writes.add(1);
    }

    fn stamp(&mut self, page: u64, address: u64) {
        let old = self.generation(page).load(Relaxed);
        let new = old.wrapping_add(1);
        pages::write(&Memory, address, page, new);
        self.generation(page).store(new, Relaxed);
        self.generations =
            self.generations.wrapping_add(u64::from(new)).wrapping_sub(u64::from(old));
    }

    /// Verifies a page; one that is wrong is reported, counted and stamped anew.
    fn check(&mut self, page: u64, address: u64) -> bool {
        let generation = self.generation(page).load(Relaxed);
        match pages::check(&Memory, address, page, generation) {
            Ok(()) => true,
            Err(wrong) => {
                self.report(page, address, generation, wrong);
                self.stamp(page, address);
                false
            }
        }
    }

    #[cold]
    fn report(&self, page: u64, address: u64, generation: u32, wrong: Corruption) {
        self.shared.errors.add(1);
        self.shared.notices.put(
            Notice::Corrupt,
            [
                page,
                address,
                u64::from(generation),
                wrong.first_word,
                wrong.offset,
                wrong.expected,
                wrong.found,
                wrong.kind as u64,
            ],
        );
    }

    /// The background verifier: goes on with its pass until `deadline`.
    fn verify(&mut self, deadline: u64) {
        while self.pages != 0 && tsc() < deadline {
            let page = self.first + self.verify_next;
            self.check(page, self.world.placement.address(page));
            self.shared.window.verified.add(1);
            self.verify_next += 1;
            if self.verify_next == self.pages {
                self.verify_next = 0;
                self.shared.passes.add(1);
            }
        }
    }

    /// If a full pass is asked for, goes on with it until `deadline`; nothing is written meanwhile,
    /// so that the sum of the generations can be checked too. False if there is none.
    fn continue_full_pass(&mut self, deadline: u64) -> bool {
        let wanted = self.world.control.full_pass.load(Relaxed);
        let mut pass = match self.full_pass.take() {
            Some(pass) => pass,
            None if wanted != self.shared.full_pass.get() => {
                FullPass { number: wanted, next: 0, errors: 0, generations: 0 }
            }
            None => return false,
        };
        while pass.next < self.pages && tsc() < deadline {
            let page = self.first + pass.next;
            if !self.check(page, self.world.placement.address(page)) {
                pass.errors += 1;
            }
            let generation = self.generation(page).load(Relaxed);
            pass.generations = pass.generations.wrapping_add(u64::from(generation));
            self.shared.window.verified.add(1);
            pass.next += 1;
        }
        if pass.next < self.pages {
            self.full_pass = Some(pass);
            return true;
        }
        if pass.generations != self.generations {
            pass.errors += 1;
            self.shared.errors.add(1);
            self.shared
                .notices
                .put(Notice::Generations, [self.generations, pass.generations, 0, 0, 0, 0, 0, 0]);
            self.generations = pass.generations;
        }
        self.shared.full_pass_errors.set(pass.errors);
        self.shared.full_pass.set(pass.number);
        true
    }
}
