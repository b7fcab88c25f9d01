//! Starting a guest, what the process then takes, and what exits cost.

use ::tests::bench::{Guest, Line, Result, Row, Setup, Target, Vmm};

use crate::rounds::{alternate, row, template};
use crate::Bench;

/// First guest instruction after exec, ms; a promise of this project.
const TARGET_START_MS: f64 = 20.0;
/// Resident memory beyond guest RAM, MiB; a promise of this project.
const TARGET_OVERHEAD_MIB: f64 = 12.0;

/// Runs of [`start`]: more than of the others, since a few milliseconds vary more.
pub fn start_runs(bench: &Bench) -> usize {
    if bench.quick {
        5
    } else {
        11
    }
}

/// From exec to the guest's first instruction, its first output, and until it is at work.
pub fn start(bench: &Bench) -> Result<Vec<Row>> {
    let setup = Setup {
        memory_mib: 1024,
        cpus: 1,
        cmdline: "ws=16 report=0".to_owned(),
        ..Setup::default()
    };
    let vmms = [Vmm::Minivmm, Vmm::QemuRom, Vmm::QemuFirmware];
    let figures = alternate(bench, &vmms, start_runs(bench), 3, |vmm| {
        let mut guest = bench.tools.boot(vmm, "start", &setup)?;
        let boot = guest.event("boot")?;
        let read = vmm::kvm::host_tsc();
        let ready = guest.event("ready")?;
        let ms = |at: std::time::Instant| Ok((at - guest.begun).as_secs_f64() * 1e3);
        let samples =
            vec![first_instruction_ms(&guest, &boot, read), ms(boot.began), ms(ready.ended)];
        guest.end()?;
        Ok(samples)
    })?;
    let what = ["exec to first guest instruction", "exec to first console byte", "exec to ready"];
    let mut rows: Vec<Row> = what
        .into_iter()
        .enumerate()
        .map(|(index, what)| {
            row(&figures, index, template("start", format!("{what}, 1 GiB"), "ms"))
        })
        .collect();
    rows[0].target = Some(Target::Limit(TARGET_START_MS));
    Ok(rows)
}

/// The guest tells the TSC at its first instruction. That can be compared with the host's only
/// where the VMM leaves the guest the host's TSC, as KVM without control of the TSC does.
fn first_instruction_ms(guest: &Guest, boot: &Line, read: u64) -> std::result::Result<f64, String> {
    let number = |key: &str| boot.event[key].as_u64().filter(|n| *n > 0);
    let entry = number("tsc_entry").ok_or("beacon says no tsc_entry")?;
    let khz = number("tsc_khz").ok_or("beacon says no tsc_khz")?;
    if entry <= guest.begun_tsc || entry >= read {
        return Err("the guest's TSC is not the host's: see the first console byte".to_owned());
    }
    Ok((entry - guest.begun_tsc) as f64 / khz as f64)
}

/// Memory that the process takes beyond the guest's.
pub fn overhead(bench: &Bench) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for cpus in [1, 2] {
        let setup = Setup {
            memory_mib: 1024,
            cpus,
            cmdline: "ws=16 report=0".to_owned(),
            ..Setup::default()
        };
        let figures = alternate(bench, &[Vmm::Minivmm, Vmm::QemuRom], bench.runs(), 2, |vmm| {
            let mut guest = bench.tools.boot(vmm, "overhead", &setup)?;
            guest.event("ready")?;
            let samples = vec![Ok(guest.overhead_mib()?), Ok(guest.status("Threads")?)];
            guest.end()?;
            Ok(samples)
        })?;
        let what = format!("resident memory beyond guest RAM, {cpus} vCPU");
        let memory = row(&figures, 0, template("overhead", what, "MiB"));
        rows.push(Row { target: Some(Target::Limit(TARGET_OVERHEAD_MIB)), ..memory });
        let threads = template("overhead", format!("threads, {cpus} vCPU"), "threads");
        rows.push(row(&figures, 1, Row { digits: 0, ..threads }));
    }
    Ok(rows)
}

/// Round trips from the guest to the VMM and back, measured by the guest.
pub fn exits(bench: &Bench) -> Result<Vec<Row>> {
    const KEYS: [&str; 6] = [
        "mmio_min_ns",
        "mmio_median_ns",
        "mmio_p99_ns",
        "pio_min_ns",
        "pio_median_ns",
        "pio_p99_ns",
    ];
    let setup = Setup {
        memory_mib: 256,
        cpus: 1,
        cmdline: "mode=exits ws=1 report=0".to_owned(),
        ..Setup::default()
    };
    let figures = alternate(bench, &[Vmm::Minivmm, Vmm::QemuRom], bench.runs(), 6, |vmm| {
        let mut guest = bench.tools.boot(vmm, "exits", &setup)?;
        let line = guest.event("exits")?;
        guest.end()?;
        let micros = |key| line.event[key].as_f64().map(|ns| ns / 1e3);
        Ok(KEYS.map(|key| micros(key).ok_or_else(|| format!("beacon says no {key}"))).to_vec())
    })?;
    let kinds = ["unmapped MMIO read", "port read (COM1 status)"];
    let statistics = ["minimum", "median", "99th percentile"];
    let mut rows = Vec::new();
    for (i, kind) in kinds.into_iter().enumerate() {
        for (j, statistic) in statistics.into_iter().enumerate() {
            let what = format!("{kind}, {statistic} of 1000");
            rows.push(row(&figures, i * 3 + j, template("exits", what, "µs")));
        }
    }
    Ok(rows)
}
