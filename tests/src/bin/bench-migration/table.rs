//! Tables in Markdown, and everything in JSON.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{json, Value};

use crate::sample::{Quantity, Runs, Sample};
use crate::subject::{Cell, Subject};
use crate::verdict::Verdict;

/// A cell with what was measured in it.
pub fn cell(samples: &[Sample], cell: Cell, columns: &[Quantity], load: &str) -> String {
    let mut subjects: Vec<Subject> =
        samples.iter().filter(|s| s.cell == cell).map(|s| s.subject).collect();
    subjects.sort_unstable();
    subjects.dedup();
    let runs: Vec<Runs> = subjects.iter().map(|s| Runs::of(samples, cell, *s)).collect();
    let mut text = format!("### {cell}\n\nLoad average {load}.\n\n|  |");
    for subject in &subjects {
        let _ = write!(text, " {subject} |");
    }
    let _ = writeln!(text, "\n|---{}|", "|---".repeat(subjects.len()));
    for quantity in columns {
        let shown: Vec<String> = runs.iter().map(|runs| runs.show(*quantity)).collect();
        if shown.iter().any(|figure| figure != "–") {
            let _ = writeln!(text, "| {} | {} |", quantity.title, shown.join(" | "));
        }
    }
    let counts: Vec<String> = runs.iter().map(count).collect();
    let _ = writeln!(text, "| runs | {} |", counts.join(" | "));
    let mut reasons: BTreeMap<(Subject, &str), usize> = BTreeMap::new();
    for sample in samples.iter().filter(|s| s.cell == cell) {
        if let Some(why) = &sample.invalid {
            *reasons.entry((sample.subject, why)).or_default() += 1;
        }
    }
    for ((subject, why), times) in reasons {
        let _ = writeln!(text, "\nInvalid, {times} times: {subject}: {why}");
    }
    text
}

/// How many runs the medians are of, and what became of the others.
fn count(runs: &Runs) -> String {
    let mut text = runs.used().to_string();
    if runs.noisy() {
        let _ = write!(text, ", {} of them disturbed", runs.disturbed);
    } else if runs.disturbed > 0 {
        let _ = write!(text, "; {} disturbed left out", runs.disturbed);
    }
    if runs.invalid > 0 {
        let _ = write!(text, "; {} INVALID", runs.invalid);
    }
    text
}

/// What is to be reached.
pub fn verdicts(verdicts: &[Verdict]) -> String {
    let mut text = String::from(
        "| guest | subject | what | figure | beside it | ratio | target |  |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for verdict in verdicts {
        let digits = verdict.digits;
        let number = |value: Option<f64>| value.map_or("–".into(), |v| format!("{v:.digits$}"));
        let peer = verdict
            .peer
            .as_ref()
            .map_or("–".into(), |(figure, who)| format!("{figure:.digits$} ({who})"));
        let ratio = verdict.ratio().map_or("–".into(), |ratio| format!("{ratio:.2}"));
        let sign = if verdict.at_least { "≥" } else { "≤" };
        let target = verdict.target.map_or("–".into(), |v| format!("{sign} {v:.digits$}"));
        let met = match (verdict.target, verdict.disturbed) {
            (None, _) => String::new(),
            (Some(_), false) => verdict.text().to_owned(),
            (Some(_), true) => format!("{}, disturbed", verdict.text()),
        };
        let Verdict { cell, subject, what, .. } = verdict;
        let figure = number(verdict.figure);
        let _ = writeln!(
            text,
            "| {cell} | {subject} | {what} | {figure} | {peer} | {ratio} | {target} | {met} |"
        );
    }
    text
}

/// The same in JSON.
pub fn verdicts_json(verdicts: &[Verdict]) -> Value {
    let one = |verdict: &Verdict| {
        json!({
            "cell": verdict.cell,
            "subject": verdict.subject,
            "what": verdict.what,
            "figure": verdict.figure,
            "peer": verdict.peer.as_ref().map(|(figure, _)| figure),
            "peer_name": verdict.peer.as_ref().map(|(_, name)| name),
            "ratio": verdict.ratio(),
            "target": verdict.target,
            "met": verdict.met(),
            "disturbed": verdict.disturbed,
        })
    };
    verdicts.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::tests::{sample, CELL};
    use crate::sample::{ROUNDS, SWITCH_GAP, TOTAL};
    use crate::verdict;

    #[test]
    fn a_cell_shows_who_was_measured_and_what_there_is() {
        let qemu = Subject::Qemu { multifd: None };
        let mut samples = vec![
            sample(Subject::Baseline, 1, &[]),
            sample(qemu, 1, &[(SWITCH_GAP, 4.0), (TOTAL, 0.25)]),
            sample(qemu, 2, &[(SWITCH_GAP, 5.0), (TOTAL, 0.35)]),
        ];
        samples[2].others = 1.0;
        samples.push(sample(qemu, 3, &[]));
        samples[3].invalid = Some("it failed".into());
        let text = cell(&samples, CELL, &[SWITCH_GAP, TOTAL, ROUNDS], "1 before, 2 after");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "### 16 MiB, 0 pages/s",
                "",
                "Load average 1 before, 2 after.",
                "",
                "|  | no migration | QEMU pre-copy |",
                "|---|---|---|",
                "| switch gap ms | – | 4.5 (4.0 to 5.0) |",
                "| total s | – | 0.300 (0.250 to 0.350) |",
                "| runs | 1 | 2, 1 of them disturbed; 1 INVALID |",
                "",
                "Invalid, 1 times: QEMU pre-copy: it failed",
            ]
        );
    }

    #[test]
    fn a_verdict_is_one_line() {
        let minivmm = Subject::Minivmm { connections: 4 };
        let qemu = Subject::Qemu { multifd: Some(4) };
        let samples = [sample(minivmm, 1, &[(TOTAL, 0.1)]), sample(qemu, 1, &[(TOTAL, 0.2)])];
        let found = verdict::of_cell(&samples, CELL, None);
        let text = verdicts(&found);
        let line = "| 16 MiB, 0 pages/s | minivmm, 4 connections | total, s | 0.100 | \
                    0.200 (QEMU multifd 4) | 0.50 | ≤ 0.140 | met |";
        assert!(text.lines().any(|found| found == line), "{text}");
        assert_eq!(verdicts_json(&found)[2]["met"], true);
    }
}
