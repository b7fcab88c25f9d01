//! Measures migrations of an idle simulated VM over TCP on the loopback interface, beside raw copies of
//! as many bytes into fresh memory of the same kind.
//!
//! `cargo run --release -p migration --features test-utils --example migration_speed -- [MIB]`

#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use migration::destination::{receive, DestinationControl, DestinationOptions};
use migration::journal::Journal;
use migration::report::{Outcome, Report};
use migration::simulated::{SimulatedHost, SimulatedVm};
use migration::source::{migrate_to, Offering, SourceControl, SourceOptions};
use migration::stream::{Config, Machine};
use migration::transport::{TcpAcceptor, TcpConnector};
use migration::volatile_io;
use migration::{Gfn, GuestMemory, MemoryLayout, MigrationId, PageRange};

const RUNS: usize = 5;
const CHUNK: u64 = 256;

fn layout(pages: u64) -> MemoryLayout {
    MemoryLayout::new([PageRange::new(Gfn(0), pages).unwrap()]).unwrap()
}

fn vm(total: u64, used: u64) -> SimulatedVm {
    let vm = SimulatedVm::new(layout(total)).unwrap();
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

/// A raw copy of all memory, straight into fresh memory.
fn raw(source: &SimulatedVm) -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let pages = source.layout().total_pages();
    let chunks = || PageRange::new(Gfn(0), pages).unwrap().chunks(CHUNK);
    let fresh = SimulatedVm::new(layout(pages)).unwrap();
    let started = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            let socket = TcpStream::connect(address).unwrap();
            for chunk in chunks() {
                let slice = source.slice(chunk).unwrap();
                volatile_io::write_all(socket.as_fd(), &[], &[slice]).unwrap();
            }
        });
        let socket = listener.accept().unwrap().0;
        for chunk in chunks() {
            let slice = fresh.slice(chunk).unwrap();
            volatile_io::read_exact(socket.as_fd(), &[slice]).unwrap();
        }
    });
    started.elapsed()
}

fn migrate(source: &SimulatedVm, connections: u16, journal: &Journal) -> Report {
    let listener = TcpAcceptor::bind("127.0.0.1:0").unwrap();
    let address = listener.local_address().unwrap().to_string();
    let host = SimulatedHost::default();
    let arriving = DestinationControl::new();
    let options = DestinationOptions::default();
    let report = thread::scope(|scope| {
        scope.spawn(|| receive(&host, &listener, journal, &options, &arriving, &|_| {}).unwrap());
        let offering = Offering {
            name: "example".to_owned(),
            machine: Machine {
                program_version: "example".to_owned(),
                identity_version: 1,
                identity: Vec::new(),
            },
            config: Config { version: 1, data: Vec::new() },
            resources: Config { version: 1, data: Vec::new() },
            blobs: Vec::new(),
        };
        migrate_to(
            source,
            offering,
            &TcpConnector::new(address),
            journal,
            &SourceOptions { connections, ..SourceOptions::default() },
            &SourceControl::new(MigrationId::random().unwrap()),
            &|_| {},
        )
    });
    assert_eq!(report.outcome, Outcome::HandedOver);
    // The next run moves it again from here.
    migration::VmControl::resume(source).unwrap();
    report
}

fn median<T: Ord + Copy>(values: &[T]) -> T {
    let mut values = values.to_vec();
    values.sort_unstable();
    values[values.len() / 2]
}

fn main() {
    let mib: u64 = std::env::args().nth(1).map_or(1024, |text| text.parse().expect("MIB"));
    let mut out = std::io::stdout().lock();
    let directory = std::env::temp_dir().join(format!("migration-speed-{}", std::process::id()));
    let journal = Journal::open(&directory).unwrap();
    let full = vm(mib * 256, mib * 256);
    let mut times: [Vec<Duration>; 3] = Default::default();
    let mut pauses: [Vec<Duration>; 2] = Default::default();
    for _ in 0..RUNS {
        times[0].push(raw(&full));
        for (at, connections) in [1, 4].into_iter().enumerate() {
            let report = migrate(&full, connections, &journal);
            times[1 + at].push(report.total);
            pauses[at].push(report.pause.unwrap().total);
            if std::env::var_os("VERBOSE").is_some() {
                writeln!(out, "{:?} {:?}", report.rounds, report.pause.unwrap()).unwrap();
            }
        }
    }
    let best = median(&times[0]);
    for (at, name) in ["raw", "1 connection", "4 connections"].into_iter().enumerate() {
        let time = median(&times[at]);
        let rate = mib as f64 / time.as_secs_f64();
        let share = best.as_secs_f64() / time.as_secs_f64();
        write!(out, "{name:14} {time:9.1?} {rate:6.0} MiB/s  {share:.2} of raw").unwrap();
        if let Some(pauses) = at.checked_sub(1).map(|at| &pauses[at]) {
            write!(out, "  pause {:.1?}", median(pauses)).unwrap();
        }
        writeln!(out).unwrap();
    }
    drop(full);
    for gib in [1, 16] {
        let sparse = vm(gib << 18, 64 << 8);
        let mut totals = Vec::new();
        for _ in 0..RUNS {
            totals.push(migrate(&sparse, 1, &journal).total);
        }
        let total = median(&totals);
        writeln!(out, "{gib:2} GiB with 64 MiB in use: {total:.1?}, all {totals:.1?}").unwrap();
    }
    let _ = std::fs::remove_dir_all(&directory);
}
