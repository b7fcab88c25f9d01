//! Samples, their medians, and the tables that show them.

use std::collections::BTreeSet;
use std::fmt::Write;

use serde_json::{json, Value};

/// Which values are good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// Times, sizes.
    Lower,
    /// Rates.
    Higher,
}

/// What is to be reached.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// This, in the unit of the row.
    Limit(f64),
    /// The best of the peers.
    Peers,
}

/// What was measured of one subject, or why nothing was.
#[derive(Debug, Clone)]
pub enum Figure {
    /// One sample for each run, in the unit of the row.
    Samples(Vec<f64>),
    /// Why there are none.
    Missing(String),
}

impl Figure {
    /// Starts without samples.
    pub fn new() -> Self {
        Self::Samples(Vec::new())
    }

    /// Takes in the sample of one run, or why it has none: one such run spoils the figure, since
    /// medians of the runs that happened to work would flatter.
    pub fn add(&mut self, sample: Result<f64, String>) {
        match (&mut *self, sample) {
            (Self::Samples(samples), Ok(sample)) => samples.push(sample),
            (Self::Samples(_), Err(why)) => *self = Self::Missing(why),
            (Self::Missing(_), _) => {}
        }
    }

    fn sorted(&self) -> Option<Vec<f64>> {
        match self {
            Self::Samples(samples) if !samples.is_empty() => {
                let mut sorted = samples.clone();
                sorted.sort_by(f64::total_cmp);
                Some(sorted)
            }
            _ => None,
        }
    }

    /// The median; of an even number of samples the mean of the two in the middle.
    pub fn median(&self) -> Option<f64> {
        let sorted = self.sorted()?;
        let middle = sorted.len() / 2;
        Some(if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            (sorted[middle - 1] + sorted[middle]) / 2.0
        })
    }

    /// `MEDIAN (MIN to MAX)`, or `n/a`.
    fn show(&self, digits: usize) -> String {
        match (self.sorted(), self.median()) {
            (Some(sorted), Some(median)) => {
                let (min, max) = (sorted[0], sorted[sorted.len() - 1]);
                format!("{median:.digits$} ({min:.digits$} to {max:.digits$})")
            }
            _ => "n/a".to_owned(),
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Samples(samples) => json!({ "median": self.median(), "samples": samples }),
            Self::Missing(why) => json!({ "missing": why }),
        }
    }
}

/// One quantity of minivmm, beside others.
#[derive(Debug, Clone)]
pub struct Row {
    /// Name of the benchmark.
    pub bench: &'static str,
    /// What was measured.
    pub what: String,
    /// Unit of all figures of the row.
    pub unit: &'static str,
    /// Which values are good.
    pub better: Better,
    /// Decimals to show.
    pub digits: usize,
    /// What minivmm does.
    pub minivmm: Figure,
    /// What is to be reached.
    pub target: Option<Target>,
    /// Others, with their names.
    pub peers: Vec<(String, Figure)>,
}

impl Row {
    /// minivmm divided by a peer, by medians.
    fn ratio(&self, peer: &Figure) -> Option<f64> {
        match (self.minivmm.median(), peer.median()) {
            (Some(mine), Some(other)) if other > 0.0 => Some(mine / other),
            _ => None,
        }
    }

    /// The target in the unit of the row; none where no peer was measured.
    fn limit(&self) -> Option<f64> {
        let peers = || self.peers.iter().filter_map(|(_, figure)| figure.median());
        match (self.target?, self.better) {
            (Target::Limit(limit), _) => Some(limit),
            (Target::Peers, Better::Lower) => peers().min_by(f64::total_cmp),
            (Target::Peers, Better::Higher) => peers().max_by(f64::total_cmp),
        }
    }

    fn target_met(&self) -> Option<bool> {
        let (limit, median) = (self.limit()?, self.minivmm.median()?);
        Some(match self.better {
            Better::Lower => median <= limit,
            Better::Higher => median >= limit,
        })
    }

    fn better(&self) -> &'static str {
        match self.better {
            Better::Lower => "lower",
            Better::Higher => "higher",
        }
    }

    fn target_text(&self) -> String {
        let Some(target) = self.target else { return String::new() };
        let sign = if self.better == Better::Lower { "≤" } else { "≥" };
        let target = match target {
            Target::Limit(limit) if limit.fract() == 0.0 => format!("{limit:.0}"),
            Target::Limit(limit) => format!("{limit:.1}"),
            Target::Peers => "best beside it".to_owned(),
        };
        let verdict = match self.target_met() {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "not measured",
        };
        format!("{sign} {target}: {verdict}")
    }

    fn json(&self) -> Value {
        let peer = |(name, figure): &(String, Figure)| {
            let mut value = figure.json();
            value["name"] = json!(name);
            value["ratio"] = json!(self.ratio(figure));
            value
        };
        json!({
            "bench": self.bench,
            "what": self.what,
            "unit": self.unit,
            "better": self.better(),
            "minivmm": self.minivmm.json(),
            "target": self.limit(),
            "target_met": self.target_met(),
            "peers": self.peers.iter().map(peer).collect::<Vec<_>>(),
        })
    }
}

/// All rows as JSON.
pub fn json(rows: &[Row]) -> Value {
    rows.iter().map(Row::json).collect()
}

/// All rows as a table in Markdown, one line for each peer, and below it why figures are missing.
pub fn markdown(rows: &[Row]) -> String {
    let mut text = String::from(
        "| bench | what | unit, better | minivmm | target | beside it | its figure | minivmm / it |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    // Mostly one reason for many figures.
    let mut missing = BTreeSet::new();
    let mut note = |bench: &str, who: &str, figure: &Figure| {
        if let Figure::Missing(why) = figure {
            missing.insert(format!("{bench}, {who}: {why}"));
        }
    };
    for row in rows {
        note(row.bench, "minivmm", &row.minivmm);
        let mut head = format!(
            "| {} | {} | {}, {} | {} | {} |",
            row.bench,
            row.what,
            row.unit,
            row.better(),
            row.minivmm.show(row.digits),
            row.target_text()
        );
        if row.peers.is_empty() {
            let _ = writeln!(text, "{head} | | |");
        }
        for (name, figure) in &row.peers {
            note(row.bench, name, figure);
            let ratio = row.ratio(figure).map_or("n/a".to_owned(), |r| format!("{r:.2}"));
            let _ = writeln!(text, "{head} {name} | {} | {ratio} |", figure.show(row.digits));
            "| | | | | |".clone_into(&mut head);
        }
    }
    for line in missing {
        let _ = write!(text, "\nn/a: {line}.");
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn row() -> Row {
        Row {
            bench: "start",
            what: "time".into(),
            unit: "ms",
            better: Better::Lower,
            digits: 1,
            minivmm: Figure::Samples(vec![3.0, 1.0, 2.0]),
            target: Some(Target::Limit(2.0)),
            peers: vec![
                ("QEMU".into(), Figure::Samples(vec![8.0, 4.0])),
                ("other".into(), Figure::Missing("not there".into())),
            ],
        }
    }

    #[test]
    fn medians_and_ratios_are_right() {
        let row = row();
        assert_eq!(row.minivmm.median(), Some(2.0));
        assert_eq!(row.peers[0].1.median(), Some(6.0));
        assert_eq!(row.ratio(&row.peers[0].1), Some(2.0 / 6.0));
        assert_eq!(row.ratio(&row.peers[1].1), None);
        assert_eq!(Figure::new().median(), None);
    }

    #[test]
    fn a_target_is_met_on_the_right_side() {
        let mut row = row();
        assert_eq!(row.target_met(), Some(true));
        row.target = Some(Target::Limit(1.9));
        assert_eq!(row.target_met(), Some(false));
        row.better = Better::Higher;
        assert_eq!(row.target_met(), Some(true));
        row.minivmm = Figure::Missing(String::new());
        assert_eq!(row.target_met(), None);
    }

    #[test]
    fn the_best_peer_is_a_target() {
        let mut row = Row { target: Some(Target::Peers), better: Better::Higher, ..row() };
        assert_eq!(row.target_met(), Some(false));
        row.peers.push(("third".into(), Figure::Samples(vec![1.0])));
        row.better = Better::Lower;
        assert_eq!((row.target_met(), row.limit()), (Some(false), Some(1.0)));
        row.peers.clear();
        assert_eq!(row.target_met(), None);
    }

    #[test]
    fn a_failed_run_spoils_the_figure() {
        let mut figure = Figure::new();
        figure.add(Ok(1.0));
        figure.add(Err("it broke".into()));
        figure.add(Ok(2.0));
        assert!(matches!(figure, Figure::Missing(why) if why == "it broke"));
    }

    #[test]
    fn the_table_says_all() {
        let text = markdown(&[row()]);
        let lines: Vec<&str> = text.lines().skip(2).collect();
        assert_eq!(
            lines,
            [
                "| start | time | ms, lower | 2.0 (1.0 to 3.0) | ≤ 2: met | QEMU | 6.0 (4.0 to 8.0) | 0.33 |",
                "| | | | | | other | n/a | n/a |",
                "",
                "n/a: start, other: not there.",
            ]
        );
    }
}
