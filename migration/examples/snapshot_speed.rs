//! Measures saving and restoring a simulated VM, beside plain writes and reads of as many bytes.
//!
//! `cargo run --release -p migration --features test-utils --example snapshot_speed -- DIR [MIB]`
//!
//! writes about `MIB` MiB (default 1024) three times into `DIR`, which is best on the file system
//! of interest. For the peer, compare with `cp` of the file that it names while it runs.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use migration::simulated::SimulatedVm;
use migration::snapshot::{PendingSnapshot, SnapshotReader, SnapshotSource};
use migration::stream::{Config, Machine};
use migration::{Gfn, MemoryLayout, PageRange};

const RUNS: usize = 3;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn timed<T>(f: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let value = f();
    (value, start.elapsed())
}

fn source(vm: &SimulatedVm) -> SnapshotSource<'_> {
    SnapshotSource {
        machine: Machine {
            program_version: "example".to_owned(),
            identity_version: 1,
            identity: Vec::new(),
        },
        config: Config { version: 1, data: Vec::new() },
        blobs: Vec::new(),
        memory: vm,
        state: vm,
    }
}

/// A VM of this size, of which `used` pages hold something.
fn vm(total: u64, used: u64) -> SimulatedVm {
    let layout = MemoryLayout::new([PageRange::new(Gfn(0), total).unwrap()]).unwrap();
    let vm = SimulatedVm::new(layout).unwrap();
    let mut page = [0u8; 4096];
    for gfn in 0..used {
        for (i, word) in page.chunks_exact_mut(8).enumerate() {
            let value = (gfn << 9 | i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            word.copy_from_slice(&value.to_le_bytes());
        }
        vm.guest_write(Gfn(gfn), &page).unwrap();
    }
    vm
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let directory = PathBuf::from(arguments.next().expect("name a directory to write to"));
    let mib: u64 = arguments.next().map_or(1024, |text| text.parse().expect("MIB is a number"));
    let path = directory.join("snapshot_speed.snap");
    let copy = directory.join("snapshot_speed.copy");
    let mut times: [Vec<Duration>; 6] = Default::default();

    let full = vm(mib * 256, mib * 256);
    for _ in 0..RUNS {
        let _ = fs::remove_file(&path);
        let (pending, write) = timed(|| {
            PendingSnapshot::write(&path, source(&full), &mut |_| ControlFlow::Continue(()))
                .unwrap()
        });
        let (_, commit) = timed(|| pending.commit().unwrap());
        let _ = fs::remove_file(&copy);
        let (_, cp) = timed(|| {
            Command::new("cp").args(["--reflink=never"]).args([&path, &copy]).status().unwrap()
        });
        let (_, cp_sync) = timed(|| File::open(&copy).unwrap().sync_all().unwrap());
        let fresh = vm(mib * 256, 0);
        let (_, restore) = timed(|| {
            let (_, reader) = SnapshotReader::open(&path).unwrap();
            reader.load_memory(&fresh).unwrap().sections().unwrap()
        });
        drop(fresh);
        // What copying the file into fresh memory costs without any check.
        let (_, read) = timed(|| {
            let mut file = File::open(&path).unwrap();
            let mut memory = Vec::with_capacity(file.metadata().unwrap().len() as usize);
            file.read_to_end(&mut memory).unwrap();
            std::hint::black_box(memory.last().copied())
        });
        for (times, time) in times.iter_mut().zip([write, commit, cp, cp_sync, restore, read]) {
            times.push(time);
        }
    }
    let names = ["save: write", "save: commit", "cp", "cp: fsync", "restore", "plain read"];
    let mut out = std::io::stdout().lock();
    for (name, times) in names.into_iter().zip(times) {
        let time = median(times.clone());
        let rate = mib as f64 / time.as_secs_f64();
        writeln!(out, "{name:14} {:8.1?}  {rate:8.0} MiB/s  all: {times:.1?}", time).unwrap();
    }
    let _ = fs::remove_file(&copy);

    // What is in use must cost, not what there is: the three lines differ in the VM's size only.
    for (name, total) in [("64 MiB", 64 << 8), ("1 GiB", 1 << 18), ("16 GiB", 16 << 18)] {
        let sparse = vm(total, 64 << 8);
        let mut writes = Vec::new();
        let mut size = 0;
        for _ in 0..RUNS {
            let (pending, write) = timed(|| {
                PendingSnapshot::write(&path, source(&sparse), &mut |_| ControlFlow::Continue(()))
                    .unwrap()
            });
            size = pending.commit().unwrap().file_bytes;
            writes.push(write);
        }
        let time = median(writes.clone());
        writeln!(
            out,
            "{name:6} with 64 MiB in use: {time:.1?} for {size} bytes, all: {writes:.1?}"
        )
        .unwrap();
    }
    let _ = fs::remove_file(&path);
}
