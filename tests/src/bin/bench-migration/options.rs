//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use crate::subject::{Cell, Subject, RAM_MIB};

const USAGE: &str = "\
Usage: bench-migration [--quick] [--parts LIST] [--cells LIST] [--subjects LIST] [--runs N] [--json FILE]

  --parts LIST     cells, idle, growth [default: all]
                     cells   the guest under load, beside QEMU
                     idle    16 GiB of which little is in use, beside 1 GiB
                     growth  memory of the process after many moves
  --cells LIST     MIB/PAGES_PER_SECOND[/sequential]: working set and dirty rate, its pages scattered over
                   RAM in any order or as they are written
                   [default: 16, 256 and 700 MiB, each with 0, 10k and 100k]
  --subjects LIST  baseline, raw-copy, minivmm-1, minivmm-4, qemu-precopy, qemu-multifd,
                   minivmm and qemu mean both of theirs [default: all of these];
                   minivmm-postcopy-bubble, -linear, -off, qemu-postcopy, qemu-postcopy-preempt,
                   postcopy means these five
  --rate MBIT      a link of so many Mbit/s: a token bucket filter (tc) on lo of the private network namespace
  --delay MS       what is sent arrives so much later, each way: through a proxy between the two processes
  --runs N         that count; one before them warms up [default: 5]
  --quick          two cells, two runs, short windows: a look, no figures
  --json FILE      write all samples to FILE

Lists are separated by commas. The two processes of a migration are on this host, in a network
namespace of their own where that is allowed. All of it takes 20 to 30 minutes on two idle CPUs and needs
4 GiB of memory. Leave the machine alone meanwhile: runs in which others used more than 0.3 CPUs are
marked, and left out of the medians where enough others remain.";

/// A part of the benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The guest under load.
    Cells,
    /// Much RAM, little of it in use.
    Idle,
    /// Many moves.
    Growth,
}

const PARTS: [(&str, Part); 3] =
    [("cells", Part::Cells), ("idle", Part::Idle), ("growth", Part::Growth)];

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// A look only.
    pub quick: bool,
    /// Parts.
    pub parts: Vec<Part>,
    /// Guests.
    pub cells: Vec<Cell>,
    /// In the order of tables.
    pub subjects: Vec<Subject>,
    /// The link, Mbit/s.
    pub rate: Option<u32>,
    /// How long what is sent is on its way.
    pub delay: Duration,
    /// Runs that count.
    pub runs: usize,
    /// Where samples go.
    pub json: Option<PathBuf>,
}

/// The elements of a list, each by `read`.
fn list<T>(
    text: &str,
    read: impl Fn(&str) -> std::result::Result<Vec<T>, String>,
) -> std::result::Result<Vec<T>, String> {
    let read = text.split(',').map(read).collect::<std::result::Result<Vec<_>, _>>()?;
    Ok(read.into_iter().flatten().collect())
}

impl Options {
    /// Reads the command line; an error is to be shown as it is.
    pub fn parse(mut arguments: impl Iterator<Item = String>) -> std::result::Result<Self, String> {
        let (mut quick, mut json, mut runs) = (false, None, None);
        let (mut rate, mut delay) = (None, Duration::ZERO);
        let mut parts = PARTS.map(|(_, part)| part).to_vec();
        let mut subjects = Subject::ALL[..Subject::PRECOPY].to_vec();
        let mut cells = None;
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value\n{USAGE}"));
            match argument.as_str() {
                "--quick" => quick = true,
                "--json" => json = Some(value()?.into()),
                "--cells" => cells = Some(list(&value()?, |text| Ok(vec![Cell::parse(text)?]))?),
                "--subjects" => subjects = list(&value()?, subjects_named)?,
                "--parts" => parts = list(&value()?, parts_named)?,
                "--rate" => {
                    let number = value()?.parse().ok().filter(|rate| (1..=100_000).contains(rate));
                    rate = Some(number.ok_or("--rate needs Mbit/s, at most 100000")?);
                }
                "--delay" => {
                    let ms: Option<f64> = value()?.parse().ok();
                    let ms = ms.filter(|ms| (0.0..=1000.0).contains(ms));
                    delay =
                        Duration::from_secs_f64(ms.ok_or("--delay needs ms, at most 1000")? / 1e3);
                }
                "--runs" => {
                    let number = value()?.parse().ok().filter(|runs| *runs > 0);
                    runs = Some(number.ok_or("--runs needs a number above 0")?);
                }
                "--help" | "-h" => return Err(USAGE.to_owned()),
                other => return Err(format!("{other} is not known\n{USAGE}")),
            }
        }
        subjects.sort_unstable();
        subjects.dedup();
        let cells = cells.unwrap_or_else(|| default_cells(quick));
        let runs = runs.unwrap_or(if quick { 2 } else { 5 });
        Ok(Self { quick, parts, cells, subjects, rate, delay, runs, json })
    }
}

fn subjects_named(word: &str) -> std::result::Result<Vec<Subject>, String> {
    let named = Subject::named(word);
    if named.is_empty() {
        return Err(format!("{word} is no subject\n{USAGE}"));
    }
    Ok(named)
}

fn parts_named(word: &str) -> std::result::Result<Vec<Part>, String> {
    let part = PARTS.iter().find(|(name, _)| *name == word);
    part.map(|(_, part)| vec![*part]).ok_or_else(|| format!("{word} is no part\n{USAGE}"))
}

fn default_cells(quick: bool) -> Vec<Cell> {
    let cell = |ws_mib, dirty| Cell { memory_mib: RAM_MIB, ws_mib, dirty, sequential: false };
    if quick {
        return vec![cell(16, 0), cell(256, 10_000)];
    }
    let sizes = [16, 256, 700];
    sizes.into_iter().flat_map(|ws| [0, 10_000, 100_000].map(|rate| cell(ws, rate))).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(line: &str) -> std::result::Result<Options, String> {
        Options::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn by_default_all_is_measured() {
        let options = parse("").unwrap();
        assert_eq!((options.cells.len(), options.runs), (9, 5));
        assert_eq!(options.subjects, Subject::ALL[..6]);
        assert_eq!(options.parts, [Part::Cells, Part::Idle, Part::Growth]);
        assert_eq!(parse("--quick").unwrap().cells.len(), 2);
    }

    #[test]
    fn lists_choose() {
        let line =
            "--subjects qemu,baseline,qemu-multifd --cells 16/0,700/100k --parts cells --runs 7";
        let options = parse(line).unwrap();
        let keys: Vec<_> = options.subjects.iter().map(|subject| subject.key()).collect();
        assert_eq!(keys, ["baseline", "qemu-precopy", "qemu-multifd"]);
        assert_eq!((options.cells.len(), options.cells[1].dirty), (2, 100_000));
        assert_eq!((options.parts, options.runs), (vec![Part::Cells], 7));
    }

    #[test]
    fn a_link_is_described() {
        let options = parse("--rate 1000 --delay 0.5 --cells 256/10k/sequential").unwrap();
        assert_eq!((options.rate, options.delay), (Some(1000), Duration::from_micros(500)));
        assert!(options.cells[0].sequential);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for wrong in [
            "--subjects xen",
            "--cells 16",
            "--parts all",
            "--runs 0",
            "--runs",
            "quick",
            "--rate 0",
            "--delay -1",
            "--cells 16/0/odd",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert!(parse("--help").unwrap_err().starts_with("Usage"));
    }
}
