//! What is to be reached beside QEMU, and whether it is.

use std::cmp::Ordering;

use crate::sample::{
    Quantity, Runs, Sample, FAULT_P50, OTHER_GAP, SWITCH_GAP, THROUGHPUT, TOLD_DOWNTIME, TOTAL,
    WORK, WORK_DRAINED,
};
use crate::subject::{Cell, Subject};

/// The switch gap beside QEMU's, to which the gap without migration is added.
pub const GAP_SHARE: f64 = 0.5;
/// The total time beside QEMU's.
pub const TOTAL_SHARE: f64 = 0.7;
/// With post-copy: the guest's work beside QEMU's, and what is good enough, percent.
pub const POSTCOPY_WORK_SHARE: f64 = 2.0;
pub const POSTCOPY_WORK: f64 = 90.0;
/// The median from fault to page beside that of QEMU's preempt, where the link is as fast as can be.
pub const FAULT_SHARE: f64 = 0.5;
/// Otherwise the median beyond the time that the link takes for the answer, us.
pub const FAULT_BEYOND_WIRE_US: f64 = 150.0;
/// An answer on the wire: a page, the record's header and table, headers of TCP and IP.
pub const ANSWER_BYTES: f64 = 4096.0 + 56.0 + 52.0;
/// The pause of an idle guest as the VMM says, ms.
pub const IDLE_PAUSE_MS: f64 = 3.0;
/// Throughput on one connection beside the raw copy.
pub const THROUGHPUT_SHARE: f64 = 0.9;

/// A figure beside what it is to be.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// The guest.
    pub cell: String,
    /// Whose figure.
    pub subject: String,
    /// What it is.
    pub what: &'static str,
    /// It.
    pub figure: Option<f64>,
    /// The figure beside it, and whose it is.
    pub peer: Option<(f64, String)>,
    /// What is to be reached, in the same unit.
    pub target: Option<f64>,
    /// Whether as much or as little is good.
    pub at_least: bool,
    /// Decimals.
    pub digits: usize,
    /// Whether disturbed runs are in what it compares.
    pub disturbed: bool,
}

impl Verdict {
    /// The figure divided by the peer's.
    pub fn ratio(&self) -> Option<f64> {
        let (peer, _) = self.peer.as_ref()?;
        Some(self.figure? / peer).filter(|ratio| ratio.is_finite())
    }

    /// Whether it is reached, by the figures as they are shown.
    pub fn met(&self) -> Option<bool> {
        let scale = 10_f64.powi(i32::try_from(self.digits).ok()?);
        let shown = |value: f64| (value * scale).round();
        let (figure, target) = (shown(self.figure?), shown(self.target?));
        Some(if self.at_least { figure >= target } else { figure <= target })
    }

    /// `met`, `MISSED`, or that it was not measured.
    pub fn text(&self) -> &'static str {
        match self.met() {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "not measured",
        }
    }
}

/// QEMU's setting with the smallest median of a quantity, of those that do the same as `ours`.
fn best_of_qemu(
    samples: &[Sample],
    cell: Cell,
    quantity: Quantity,
    ours: Subject,
) -> Option<(f64, Subject)> {
    of_qemu(samples, cell, quantity, ours).min_by(by_figure)
}

fn by_figure(a: &(f64, Subject), b: &(f64, Subject)) -> Ordering {
    a.0.total_cmp(&b.0)
}

/// The median of a quantity of each of QEMU's settings that do the same as `ours`.
fn of_qemu(
    samples: &[Sample],
    cell: Cell,
    quantity: Quantity,
    ours: Subject,
) -> impl Iterator<Item = (f64, Subject)> + '_ {
    let alike =
        move |subject: &Subject| subject.is_qemu() && subject.is_postcopy() == ours.is_postcopy();
    Subject::ALL.into_iter().filter(alike).filter_map(move |subject| {
        Some((Runs::of(samples, cell, subject).median(quantity)?, subject))
    })
}

/// All that is asked of minivmm in a cell.
/// `rate`: of the link, Mbit/s.
pub fn of_cell(samples: &[Sample], cell: Cell, rate: Option<u32>) -> Vec<Verdict> {
    let median = |subject, quantity| Runs::of(samples, cell, subject).median(quantity);
    let disturbed = Subject::ALL.iter().any(|s| Runs::of(samples, cell, *s).noisy());
    let mut verdicts = Vec::new();
    for subject in Subject::ALL.into_iter().filter(|subject| subject.is_minivmm()) {
        if Runs::of(samples, cell, subject).used() == 0 {
            continue;
        }
        let verdict = |quantity: Quantity, what, peer: Option<(f64, Subject)>, target| Verdict {
            cell: cell.to_string(),
            subject: subject.to_string(),
            what,
            figure: median(subject, quantity),
            peer: peer.map(|(figure, subject)| (figure, subject.to_string())),
            target,
            at_least: false,
            digits: quantity.digits,
            disturbed,
        };
        let gap = best_of_qemu(samples, cell, SWITCH_GAP, subject);
        let machine = median(Subject::Baseline, OTHER_GAP);
        let target = Option::zip(gap, machine).map(|(gap, own)| gap.0 * GAP_SHARE + own);
        verdicts.push(verdict(SWITCH_GAP, "switch gap, ms", gap, target));
        if cell.dirty > 0 {
            // Beside the setting that the gap is compared with, in whole percents.
            let row = if subject.is_postcopy() {
                let work = of_qemu(samples, cell, WORK_DRAINED, subject).max_by(by_figure);
                let target = work.map(|(work, _)| (POSTCOPY_WORK_SHARE * work).min(POSTCOPY_WORK));
                verdict(WORK_DRAINED, "guest work until drained, %", work, target)
            } else {
                let work = gap.and_then(|(_, qemu)| Some((median(qemu, WORK)?, qemu)));
                verdict(WORK, "guest work, %", work, work.map(|(work, _)| work))
            };
            verdicts.push(Verdict { at_least: true, digits: 0, ..row });
        } else {
            let row = verdict(TOLD_DOWNTIME, "own pause, ms", None, Some(IDLE_PAUSE_MS));
            verdicts.push(row);
        }
        let total = best_of_qemu(samples, cell, TOTAL, subject);
        let share = if subject.is_postcopy() { 1.0 } else { TOTAL_SHARE };
        let target = total.map(|(total, _)| total * share);
        verdicts.push(verdict(TOTAL, "total, s", total, target));
        if subject.is_postcopy() && cell.dirty > 0 {
            let preempt = Subject::QemuPostcopy { preempt: true };
            let theirs = median(preempt, FAULT_P50).map(|wait| (wait, preempt));
            let target = match rate {
                None => theirs.map(|(wait, _)| wait * FAULT_SHARE),
                Some(rate) => Some(ANSWER_BYTES * 8.0 / f64::from(rate) + FAULT_BEYOND_WIRE_US),
            };
            verdicts.push(verdict(FAULT_P50, "from fault to page, p50 us", theirs, target));
        }
        if subject == (Subject::Minivmm { connections: 1 }) {
            if let Some(limit) = median(Subject::RawCopy, THROUGHPUT) {
                let peer = Some((limit, Subject::RawCopy));
                let target = Some(limit * THROUGHPUT_SHARE);
                let row = verdict(THROUGHPUT, "first pass, MiB/s", peer, target);
                verdicts.push(Verdict { at_least: true, ..row });
            }
        }
    }
    verdicts
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sample::tests::{sample, CELL};

    const ONE: Subject = Subject::Minivmm { connections: 1 };
    const QEMU: Subject = Subject::Qemu { multifd: None };
    const MULTIFD: Subject = Subject::Qemu { multifd: Some(4) };

    fn samples() -> Vec<Sample> {
        vec![
            sample(Subject::Baseline, 1, &[(OTHER_GAP, 1.0)]),
            sample(Subject::RawCopy, 1, &[(THROUGHPUT, 1000.0)]),
            sample(
                ONE,
                1,
                &[(SWITCH_GAP, 3.0), (TOTAL, 0.2), (TOLD_DOWNTIME, 2.5), (THROUGHPUT, 899.0)],
            ),
            sample(QEMU, 1, &[(SWITCH_GAP, 4.0), (TOTAL, 0.4), (WORK, 97.0)]),
            sample(MULTIFD, 1, &[(SWITCH_GAP, 9.0), (TOTAL, 0.25), (WORK, 80.0)]),
        ]
    }

    #[test]
    fn each_figure_is_compared_with_qemus_best() {
        let verdicts = of_cell(&samples(), CELL, None);
        let what: Vec<_> = verdicts.iter().map(|v| (v.what, v.text())).collect();
        assert_eq!(
            what,
            [
                ("switch gap, ms", "met"),
                ("own pause, ms", "met"),
                ("total, s", "MISSED"),
                ("first pass, MiB/s", "MISSED"),
            ]
        );
        assert_eq!(verdicts[0].target, Some(3.0));
        assert_eq!(verdicts[0].ratio(), Some(0.75));
        assert_eq!(verdicts[0].peer.as_ref().unwrap().1, "QEMU pre-copy");
        assert_eq!(verdicts[2].ratio(), Some(0.8));
        assert_eq!(verdicts[2].peer.as_ref().unwrap().1, "QEMU multifd 4");
    }

    #[test]
    fn work_is_compared_with_the_setting_of_the_smallest_gap() {
        let cell = Cell { dirty: 10_000, ..CELL };
        let mut samples = samples();
        samples.iter_mut().for_each(|sample| sample.cell = cell);
        samples[2].set(WORK, 96.6);
        let work = of_cell(&samples, cell, None).into_iter().find(|v| v.at_least).unwrap();
        assert_eq!((work.target, work.text()), (Some(97.0), "met"));
        samples[2].set(WORK, 96.4);
        let work = of_cell(&samples, cell, None).into_iter().find(|v| v.at_least).unwrap();
        assert_eq!(work.text(), "MISSED");
    }

    #[test]
    fn faults_are_compared_with_preempt_or_with_the_wire() {
        let cell = Cell { dirty: 10_000, ..CELL };
        let bubble = Subject::MinivmmPostcopy { prepaging: "bubble" };
        let qemu = |preempt| Subject::QemuPostcopy { preempt };
        let mut samples = vec![
            sample(bubble, 1, &[(FAULT_P50, 151.0)]),
            sample(qemu(true), 1, &[(FAULT_P50, 300.0)]),
            sample(qemu(false), 1, &[(FAULT_P50, 100.0)]),
        ];
        samples.iter_mut().for_each(|sample| sample.cell = cell);
        let row = |samples: &[Sample], rate| {
            let mut rows = of_cell(samples, cell, rate).into_iter();
            rows.find(|v| v.what == "from fault to page, p50 us").unwrap()
        };
        let found = row(&samples, None);
        assert_eq!((found.target, found.text()), (Some(150.0), "MISSED"));
        assert_eq!(row(&samples, Some(1000)).text(), "met");
        assert_eq!(row(&samples[..1], None).met(), None);
    }

    #[test]
    fn without_a_peer_or_a_baseline_nothing_is_met() {
        let all = samples();
        let alone = of_cell(&all[2..3], CELL, None);
        assert_eq!(alone[0].met(), None);
        assert_eq!(alone[0].ratio(), None);
        assert_eq!(of_cell(&all[3..], CELL, None), []);
    }
}
