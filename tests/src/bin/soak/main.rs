//! Migrations under fire for an hour or two: the complete matrix of faults, and one guest that is moved again
//! and again with faults in between. `--help` has the options.
//!
//! ```text
//!   soak                                    reads events, prints progress and the summary
//!    |-- soak case CutPages_at_Loaded_4_cold    a process for each case of the matrix
//!    `-- soak moves                             one for the chain of moves
//! ```
//!
//! Each part is a process of its own, so that one that fails takes nothing else along: its standard
//! error is a log that is kept then, and its standard output carries [`Event`](event::Event)s.
#![allow(clippy::unwrap_used)]

mod chain;
mod event;
mod matrix;
mod options;
mod part;
mod random;
mod summary;

use std::process::ExitCode;
use std::time::Instant;

use tests::fire::Case;
use tests::ways::Way;
use tests::{kvm, namespaces, network_namespaces, root};

use options::{Options, Work};
use part::Part;
use summary::Summary;

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1), |name| std::env::var(name).ok()) {
        Ok(options) => options,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    match &options.work {
        Work::Help => println!("{}", options::USAGE),
        Work::Cases => {
            Case::all().iter().for_each(|case| println!("{case}"));
            Way::all().iter().for_each(|way| println!("{way}"));
        }
        Work::Case(case) => matrix::case(*case),
        Work::Way(way) => matrix::way(*way),
        Work::Moves => chain::run(options.seed, options.moves),
        Work::All { matrix, chain } => return all(&options, *matrix, *chain),
    }
    ExitCode::SUCCESS
}

fn all(options: &Options, matrix: bool, chain: bool) -> ExitCode {
    let needs = [kvm(), root(), namespaces(), network_namespaces()];
    if let Some(why) = needs.iter().find_map(|need| need.as_ref().err()) {
        eprintln!("soak: this machine cannot run it: {why}");
        return ExitCode::from(2);
    }
    if let Err(error) = std::fs::create_dir_all(&options.logs) {
        eprintln!("soak: no folder for logs at {}: {error}", options.logs.display());
        return ExitCode::from(2);
    }
    println!("seed {}: SOAK_SEED={} makes the same choices again", options.seed, options.seed);
    let begun = Instant::now();
    let mut summary = Summary::default();
    if matrix {
        matrix::run(options, &mut summary);
    }
    if chain {
        let (seed, moves) = (options.seed.to_string(), options.moves.to_string());
        let part = Part {
            name: "chain".to_owned(),
            args: ["moves", "--seed", &seed, "--moves", &moves].map(str::to_owned).to_vec(),
        };
        let result = part.run(&options.logs, |event| {
            println!("{event}");
            summary.chain(event);
        });
        summary.ended(result);
    }
    print!("{}", summary.text(options, begun.elapsed()));
    if summary.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
