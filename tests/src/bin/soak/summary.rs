//! What a person reads in the end.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use crate::event::Event;
use crate::options::Options;
use crate::part::Failure;

/// What there was of one fault: how often each thing came of it.
type Outcomes = BTreeMap<String, u32>;

/// All that happened.
#[derive(Debug, Default)]
pub struct Summary {
    cases: u32,
    matrix: BTreeMap<String, Outcomes>,
    chain: BTreeMap<String, Outcomes>,
    moves: u32,
    bytes: u64,
    /// By mode: as the source knows them and as the guest saw them, µs.
    pauses: BTreeMap<String, (Vec<f64>, Vec<f64>)>,
    verified: u64,
    failures: Vec<Failure>,
}

impl Summary {
    /// An event of the matrix.
    pub fn matrix(&mut self, event: Event) {
        if let Event::Fault { fault, came, .. } = event {
            self.cases += 1;
            *self.matrix.entry(fault).or_default().entry(came).or_default() += 1;
        }
    }

    /// An event of the chain.
    pub fn chain(&mut self, event: Event) {
        match event {
            Event::Fault { fault, came, .. } => {
                *self.chain.entry(fault).or_default().entry(came).or_default() += 1;
            }
            Event::Move { mode, bytes, pause_us, guest_pause_us, verified, .. } => {
                self.moves += 1;
                self.bytes += bytes;
                let (source, guest) = self.pauses.entry(mode).or_default();
                source.push(pause_us as f64);
                guest.push(guest_pause_us);
                self.verified = verified;
            }
        }
    }

    /// A part has ended.
    pub fn ended(&mut self, result: Result<(), Failure>) {
        self.failures.extend(result.err());
    }

    /// Whether nothing failed.
    pub fn is_good(&self) -> bool {
        self.failures.is_empty()
    }

    /// All of it.
    pub fn text(&self, options: &Options, took: Duration) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut text, options, took);
        text
    }

    fn write(&self, text: &mut String, options: &Options, took: Duration) -> std::fmt::Result {
        let minutes = took.as_secs_f64() / 60.0;
        writeln!(text, "\nsoak: {minutes:.0} minutes, seed {}", options.seed)?;
        writeln!(text, "\nmatrix: {} cases as they must be", self.cases)?;
        outcomes(text, &self.matrix)?;
        let faults: u32 = self.chain.values().flat_map(BTreeMap::values).sum();
        writeln!(text, "\nchain: {} moves of one guest, {faults} faults on the way", self.moves)?;
        outcomes(text, &self.chain)?;
        let mib = self.bytes as f64 / f64::from(1 << 20);
        writeln!(text, "  {mib:.0} MiB on the page connections of the moves")?;
        writeln!(text, "  {} pages verified by the guest, none wrong", self.verified)?;
        for (mode, (source, guest)) in &self.pauses {
            for (who, pauses) in [("the source", source), ("the guest", guest)] {
                let [median, p99, worst] =
                    [0.5, 0.99, 1.0].map(|share| quantile(pauses, share) / 1e3);
                writeln!(
                    text,
                    "  pause, {mode}, by {who}: median {median:.1} ms, 99th percentile {p99:.1} ms, \
                     worst {worst:.1} ms of {}",
                    pauses.len()
                )?;
            }
        }
        if self.failures.is_empty() {
            return writeln!(text, "\nnothing failed");
        }
        writeln!(text, "\n{} FAILED, logs in {}:", self.failures.len(), options.logs.display())?;
        for Failure { name, why, log } in &self.failures {
            writeln!(text, "  {name}: {why}\n    {}", log.display())?;
        }
        Ok(())
    }
}

fn outcomes(text: &mut String, faults: &BTreeMap<String, Outcomes>) -> std::fmt::Result {
    for (fault, outcomes) in faults {
        let all: Vec<String> =
            outcomes.iter().map(|(came, times)| format!("{came} {times}")).collect();
        writeln!(text, "  {fault:<16} {}", all.join(", "))?;
    }
    Ok(())
}

/// The smallest of `values` that so large a share of them does not exceed; 0 if there are none.
fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_there_were() {
        let values: Vec<f64> = (1..=50).rev().map(f64::from).collect();
        assert_eq!([0.5, 0.99, 1.0].map(|share| quantile(&values, share)), [25.0, 50.0, 50.0]);
        assert_eq!(quantile(&[7.0], 0.5), 7.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    #[test]
    fn the_summary_says_what_happened_and_what_failed() {
        let mut summary = Summary::default();
        let case = |came: &str| Event::Fault {
            case: "Stall_at_Loaded_1_cold".into(),
            fault: "Stall".into(),
            came: came.into(),
        };
        summary.matrix(case("Source"));
        summary.matrix(case("Source"));
        summary.chain(case("Destination"));
        summary.chain(Event::Move {
            number: 1,
            mode: "cold".into(),
            connections: 2,
            bytes: 3 << 20,
            pause_us: 1500,
            guest_pause_us: 1600.5,
            verified: 42,
        });
        summary.ended(Ok(()));
        assert!(summary.is_good());
        let failure =
            Failure { name: "chain".into(), why: "it broke".into(), log: "logs/chain.log".into() };
        summary.ended(Err(failure));
        assert!(!summary.is_good());
        let options = Options::parse(["--seed", "5"].map(str::to_owned).into_iter(), |_| None);
        let text = summary.text(&options.unwrap(), Duration::from_secs(120));
        for part in [
            "2 minutes, seed 5",
            "2 cases",
            "Stall            Source 2",
            "1 moves of one guest, 1 faults",
            "Stall            Destination 1",
            "3 MiB",
            "42 pages",
            "by the source: median 1.5 ms",
            "by the guest: median 1.6 ms",
            "chain: it broke",
            "logs/chain.log",
        ] {
            assert!(text.contains(part), "no {part:?} in\n{text}");
        }
    }
}
