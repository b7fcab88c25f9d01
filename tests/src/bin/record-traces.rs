//! Records in which order guests touch pages for the first time: the traces of the simulator of pre-paging.
//!
//! `cargo build -p vmm && cargo run -p tests --bin record-traces -- migration/src/prepaging/recorded`
//!
//! A guest is moved by post-copy with demand alone: neither push nor pre-paging, so that the source is asked for each page
//! when the guest touches it. The destination's log says so.
// As in the rest of the crate.
#![allow(clippy::unwrap_used)]

use std::fmt::Write;
use std::path::Path;
use std::time::Instant;

use tests::{Host, Migrating, PATIENCE};

/// Working set of the guests, pages; what they touch besides is recorded as well.
const PAGES: usize = (8 << 20) / 4096;
/// So much of it is recorded: random walks take very long to the last page, and what the guest has not touched before it moves
/// is nowhere to be asked for.
const RECORDED: usize = PAGES * 3 / 4;
/// What the destination logs of a page.
const ASKED: &str = "a page is asked for";

fn main() {
    let directory = std::env::args().nth(1).expect("the folder for the traces");
    for pattern in ["sequential", "stride", "hotspot", "random"] {
        let touched = record(pattern);
        let path = Path::new(&directory).join(format!("{pattern}.trace"));
        std::fs::write(&path, encode(pattern, &touched)).unwrap();
        println!("{}: {} touches", path.display(), touched.len());
    }
}

/// Page frames in the order of their first touch.
fn record(pattern: &str) -> Vec<u64> {
    let (from, to_host) = (Host::new(), Host::new());
    let guest = format!("ws=8 dirty=20000 pattern={pattern} order=linear verify=off report=0");
    let _source = from.run(&guest, &["--memory", "32M"]).ready();
    let log = ["--log", "info,migration::destination::postcopy=debug"];
    let (destination, to) = to_host.receive(&log);
    let args = ["--mode", "postcopy", "--push", "off", "--prepaging", "off"];
    let migrating = Migrating::start(&from, &to, &args);
    let deadline = Instant::now() + PATIENCE;
    let touched = loop {
        let touched = asked(&destination.log());
        if touched.len() >= RECORDED {
            break touched;
        }
        assert!(Instant::now() < deadline, "{pattern}: {} of {RECORDED}", touched.len());
    };
    from.ok(&["migrate-set", "vm", "--push", "on"]);
    assert_eq!(migrating.end().code, Some(0));
    touched.into_iter().take(RECORDED).collect()
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
fn encode(pattern: &str, touched: &[u64]) -> String {
    let mut text = format!(
        "# First touches of beacon, pattern={pattern} order=linear, in 32 MiB; by the bin record-traces of tests.\n"
    );
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
