//! `make demo`: a guest under load moves, running, from one process to another by pre-copy, verified by both
//! ends, and to a third one by post-copy; and verifies itself.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use serde_json::Value;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Longest wait for anything; far beyond what it takes.
const LIMIT: Duration = Duration::from_secs(60);
/// What the guest does: both vCPUs write 4,000 pages a second and verify all they wrote.
const GUEST: &str = "ws=64 dirty=4000 pattern=random report=500";
const NAME: &str = "demo";

fn main() -> ExitCode {
    match demo() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> Result<()> {
    let minivmm = std::env::current_exe()?.with_file_name("minivmm");
    let folder = Folder::new()?;

    say(
        "1. a guest with 2 vCPUs and 256 MiB writes and verifies memory; this is its own heartbeat",
    );
    let run = ["run", "--name", NAME, "--cpus", "2", "--memory", "256M", "--cmdline", GUEST];
    let mut first = Vm::start(&minivmm, &folder.0, &run)?;
    let before = first.show_reports(4)?;

    say("2. another process waits for it (`minivmm receive`), and `minivmm migrate` moves it, running");
    let receive = ["receive", "--listen", "127.0.0.1:0", "--once"];
    let mut second = Vm::start(&minivmm, &folder.0, &receive)?;
    let to = second.listens_at()?;
    let report = cli(&minivmm, &folder.0, &["migrate", NAME, "--to", &to, "--verify", "--json"])?;
    show_migration(&report);
    first.wait_for_end()?;

    say("3. its first process has ended; it goes on in the second one");
    let after = second.show_reports(4)?;

    say("4. and on to a third one by post-copy: the guest goes first, its memory follows it");
    let mut third = Vm::start(&minivmm, &folder.0, &receive)?;
    let to = third.listens_at()?;
    let postcopy = ["migrate", NAME, "--to", &to, "--mode", "postcopy", "--json"];
    show_postcopy(&cli(&minivmm, &folder.0, &postcopy)?);
    second.wait_for_end()?;
    third.show_reports(4)?;

    say("5. the guest verifies every page it ever wrote");
    third.type_line("verify")?;
    let pass = third.event("verified")?;
    third.type_line("report")?;
    let last = third.event("report")?;
    third.type_line("poweroff")?;
    third.wait_for_end()?;
    println!("   {} pages verified, {} wrong", pass["pages"], pass["errors"]);
    println!(
        "   the longest pause that it saw: {:.1} ms; its longest other gap: {:.1} ms; clocks fell back {} times",
        micros(&last, "switch_max_us") / 1e3,
        micros(&last, "gap_max_us") / 1e3,
        count(&last, "tsc_back") + count(&last, "clock_back"),
    );

    let wrong = count(&pass, "errors")
        + ["errors", "fpu_errors", "tsc_back", "clock_back"]
            .map(|k| count(&last, k))
            .iter()
            .sum::<u64>();
    let went_on = count(&last, "writes") > count(&before, "writes")
        && count(&after, "switches") == 1
        && count(&last, "switches") == 2;
    if wrong == 0 && went_on {
        println!("\nThe guest went on where it was, and nothing differs.");
        return Ok(());
    }
    Err(format!("the guest found {wrong} errors; went on: {went_on}; last report: {last}").into())
}

fn show_postcopy(report: &Value) {
    let there = &report["postcopy"]["destination"];
    println!(
        "   paused {:.1} ms; then {} pages followed in {:.1} ms: {} asked for, {} with those, {} pushed",
        micros(&report["pause"], "total_us") / 1e3,
        report["postcopy"]["missing_pages"],
        micros(there, "drain_us") / 1e3,
        there["demand_pages"],
        there["prepaged_pages"],
        there["pushed_pages"],
    );
    println!(
        "   {} page faults over the network, half of them within {:.0} us",
        there["requests"],
        micros(&there["latency"], "p50_ns") / 1e3,
    );
}

fn show_migration(report: &Value) {
    let ms = |value: &Value| value.as_f64().unwrap_or(f64::NAN) / 1e3;
    for round in report["rounds"].as_array().into_iter().flatten() {
        println!(
            "   round {}: {:6} pages in {:6.1} ms, {:5} written meanwhile; a pause now would be about {:.1} ms",
            round["number"],
            round["data_pages"],
            ms(&round["duration_us"]),
            round["dirty_pages"],
            ms(&round["predicted_pause_us"]),
        );
    }
    let pause = &report["pause"];
    println!(
        "   pause of {:.1} ms, {:.1} ms of it to compare hashes of all memory and load the state; {:.3} s in all",
        ms(&pause["total_us"]),
        ms(&pause["load_us"]),
        ms(&report["total_us"]) / 1e3,
    );
}

fn say(text: &str) {
    println!("\n{text}");
}

fn count(event: &Value, key: &str) -> u64 {
    event[key].as_u64().unwrap_or(u64::MAX >> 8)
}

fn micros(event: &Value, key: &str) -> f64 {
    event[key].as_f64().unwrap_or(f64::NAN)
}

/// Runs a command of `minivmm` and reads its JSON.
fn cli(minivmm: &Path, runtime: &Path, args: &[&str]) -> Result<Value> {
    let output = Command::new(minivmm)
        .env("MINIVMM_RUNTIME_DIR", runtime)
        .env("MINIVMM_STATE_DIR", runtime.join("state"))
        .args(args)
        .output()?;
    if !output.status.success() {
        return Err(format!("{args:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// A folder of its own, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("minivmm-demo-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A VM in a process of its own, with its console on a pipe.
struct Vm {
    process: Child,
    console: ChildStdin,
    lines: Receiver<String>,
    log: Receiver<String>,
}

impl Vm {
    fn start(minivmm: &Path, runtime: &Path, args: &[&str]) -> Result<Self> {
        let mut process = Command::new(minivmm)
            .env("MINIVMM_RUNTIME_DIR", runtime)
            .env("MINIVMM_STATE_DIR", runtime.join("state"))
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let console = process.stdin.take().ok_or("no standard input")?;
        let output = process.stdout.take().ok_or("no standard output")?;
        let log = process.stderr.take().ok_or("no standard error")?;
        Ok(Self { process, console, lines: lines_of(output), log: lines_of(log) })
    }

    /// Where it listens for VMs.
    fn listens_at(&mut self) -> Result<String> {
        loop {
            let line = self.log.recv_timeout(LIMIT).map_err(|e| format!("no address: {e}"))?;
            if let Some((_, address)) = line.split_once("listening on ") {
                return Ok(address.to_owned());
            }
            eprintln!("{line}");
        }
    }

    fn type_line(&mut self, line: &str) -> Result<()> {
        Ok(writeln!(self.console, "{line}")?)
    }

    /// The next event of this kind; a report of damage on the way is an error.
    fn event(&mut self, kind: &str) -> Result<Value> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).map_err(|e| format!("no {kind}: {e}"))?;
            // A restored guest may be in the middle of a line.
            let Ok(event) = serde_json::from_str::<Value>(&line) else { continue };
            match event["event"].as_str() {
                Some(found) if found == kind => return Ok(event),
                Some("corrupt" | "fpu" | "tsc-back" | "clock-back" | "exception" | "panic") => {
                    return Err(line.into());
                }
                _ => {}
            }
        }
    }

    fn show_reports(&mut self, how_many: usize) -> Result<Value> {
        let mut last = Value::Null;
        for _ in 0..how_many {
            last = self.event("report")?;
            println!(
                "   {:6.1} s | {:7} pages written | {:8} verified | {} wrong | longest gap {:6.2} ms | stops {}",
                micros(&last, "uptime_ms") / 1e3,
                last["writes"],
                last["verified"],
                last["errors"],
                micros(&last, "gap_max_us") / 1e3,
                last["switches"],
            );
        }
        Ok(last)
    }

    fn wait_for_end(&mut self) -> Result<()> {
        // The output ends when the process does.
        while self.lines.recv_timeout(LIMIT).is_ok() {}
        let status = self.process.wait()?;
        self.log.try_iter().for_each(|line| eprintln!("{line}"));
        if status.success() {
            return Ok(());
        }
        Err(format!("minivmm ended with {status}").into())
    }
}

/// Lines of a pipe, read on a thread of their own.
fn lines_of(pipe: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        BufReader::new(pipe).lines().map_while(|l| l.ok()).all(|l| sender.send(l).is_ok())
    });
    lines
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
