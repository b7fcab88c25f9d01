//! `make bench-network`: what becomes of a guest's traffic as it moves, by minivmm and by QEMU, on the same networks
//! in namespaces (`tests::topology`).
//!
//! ```text
//!   options    what is to be measured
//!   subject    who runs and moves the guest
//!   run        one run: datagrams while it moves from A to B, a download while it moves back
//!   datagrams  numbered datagrams from C to the guest and back: lost, doubled, the longest silence
//!   stood      when the guest was switched, by its own clock
//!   download   TCP from the guest to C: throughput over time
//!   table      medians, worst runs, targets
//! ```
//!
//! Subjects take turns, a different one first each time. Tables go to standard output, progress to standard error.

mod datagrams;
mod download;
mod options;
mod run;
mod stood;
mod subject;
mod table;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use ::tests::bench::{cpu_model, load_average, Result, Tools};
use ::tests::open_vswitch::OpenVswitch;
use ::tests::topology::{Sites, Topology};
use serde_json::{json, Value};

use options::{name, Options, MODES, SUBJECTS, TOPOLOGIES};
use run::Sample;
use subject::{How, Mode, Subject};

/// What was measured of one subject on one topology in one mode.
pub struct Cell {
    topology: Topology,
    mode: Mode,
    subject: Subject,
    /// Datagrams per second.
    rate: u64,
    samples: Vec<Sample>,
    failures: Vec<String>,
}

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    match bench(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench-network: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(options: &Options) -> Result<bool> {
    ::tests::root()?;
    ::tests::network_namespaces()?;
    let begin = Instant::now();
    let tools = Arc::new(Tools::new(&std::env::temp_dir())?);
    let mut subjects = options.subjects.clone();
    if let (true, Err(why)) = (subjects.contains(&Subject::Qemu), &tools.qemu) {
        println!("Not measured: {why}.\n");
        subjects.retain(|subject| *subject != Subject::Qemu);
    }
    println!("{}, load average {} at the begin.\n", cpu_model(), load_average());
    let (mut cells, mut all_well) = (Vec::new(), true);
    for topology in &options.topologies {
        if let (Topology::Ovs, Err(why)) = (topology, OpenVswitch::need()) {
            println!("Not measured: {why}.\n");
            continue;
        }
        let measured = measure(&tools, options, &subjects, *topology)?;
        println!("{}", table::table(&measured));
        all_well &= measured.iter().all(|cell| table::reached(cell) != Some(false));
        cells.extend(measured);
    }
    println!(
        "{:.0} minutes, load average {} at the end.",
        begin.elapsed().as_secs_f64() / 60.0,
        load_average()
    );
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_vec_pretty(&json!({ "cells": as_json(&cells) }))?)?;
    }
    Ok(all_well)
}

/// All runs of one topology.
fn measure(
    tools: &Arc<Tools>,
    options: &Options,
    subjects: &[Subject],
    topology: Topology,
) -> Result<Vec<Cell>> {
    let sites = Sites::new(topology);
    sites.declare();
    let rate = match topology {
        // The guest sends by itself there.
        Topology::Nat => options.rate,
        _ => run::sustained(tools, &sites, options.rate)?,
    };
    let mut cells = Vec::new();
    for mode in &options.modes {
        let first = cells.len();
        cells.extend(subjects.iter().map(|subject| {
            let (samples, failures) = (Vec::new(), Vec::new());
            Cell { topology, mode: *mode, subject: *subject, rate, samples, failures }
        }));
        let how = How { mode: *mode, bandwidth: options.bandwidth, own_wire: options.own_wire };
        for run in 0..options.runs {
            for turn in 0..subjects.len() {
                let cell: &mut Cell = &mut cells[first + (run + turn) % subjects.len()];
                let what = [
                    name(topology, &TOPOLOGIES),
                    name(*mode, &MODES),
                    name(cell.subject, &SUBJECTS),
                ]
                .join(", ");
                let (now, all) = (run + 1, options.runs);
                match run::sample(tools, &sites, topology, cell.subject, how, rate) {
                    Ok(sample) => {
                        eprintln!("{what}, run {now} of {all}: {}", sample.summary());
                        cell.samples.push(sample);
                    }
                    Err(error) => {
                        eprintln!("{what}, run {now} of {all}: {error}");
                        cell.failures.push(error.to_string());
                    }
                }
            }
        }
    }
    Ok(cells)
}

fn as_json(cells: &[Cell]) -> Vec<Value> {
    let one = |cell: &Cell| {
        json!({
            "topology": name(cell.topology, &TOPOLOGIES), "mode": name(cell.mode, &MODES),
            "subject": name(cell.subject, &SUBJECTS), "datagrams_per_s": cell.rate,
            "samples": cell.samples.iter().map(Sample::json).collect::<Vec<_>>(), "failures": cell.failures,
        })
    };
    cells.iter().map(one).collect()
}
