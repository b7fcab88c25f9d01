//! `make bench`: minivmm beside QEMU microvm with the same guest, on one machine, in one run.
//!
//! Subjects alternate, so that what else the machine does meets all of them; the first round only
//! warms up. Tables go to standard output, progress to standard error.

mod block;
mod boot;
mod figures;
mod guest;
mod linux;
mod net;
mod qmp;
mod rounds;
mod saving;

use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use serde_json::json;

use figures::Row;
use guest::Tools;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const USAGE: &str = "\
Usage: bench [--quick] [--json FILE] [--dir DIR] [BENCH...]

  BENCH        start, overhead, exits, save, restore, sparse, block, net, linux [default: all]
  --quick      fewer runs and less memory, for a look
  --json FILE  write all samples to FILE
  --dir DIR    where VMs are saved, and where disks are: the file system that is measured
               [default: beside this program]

Needs 3 GiB of memory and 2.5 GiB of disk. With nothing else to do, the machine gives figures that can
be compared; each table says how busy it was.";

type Run = fn(&Bench) -> Result<Vec<Row>>;

const BENCHES: [(&str, Run); 9] = [
    ("start", boot::start),
    ("overhead", boot::overhead),
    ("exits", boot::exits),
    ("save", saving::save),
    ("restore", saving::restore),
    ("sparse", saving::sparse),
    ("block", block::block),
    ("net", net::net),
    ("linux", linux::boot),
];

/// What a benchmark needs to know.
#[derive(Debug)]
struct Bench {
    tools: Tools,
    quick: bool,
    name: &'static str,
}

impl Bench {
    /// How many runs count.
    fn runs(&self) -> usize {
        if self.quick {
            3
        } else {
            5
        }
    }

    /// Tells how far it is.
    fn run(&self, run: usize, of: usize) {
        let what = if run == 0 { "warm-up".to_owned() } else { format!("run {run} of {of}") };
        eprintln!("{}: {what}", self.name);
    }
}

#[derive(Debug, Default)]
struct Options {
    quick: bool,
    json: Option<PathBuf>,
    dir: Option<PathBuf>,
    names: Vec<String>,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> std::result::Result<Self, String> {
        let mut options = Self::default();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value\n{USAGE}"));
            match argument.as_str() {
                "--quick" => options.quick = true,
                "--json" => options.json = Some(value()?.into()),
                "--dir" => options.dir = Some(value()?.into()),
                name if BENCHES.iter().any(|(known, _)| *known == name) => {
                    options.names.push(argument);
                }
                "--help" | "-h" => return Err(USAGE.to_owned()),
                other => return Err(format!("{other} is neither option nor benchmark\n{USAGE}")),
            }
        }
        Ok(options)
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [linux::SAMPLES, runs] = arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        // In the lab.
        linux::print_samples(runs.parse().unwrap_or(1));
        return ExitCode::SUCCESS;
    }
    let options = match Options::parse(arguments.into_iter()) {
        Ok(options) => options,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    match bench(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(options: Options) -> Result<()> {
    let beside = || Ok(std::env::current_exe()?.parent().ok_or("no folder")?.to_owned());
    let data = options.dir.map_or_else(beside, Ok::<_, Box<dyn Error>>)?;
    let begin = Instant::now();
    let before = load_average();
    let mut bench = Bench { tools: Tools::new(&data)?, quick: options.quick, name: "" };
    let mut rows = Vec::new();
    for (name, run) in BENCHES {
        if options.names.is_empty() || options.names.iter().any(|wanted| wanted == name) {
            bench.name = name;
            rows.extend(run(&bench).map_err(|error| format!("{name}: {error}"))?);
        }
    }
    let after = load_average();
    let qemu = bench.tools.qemu.clone().unwrap_or_else(|why| format!("no QEMU: {why}"));
    println!("{}", figures::markdown(&rows));
    println!(
        "Medians (minimum to maximum) of at least {} runs, start-up of {}, in turn; {}.",
        bench.runs(),
        boot::start_runs(&bench),
        qemu
    );
    println!(
        "{} CPUs ({}), Linux {}, files in {}. Load average {before} before and {after} after; {:.0} s in all.",
        std::thread::available_parallelism()?,
        cpu_model(),
        first_line("/proc/sys/kernel/osrelease"),
        data.display(),
        begin.elapsed().as_secs_f64(),
    );
    if cfg!(debug_assertions) {
        println!("This is not a release build: the figures say little.");
    }
    if let Some(path) = options.json {
        let value = json!({
            "rows": figures::json(&rows),
            "qemu": qemu,
            "quick": bench.quick,
            "cpu": cpu_model(),
            "kernel": first_line("/proc/sys/kernel/osrelease"),
            "load_before": before,
            "load_after": after,
        });
        fs::write(&path, serde_json::to_vec_pretty(&value)?)
            .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    }
    Ok(())
}

fn first_line(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().next().unwrap_or("unknown").to_owned()
}

/// The three load averages (proc(5)).
fn load_average() -> String {
    first_line("/proc/loadavg").split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    line.map_or("unknown CPU", |(_, name)| name.trim()).to_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(line: &str) -> std::result::Result<Options, String> {
        Options::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn options_and_names_mix() {
        let options = parse("start --quick --json f exits --dir d").unwrap();
        assert!(options.quick);
        assert_eq!(options.names, ["start", "exits"]);
        assert_eq!(options.json.unwrap().to_str(), Some("f"));
        assert_eq!(options.dir.unwrap().to_str(), Some("d"));
    }

    #[test]
    fn what_is_not_known_is_refused() {
        assert!(parse("speed").unwrap_err().starts_with("speed is neither"));
        assert!(parse("--json").unwrap_err().starts_with("--json needs a value"));
    }
}
