//! Records in which order guests touch pages for the first time: the traces of the simulator of pre-paging.
//!
//! `cargo build -p vmm && cargo run -p tests --bin record-traces -- migration/src/prepaging/recorded [linux]`
//!
//! A guest is moved by post-copy with demand alone: neither push nor pre-paging, so that the source is asked for each page
//! when the guest touches it. The destination's log says so. The guest is beacon with each of its walks, or Linux, for
//! which `make guest-images` is needed, and without hardware virtualization the lab.
// As in the rest of the crate.
#![allow(clippy::unwrap_used)]

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::lab::{self, Lab, Linux};
use tests::{Host, Migrating, PATIENCE};

/// Working set of beacon, pages; what it touches besides is recorded as well.
const PAGES: usize = (8 << 20) / 4096;
/// So much of it is recorded: random walks take very long to the last page, and what the guest has not touched before it moves
/// is nowhere to be asked for.
const RECORDED: usize = PAGES * 3 / 4;
/// So many touches of Linux are recorded.
const LINUX_RECORDED: usize = 4000;
/// How a guest is moved that tells all that it touches, and how the destination logs that.
const DEMAND: [&str; 6] = ["--mode", "postcopy", "--push", "off", "--prepaging", "off"];
const LOG: [&str; 2] = ["--log", "info,migration::destination::postcopy=debug"];
/// What the destination logs of a page.
const ASKED: &str = "a page is asked for";

fn main() {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().expect("the folder for the traces");
    let directory = Path::new(&directory);
    match arguments.next().as_deref() {
        None => {
            for pattern in ["sequential", "stride", "hotspot", "random"] {
                write(directory, pattern, &record(pattern));
            }
        }
        Some("linux") => {
            let here = lab::virtualization().is_ok();
            let trace = if here { record_linux() } else { record_in_lab() };
            write(directory, "linux", &trace);
        }
        Some(other) => panic!("{other}: only linux can be asked for"),
    }
}

fn write(directory: &Path, name: &str, trace: &str) {
    let path = directory.join(format!("{name}.trace"));
    fs::write(&path, trace).unwrap();
    println!("{}: {} bytes", path.display(), trace.len());
}

/// A trace of beacon.
fn record(pattern: &str) -> String {
    let (from, to_host) = (Host::new(), Host::new());
    let guest = format!("ws=8 dirty=20000 pattern={pattern} order=linear verify=off report=0");
    let _source = from.run(&guest, &["--memory", "32M"]).ready();
    let (destination, to) = to_host.receive(&LOG);
    let migrating = Migrating::start(&from, &to, &DEMAND);
    let touched = first_touches(RECORDED, || destination.log());
    from.ok(&["migrate-set", "vm", "--push", "on"]);
    assert_eq!(migrating.end().code, Some(0));
    encode(&format!("beacon, pattern={pattern} order=linear, in 32 MiB"), &touched)
}

/// A trace of Linux with two vCPUs: one process copies files on a disk, one writes memory, both compare.
fn record_linux() -> String {
    let (from, to_host) = (Host::new(), Host::new());
    let mut run = from.command(&["run", "--name", "vm", "--console", "stdio"]);
    run.args(["--memory", "128M", "--cpus", "2"]);
    run.args(["--disk", &format!("id=data,path={}", lab::ext4(&from, "disk.img"))]);
    run.arg("--kernel").arg(lab::image("vmlinuz"));
    run.arg("--initrd").arg(lab::image("initramfs.cpio"));
    let modules = "modules=virtio_mmio,virtio_blk,ext4 disk=vda";
    run.args(["--cmdline", &format!("console=ttyS0 quiet panic=-1 {modules}")]);
    let mut source = Linux::start(run).ready();
    let kernel = source.sh("uname -r");
    source.sh("copy 8 /mnt & dirty 16 & after copies 0 && after dirtied 0");

    let receive = ["receive", "--listen", "127.0.0.1:0", "--once", "--console", "stdio"];
    let mut guest = Linux::start(to_host.command(&[&receive[..], &LOG].concat()));
    let migrating = Migrating::start(&from, &guest.listens_at(), &DEMAND);
    let touched = first_touches(LINUX_RECORDED, || guest.stderr());
    from.ok(&["migrate-set", "vm", "--push", "on"]);
    assert_eq!(migrating.end().code, Some(0));
    assert_eq!(guest.sh("cat /run/copy-errors /run/dirty-errors 2>/dev/null; true"), "");
    guest.send("poweroff -f");
    guest.ends_well();
    encode(&format!("Linux {kernel}, `copy 8 /mnt & dirty 16`, 2 vCPUs, in 128 MiB"), &touched)
}

/// [`record_linux`] by this program in the lab.
fn record_in_lab() -> String {
    lab::linux_image().and_then(|()| lab::available()).unwrap();
    // What the lab gives back is JSON: a string for each line.
    let script = r#"tests /tmp linux && sed 's/.*/"&"/' /tmp/linux.trace >/dev/ttyS1"#;
    let lab = Lab::with_minivmm(script).and_then(|lab| lab.program("mkfs.ext4")).unwrap();
    let run = lab.run(&lab::lab_dir("record-traces")).unwrap();
    let lines = run.results.iter().filter_map(Value::as_str);
    let trace: String = lines.map(|line| format!("{line}\n")).collect();
    assert!(run.finished && !trace.is_empty(), "the lab's logs are in {}", run.logs.display());
    trace
}

/// The first `count` page frames in the order of their first touch, once the destination's log has so many.
fn first_touches(count: usize, log: impl Fn() -> String) -> Vec<u64> {
    /// In the lab, whoever looks takes the guest's time.
    const BETWEEN_LOOKS: Duration = Duration::from_millis(100);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let log = log();
        assert!(log.contains("listening on"), "the log's beginning is not kept any more");
        let mut touched = asked(&log);
        if touched.len() >= count {
            touched.truncate(count);
            return touched;
        }
        assert!(Instant::now() < deadline, "{} of {count} touches", touched.len());
        std::thread::sleep(BETWEEN_LOOKS);
    }
}

/// The pages of whole lines.
fn asked(log: &str) -> Vec<u64> {
    let lines = log.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    lines
        .filter(|line| line.contains(ASKED))
        .map(|line| {
            let (_, page) = line.split_once("page frame 0x").unwrap();
            let digits = page.split(|c: char| !c.is_ascii_hexdigit()).next().unwrap();
            u64::from_str_radix(digits, 16).unwrap()
        })
        .collect()
}

/// Distances from touch to touch; what repeats is counted.
fn encode(guest: &str, touched: &[u64]) -> String {
    let mut text = format!("# First touches of {guest}; by the bin record-traces of tests.\n");
    let mut before = 0;
    let mut steps: Vec<(i64, usize)> = Vec::new();
    for gfn in touched {
        let step = *gfn as i64 - before;
        before = *gfn as i64;
        match steps.last_mut() {
            Some((last, times)) if *last == step => *times += 1,
            _ => steps.push((step, 1)),
        }
    }
    for (step, times) in steps {
        match times {
            1 => writeln!(text, "{step:+}").unwrap(),
            _ => writeln!(text, "{step:+}x{times}").unwrap(),
        }
    }
    text
}
