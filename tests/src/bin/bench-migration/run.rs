//! One run: a guest at work, perhaps migrated, and what it says about that.

use std::time::{Duration, Instant};

use ::tests::bench::{loopback_bytes, CpuMeter, CpuUsed, Guest, Result, GUEST_ERROR};
use ::tests::proxy::{Proxy, Shape};
use serde_json::Value;

use crate::raw::RawCopy;
use crate::sample::{self, Sample};
use crate::subject::{Cell, Incoming, Moved, Subject};
use crate::warm::warm;
use crate::Bench;

const MIB: f64 = 1_048_576.0;
/// The bucket of the guest's gaps from which on something held it up: a turn takes about 20 us, this one begins at 33.
const STALL: usize = 6;
/// The first part of a window, in which a guest without its memory suffers most.
const FIRST_MS: u64 = 1000;
/// What has just been started may come to rest.
const SETTLE: Duration = Duration::from_millis(150);
/// What is touched ahead besides what the guest uses, bytes.
const WARM_BEYOND: u64 = 64 << 20;
/// The end of the window is at least so long after the end of the migration.
const AFTER: Duration = Duration::from_millis(200);
/// The VM's name at all times: at the destination it is taken over.
pub const NAME: &str = "vm";

/// How long the guest is observed: long enough for each migration, and the same for all subjects,
/// so that what the guest lost can be compared.
pub fn window(cell: Cell, quick: bool) -> Duration {
    Duration::from_millis(match cell.ws_mib {
        _ if quick => 1000,
        0..=64 => 1000,
        65..=300 => 1500,
        _ => 3000,
    })
}

/// Measures one subject once. What goes wrong makes the sample invalid.
pub fn measure(bench: &Bench, sample: &mut Sample) {
    let measured = match sample.subject {
        Subject::Baseline | Subject::RawCopy => stay(bench, sample),
        _ => migration(bench, sample),
    };
    if let Err(error) = measured {
        sample.invalid.get_or_insert(error.to_string());
    }
}

/// The guest stays where it is, alone or beside a raw copy.
fn stay(bench: &Bench, sample: &mut Sample) -> Result<()> {
    let Sample { cell, subject, .. } = *sample;
    let setup = cell.setup();
    let mut guest = subject.boot(&bench.tools, bench.without_migration, NAME, &setup)?;
    let mut copy = match subject {
        Subject::RawCopy => Some(RawCopy::prepare(cell.bytes())?),
        _ => None,
    };
    std::thread::sleep(SETTLE);
    warm(cell.bytes() + WARM_BEYOND)?;
    let copiers = copy.as_ref().map(RawCopy::pids).unwrap_or_default();
    let pids = [&[guest.pid()], &copiers[..]].concat();
    let window = Window::begin(bench, sample, pids, &mut guest)?;
    if let Some(copy) = &mut copy {
        let cpu = CpuMeter::begin(&copiers)?;
        let took = copy.run()?;
        let used = cpu.used(&copiers)?;
        sample.set(sample::TOTAL, took.as_secs_f64());
        sample.set(sample::THROUGHPUT, cell.bytes() as f64 / MIB / took.as_secs_f64());
        sample.set(sample::CPU_SOURCE, used.processes.first().copied());
        sample.set(sample::CPU_DESTINATION, used.processes.get(1).copied());
    }
    window.end(sample, &mut guest)?;
    verify(sample, &mut guest)?;
    guest.end()
}

fn migration(bench: &Bench, sample: &mut Sample) -> Result<()> {
    let Sample { cell, subject, .. } = *sample;
    let setup = cell.setup();
    let mut source = subject.boot(&bench.tools, bench.without_migration, NAME, &setup)?;
    let mut incoming = subject.receive(&bench.tools, "incoming", &setup)?;
    std::thread::sleep(SETTLE);
    warm(cell.bytes() + WARM_BEYOND)?;
    let pids = vec![source.pid(), incoming.guest.pid()];
    // The link is there for all of them, and only they take it.
    let proxy = (!bench.delay.is_zero()).then(|| {
        let shape = Shape { bandwidth: None, latency: bench.delay };
        Proxy::shaped(&incoming.address, shape, shape)
    });
    let address = proxy.as_ref().map_or(incoming.address.clone(), Proxy::address);
    let window = Window::begin(bench, sample, pids.clone(), &mut source)?;
    let wire = loopback_bytes();
    let cpu = CpuMeter::begin(&pids)?;
    let clocks = Clocks::now();
    let moved = subject.migrate(&bench.tools, &mut source, NAME, &address)?;
    let used = cpu.used(&pids)?;
    tell(sample, &moved, &used);
    let switch = incoming.arrived(subject)?;
    sample.set(sample::ARRIVAL, switch["tsc"].as_u64().and_then(|tsc| clocks.seconds_until(tsc)));
    if subject.is_postcopy() {
        drained(sample, &mut incoming)?;
    }
    // Now, since a source that has let go may have left much in its socket.
    if let (true, Ok(before), Ok(after)) = (bench.private_network, wire, loopback_bytes()) {
        sample.set(sample::WIRE, after.saturating_sub(before) as f64 / MIB);
    }
    window.end(sample, &mut incoming.guest)?;
    switched(sample)?;
    verify(sample, &mut incoming.guest)?;
    source.end()?;
    incoming.guest.end()
}

/// What the guest got done until all of its memory was there, which is now, and what it waited for.
fn drained(sample: &mut Sample, incoming: &mut Incoming) -> Result<()> {
    incoming.guest.say("window")?;
    // One that was asked for before the guest moved, and this one, in whatever order they come. Where the guest moved too late
    // its source had the first one.
    let (mut first, mut now) = (false, None);
    while now.is_none_or(|age| !first && age < FIRST_MS) {
        let window = incoming.guest.event("window")?.event;
        let work = Option::zip(window["writes"].as_f64(), window["intended"].as_f64())
            .filter(|(_, intended)| *intended > 0.0)
            .map(|(writes, intended)| 100.0 * writes / intended);
        if window["asked_ms"] == FIRST_MS {
            first = true;
            sample.set(sample::WORK_SECOND, work);
        } else {
            now = Some(window["window_ms"].as_u64().unwrap_or(FIRST_MS));
            sample.set(sample::WORK_DRAINED, work);
            let gaps: Vec<f64> = window["hist"]
                .as_array()
                .map_or(&[][..], Vec::as_slice)
                .iter()
                .filter_map(Value::as_f64)
                .collect();
            sample.set(sample::DRAIN_GAP, f64::powi(2.0, 9 + gaps.len() as i32) / 1e6);
            sample.set(sample::STALLS, gaps.iter().skip(STALL).sum::<f64>());
            sample.set(sample::STALL_P50, quantile(&gaps, STALL, 0.5));
            sample.set(sample::STALL_P99, quantile(&gaps, STALL, 0.99));
        }
    }
    if let Some(trace) = &incoming.faults {
        let waits = trace.waits()?;
        let us = |share| (waits.count() > 0).then(|| waits.quantile(share) as f64 / 1e3);
        sample.set(sample::FAULT_P50, us(0.5));
        sample.set(sample::FAULT_P99, us(0.99));
        sample.set(sample::FAULTS_SEEN, waits.count() as f64);
    }
    let faults = sample.get(sample::FAULTS);
    let pages = sample.cell.bytes() as f64 / 4096.0;
    sample.set(sample::FAULT_SHARE, faults.map(|faults| 100.0 * faults / pages));
    Ok(())
}

/// Of the gaps from a bucket on, the one that a share of them does not exceed, us; within its bucket they are taken to be
/// spread evenly. Bucket n has gaps of 2^(9 + n) to 2^(10 + n) ns.
fn quantile(buckets: &[f64], from: usize, share: f64) -> Option<f64> {
    let wanted = share * buckets.iter().skip(from).sum::<f64>();
    let mut below = 0.0;
    for (bucket, count) in buckets.iter().enumerate().skip(from).filter(|(_, count)| **count > 0.0)
    {
        if below + count >= wanted {
            let start = f64::powi(2.0, 9 + bucket as i32) / 1e3;
            return Some(start + start * (wanted - below) / count);
        }
        below += count;
    }
    None
}

/// What the VMM says, and what was seen of it from outside.
fn tell(sample: &mut Sample, moved: &Moved, used: &CpuUsed) {
    let told = &moved.told;
    sample.set(sample::TOTAL, moved.outside.as_secs_f64());
    sample.set(sample::TOLD_TOTAL, told.total_ms.map(|ms| ms / 1e3));
    sample.set(sample::TOLD_DOWNTIME, told.downtime_ms);
    sample.set(sample::TOLD_WIRE, told.bytes.map(|bytes| bytes / MIB));
    sample.set(sample::ROUNDS, told.rounds);
    sample.set(sample::THROUGHPUT, told.first_pass.map(|bytes| bytes / MIB));
    for (quantity, figure) in &told.figures {
        sample.set(*quantity, *figure);
    }
    // The command that gives the order is a part of the source.
    sample.set(sample::CPU_SOURCE, used.processes.first().map(|cpu| cpu + used.own));
    sample.set(sample::CPU_DESTINATION, used.processes.get(1).copied());
    sample.vmm = told.all.clone();
}

/// A moment by two clocks.
#[derive(Debug, Clone, Copy)]
struct Clocks {
    at: Instant,
    tsc: u64,
}

impl Clocks {
    fn now() -> Self {
        Self { at: Instant::now(), tsc: vmm::kvm::host_tsc() }
    }

    /// Time until the TSC was `tsc`; nothing if it never was since, as when a guest has a TSC of its
    /// own.
    fn seconds_until(self, tsc: u64) -> Option<f64> {
        self.between(tsc, Self::now())
    }

    fn between(self, tsc: u64, now: Self) -> Option<f64> {
        let (passed, all) = (tsc.checked_sub(self.tsc)?, now.tsc.checked_sub(self.tsc)?);
        let seconds = (now.at - self.at).as_secs_f64() * passed as f64 / all as f64;
        Some(seconds).filter(|_| passed < all)
    }
}

/// Time in which the guest is observed.
struct Window {
    begin: Instant,
    length: Duration,
    cpu: CpuMeter,
    pids: Vec<u32>,
}

impl Window {
    /// Begins: the guest forgets what it counted.
    fn begin(bench: &Bench, sample: &Sample, pids: Vec<u32>, guest: &mut Guest) -> Result<Self> {
        let cpu = CpuMeter::begin(&pids)?;
        let mark = match sample.subject.is_postcopy() {
            true => format!("mark {FIRST_MS}"),
            false => "mark".to_owned(),
        };
        guest.ask(&mark, "mark")?;
        let length = window(sample.cell, bench.quick);
        Ok(Self { begin: Instant::now(), length, cpu, pids })
    }

    /// Waits for the end; the guest, wherever it is now, says what it saw.
    fn end(self, sample: &mut Sample, guest: &mut Guest) -> Result<()> {
        std::thread::sleep(self.length.saturating_sub(self.begin.elapsed()).max(AFTER));
        let report = guest.ask("report", "report")?;
        let used = self.cpu.used(&self.pids)?;
        (sample.others, sample.stolen) = (used.others, used.stolen);
        understand(sample, &report);
        sample.guest = report;
        Ok(())
    }
}

/// The figures of the guest's report.
fn understand(sample: &mut Sample, report: &Value) {
    let number = |name: &str| report[name].as_f64();
    sample.set(sample::OTHER_GAP, number("gap_max_us").map(|us| us / 1e3));
    let Some(seconds) = number("window_ms").map(|ms| ms / 1e3).filter(|s| *s > 0.0) else {
        return;
    };
    sample.set(sample::BEATS, number("beats").map(|beats| beats / seconds));
    let written = Option::zip(number("writes"), number("intended"));
    if let Some((writes, intended)) = written.filter(|(_, intended)| *intended > 0.0) {
        sample.set(sample::RATE, writes / seconds);
        sample.set(sample::WORK, 100.0 * writes / intended);
        let missing = (intended - writes).max(0.0);
        sample.set(sample::LOST, 1e3 * seconds * missing / intended);
    }
}

/// The guest stood once, in the window.
fn switched(sample: &mut Sample) -> Result<()> {
    let report = &sample.guest;
    if report["switches"] != 1 {
        return Err(format!("the guest did not stand once: {report}").into());
    }
    let gap = report["switch_last_us"].as_f64().map(|us| us / 1e3);
    sample.set(sample::SWITCH_GAP, gap);
    Ok(())
}

/// Has the guest read all of its memory. An error is worth more than all figures.
pub fn verify(sample: &Sample, guest: &mut Guest) -> Result<()> {
    let verified = guest.ask("verify", "verified")?;
    let counters = ["errors", "fpu_errors", "tsc_back", "clock_back", "timer_stalls"];
    let wrong = counters.iter().any(|name| sample.guest[*name] != 0 && !sample.guest.is_null());
    if wrong || verified["errors"] != 0 || verified["pages"] == 0 {
        return Err(format!("{GUEST_ERROR}: {verified} {}", sample.guest).into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sample::tests::sample;
    use serde_json::json;

    #[test]
    fn what_the_guest_lost_is_counted() {
        let mut sample = sample(Subject::Baseline, 1, &[]);
        let report = json!({ "gap_max_us": 1500.0, "window_ms": 2000, "beats": 50_000,
            "writes": 15_000, "intended": 20_000 });
        understand(&mut sample, &report);
        assert_eq!(sample.get(sample::OTHER_GAP), Some(1.5));
        assert_eq!(sample.get(sample::BEATS), Some(25_000.0));
        assert_eq!(sample.get(sample::RATE), Some(7500.0));
        assert_eq!(sample.get(sample::WORK), Some(75.0));
        assert_eq!(sample.get(sample::LOST), Some(500.0));
    }

    #[test]
    fn gaps_are_told_by_size() {
        let mut gaps = vec![0.0; 8];
        gaps[5] = 1000.0;
        assert_eq!(quantile(&gaps, STALL, 0.5), None);
        gaps[6..].copy_from_slice(&[30.0, 10.0]);
        assert_eq!(quantile(&gaps, STALL, 0.75), Some(65.536));
        assert_eq!(quantile(&gaps, STALL, 1.0), Some(131.072));
    }

    #[test]
    fn a_tsc_becomes_a_time_between_two_others() {
        let begin = Clocks { at: Instant::now(), tsc: 1000 };
        let now = Clocks { at: begin.at + Duration::from_secs(2), tsc: 5000 };
        assert_eq!(begin.between(2000, now), Some(0.5));
        assert_eq!(begin.between(999, now), None);
        assert_eq!(begin.between(5000, now), None);
    }

    #[test]
    fn a_guest_that_wants_no_writes_loses_none() {
        let mut sample = sample(Subject::Baseline, 1, &[]);
        understand(&mut sample, &json!({ "window_ms": 1000, "writes": 0, "intended": 0 }));
        assert_eq!(sample.get(sample::WORK), None);
    }

    #[test]
    fn a_guest_that_did_not_stand_was_not_migrated() {
        let mut sample = sample(Subject::Baseline, 1, &[]);
        sample.guest = json!({ "switches": 0 });
        assert!(switched(&mut sample).is_err());
        sample.guest = json!({ "switches": 1, "switch_last_us": 4000.5 });
        switched(&mut sample).unwrap();
        assert_eq!(sample.get(sample::SWITCH_GAP), Some(4.0005));
    }
}
