//! Figures of all runs, as a person reads them, and whether targets are reached.

use ::tests::bench::median;

use crate::options::{name, MODES, SUBJECTS, TOPOLOGIES};
use crate::run::Sample;
use crate::subject::Subject;
use crate::Cell;

/// Runs of ten in which nothing may be lost by the move.
const WITHOUT_LOSS: f64 = 0.9;
/// How much longer than the guest stood C may hear nothing, ms.
const BEYOND_GAP_MS: f64 = 5.0;
/// The download is back within this time after the switch, ms.
const BACK_MS: f64 = 200.0;

/// Whether this project's targets are reached; `None` for others.
pub fn reached(cell: &Cell) -> Option<bool> {
    (cell.subject == Subject::Minivmm).then(|| missed(cell).is_empty())
}

/// What of the targets is missed.
fn missed(cell: &Cell) -> Vec<&'static str> {
    let Cell { samples, failures, .. } = cell;
    let without_loss = samples.iter().filter(|sample| sample.lost_by_move() < 1.0).count();
    let beyond: Vec<f64> = samples.iter().map(|sample| sample.silence_ms - sample.gap_ms).collect();
    let back = samples.iter().filter_map(back_after_switch);
    let targets = [
        (failures.is_empty() && !samples.is_empty(), "every run succeeds"),
        (
            without_loss as f64 >= WITHOUT_LOSS * samples.len() as f64,
            "nothing lost in 9 of 10 runs",
        ),
        (samples.iter().all(|sample| sample.doubled == 0), "nothing doubled"),
        (
            median(&beyond).is_none_or(|ms| ms <= BEYOND_GAP_MS),
            "silence at most the gap + 5 ms (median)",
        ),
        (
            median(&back.collect::<Vec<_>>()).is_none_or(|ms| ms <= BACK_MS),
            "download back within 200 ms (median)",
        ),
    ];
    targets.into_iter().filter(|(well, _)| !well).map(|(_, what)| what).collect()
}

/// From the guest's start at its new host until the download had its rate again, ms; infinite if it never had.
fn back_after_switch(sample: &Sample) -> Option<f64> {
    let (course, gap) = (sample.course.as_ref()?, sample.course_gap_ms?);
    Some(course.back.map_or(f64::INFINITY, |back| (back.as_secs_f64() * 1e3 - gap).max(0.0)))
}

/// A table of one topology, and what is missed.
pub fn table(cells: &[Cell]) -> String {
    let mut text = String::from(
        "| topology | mode | | datagrams/s | lost by the move, median (worst) | runs without loss | doubled \
         | silence of the switch, ms | of which the guest stood | another | silence before | download, MiB/s | its silence, ms \
         | back at 90 % after, ms |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for cell in cells {
        let Cell { samples, failures, .. } = cell;
        let all = |figure: &dyn Fn(&Sample) -> Option<f64>| -> Vec<f64> {
            samples.iter().filter_map(figure).collect()
        };
        let show = |figure: &dyn Fn(&Sample) -> Option<f64>| {
            let all = all(figure);
            let worst = all.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            median(&all).map_or("n/a".to_owned(), |median| format!("{median:.1} ({worst:.1})"))
        };
        let ms = |course: &Sample| {
            course.course.as_ref().map(|course| course.silence.as_secs_f64() * 1e3)
        };
        let rate =
            all(&|sample| sample.course.as_ref().map(|course| course.before / f64::from(1 << 20)));
        let columns = [
            name(cell.topology, &TOPOLOGIES).to_owned(),
            name(cell.mode, &MODES).to_owned(),
            name(cell.subject, &SUBJECTS).to_owned(),
            cell.rate.to_string(),
            show(&|sample| Some(sample.lost_by_move())),
            format!(
                "{} of {}",
                samples.iter().filter(|s| s.lost_by_move() < 1.0).count(),
                samples.len() + failures.len()
            ),
            samples.iter().map(|sample| sample.doubled).sum::<u64>().to_string(),
            show(&|sample| Some(sample.silence_ms)),
            show(&|sample| Some(sample.gap_ms)),
            show(&|sample| sample.other_silence_ms),
            show(&|sample| Some(sample.silence_before_ms)),
            median(&rate).map_or("n/a".to_owned(), |rate| format!("{rate:.0}")),
            show(&ms),
            show(&back_after_switch),
        ];
        text += &format!("| {} |\n", columns.join(" | "));
    }
    for cell in cells.iter().filter(|cell| cell.subject == Subject::Minivmm) {
        let (missed, mode) = (missed(cell), name(cell.mode, &MODES));
        let verdict = if missed.is_empty() {
            "targets reached".to_owned()
        } else {
            format!("missed: {}", missed.join("; "))
        };
        text += &format!("\n{mode}: {verdict}");
    }
    text + "\n"
}
