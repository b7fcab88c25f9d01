//! Saving to a file and restoring from it, beside plain copies of as many bytes.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{json, Value};
use vmm::memory::{GuestRam, PAGE_SIZE};

use crate::figures::{Better, Figure, Row};
use crate::guest::{sync, Guest, Setup, Vmm};
use crate::qmp::{time_of, wall_ms};
use crate::{Bench, Result};

const BLOCK: usize = 1 << 20;
const MIB: f64 = 1048576.0;

/// The guest whose memory is moved: most of its RAM written, in scattered order.
fn full(bench: &Bench) -> Setup {
    let (memory_mib, ws) = if bench.quick { (512, 300) } else { (1024, 700) };
    Setup { memory_mib, cpus: 1, cmdline: format!("ws={ws} order=scattered report=0") }
}

fn row(bench: &'static str, what: &str, unit: &'static str, better: Better) -> Row {
    Row {
        bench,
        what: what.to_owned(),
        unit,
        better,
        digits: if unit == "MiB/s" { 0 } else { 1 },
        minivmm: Figure::new(),
        target: None,
        peers: Vec::new(),
    }
}

fn named(name: &str, figure: &Figure) -> (String, Figure) {
    (name.to_owned(), figure.clone())
}

/// Copies a file as plainly as can be: blocks of 1 MiB, then fsync.
fn copy_plainly(from: &Path, to: &Path) -> Result<Duration> {
    let begin = Instant::now();
    let (mut input, mut output) = (File::open(from)?, File::create(to)?);
    let mut block = vec![0; BLOCK];
    loop {
        let length = input.read(&mut block)?;
        if length == 0 {
            break;
        }
        output.write_all(&block[..length])?;
    }
    output.sync_all()?;
    Ok(begin.elapsed())
}

/// Reads a file into fresh guest memory and does nothing else: no restore that fills memory can be
/// faster than this on one thread.
fn read_into_fresh_memory(file: &Path) -> Result<Duration> {
    let begin = Instant::now();
    let file = File::open(file)?;
    let length = file.metadata()?.len() / PAGE_SIZE * PAGE_SIZE;
    let ram = GuestRam::new(length, false)?;
    for region in ram.regions() {
        let mut done = 0;
        while done < region.len {
            let step = (region.len - done).min(BLOCK as u64);
            let slice = ram.slice(region.gpa + done, step)?;
            migration::volatile_io::read_exact(file.as_fd(), &[slice])?;
            done += step;
        }
    }
    Ok(begin.elapsed())
}

fn path_text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| format!("{} is not UTF-8", path.display()).into())
}

fn mib(path: &Path) -> Result<f64> {
    Ok(fs::metadata(path)?.len() as f64 / MIB)
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

fn number(value: &Value, key: &str) -> Result<f64> {
    value[key].as_f64().ok_or_else(|| format!("minivmm's report has no {key}: {value}").into())
}

/// `minivmm save`; its report.
fn minivmm_save(bench: &Bench, name: &str, file: &Path) -> Result<Value> {
    remove(file)?;
    let report = bench.tools.minivmm_json(&["save", name, path_text(file)?])?;
    Ok(report.into_iter().next().ok_or("minivmm save reports nothing")?)
}

/// A QEMU whose guest is at work.
fn qemu(bench: &Bench, setup: &Setup) -> std::result::Result<Guest, String> {
    bench.tools.qemu.clone()?;
    let boot = || -> Result<Guest> {
        let mut guest = bench.tools.qemu_with_monitor(setup, None)?;
        guest.event("ready")?;
        guest.qmp()?.prepare_migration()?;
        Ok(guest)
    };
    boot().map_err(|error| error.to_string())
}

/// QEMU's time to write a stopped guest to a file that is on the disk afterwards.
fn qemu_save(guest: &mut Guest, file: &Path) -> Result<Duration> {
    remove(file)?;
    let monitor = guest.qmp()?;
    // A VM that was migrated goes on before it is migrated again.
    monitor.command("cont", json!({}))?;
    monitor.command("stop", json!({}))?;
    let begin = Instant::now();
    monitor.migrate_to(path_text(file)?)?;
    sync(file)?;
    Ok(begin.elapsed())
}

/// Saving a running VM.
pub fn save(bench: &Bench) -> Result<Vec<Row>> {
    let setup = full(bench);
    let folder = &bench.tools.data;
    let (file, copy) = (folder.join("saved"), folder.join("copy"));
    let mut minivmm = bench.tools.boot(Vmm::Minivmm, "save", &setup)?;
    minivmm.event("ready")?;
    // Only who is measured may run.
    bench.tools.minivmm_json(&["pause", "save"])?;
    let mut peer = qemu(bench, &setup);
    if let Ok(guest) = &mut peer {
        guest.qmp()?.command("stop", json!({}))?;
    }

    let [mut total, mut rate, mut paused, mut plain, mut plain_rate, mut other, mut other_rate] =
        std::array::from_fn(|_| Figure::new());
    for run in 0..=bench.runs() {
        bench.run(run, bench.runs());
        bench.tools.minivmm_json(&["resume", "save"])?;
        let report = minivmm_save(bench, "save", &file)?;
        bench.tools.minivmm_json(&["pause", "save"])?;
        let size = number(&report, "file_bytes")? / MIB;
        remove(&copy)?;
        let copied = copy_plainly(&file, &copy)?;
        let by_peer = match &mut peer {
            Ok(guest) => qemu_save(guest, &copy)
                .and_then(|took| Ok((took, mib(&copy)?)))
                .map_err(|error| error.to_string()),
            Err(why) => Err(why.clone()),
        };
        if run == 0 {
            continue;
        }
        total.add(Ok(number(&report, "total_ms")?));
        rate.add(Ok(size / number(&report, "total_ms")? * 1e3));
        paused.add(Ok(number(&report, "paused_ms")?));
        plain.add(Ok(copied.as_secs_f64() * 1e3));
        plain_rate.add(Ok(size / copied.as_secs_f64()));
        other.add(by_peer.clone().map(|(took, _)| took.as_secs_f64() * 1e3));
        other_rate.add(by_peer.map(|(took, size)| size / took.as_secs_f64()));
    }
    let peers = |plain: &Figure, other: &Figure| {
        vec![named("plain copy", plain), named(Vmm::QemuRom.name(), other)]
    };
    let what = format!("save of {:.0} MiB, on the disk", mib(&file)?);
    let times = row("save", &what, "ms", Better::Lower);
    let rates = row("save", &what, "MiB/s", Better::Higher);
    let stopped = row("save", "the part of it in which the guest stands", "ms", Better::Lower);
    Ok(vec![
        Row { minivmm: total, peers: peers(&plain, &other), ..times },
        Row { minivmm: rate, peers: peers(&plain_rate, &other_rate), ..rates },
        Row { minivmm: paused, ..stopped },
    ])
}

/// From exec of `minivmm restore` until the guest runs, ms; as the VM's own event log says.
fn minivmm_restore_ms(bench: &Bench, file: &Path, name: &str) -> Result<f64> {
    let mut guest = bench.tools.minivmm_restore(file, name)?;
    // Its restored guest says how long it stood.
    guest.event("switch")?;
    let events = bench.tools.minivmm_json(&["events", name])?;
    let running = events.iter().find(|event| event["kind"] == "running");
    let at = running.and_then(|event| event["unix_ms"].as_u64()).ok_or("no event: running")?;
    let took = wall_ms(guest.begun_wall, Duration::from_millis(at))?;
    guest.end()?;
    Ok(took)
}

/// From exec of QEMU until the guest runs, ms; by QEMU's own event.
fn qemu_restore_ms(bench: &Bench, setup: &Setup, file: &Path) -> Result<f64> {
    let from = format!("exec:cat '{}'", path_text(file)?);
    let mut guest = bench.tools.qemu_with_monitor(setup, Some(&from))?;
    let resumed = guest.qmp()?.event("RESUME event", |event| event["event"] == "RESUME")?;
    let took = wall_ms(guest.begun_wall, time_of(&resumed)?)?;
    guest.end()?;
    Ok(took)
}

/// Restoring from a file in the page cache.
pub fn restore(bench: &Bench) -> Result<Vec<Row>> {
    let setup = full(bench);
    let folder = &bench.tools.data;
    let (file, copy, peer_file) = (folder.join("saved"), folder.join("copy"), folder.join("qemu"));
    let mut guest = bench.tools.boot(Vmm::Minivmm, "restore", &setup)?;
    guest.event("ready")?;
    minivmm_save(bench, "restore", &file)?;
    guest.end()?;
    let peer = qemu(bench, &setup).and_then(|mut guest| {
        let save = |guest: &mut Guest| -> Result<()> {
            // Running, so that it runs when it is restored.
            guest.qmp()?.migrate_to(path_text(&peer_file)?)?;
            sync(&peer_file)
        };
        save(&mut guest).map_err(|error| error.to_string())
    });

    let [mut mine, mut rate, mut plain, mut limit, mut other] =
        std::array::from_fn(|_| Figure::new());
    let size = mib(&file)?;
    for run in 0..=bench.runs() {
        bench.run(run, bench.runs());
        let took = minivmm_restore_ms(bench, &file, "restore")?;
        remove(&copy)?;
        let copied = copy_plainly(&file, &copy)?;
        let read = read_into_fresh_memory(&file)?;
        let by_peer = match &peer {
            Ok(()) => qemu_restore_ms(bench, &setup, &peer_file).map_err(|e| e.to_string()),
            Err(why) => Err(why.clone()),
        };
        if run == 0 {
            continue;
        }
        mine.add(Ok(took));
        rate.add(Ok(size / took * 1e3));
        plain.add(Ok(copied.as_secs_f64() * 1e3));
        limit.add(Ok(read.as_secs_f64() * 1e3));
        other.add(by_peer);
    }
    let what = format!("restore of {size:.0} MiB, exec to guest runs");
    Ok(vec![
        Row {
            minivmm: mine,
            peers: vec![
                named("plain copy", &plain),
                named("plain read into fresh memory", &limit),
                named(Vmm::QemuRom.name(), &other),
            ],
            ..row("restore", &what, "ms", Better::Lower)
        },
        Row { minivmm: rate, ..row("restore", &what, "MiB/s", Better::Higher) },
    ])
}

/// What there is, and what is used of it: only the latter may cost.
pub fn sparse(bench: &Bench) -> Result<Vec<Row>> {
    const NAMES: [&str; 2] = ["big", "small"];
    let file = bench.tools.data.join("sparse");
    let cmdline = "ws=64 order=scattered report=0".to_owned();
    let sizes = [if bench.quick { 4 } else { 16 } << 10, 1 << 10];
    let mut guests = Vec::new();
    for (name, memory_mib) in NAMES.into_iter().zip(sizes) {
        let setup = Setup { memory_mib, cpus: 1, cmdline: cmdline.clone() };
        let mut guest = bench.tools.boot(Vmm::Minivmm, name, &setup)?;
        guest.event("ready")?;
        bench.tools.minivmm_json(&["pause", name])?;
        guests.push(guest);
    }
    let mut figures: [[Figure; 4]; 2] =
        std::array::from_fn(|_| std::array::from_fn(|_| Figure::new()));
    for run in 0..=bench.runs() {
        bench.run(run, bench.runs());
        for (name, figures) in NAMES.into_iter().zip(&mut figures) {
            bench.tools.minivmm_json(&["resume", name])?;
            let report = minivmm_save(bench, name, &file)?;
            bench.tools.minivmm_json(&["pause", name])?;
            let restored = minivmm_restore_ms(bench, &file, "restored")?;
            let samples = [
                number(&report, "paused_ms")?,
                number(&report, "total_ms")?,
                number(&report, "file_bytes")? / MIB,
                restored,
            ];
            if run > 0 {
                figures.iter_mut().zip(samples).for_each(|(figure, sample)| figure.add(Ok(sample)));
            }
        }
    }
    let [big, small] = figures;
    let gib = sizes.map(|mib| mib >> 10);
    let what = [
        ("save, guest stands", "ms"),
        ("save, on the disk", "ms"),
        ("size of the file", "MiB"),
        ("restore, exec to guest runs", "ms"),
    ];
    let rows = what.into_iter().zip(big).zip(small).map(|(((what, unit), big), small)| Row {
        minivmm: big,
        peers: vec![(format!("minivmm, {} GiB with 64 MiB in use", gib[1]), small)],
        ..row("sparse", &format!("{} GiB with 64 MiB in use: {what}", gib[0]), unit, Better::Lower)
    });
    Ok(rows.collect())
}
