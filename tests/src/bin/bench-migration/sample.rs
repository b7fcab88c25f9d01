//! What one run gave, and what many of them say together.

use std::collections::BTreeMap;

use ::tests::bench::median;
use serde::Serialize;
use serde_json::Value;

use crate::subject::{Cell, Subject};

/// A quantity that runs give.
#[derive(Debug, Clone, Copy)]
pub struct Quantity {
    /// Its name in JSON, with the unit.
    pub key: &'static str,
    /// Its column's head.
    pub title: &'static str,
    /// Decimals to show.
    pub digits: usize,
}

const fn quantity(key: &'static str, title: &'static str, digits: usize) -> Quantity {
    Quantity { key, title, digits }
}

/// The gap that spans the move, as the guest saw it by its TSC.
pub const SWITCH_GAP: Quantity = quantity("switch_gap_ms", "switch gap ms", 1);
/// The largest other gap of the window.
pub const OTHER_GAP: Quantity = quantity("other_gap_ms", "other gap ms", 1);
/// From the order until the source is known to have let go.
pub const TOTAL: Quantity = quantity("total_s", "total s", 3);
/// From the order until the guest runs at the destination, by the host's TSC if the guest has it.
pub const ARRIVAL: Quantity = quantity("arrival_s", "guest runs there s", 3);
/// The total as the VMM says.
pub const TOLD_TOTAL: Quantity = quantity("told_total_s", "told s", 3);
/// The pause as the VMM says.
pub const TOLD_DOWNTIME: Quantity = quantity("told_downtime_ms", "told downtime ms", 1);
/// Bytes of `lo` in a network namespace of its own.
pub const WIRE: Quantity = quantity("wire_mib", "wire MiB", 1);
/// Bytes as the VMM says.
pub const TOLD_WIRE: Quantity = quantity("told_wire_mib", "told MiB", 1);
/// CPU seconds of the source's process between order and end.
pub const CPU_SOURCE: Quantity = quantity("cpu_source_s", "CPU source s", 2);
/// The same of the destination's.
pub const CPU_DESTINATION: Quantity = quantity("cpu_destination_s", "destination s", 2);
/// Written of what was intended in the window.
pub const WORK: Quantity = quantity("work_percent", "work %", 1);
/// Time that the missing writes stand for.
pub const LOST: Quantity = quantity("lost_ms", "lost ms", 0);
/// Achieved dirty rate, pages per second.
pub const RATE: Quantity = quantity("dirty_pages_per_s", "dirty pages/s", 0);
/// Turns of the guest's loop per second.
pub const BEATS: Quantity = quantity("beats_per_s", "beats/s", 0);
/// Times that memory was gone through.
pub const ROUNDS: Quantity = quantity("rounds", "rounds", 0);
/// Throughput of the first pass, or of the raw copy.
pub const THROUGHPUT: Quantity = quantity("first_pass_mib_per_s", "first pass MiB/s", 0);

/// Written of what was intended until all memory was at the destination.
pub const WORK_DRAINED: Quantity = quantity("work_drained_percent", "work until drained %", 1);
/// The same of the first second.
pub const WORK_SECOND: Quantity = quantity("work_second_percent", "work in the first second %", 1);
/// The guest's largest gap until all memory was at the destination, the switch apart: a bound, a power of two.
pub const DRAIN_GAP: Quantity = quantity("drain_gap_ms", "gap until drained, below ms", 1);
/// How often the guest was held up until then, for whatever reason.
pub const STALLS: Quantity = quantity("stalls", "stalls until drained", 0);
/// Half of these were shorter, by the guest's TSC.
pub const STALL_P50: Quantity = quantity("stall_p50_us", "of these p50 us", 0);
/// Of a hundred of these one was longer.
pub const STALL_P99: Quantity = quantity("stall_p99_us", "of these p99 us", 0);
/// Pages that were asked for over the network.
pub const FAULTS: Quantity = quantity("network_faults", "network faults", 0);
/// The same, of the working set's pages.
pub const FAULT_SHARE: Quantity = quantity("fault_share_percent", "of the working set %", 2);
/// How long the guest waited for a page on average, as the VMM tells.
pub const FAULT_MEAN: Quantity = quantity("fault_mean_us", "wait for a page, mean us", 0);
/// From reading a fault until its page is in, by the VMM's own clock: half of the waits were shorter. Estimated by the same
/// histogram for all.
pub const FAULT_P50: Quantity = quantity("fault_p50_us", "from fault to page, p50 us", 0);
/// Of a hundred of these one was longer.
pub const FAULT_P99: Quantity = quantity("fault_p99_us", "from fault to page, p99 us", 0);
/// How many of these there were, where that is not the number of faults that the VMM tells.
pub const FAULTS_SEEN: Quantity = quantity("faults_seen", "faults in QEMU's trace", 0);

/// What a table has of post-copy.
pub const POSTCOPY: [Quantity; 12] = [
    WORK_SECOND,
    WORK_DRAINED,
    DRAIN_GAP,
    STALLS,
    STALL_P50,
    STALL_P99,
    FAULTS,
    FAULT_SHARE,
    FAULT_MEAN,
    FAULT_P50,
    FAULT_P99,
    FAULTS_SEEN,
];

/// The parts of the pause as minivmm tells them, one after the other; the last three are the
/// destination's own figures, within `load`, `commit` and `resume`.
pub const PAUSE: [Quantity; 10] = [
    quantity("pause_stop_ms", "pause: stop ms", 2),
    quantity("pause_save_ms", "pause: save ms", 2),
    quantity("pause_harvest_ms", "pause: harvest ms", 2),
    quantity("pause_send_ms", "pause: send ms", 2),
    quantity("pause_load_ms", "pause: load ms", 2),
    quantity("pause_commit_ms", "pause: commit ms", 2),
    quantity("pause_resume_ms", "pause: resume ms", 2),
    quantity("pause_destination_load_ms", "there: load ms", 2),
    quantity("pause_destination_own_ms", "there: own ms", 2),
    quantity("pause_destination_resume_ms", "there: resume ms", 2),
];

/// What a cell's table has before the parts of the pause.
pub const COLUMNS: [Quantity; 16] = [
    SWITCH_GAP,
    OTHER_GAP,
    TOLD_DOWNTIME,
    TOTAL,
    TOLD_TOTAL,
    ARRIVAL,
    WIRE,
    TOLD_WIRE,
    CPU_SOURCE,
    CPU_DESTINATION,
    WORK,
    LOST,
    RATE,
    BEATS,
    ROUNDS,
    THROUGHPUT,
];

/// Other processes' CPUs from which on a run counts as disturbed.
pub const BUSY: f64 = 0.3;
/// So many undisturbed runs are enough to leave out the others.
pub const ENOUGH: usize = 3;

/// One run.
#[derive(Debug, Clone, Serialize)]
pub struct Sample {
    /// The guest.
    pub cell: Cell,
    /// What was measured.
    pub subject: Subject,
    /// 0 is the warm-up.
    pub run: usize,
    /// Its place in the turn.
    pub turn: usize,
    /// By [`Quantity::key`].
    pub values: BTreeMap<&'static str, f64>,
    /// CPUs that other processes kept busy in the window.
    pub others: f64,
    /// CPUs that the machine below took away.
    pub stolen: f64,
    /// Why it does not count.
    pub invalid: Option<String>,
    /// The guest's own report.
    pub guest: Value,
    /// The VMM's.
    pub vmm: Value,
}

impl Sample {
    /// A run without figures yet.
    pub fn new(cell: Cell, subject: Subject, run: usize, turn: usize) -> Self {
        Self {
            cell,
            subject,
            run,
            turn,
            values: BTreeMap::new(),
            others: 0.0,
            stolen: 0.0,
            invalid: None,
            guest: Value::Null,
            vmm: Value::Null,
        }
    }

    /// Takes in a figure, if there is one.
    pub fn set(&mut self, quantity: Quantity, value: impl Into<Option<f64>>) {
        if let Some(value) = value.into() {
            self.values.insert(quantity.key, value);
        }
    }

    /// A figure.
    pub fn get(&self, quantity: Quantity) -> Option<f64> {
        self.values.get(quantity.key).copied()
    }

    /// Whether others used the machine.
    pub fn disturbed(&self) -> bool {
        self.others > BUSY
    }

    fn counts(&self) -> bool {
        self.run > 0 && self.invalid.is_none()
    }
}

/// Runs of one subject in one cell.
#[derive(Debug, Clone, Default)]
pub struct Runs<'a> {
    used: Vec<&'a Sample>,
    /// How many were disturbed, of all valid ones.
    pub disturbed: usize,
    /// How many were not.
    pub invalid: usize,
}

impl<'a> Runs<'a> {
    /// Those of this subject and cell that count: the undisturbed ones, if enough remain.
    pub fn of(samples: &'a [Sample], cell: Cell, subject: Subject) -> Self {
        let all = samples.iter().filter(|s| s.cell == cell && s.subject == subject);
        let invalid = all.clone().filter(|s| s.invalid.is_some()).count();
        let valid: Vec<&Sample> = all.filter(|s| s.counts()).collect();
        let quiet: Vec<&Sample> = valid.iter().copied().filter(|s| !s.disturbed()).collect();
        let disturbed = valid.len() - quiet.len();
        let used = if quiet.len() >= ENOUGH { quiet } else { valid };
        Self { used, disturbed, invalid }
    }

    /// How many the medians are of.
    pub fn used(&self) -> usize {
        self.used.len()
    }

    /// Whether disturbed runs are among them.
    pub fn noisy(&self) -> bool {
        self.used.iter().any(|sample| sample.disturbed())
    }

    fn values(&self, quantity: Quantity) -> Vec<f64> {
        self.used.iter().filter_map(|sample| sample.get(quantity)).collect()
    }

    /// Median of a quantity.
    pub fn median(&self, quantity: Quantity) -> Option<f64> {
        median(&self.values(quantity))
    }

    /// `MEDIAN (MIN to MAX)`, or `–`.
    pub fn show(&self, quantity: Quantity) -> String {
        let mut values = self.values(quantity);
        values.sort_by(f64::total_cmp);
        let digits = quantity.digits;
        match (median(&values), values.first(), values.last()) {
            (Some(median), Some(min), Some(max)) if values.len() > 1 => {
                format!("{median:.digits$} ({min:.digits$} to {max:.digits$})")
            }
            (Some(median), ..) => format!("{median:.digits$}"),
            _ => "–".to_owned(),
        }
    }
}

#[cfg(test)]
pub mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The cell of all tests.
    pub const CELL: Cell = Cell { memory_mib: 1024, ws_mib: 16, dirty: 0, sequential: false };

    /// A valid run.
    pub fn sample(subject: Subject, run: usize, values: &[(Quantity, f64)]) -> Sample {
        let mut sample = Sample::new(CELL, subject, run, 0);
        values.iter().for_each(|(quantity, value)| sample.set(*quantity, *value));
        sample
    }

    fn totals(values: &[f64]) -> Vec<Sample> {
        let runs = values.iter().enumerate();
        runs.map(|(run, value)| sample(Subject::Baseline, run, &[(TOTAL, *value)])).collect()
    }

    #[test]
    fn the_warm_up_and_invalid_runs_do_not_count() {
        let mut samples = totals(&[9.0, 1.0, 2.0, 8.0]);
        samples[3].invalid = Some("a page was wrong".into());
        let runs = Runs::of(&samples, CELL, Subject::Baseline);
        assert_eq!((runs.used(), runs.invalid), (2, 1));
        assert_eq!(runs.median(TOTAL), Some(1.5));
        assert_eq!(runs.show(TOTAL), "1.500 (1.000 to 2.000)");
        assert_eq!(runs.show(WIRE), "–");
        assert_eq!(Runs::of(&samples, CELL, Subject::RawCopy).median(TOTAL), None);
    }

    #[test]
    fn disturbed_runs_are_left_out_if_enough_remain() {
        let mut samples = totals(&[0.0, 1.0, 2.0, 3.0, 10.0, 11.0]);
        for sample in &mut samples[4..] {
            sample.others = 0.5;
        }
        let runs = Runs::of(&samples, CELL, Subject::Baseline);
        assert_eq!((runs.used(), runs.disturbed, runs.noisy()), (3, 2, false));
        assert_eq!(runs.median(TOTAL), Some(2.0));

        samples[3].others = 0.31;
        let runs = Runs::of(&samples, CELL, Subject::Baseline);
        assert_eq!((runs.used(), runs.disturbed, runs.noisy()), (5, 3, true));
        assert_eq!(runs.median(TOTAL), Some(3.0));
    }
}
