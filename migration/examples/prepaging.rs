//! Compares ways of pre-paging in virtual time (see `migration::prepaging::simulation`): the walks that beacon
//! makes, over 64 MiB of a guest that lacks 256 MiB, and traces that were recorded, or another one.
//!
//! `cargo run --release -p migration --example prepaging -- [TRACEFILE]`; `migration::prepaging::traces::read` says what is in the file.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs::File;
use std::hint::black_box;
use std::io::BufReader;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::prepaging::simulation::{simulate, Link, Touch};
use migration::prepaging::traces::{read, walks, Pattern, Walks, RECORDED};
use migration::prepaging::{Plan, Prepaging};
use migration::{Gfn, MemoryLayout, PageRange, PageSet};

const LINK: Link =
    Link { round_trip: Duration::from_micros(200), bytes_per_second: 1_000_000_000 / 8 };
const UNSENT_PAGES: u64 = (256 << 20) / 4096;
const WORKING_SET_PAGES: u64 = (64 << 20) / 4096;
const WAYS: [(Prepaging, bool); 6] = [
    (Prepaging::Off, false),
    (Prepaging::Linear, false),
    (Prepaging::Bubble, false),
    (Prepaging::Off, true),
    (Prepaging::Linear, true),
    (Prepaging::Bubble, true),
];

fn all(pages: u64) -> PageSet {
    let range = PageRange::new(Gfn(0), pages).unwrap();
    PageSet::full(&Arc::new(MemoryLayout::new([range]).unwrap()))
}

/// Network faults, their share of the pages touched, touches of pages on their way, and how long the guest stood.
fn row(name: &str, trace: &[Touch], pages: u64) {
    let touched = trace.iter().map(|touch| touch.gfn).collect::<BTreeSet<_>>().len();
    print!("{name:<16}");
    for (prepaging, push) in WAYS {
        let outcome = simulate(trace, all(pages), 1, prepaging, push, LINK);
        let share = outcome.faults as f64 / touched.max(1) as f64 * 100.0;
        let waited = outcome.waited.as_secs_f64();
        print!(" |{:>6} {share:>5.1}% {:>6} {waited:>6.3} s", outcome.faults, outcome.waits);
    }
    println!();
}

fn heading(think: &str) {
    println!("\n{think}");
    print!("{:<16}", "");
    for (prepaging, push) in WAYS {
        let way = format!("{prepaging:?}{}", if push { " + push" } else { "" });
        print!(" | {way:<28}");
    }
    print!("\n{:<16}", "trace");
    for _ in WAYS {
        print!(" |{:>6} {:>6} {:>6} {:>8}", "faults", "share", "waits", "stood");
    }
    println!();
}

/// What one call costs with 16 GiB to send: the median of many, in turn, and what one of a thousand exceeds.
fn cost() {
    println!("\ncost of a call with 16 GiB unsent     median     99.9 %");
    for prepaging in [Prepaging::Linear, Prepaging::Bubble] {
        for pattern in [Pattern::Random, Pattern::Stride(7), Pattern::Sequential] {
            let pages = 4 << 20;
            let mut plan = Plan::new(all(pages), 1, prepaging);
            let (first, touches, think) = (Gfn(0), 40_000, Duration::ZERO);
            let trace = walks(&Walks { pattern, cpus: 2, first, pages, touches, think });
            let (mut demands, mut pushes) = (Vec::new(), Vec::new());
            for touch in trace {
                let started = Instant::now();
                black_box(plan.demand(touch.gfn));
                demands.push(started.elapsed());
                let started = Instant::now();
                black_box(plan.push(64));
                pushes.push(started.elapsed());
            }
            for (call, mut times) in [("demand", demands), ("push of 64", pushes)] {
                times.sort_unstable();
                let name = format!("{prepaging:?}, {pattern:?}, {call}");
                let (median, most) = (times[times.len() / 2], times[times.len() * 999 / 1000]);
                println!("{name:<35} {:>6} ns {:>6} ns", median.as_nanos(), most.as_nanos());
            }
        }
    }
}

fn main() {
    println!("faults: pages that were asked for; share: of the pages touched; waits: pages asked for that were on");
    println!("their way; stood: how long the guest did. Round trip 200 µs, 1 Gbit/s.");
    if let Some(path) = std::env::args().nth(1) {
        let trace = read(BufReader::new(File::open(&path).unwrap())).unwrap();
        let pages = trace.iter().map(|touch| touch.gfn.0 + 1).max().unwrap_or(1);
        heading("all memory below the trace's highest page is unsent");
        row("recorded", &trace, pages);
        return;
    }
    for micros in [20, 100] {
        heading(&format!("a touch every {micros} µs, 33 µs being what the link takes for a page"));
        for cpus in [1, 2] {
            for (name, pattern) in [
                ("sequential", Pattern::Sequential),
                ("stride 7", Pattern::Stride(7)),
                ("stride 300", Pattern::Stride(300)),
                ("hot-spot", Pattern::HotSpot),
                ("random", Pattern::Random),
            ] {
                let trace = walks(&Walks {
                    pattern,
                    cpus,
                    first: Gfn(UNSENT_PAGES / 4),
                    pages: WORKING_SET_PAGES,
                    touches: 2 * WORKING_SET_PAGES,
                    think: Duration::from_micros(micros),
                });
                row(&format!("{name}, {cpus}"), &trace, UNSENT_PAGES);
            }
        }
    }
    recorded();
    cost();
}

/// What a real guest did, at two speeds.
fn recorded() {
    for micros in [20, 100] {
        heading(&format!(
            "first touches of beacon in 32 MiB and of Linux in 128 MiB, one every {micros} µs"
        ));
        for guest in RECORDED {
            let mut trace = read(guest.text.as_bytes()).unwrap();
            trace.iter_mut().for_each(|touch| touch.think = Duration::from_micros(micros));
            row(guest.name, &trace, guest.memory_pages);
        }
    }
}
