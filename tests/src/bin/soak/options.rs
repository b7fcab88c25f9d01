//! The command line.

use std::path::PathBuf;

use ::tests::fire::Case;
use ::tests::ways::Way;

use crate::random::Random;

pub const USAGE: &str = "\
Usage: soak [OPTIONS] [PART]

Parts; matrix and chain, unless one is named:
  matrix           every fault in every phase of a migration, with each number of connections and each
                   mode, each with a VM of its own; and every way in which memory follows its guest
  chain            one VM with disk, network and 2 vCPUs is moved again and again between two hosts, in
                   modes and with connections as they come, compared page by page; on the way
                   migrations of it meet faults
  cases            lists the names of the matrix' cases
  case NAME        one case, in this process
  moves            the chain, in this process

Options:
  --seed N         of all that is chosen at random [env: SOAK_SEED; default: another one each time]
  --moves N        of the chain [env: SOAK_MOVES; default: 50]
  --jobs N         cases of the matrix at a time [env: SOAK_JOBS; default: as many as CPUs]
  --logs FOLDER    where the logs of what failed are kept [env: SOAK_LOGS; default: target/soak]

The exit code is 0 if nothing failed, 1 if something did, 2 if it could not begin. It needs /dev/kvm and root (for network
and mount namespaces, in which everything happens).";

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Work {
    /// To say how it is used.
    Help,
    /// To list the cases.
    Cases,
    /// Parts, in processes of their own.
    All {
        /// The matrix.
        matrix: bool,
        /// The chain.
        chain: bool,
    },
    /// One case, here.
    Case(Case),
    /// One way in which memory follows, here.
    Way(Way),
    /// The chain, here.
    Moves,
}

/// The command line.
#[derive(Debug)]
pub struct Options {
    /// What is to be done.
    pub work: Work,
    /// Of what is chosen at random.
    pub seed: u64,
    /// Moves of the chain.
    pub moves: u32,
    /// Cases at a time.
    pub jobs: usize,
    /// Folder of logs.
    pub logs: PathBuf,
}

impl Options {
    /// Reads the command line, and for what it leaves out the environment; an error is to be shown as it is.
    pub fn parse(
        mut arguments: impl Iterator<Item = String>,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, String> {
        let mut work = Work::All { matrix: true, chain: true };
        let (mut seed, mut moves) = (environment("SOAK_SEED"), environment("SOAK_MOVES"));
        let (mut jobs, mut logs) = (environment("SOAK_JOBS"), environment("SOAK_LOGS"));
        while let Some(argument) = arguments.next() {
            let mut value =
                || arguments.next().ok_or_else(|| format!("{argument} needs a value\n{USAGE}"));
            match argument.as_str() {
                "--seed" => seed = Some(value()?),
                "--moves" => moves = Some(value()?),
                "--jobs" => jobs = Some(value()?),
                "--logs" => logs = Some(value()?),
                "--help" | "-h" => work = Work::Help,
                "matrix" => work = Work::All { matrix: true, chain: false },
                "chain" => work = Work::All { matrix: false, chain: true },
                "cases" => work = Work::Cases,
                "case" => work = case(&value()?)?,
                "moves" => work = Work::Moves,
                other => return Err(format!("{other} is not known\n{USAGE}")),
            }
        }
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            work,
            seed: number("seed", seed)?.unwrap_or_else(Random::seed),
            moves: number("number of moves", moves)?.unwrap_or(50),
            jobs: number("number of jobs", jobs)?.unwrap_or(cpus).max(1),
            logs: logs.unwrap_or_else(|| "target/soak".to_owned()).into(),
        })
    }
}

fn number<T: std::str::FromStr>(what: &str, text: Option<String>) -> Result<Option<T>, String> {
    let Some(text) = text else { return Ok(None) };
    text.parse().map(Some).map_err(|_| format!("{text:?} is no {what}"))
}

fn case(name: &str) -> Result<Work, String> {
    let case = Case::all().into_iter().find(|case| case.to_string() == name).map(Work::Case);
    let way = || Way::all().into_iter().find(|way| way.to_string() == name).map(Work::Way);
    case.or_else(way).ok_or_else(|| format!("no case {name}: `soak cases` lists them"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, String> {
        let environment = |name: &str| (name == "SOAK_MOVES").then(|| "7".to_owned());
        Options::parse(line.split_whitespace().map(str::to_owned), environment)
    }

    #[test]
    fn the_command_line_goes_before_the_environment() {
        let options = parse("chain --seed 5").unwrap();
        assert_eq!(options.work, Work::All { matrix: false, chain: true });
        assert_eq!((options.seed, options.moves), (5, 7));
        assert_eq!(parse("--moves 9").unwrap().moves, 9);
        assert_ne!(parse("").unwrap().seed, parse("").unwrap().seed);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, word) in
            [("--seed x", "\"x\""), ("--seed", "--seed"), ("case a", "case a"), ("what", "what")]
        {
            assert!(parse(line).unwrap_err().contains(word), "{line}");
        }
        assert!(Case::all().iter().all(|one| case(&one.to_string()) == Ok(Work::Case(*one))));
        assert!(Way::all().iter().all(|one| case(&one.to_string()) == Ok(Work::Way(*one))));
    }
}
