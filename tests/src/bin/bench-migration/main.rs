//! `make bench-migration`: the same guest migrated by minivmm and by QEMU, on one machine, in one
//! run, beside the same guest that stays where it is.
//!
//! ```text
//!   options   what is to be measured
//!   subject   who migrates, under which load; minivmm and qemu: how each is told to
//!   qemu_faults  how long QEMU's guest waited for pages, by its trace events
//!   run       one run: boot, migrate, ask the guest, let it verify its memory
//!   raw       the raw TCP copy
//!   extra     idle VMs with much RAM; a guest that is moved many times
//!   sample    figures of runs, medians; verdict: targets; table: how they are shown
//! ```
//!
//! Subjects take turns within each cell, a different one first each time, so that what else the
//! machine does meets all of them. Tables go to standard output, progress to standard error.

mod extra;
mod minivmm;
mod options;
mod qemu;
mod qemu_faults;
mod raw;
mod run;
mod sample;
mod subject;
mod table;
mod verdict;
mod warm;

use std::fs;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use ::tests::bench::{cpu_model, first_line, load_average, Result, Tools, Vmm, GUEST_ERROR};
use serde_json::json;

use options::{Options, Part};
use sample::{Quantity, Sample};
use subject::{Cell, Subject};
use verdict::Verdict;

/// Set in the network namespace that this program made for itself.
const IN_NAMESPACE: &str = "MINIVMM_BENCH_NAMESPACE";
/// A raw copy takes part from this working set on: a smaller one says little about throughput.
const RAW_COPY_MIB: u64 = 700;
/// A subject that failed so often in a cell is left alone there.
const FAILURES: usize = 2;

/// What a run needs to know.
#[derive(Debug)]
pub struct Bench {
    /// The programs.
    pub tools: Tools,
    /// What runs guests that are not migrated.
    pub without_migration: Vmm,
    /// Whether all bytes of `lo` are this program's.
    pub private_network: bool,
    /// Short windows.
    pub quick: bool,
    /// How long what is sent is on its way.
    pub delay: Duration,
    /// The link, Mbit/s.
    pub rate: Option<u32>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match raw::copier(&arguments) {
        Some(copied) => copied.map(|()| true),
        None => match Options::parse(arguments.iter().cloned()) {
            Ok(options) => bench(&options, &arguments),
            Err(text) => {
                eprintln!("{text}");
                return ExitCode::from(2);
            }
        },
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench-migration: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Makes this process one in a network namespace of its own, where nobody else uses `lo`. Says
/// whether it is; comes back only if there is nothing to do, or it cannot.
fn private_network(arguments: &[String]) -> bool {
    use std::os::unix::process::CommandExt;
    const UP: &str = "ip link set lo up";
    if std::env::var_os(IN_NAMESPACE).is_some() {
        return true;
    }
    let Ok(program) = std::env::current_exe() else { return false };
    // The second for those who are not root.
    for how in ["-n", "-rn"] {
        let try_it = Command::new("unshare").args([how, "--", "sh", "-c", UP]).output();
        if try_it.is_ok_and(|output| output.status.success()) {
            let script = format!("{UP} && exec \"$0\" \"$@\"");
            let mut command = Command::new("unshare");
            command.args([how, "--", "sh", "-c", &script]).arg(&program).args(arguments);
            let error = command.env(IN_NAMESPACE, "1").exec();
            eprintln!("unshare: {error}");
        }
    }
    eprintln!("no network namespace: bytes on the wire are not counted from outside");
    false
}

/// Makes `lo` a link of so many Mbit/s, which both directions share: one of them has nearly all bytes. What waits for it
/// is queued as Linux does where nothing else is set (tc-pfifo_fast(8)).
fn restrict(rate: u32, private_network: bool) -> Result<()> {
    if !private_network {
        return Err("--rate needs a network namespace of its own".into());
    }
    // A burst of 1 ms, at least a packet of lo; what waits longer than 50 ms is dropped.
    let burst = (rate * 125).max(66_000).to_string();
    let rate = format!("{rate}mbit");
    let link = ["root", "handle", "1:", "tbf", "rate", &rate, "burst", &burst, "latency", "50ms"];
    for qdisc in [&link[..], &["parent", "1:1", "pfifo_fast"]] {
        let made = Command::new("tc").args(["qdisc", "add", "dev", "lo"]).args(qdisc).output();
        let made = made.map_err(|error| format!("tc: {error}"))?;
        if !made.status.success() {
            let text = String::from_utf8_lossy(&made.stderr);
            return Err(format!("tc qdisc add dev lo {}: {text}", qdisc.join(" ")).into());
        }
    }
    Ok(())
}

/// How far it is.
struct Progress {
    begin: Instant,
    done: f64,
    all: f64,
}

impl Progress {
    /// Minutes that are left, from how long it took so far.
    fn left(&self) -> String {
        let rate = match self.done {
            done if done > 0.0 => self.begin.elapsed().as_secs_f64() / done,
            _ => 1.0,
        };
        format!("{:.0} min left", ((self.all - self.done) * rate / 60.0).ceil())
    }
}

/// A guest and what is done with it.
type Turn = (Cell, Subject);

/// What is measured in which order.
struct Plan {
    /// Of each cell; they are compared within it.
    cells: Vec<Vec<Turn>>,
    idle: Vec<Turn>,
    growth: Vec<Subject>,
    moves: usize,
}

impl Plan {
    fn new(options: &Options, subjects: &[Subject]) -> Self {
        let wants = |part| options.parts.contains(&part);
        let mut plan = Self { cells: vec![], idle: vec![], growth: vec![], moves: 20 };
        if options.quick {
            plan.moves = 8;
        }
        if wants(Part::Cells) {
            let fits = |cell: Cell, subject| {
                subject != Subject::RawCopy || cell.ws_mib >= RAW_COPY_MIB || options.quick
            };
            let turns = |cell: &Cell| {
                let subjects = subjects.iter().filter(|subject| fits(*cell, **subject));
                subjects.map(|subject| (*cell, *subject)).collect()
            };
            plan.cells = options.cells.iter().map(turns).collect();
        }
        if wants(Part::Idle) {
            // QEMU is nobody's measure here.
            let ours = subjects.iter().filter(|subject| subject.is_minivmm());
            let turns = |subject: &Subject| {
                let subject = *subject;
                extra::idle_cells(options.quick).map(|cell| (cell, subject))
            };
            plan.idle = ours.flat_map(turns).collect();
        }
        if wants(Part::Growth) {
            plan.growth = subjects.to_vec();
            plan.growth.retain(|subject| extra::can_grow(*subject));
        }
        plan
    }

    /// Seconds, roughly.
    fn seconds(&self, options: &Options) -> f64 {
        let turns = self.cells.iter().flatten().chain(&self.idle);
        let once: f64 = turns.map(|(cell, _)| seconds(*cell, options.quick)).sum();
        once * (options.runs as f64 + 1.0) + self.growth_seconds() * self.growth.len() as f64
    }

    fn growth_seconds(&self) -> f64 {
        self.moves as f64
    }
}

/// Seconds that a run takes, roughly: boot, window, verification.
fn seconds(cell: Cell, quick: bool) -> f64 {
    run::window(cell, quick).as_secs_f64() + 0.9 + cell.ws_mib as f64 / 350.0
}

/// Results of all parts.
#[derive(Default)]
struct Results {
    samples: Vec<Sample>,
    verdicts: Vec<Verdict>,
    growth: Vec<extra::Growth>,
}

fn bench(options: &Options, arguments: &[String]) -> Result<bool> {
    let private_network = private_network(arguments);
    let tools = Tools::new(&std::env::temp_dir())?;
    let (subjects, qemu) = available(options, &tools);
    // The guest that stays is run by who is measured.
    let by_minivmm = subjects.iter().any(|s| s.is_minivmm()) || tools.qemu.is_err();
    let without_migration = if by_minivmm { Vmm::Minivmm } else { Vmm::QemuRom };
    if let Some(rate) = options.rate {
        restrict(rate, private_network)?;
    }
    let bench = Bench {
        tools,
        without_migration,
        private_network,
        quick: options.quick,
        delay: options.delay,
        rate: options.rate,
    };

    let plan = Plan::new(options, &subjects);
    let all = plan.seconds(options);
    let mut progress = Progress { begin: Instant::now(), done: 0.0, all };
    eprintln!("{}", progress.left());
    let mut results = Results::default();
    let columns = [&sample::COLUMNS[..], &sample::POSTCOPY, &sample::PAUSE].concat();
    for turns in plan.cells.iter().filter(|turns| !turns.is_empty()) {
        let load = measure(&bench, options, turns, &mut progress, &mut results);
        let cell = turns[0].0;
        println!("{}", table::cell(&results.samples, cell, &columns, &load));
        results.verdicts.extend(verdict::of_cell(&results.samples, cell, options.rate));
    }
    if !plan.idle.is_empty() {
        let load = measure(&bench, options, &plan.idle, &mut progress, &mut results);
        let cells = extra::idle_cells(options.quick);
        for cell in cells {
            println!("{}", table::cell(&results.samples, cell, &columns, &load));
        }
        results.verdicts.extend(extra::idle_verdicts(&results.samples, cells));
    }
    for subject in &plan.growth {
        eprintln!("{subject}: {} moves; {}", plan.moves, progress.left());
        let growth = extra::growth(&bench, *subject, plan.moves);
        shout(growth.error.as_deref());
        results.verdicts.push(growth.verdict());
        results.growth.push(growth);
        progress.done += plan.growth_seconds();
    }
    conclude(&bench, options, &results, &qemu, progress.begin.elapsed())
}

/// Those subjects that can be measured here, and which QEMU it is.
fn available(options: &Options, tools: &Tools) -> (Vec<Subject>, String) {
    let mut subjects = options.subjects.clone();
    let mut without = |theirs: fn(Subject) -> bool, why: &str| {
        if subjects.iter().any(|subject| theirs(*subject)) {
            println!("Not measured: {why}.\n");
            subjects.retain(|subject| !theirs(*subject));
        }
    };
    if let Some(why) = minivmm::lacks(tools) {
        without(Subject::is_minivmm, &why);
    }
    let qemu = match &tools.qemu {
        Ok(version) => version.clone(),
        Err(why) => {
            without(Subject::is_qemu, why);
            "no QEMU".to_owned()
        }
    };
    (subjects, qemu)
}

/// Runs all turns, a different one first each time. Gives the load averages around them.
fn measure(
    bench: &Bench,
    options: &Options,
    turns: &[Turn],
    progress: &mut Progress,
    results: &mut Results,
) -> String {
    let before = load_average();
    let mut failures = vec![0; turns.len()];
    for run in 0..=options.runs {
        for turn in 0..turns.len() {
            let which = (run + turn) % turns.len();
            let (cell, subject) = turns[which];
            progress.done += seconds(cell, options.quick);
            if failures[which] >= FAILURES {
                continue;
            }
            let mut sample = Sample::new(cell, subject, run, turn);
            run::measure(bench, &mut sample);
            failures[which] += usize::from(sample.invalid.is_some());
            say(&sample, options.runs, progress);
            results.samples.push(sample);
        }
    }
    format!("{before} before, {} after", load_average())
}

fn say(sample: &Sample, runs: usize, progress: &Progress) {
    let run = if sample.run == 0 { "warm-up".into() } else { format!("{} of {runs}", sample.run) };
    let figure = |quantity: Quantity| {
        let digits = quantity.digits;
        let value = sample.get(quantity)?;
        Some(format!("{} {value:.digits$}", quantity.title))
    };
    let quantities = [sample::SWITCH_GAP, sample::OTHER_GAP, sample::TOTAL, sample::WORK];
    let figures: Vec<String> = quantities.into_iter().filter_map(figure).collect();
    let note = if sample.disturbed() { "; DISTURBED" } else { "" };
    eprintln!(
        "{}: {}, {run}: {}; others {:.1} CPUs{note}; {}",
        sample.cell,
        sample.subject,
        figures.join(", "),
        sample.others,
        progress.left()
    );
    shout(sample.invalid.as_deref());
}

/// Errors are not to be overlooked, those of memory least of all.
fn shout(error: Option<&str>) {
    match error {
        Some(error) if error.contains(GUEST_ERROR) => {
            eprintln!("\n!!!!! INTEGRITY ERROR !!!!! {error}\n");
        }
        Some(error) => eprintln!("  INVALID: {error}"),
        None => {}
    }
}

/// Targets, what the machine was, JSON. Whether all went well.
fn conclude(
    bench: &Bench,
    options: &Options,
    results: &Results,
    qemu: &str,
    took: Duration,
) -> Result<bool> {
    println!("## Targets\n\n{}", table::verdicts(&results.verdicts));
    for growth in &results.growth {
        let shown: Vec<_> = growth.overhead_mib.iter().map(|mib| format!("{mib:.2}")).collect();
        println!("Overhead after each move, MiB, {}: {}.\n", growth.subject, shown.join(" "));
        if let Some(error) = &growth.error {
            println!("INVALID: {error}\n");
        }
    }
    let failed = |s: &&Sample| s.invalid.is_some();
    let damaged = results.samples.iter().filter(failed).filter_map(|s| s.invalid.as_deref());
    let damaged = damaged.chain(results.growth.iter().filter_map(|g| g.error.as_deref()));
    let damaged = damaged.filter(|error| error.contains(GUEST_ERROR)).count();
    println!(
        "{}\n",
        if damaged == 0 {
            "No integrity errors."
        } else {
            "!!!!! INTEGRITY ERRORS: see above !!!!!"
        }
    );
    println!("{}", notes(bench, options, qemu, took)?);
    if let Some(path) = &options.json {
        let value = json!({
            "samples": results.samples,
            "targets": table::verdicts_json(&results.verdicts),
            "growth": results.growth,
            "qemu": qemu,
            "quick": options.quick,
            "private_network": bench.private_network,
            "cpu": cpu_model(),
            "kernel": first_line("/proc/sys/kernel/osrelease"),
        });
        fs::write(path, serde_json::to_vec_pretty(&value)?)
            .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    }
    let ours = results.samples.iter().filter(failed).filter(|s| s.subject.is_minivmm()).count();
    let grown = results.growth.iter().filter(|g| g.subject.is_minivmm() && g.error.is_some());
    Ok(damaged == 0 && ours + grown.count() == 0)
}

/// What the figures are.
fn notes(bench: &Bench, options: &Options, qemu: &str, took: Duration) -> Result<String> {
    let mut text = format!(
        "Medians (minimum to maximum) of {} runs after a warm-up, in turn; {qemu}, pre-copy with a limit of {} ms.\n\
         Host memory as much as the guest uses is touched and freed right before each migration and copy. switch gap: by the guest's TSC. other gap: the largest other one in the window, which is as long for all, and longer only for a migration that takes longer. \
         total: from the order (making the process `minivmm migrate`; QMP `migrate`) until the source has let go (the end of that process; \
         QMP event `completed`). told: what the VMM says itself. \
         guest runs there: from the order until the guest's first turn at the destination. \
         wire: all bytes on lo, headers and acknowledgements included. CPU: between order and end, the guest's vCPU included, in ticks of 10 ms; \
         `minivmm migrate` counts as part of the source. work, lost: pages written in the window of those intended, and the time of the missing ones.\n",
        options.runs,
        qemu::DOWNTIME_LIMIT_MS,
    );
    text += &format!(
        "{} CPUs ({}), Linux {}. Load average at the end {}; {:.1} min in all.",
        std::thread::available_parallelism()?,
        cpu_model(),
        first_line("/proc/sys/kernel/osrelease"),
        load_average(),
        took.as_secs_f64() / 60.0
    );
    if let Some(rate) = bench.rate {
        text += &format!("\nThe link: {rate} Mbit/s, by a token bucket filter on lo.");
    }
    if !bench.delay.is_zero() {
        text +=
            &format!("\nThe link: {:?} more each way, by a proxy on the same CPUs.", bench.delay);
    }
    if !bench.private_network {
        text += "\nNo network namespace of its own: bytes on the wire were not counted.";
    }
    if cfg!(debug_assertions) {
        text += "\nThis is not a release build: the figures say little.";
    }
    Ok(text)
}
