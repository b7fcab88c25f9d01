//! The events that beacon writes. `README.md` has each field with its unit.

use core::sync::atomic::Ordering::Relaxed;

use beacon_core::boot::{BootInfo, Protocol};
use beacon_core::config::{Rate, WorkingSet};
use beacon_core::json::Line;
use beacon_core::pages::{Kind, PAGE_SIZE};
use beacon_core::stats::{TopGaps, BUCKETS};

use crate::devices::Devices;
use crate::world::{Notice, Shared, World};
use crate::{apic, console, fpu};

/// The version of the format of all events.
const VERSION: u64 = 1;

fn rate(line: &mut Line, rate: Rate) {
    match rate {
        Rate::Max => line.text("dirty", "max"),
        Rate::PerSecond(pages) => line.number("dirty", pages),
    }
}

/// The first event.
pub fn boot(world: &World, info: &BootInfo, protocol: Protocol) {
    let config = &world.config;
    let memory: u64 = info.ram().iter().map(|ram| ram.length).sum();
    let mut line = Line::event("boot");
    line.number("version", VERSION);
    line.number("tsc_entry", world.tsc_entry);
    line.number("tsc_khz", world.scale.khz());
    line.number("cpus", world.cpus());
    line.number("memory_mib", memory >> 20);
    line.text("boot", protocol.name());
    line.flag("kvmclock", world.kvmclock);
    line.text("timer", if apic::has_tsc_deadline() { "tsc-deadline" } else { "periodic" });
    line.text("fpu", world.registers.name());
    line.number("report_ms", config.report_ms);
    rate(&mut line, config.dirty);
    line.number("ws_pages", world.placement.pages());
    line.text("pattern", config.pattern.name());
    line.number("stride", config.stride);
    line.text("order", config.order.name());
    line.flag("verify", config.verify);
    line.optional("runtime_ms", config.runtime_ms);
    line.text("mode", config.mode.name());
    console::send(&mut line);
    for bad in config.bad.iter() {
        let mut line = Line::event("error");
        line.text("text", "bad option, the default is used");
        line.bytes("option", bad);
        console::send(&mut line);
    }
    if let WorkingSet::Mib(mib) = config.working_set {
        if world.placement.pages() < mib << 20 >> 12 {
            let mut line = Line::event("warning");
            line.text("text", "the working set does not fit into RAM and is smaller");
            line.number("ws_mib", mib);
            line.number("free_mib", (world.placement.pages() * PAGE_SIZE) >> 20);
            console::send(&mut line);
        }
    }
}

/// The working set is populated.
pub fn ready(world: &World, now: u64) {
    let mut line = Line::event("ready");
    line.flag("ready", true);
    line.number("tsc", now);
    line.micros("since_entry_us", world.scale.nanoseconds(now - world.tsc_entry));
    line.number("ws_pages", world.placement.pages());
    console::send(&mut line);
}

/// A sign of life. Numbers are never used twice by one guest, so that two consoles with the same
/// number show that it ran twice.
pub fn beat(world: &World, number: u64) {
    let mut line = Line::event("beat");
    line.number("boot", world.tsc_entry);
    line.number("n", number);
    console::offer(&mut line);
}

/// The regular report.
pub fn report(world: &World, devices: &Devices, seq: u64, now: u64, window_start: u64) {
    let sum = |of: fn(&Shared) -> u64| world.shared.iter().map(of).sum::<u64>();
    let max = |of: fn(&Shared) -> u64| world.shared.iter().map(of).max().unwrap_or(0);
    let min = |of: fn(&Shared) -> u64| world.shared.iter().map(of).min().unwrap_or(0);
    let mut top = TopGaps::default();
    for (cpu, shared) in (0..).zip(world.shared) {
        shared.window.add_top(cpu, &mut top);
    }

    let mut line = Line::event("report");
    line.number("seq", seq);
    line.number("tsc", now);
    line.number("uptime_ms", world.scale.nanoseconds(now - world.tsc_entry) / 1_000_000);
    line.number("window_ms", world.scale.nanoseconds(now - window_start) / 1_000_000);
    line.number("beats", sum(|shared| shared.window.beats.get()));
    line.number("beats_min", min(|shared| shared.window.beats.get()));
    line.number("switches", max(|shared| shared.window.switches.get()));
    line.micros("switch_last_us", max(|shared| shared.window.switch_last.get()));
    line.micros("switch_last_clock_us", max(|shared| shared.window.switch_last_clock.get()));
    line.number("switch_last_tsc", max(|shared| shared.window.switch_last_tsc.get()));
    line.micros("switch_max_us", max(|shared| shared.window.switch_max.get()));
    line.micros("gap_max_us", top.as_slice()[0].nanoseconds);
    line.array("top", |list| {
        for gap in top.as_slice().iter().filter(|gap| gap.nanoseconds != 0) {
            list.object(|object| {
                object.micros("us", gap.nanoseconds);
                object.number("tsc", gap.tsc);
                object.number("cpu", gap.cpu);
            });
        }
    });
    line.array("hist", |list| histogram(list, world.shared));
    rate(&mut line, world.control.rate());
    line.number("writes", sum(|shared| shared.window.writes.get()));
    let intended = sum(|shared| shared.window.intended.get());
    line.optional("intended", (world.control.rate() != Rate::Max).then_some(intended));
    line.number("verified", sum(|shared| shared.window.verified.get()));
    line.number("passes", min(|shared| shared.passes.get()));
    line.number("errors", sum(|shared| shared.errors.get()));
    line.number("fpu_checks", sum(|shared| shared.fpu_checks.get()));
    line.number("fpu_errors", sum(|shared| shared.fpu_errors.get()));
    line.number("ticks", sum(|shared| shared.window.ticks.get()));
    line.number("ticks_expected", sum(|shared| shared.window.ticks_expected.get()));
    line.number("timer_stalls", sum(|shared| shared.timer_stalls.get()));
    line.number("tsc_back", sum(|shared| shared.tsc_back.get()));
    line.micros("tsc_back_max_us", max(|shared| shared.tsc_back_max.get()));
    line.number("clock_back", sum(|shared| shared.clock_back.get()));
    line.micros("clock_back_max_us", max(|shared| shared.clock_back_max.get()));
    line.number("dropped", console::dropped());
    devices.report(&mut line);
    console::send(&mut line);
}

/// What the guest got done since the last `mark`, shorter than a report; `asked_ms` is the age that was asked for.
pub fn window(world: &World, now: u64, window_start: u64, asked_ms: u64) {
    let sum = |of: fn(&Shared) -> u64| world.shared.iter().map(of).sum::<u64>();
    let mut line = Line::event("window");
    line.number("tsc", now);
    line.number("asked_ms", asked_ms);
    line.number("window_ms", world.scale.nanoseconds(now - window_start) / 1_000_000);
    line.number("beats", sum(|shared| shared.window.beats.get()));
    line.array("hist", |list| histogram(list, world.shared));
    line.number("writes", sum(|shared| shared.window.writes.get()));
    let intended = sum(|shared| shared.window.intended.get());
    line.optional("intended", (world.control.rate() != Rate::Max).then_some(intended));
    console::send(&mut line);
}

/// The buckets of all vCPUs together, without the empty ones at the end.
fn histogram(list: &mut Line, shared: &[Shared]) {
    let bucket = |index: usize| -> u64 {
        shared.iter().map(|shared: &Shared| shared.window.histogram[index].get()).sum()
    };
    let used = (0..BUCKETS).rev().find(|&index| bucket(index) != 0).map_or(0, |last| last + 1);
    for index in 0..used {
        list.item(bucket(index));
    }
}

/// The result of a full pass.
pub fn verified(world: &World, started: u64, now: u64) {
    let errors: u64 = world.shared.iter().map(|shared| shared.full_pass_errors.get()).sum();
    let mut line = Line::event("verified");
    line.number("pages", world.placement.pages());
    line.number("errors", errors);
    line.micros("time_us", world.scale.nanoseconds(now - started));
    console::send(&mut line);
}

/// What a vCPU noticed.
pub fn notice(cpu: u64, notice: Notice, v: &[u64; 8]) {
    let mut line = Line::event(match notice {
        Notice::Corrupt | Notice::Generations => "corrupt",
        Notice::Fpu => "fpu",
        Notice::TimerStalled => "timer-stalled",
        Notice::TscBack => "tsc-back",
        Notice::ClockBack => "clock-back",
        Notice::Switch => "switch",
    });
    line.number("cpu", cpu);
    match notice {
        Notice::Corrupt => {
            const KINDS: [Kind; 5] =
                [Kind::Zero, Kind::Stale, Kind::Newer, Kind::OtherPage, Kind::Torn];
            let kind = KINDS.into_iter().find(|&kind| kind as u64 == v[7]);
            line.text("kind", kind.map_or("", Kind::name));
            line.number("page", v[0]);
            line.hex("gpa", v[1]);
            line.number("expected_generation", v[2]);
            line.number("found_generation", v[3] >> 32);
            line.number("found_page", v[3] & 0xFFFF_FFFF);
            line.number("offset", v[4]);
            line.hex("expected", v[5]);
            line.hex("found", v[6]);
        }
        Notice::Generations => {
            line.text("kind", "generation-table");
            line.number("expected_sum", v[0]);
            line.number("found_sum", v[1]);
        }
        Notice::Fpu => {
            line.text("class", fpu::NAMES.get(v[0] as usize).copied().unwrap_or(""));
            line.number("register", v[1]);
            line.number("word", v[2]);
            line.hex("expected", v[3]);
            line.hex("found", v[4]);
        }
        Notice::TimerStalled => {
            line.number("ticks", v[0]);
            line.micros("silent_us", v[1]);
        }
        Notice::TscBack => {
            line.micros("back_us", v[0]);
            line.flag("against_other_cpu", v[1] != 0);
            line.number("tsc", v[2]);
        }
        Notice::ClockBack => {
            line.micros("back_us", v[0]);
            line.number("clock_ns", v[1]);
        }
        Notice::Switch => {
            line.micros("gap_us", v[0]);
            line.micros("clock_us", v[1]);
            line.number("tsc", v[2]);
        }
    }
    console::send(&mut line);
}

/// An `error` event for the console's user.
pub fn error(text: &str, what: &[u8]) {
    let mut line = Line::event("error");
    line.text("text", text);
    line.bytes("input", what);
    console::send(&mut line);
}

/// An event with nothing but a TSC.
pub fn plain(event: &str, tsc: u64) {
    let mut line = Line::event(event);
    line.number("tsc", tsc);
    console::send(&mut line);
}

/// What `echo` answers.
pub fn echo(text: &[u8]) {
    let mut line = Line::event("echo");
    line.bytes("text", text);
    console::send(&mut line);
}

/// What `dirty` answers.
pub fn dirty(world: &World) {
    let mut line = Line::event("dirty");
    rate(&mut line, world.control.rate());
    console::send(&mut line);
}

/// What `poke` answers.
pub fn poked(page: u64, address: u64) {
    let mut line = Line::event("poked");
    line.number("page", page);
    line.hex("gpa", address);
    console::send(&mut line);
}

/// True when all vCPUs have populated their pages.
pub fn all_ready(world: &World) -> bool {
    world.shared.iter().all(|shared| shared.ready.load(Relaxed))
}
