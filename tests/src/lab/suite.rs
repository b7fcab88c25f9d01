//! A test program whose tests run inside the lab, reported as if they ran here.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use libtest_mimic::{Arguments, Trial};
use serde_json::Value;

use super::world::{isolated, network_namespace, programs};
use super::{available, lab_dir, linux_image, virtualization, Lab};

/// How long all tests together may take.
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// The tests of a program: names and functions that fail by panicking.
pub type Tests = [(&'static str, fn())];

type Outcome = Result<(), String>;

/// A test program of real Linux guests.
#[derive(Debug, Clone, Copy)]
pub struct LabSuite {
    /// Programs of this machine that the tests use.
    pub programs: &'static [&'static str],
    /// Kernel modules that they need in the lab, beside those of every lab.
    pub modules: &'static [&'static str],
    /// Files of this machine that they need in the lab, at the same paths.
    pub files: &'static [&'static str],
    /// The tests.
    pub tests: &'static Tests,
}

/// Runs the tests here where the processor can, in a network namespace of its own; else in the lab,
/// all in one machine.
pub fn run_suite(suite: LabSuite) -> ExitCode {
    let arguments = Arguments::from_args();
    let direct = virtualization().is_ok();
    let missing = linux_image()
        .and_then(|()| programs(suite.programs))
        .and_then(|()| if direct { network_namespace() } else { available() })
        .err();
    if direct && missing.is_none() && !arguments.list {
        if let Some(code) = isolated() {
            return code;
        }
    }
    let filter = filter_of(&arguments);
    let lab = Arc::new(InLab { suite, filter, outcomes: OnceLock::new() });
    let trial = |(name, test): &'static (&str, fn())| {
        let lab = Arc::clone(&lab);
        let trial = Trial::test(*name, move || {
            if direct {
                test();
                return Ok(());
            }
            Ok(lab.outcome(name)?)
        });
        match &missing {
            Some(why) => trial.with_kind(why.clone()).with_ignored_flag(true),
            None => trial,
        }
    };
    libtest_mimic::run(&arguments, suite.tests.iter().map(trial).collect()).exit_code()
}

/// Tests that run in the lab, all when the first of them is asked for.
struct InLab {
    suite: LabSuite,
    filter: Vec<String>,
    outcomes: OnceLock<HashMap<String, Outcome>>,
}

impl InLab {
    fn outcome(&self, name: &str) -> Outcome {
        let outcomes = self.outcomes.get_or_init(|| self.run());
        let logs = logs_dir();
        let none = || Err(format!("the lab gave no result for it: see {}", logs.display()));
        outcomes.get(name).cloned().unwrap_or_else(none)
    }

    /// Runs this program again in the lab, with the arguments that choose tests.
    fn run(&self) -> HashMap<String, Outcome> {
        let run = match self.lab().and_then(|lab| lab.run(&logs_dir())) {
            Ok(run) => run,
            Err(error) => {
                return all(self.suite.tests, &Err(format!("the lab cannot run: {error}")))
            }
        };
        let mut outcomes = HashMap::new();
        if !run.finished {
            let why = format!(
                "the lab did not finish in {} s; its logs are in {}:\n{}",
                run.time.as_secs(),
                run.logs.display(),
                tail_of(&run.logs.join("console.log"))
            );
            outcomes = all(self.suite.tests, &Err(why));
        }
        outcomes.extend(run.results.iter().filter_map(|line| outcome(line, &run.logs)));
        for line in run.results.iter().filter(|line| line["type"] == "measured") {
            eprintln!("{line}");
        }
        eprintln!("the lab took {:.0} s", run.time.as_secs_f64());
        let passed = |line: &Value| line["type"] == "suite" && line["event"] == "ok";
        if run.finished && run.results.iter().any(passed) {
            let _ = std::fs::remove_dir_all(&run.logs);
        }
        outcomes
    }

    fn lab(&self) -> io::Result<Lab> {
        let quoted: Vec<String> =
            self.filter.iter().map(|a| format!("'{}'", a.replace('\'', r"'\''"))).collect();
        let script =
            format!("tests --format json --test-threads 1 {} >/dev/ttyS1", quoted.join(" "));
        let lab = Lab::with_minivmm(&script)?.limit(LIMIT).modules(self.suite.modules);
        let lab = self.suite.files.iter().fold(lab, |lab, path| lab.file(path, path));
        self.suite.programs.iter().try_fold(lab, |lab, name| lab.program(name))
    }
}

/// The arguments that choose among the tests; the others are for this end.
fn filter_of(arguments: &Arguments) -> Vec<String> {
    let skip = arguments.skip.iter().flat_map(|name| ["--skip".to_owned(), name.clone()]);
    let exact = arguments.exact.then(|| "--exact".to_owned());
    arguments.filter.iter().cloned().chain(skip).chain(exact).collect()
}

fn all(tests: &'static Tests, outcome: &Outcome) -> HashMap<String, Outcome> {
    tests.iter().map(|(name, _)| ((*name).to_owned(), outcome.clone())).collect()
}

/// The outcome of one test, from a line of libtest's JSON format.
fn outcome(line: &Value, logs: &Path) -> Option<(String, Outcome)> {
    if line["type"] != "test" {
        return None;
    }
    let outcome = match line["event"].as_str()? {
        "ok" => Ok(()),
        "failed" => {
            let why = line["stdout"].as_str().unwrap_or("no message");
            Err(format!("{why}\nthe lab's logs are in {}", logs.display()))
        }
        "ignored" => Err("the lab could not run it".to_owned()),
        _ => return None,
    };
    Some((line["name"].as_str()?.to_owned(), outcome))
}

/// `target/lab/PROGRAM`: the next run of the program takes the place of this one.
fn logs_dir() -> PathBuf {
    let me = std::env::current_exe().unwrap();
    let name = me.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    // Cargo appends a hash.
    let name = name.rsplit_once('-').map_or(name.as_str(), |(name, _)| name);
    lab_dir(name)
}

fn tail_of(path: &Path) -> String {
    /// Enough for the end of a kernel's last words.
    const LINES: usize = 40;
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
