//! What vCPU 0 does besides its work: reports, console commands, the power button, the end.

use core::sync::atomic::Ordering::Relaxed;

use beacon_core::acpi::Acpi;
use beacon_core::config::{parse_number, parse_rate, MAX_SAMPLES};
use beacon_core::pages::{Words, PAGE_SIZE};

use crate::cpu::tsc;
use crate::devices::Devices;
use crate::phys::Memory;
use crate::worker::Worker;
use crate::world::World;
use crate::{apic, console, exception, exits, power, report, ring0};

/// How often the console and the power button are looked at, in microseconds.
const POLL_US: u64 = 10_000;
/// How often the other vCPUs' notices are collected, in microseconds.
const COLLECT_US: u64 = 1000;
/// Longest command.
const COMMAND: usize = 128;
/// A day.
const MAX_WINDOW_MS: u64 = 86_400_000;

/// vCPU 0's side work.
pub struct Operator {
    world: &'static World,
    devices: &'static mut Devices,
    acpi: Acpi,
    poll: u64,
    collect: u64,
    pace: u64,
    report_every: u64,
    beat_every: u64,
    next_byte: u64,
    next_poll: u64,
    next_collect: u64,
    next_report: u64,
    next_beat: u64,
    /// Signs of life since boot, also those that the console had no room for.
    beats: u64,
    /// When `runtime=` is over.
    end: Option<u64>,
    seq: u64,
    window_start: u64,
    /// When the window is to be told of, and how old it is to be then, ms.
    window_due: Option<(u64, u64)>,
    stage: Stage,
    /// When the full pass that is under way was asked for.
    verifying: Option<u64>,
    command: [u8; COMMAND],
    command_length: usize,
    /// The button and the console are looked at in turn, so that one turn has one of them.
    button_next: bool,
}

#[derive(PartialEq)]
enum Stage {
    Populating,
    /// The `ready` event is on its way; what comes after is measured.
    Announcing,
    Running,
}

impl Operator {
    /// Side work that begins at `now`.
    pub fn new(world: &'static World, devices: &'static mut Devices, acpi: Acpi, now: u64) -> Self {
        let of = |microseconds| world.scale.ticks_of_micros(microseconds);
        power::arm_button(&acpi);
        Self {
            world,
            devices,
            acpi,
            poll: of(POLL_US) / 2,
            collect: of(COLLECT_US),
            pace: of(world.config.pace_us),
            report_every: of(world.config.report_ms * 1000),
            beat_every: of(world.config.beat_ms * 1000),
            next_byte: now,
            next_poll: now,
            next_collect: now,
            next_report: 0,
            next_beat: 0,
            beats: 0,
            end: None,
            seq: 0,
            window_start: now,
            window_due: None,
            stage: Stage::Populating,
            verifying: None,
            command: [0; COMMAND],
            command_length: 0,
            button_next: false,
        }
    }

    /// One turn's share: at most one exit besides those that the devices need. True if the vCPU has
    /// more to do than to wait.
    pub fn turn(&mut self, worker: &mut Worker, now: u64) -> bool {
        exception::speak_if_dying();
        if now >= self.next_collect {
            self.next_collect = now + self.collect;
            self.collect(now);
        } else if now >= self.next_poll {
            self.next_poll = now + self.poll;
            self.poll(worker, now);
        } else if now >= self.next_byte || self.stage != Stage::Running {
            self.next_byte = now + self.pace;
            console::pump();
        }
        self.devices.turn(now)
    }

    /// Looks at what the vCPUs left, and at the time.
    fn collect(&mut self, now: u64) {
        let world = self.world;
        for (cpu, shared) in (0..).zip(world.shared) {
            // Half of the console's buffer stays free for what was asked for.
            while console::has_room() {
                let Some((notice, values)) = shared.notices.take() else { break };
                report::notice(cpu, notice, &values);
            }
        }
        if self.end.is_some_and(|end| now >= end) {
            self.report(now);
            self.power_off("runtime-over", now);
        }
        if let Some((_, age_ms)) = self.window_due.filter(|(due, _)| now >= *due) {
            self.window_due = None;
            report::window(world, now, self.window_start, age_ms);
        }
        if self.beat_every != 0 && now >= self.next_beat && self.stage == Stage::Running {
            self.next_beat = now + self.beat_every;
            self.beats += 1;
            report::beat(self.world, self.beats);
        }
        match self.stage {
            Stage::Populating if report::all_ready(world) => {
                report::ready(world, now);
                self.stage = Stage::Announcing;
            }
            Stage::Announcing if console::waiting() == 0 => {
                self.stage = Stage::Running;
                self.mark(now);
                self.devices.begin();
                self.next_report = now + self.report_every;
                let runtime = self.world.config.runtime_ms;
                self.end = runtime.map(|ms| now + world.scale.ticks_of_micros(ms * 1000));
            }
            Stage::Running if self.report_every != 0 && now >= self.next_report => {
                self.report(now);
                // After a pause the reports that were missed are not made up for.
                while self.next_report <= now {
                    self.next_report += self.report_every;
                }
            }
            _ => (),
        }
        if let Some(started) = self.verifying {
            let wanted = world.control.full_pass.load(Relaxed);
            if world.shared.iter().all(|shared| shared.full_pass.get() == wanted) {
                report::verified(world, started, now);
                self.verifying = None;
            }
        }
    }

    fn report(&mut self, now: u64) {
        self.seq += 1;
        report::report(self.world, self.devices, self.seq, now, self.window_start);
    }

    fn mark(&mut self, now: u64) {
        self.window_start = now;
        self.world.control.mark.fetch_add(1, Relaxed);
        self.devices.mark();
    }

    fn poll(&mut self, worker: &mut Worker, now: u64) {
        self.button_next = !self.button_next && self.acpi.pm1_event.is_some();
        if self.button_next {
            if power::button_pressed(&self.acpi) {
                self.power_off("power-button", now);
            }
            return;
        }
        let Some(byte) = console::receive() else { return };
        // More is likely to follow.
        self.next_poll = now;
        match byte {
            b'\n' | b'\r' => {
                let (command, length) = (self.command, self.command_length);
                self.command_length = 0;
                if length > COMMAND {
                    report::error("command longer than 128 bytes", &command);
                } else {
                    self.run(command[..length].trim_ascii(), worker, now);
                }
            }
            _ => {
                if let Some(place) = self.command.get_mut(self.command_length) {
                    *place = byte;
                }
                self.command_length = (self.command_length + 1).min(COMMAND + 1);
            }
        }
    }

    fn run(&mut self, command: &[u8], worker: &mut Worker, now: u64) {
        let space = command.iter().position(|&byte| byte == b' ').unwrap_or(command.len());
        let (name, argument) = (&command[..space], command[space..].trim_ascii_start());
        match name {
            b"" => (),
            b"report" => self.report(now),
            b"verify" => {
                self.world.control.full_pass.fetch_add(1, Relaxed);
                self.verifying = Some(now);
            }
            b"mark" => {
                let age_ms = parse_number(argument).filter(|age_ms| *age_ms <= MAX_WINDOW_MS);
                if age_ms.is_none() && !argument.is_empty() {
                    report::error("mark takes milliseconds, at most a day", command);
                    return;
                }
                self.mark(now);
                self.window_due = age_ms
                    .map(|age_ms| (now + self.world.scale.ticks_of_micros(age_ms * 1000), age_ms));
                report::plain("mark", now);
            }
            b"window" => report::window(self.world, now, self.window_start, 0),
            b"dirty" => match parse_rate(argument) {
                Some(rate) => {
                    self.world.control.set_rate(rate);
                    report::dirty(self.world);
                }
                None => report::error("dirty needs pages per second or max", command),
            },
            b"disk" => self.devices.disk_command(argument),
            b"spoil" => match parse_number(argument) {
                Some(block) if self.devices.spoil(block) => report::plain("spoil", now),
                _ => report::error("spoil needs a block that the disk load has written", command),
            },
            b"deafen" => {
                self.devices.deafen();
                report::plain("deafen", now);
            }
            b"echo" => report::echo(argument),
            b"poke" => self.poke(argument, command),
            b"flip" => {
                worker.damage_register();
                report::plain("flip", now);
            }
            b"mute" => {
                apic::stop_timer();
                report::plain("mute", now);
            }
            b"poweroff" => self.power_off("poweroff", now),
            b"reboot" => {
                self.last_words("reboot", now);
                power::reset(&self.acpi);
                exception::fatal("the machine does not reset");
            }
            b"hang" => {
                self.last_words("hang", now);
                self.world.control.stop.store(true, Relaxed);
                ring0::hang();
            }
            b"triple" => {
                self.last_words("triple", now);
                ring0::triple_fault();
            }
            b"exception" => {
                // A general protection fault: there is no such register.
                ring0::rdmsr(0x4B56_4DFF);
            }
            _ => report::error("unknown command", command),
        }
    }

    /// Damages a page, for tests of what finds damage.
    fn poke(&self, argument: &[u8], command: &[u8]) {
        let placement = &self.world.placement;
        match parse_number(argument) {
            Some(page) if page < placement.pages() => {
                let last_word = placement.address(page) + PAGE_SIZE - 8;
                Memory.store(last_word, !Memory.load(last_word));
                report::poked(page, placement.address(page));
            }
            _ => report::error("poke needs a page of the working set", command),
        }
    }

    /// `mode=exits`, before the work loop.
    pub fn measure_exits(&self) {
        let config = &self.world.config;
        let mut samples = [0; MAX_SAMPLES];
        let count = (config.samples as usize).min(MAX_SAMPLES);
        exits::measure(config.mmio, &mut samples[..count], self.world.scale);
        if config.then_poweroff {
            self.power_off("poweroff", tsc());
        }
    }

    fn last_words(&self, event: &str, now: u64) {
        console::flush();
        report::plain(event, now);
        console::flush();
    }

    fn power_off(&self, event: &str, now: u64) -> ! {
        self.last_words(event, now);
        power::off(&self.acpi);
        exception::fatal("the machine does not go off")
    }
}
