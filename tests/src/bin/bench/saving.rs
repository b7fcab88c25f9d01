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
    Setup {
        memory_mib,
        cpus: 1,
        cmdline: format!("ws={ws} order=scattered report=0"),
        ..Setup::default()
    }
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

/// The two steps of bringing something to the disk, from the same begin, and how much it was.
#[derive(Debug, Clone, Copy)]
struct Written {
    /// Until all was handed to the kernel.
    cached_ms: f64,
    /// Until fsync was done.
    synced_ms: f64,
    mib: f64,
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Copies a file as plainly as can be: blocks of 1 MiB, then fsync.
fn copy_plainly(from: &Path, to: &Path) -> Result<Written> {
    remove(to)?;
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
    let cached_ms = ms(begin);
    output.sync_all()?;
    Ok(Written { cached_ms, synced_ms: ms(begin), mib: mib(to)? })
}

/// Reads a file into fresh guest memory through its mapping and does nothing else: what a restore
/// without checks would be.
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

/// QEMU writes a stopped guest to a file.
fn qemu_save(guest: &mut Guest, file: &Path) -> Result<Written> {
    remove(file)?;
    let monitor = guest.qmp()?;
    // A VM that was migrated goes on before it is migrated again.
    monitor.command("cont", json!({}))?;
    monitor.command("stop", json!({}))?;
    let begin = Instant::now();
    monitor.migrate_to(path_text(file)?)?;
    let cached_ms = ms(begin);
    sync(file)?;
    Ok(Written { cached_ms, synced_ms: ms(begin), mib: mib(file)? })
}

/// Who writes, in the order of the columns.
const WRITERS: [&str; 3] = ["minivmm", "plain copy", "QEMU microvm"];

/// Saving a running VM.
pub fn save(bench: &Bench) -> Result<Vec<Row>> {
    let setup = full(bench);
    let folder = &bench.tools.data;
    let (file, copy, peer_file) = (folder.join("saved"), folder.join("copy"), folder.join("qemu"));
    let mut minivmm = bench.tools.boot(Vmm::Minivmm, "save", &setup)?;
    minivmm.event("ready")?;
    minivmm_save(bench, "save", &file)?;
    // Only who is measured may run.
    bench.tools.minivmm_json(&["pause", "save"])?;
    let mut peer = qemu(bench, &setup);
    if let Ok(guest) = &mut peer {
        guest.qmp()?.command("stop", json!({}))?;
    }

    let mut figures: [[Figure; 3]; 3] =
        std::array::from_fn(|_| std::array::from_fn(|_| Figure::new()));
    // Each comes first, second and third equally often: a disk that was just written to may be
    // slower, or faster, than one that rested.
    let runs = bench.runs().next_multiple_of(WRITERS.len());
    for run in 0..=runs {
        bench.run(run, runs);
        for turn in 0..WRITERS.len() {
            let who = (run + turn) % WRITERS.len();
            let written = match (who, &mut peer) {
                (0, _) => minivmm_save_running(bench, "save", &file),
                (1, _) => copy_plainly(&file, &copy),
                (_, Ok(guest)) => qemu_save(guest, &peer_file),
                (_, Err(why)) => Err(why.clone().into()),
            };
            // What is ours must work.
            let written = match (who, written) {
                (0 | 1, Err(error)) => return Err(error),
                (_, written) => written.map_err(|error| error.to_string()),
            };
            if run > 0 {
                let of = |f: fn(&Written) -> f64| written.as_ref().map(f).map_err(Clone::clone);
                figures[0][who].add(of(|w| w.cached_ms));
                figures[1][who].add(of(|w| w.synced_ms));
                figures[2][who].add(of(|w| w.mib / w.synced_ms * 1e3));
            }
        }
    }
    let size = format!("save of {:.0} MiB", mib(&file)?);
    let rows = [
        (format!("{size}, written (until then the guest stands)"), "ms", Better::Lower),
        (format!("{size}, on the disk"), "ms", Better::Lower),
        (format!("{size}, on the disk"), "MiB/s", Better::Higher),
    ];
    let rows = rows.into_iter().zip(figures).map(|((what, unit, better), figures)| {
        let [minivmm, peers @ ..] = figures;
        let peers = WRITERS[1..].iter().map(|name| (*name).to_owned()).zip(peers).collect();
        Row { minivmm, peers, ..row("save", &what, unit, better) }
    });
    Ok(rows.collect())
}

/// As [`minivmm_save`], of a VM that is paused before and after.
fn minivmm_save_running(bench: &Bench, name: &str, file: &Path) -> Result<Written> {
    bench.tools.minivmm_json(&["resume", name])?;
    let report = minivmm_save(bench, name, file)?;
    bench.tools.minivmm_json(&["pause", name])?;
    Ok(Written {
        cached_ms: number(&report, "paused_ms")?,
        synced_ms: number(&report, "total_ms")?,
        mib: number(&report, "file_bytes")? / MIB,
    })
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

    let [mut mine, mut rate, mut cached, mut plain, mut limit, mut other] =
        std::array::from_fn(|_| Figure::new());
    let size = mib(&file)?;
    for run in 0..=bench.runs() {
        bench.run(run, bench.runs());
        let took = minivmm_restore_ms(bench, &file, "restore")?;
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
        cached.add(Ok(copied.cached_ms));
        plain.add(Ok(copied.synced_ms));
        limit.add(Ok(read.as_secs_f64() * 1e3));
        other.add(by_peer);
    }
    let what = format!("restore of {size:.0} MiB, exec to guest runs");
    Ok(vec![
        Row {
            minivmm: mine,
            peers: vec![
                named("plain copy, with fsync", &plain),
                named("plain copy, without", &cached),
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
        let setup = Setup { memory_mib, cpus: 1, cmdline: cmdline.clone(), ..Setup::default() };
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
            let saved = minivmm_save_running(bench, name, &file)?;
            let restored = minivmm_restore_ms(bench, &file, "restored")?;
            let samples = [saved.cached_ms, saved.synced_ms, saved.mib, restored];
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
