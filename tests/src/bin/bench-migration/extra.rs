//! What must not cost: RAM that is not in use, and having been moved before.

use ::tests::bench::Result;
use serde::Serialize;
use serde_json::json;

use crate::run::{self, NAME};
use crate::sample::{Quantity, Runs, Sample, SWITCH_GAP, TOTAL, WIRE};
use crate::subject::{Cell, Subject, RAM_MIB};
use crate::verdict::Verdict;
use crate::{minivmm, Bench};

/// Total time with much RAM, beside that with little, both with as much in use.
const IDLE_RATIO: f64 = 1.5;
/// What may be added to the process between the two moves that are compared.
const GROWTH_MIB: f64 = 1.0;
/// After the first few moves everything has its size.
const GROWN_UP: usize = 5;

/// Much RAM, and little, with the same in use.
pub fn idle_cells(quick: bool) -> [Cell; 2] {
    let much = if quick { 4 << 10 } else { 16 << 10 };
    [much, RAM_MIB].map(|memory_mib| Cell { memory_mib, ws_mib: 64, dirty: 0, sequential: false })
}

/// What is asked of the idle VMs.
pub fn idle_verdicts(samples: &[Sample], [much, little]: [Cell; 2]) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for subject in Subject::ALL.into_iter().filter(|subject| subject.is_minivmm()) {
        let of = |cell, quantity| Runs::of(samples, cell, subject).median(quantity);
        let verdict = |quantity: Quantity, what, limit: Option<f64>| Verdict {
            cell: much.to_string(),
            subject: subject.to_string(),
            what,
            figure: of(much, quantity),
            peer: of(little, quantity).map(|figure| (figure, "1 GiB of RAM".to_owned())),
            target: Option::zip(of(little, quantity), limit).map(|(figure, limit)| figure * limit),
            at_least: false,
            digits: quantity.digits,
            disturbed: [much, little].iter().any(|c| Runs::of(samples, *c, subject).noisy()),
        };
        if of(much, TOTAL).is_some() {
            verdicts.push(verdict(TOTAL, "total, s", Some(IDLE_RATIO)));
            verdicts.push(verdict(SWITCH_GAP, "switch gap, ms", None));
            verdicts.push(verdict(WIRE, "wire, MiB", None));
        }
    }
    verdicts
}

/// A guest that was moved from process to process.
#[derive(Debug, Clone, Serialize)]
pub struct Growth {
    /// By whom.
    pub subject: Subject,
    /// Resident memory beyond the guest's after each move, MiB.
    pub overhead_mib: Vec<f64>,
    /// Why it ended early.
    pub error: Option<String>,
}

/// Whether growth of its process is measured.
pub fn can_grow(subject: Subject) -> bool {
    match subject {
        Subject::Minivmm { connections } => connections == 1,
        Subject::Qemu { multifd } => multifd.is_none(),
        Subject::MinivmmPostcopy { .. } | Subject::QemuPostcopy { .. } => false,
        _ => false,
    }
}

/// Moves a guest `moves` times.
pub fn growth(bench: &Bench, subject: Subject, moves: usize) -> Growth {
    let mut growth = Growth { subject, overhead_mib: Vec::new(), error: None };
    growth.error = chain(bench, &mut growth, moves).err().map(|error| error.to_string());
    growth
}

fn chain(bench: &Bench, growth: &mut Growth, moves: usize) -> Result<()> {
    let cell = Cell { memory_mib: RAM_MIB, ws_mib: 64, dirty: 10_000, sequential: false };
    let (setup, subject) = (cell.setup(), growth.subject);
    let mut guest = subject.boot(&bench.tools, bench.without_migration, NAME, &setup)?;
    for hop in 1..=moves {
        let mut incoming = subject.receive(&bench.tools, &format!("hop{hop}"), &setup)?;
        subject.migrate(&bench.tools, &mut guest, NAME, &incoming.address)?;
        incoming.arrived(subject)?;
        if subject.is_minivmm() {
            guest.wait_for_end()?;
            minivmm::has_name(&bench.tools, NAME, &incoming.guest)?;
        } else {
            guest.end()?;
        }
        guest = incoming.guest;
        growth.overhead_mib.push(guest.overhead_mib()?);
    }
    let mut sample = Sample::new(cell, subject, 1, 0);
    sample.guest = guest.ask("report", "report")?;
    // Each of its vCPUs has seen each move.
    if sample.guest["switches"] != json!(moves) {
        return Err(format!("the guest did not stand {moves} times: {}", sample.guest).into());
    }
    run::verify(&sample, &mut guest)?;
    guest.end()
}

impl Growth {
    /// The last move beside the fifth.
    pub fn verdict(&self) -> Verdict {
        let moves = self.overhead_mib.len();
        let early = self.overhead_mib.get(GROWN_UP - 1).copied();
        let late = self.overhead_mib.last().copied().filter(|_| moves > GROWN_UP);
        Verdict {
            cell: format!("{moves} moves"),
            subject: self.subject.to_string(),
            what: "overhead at the end, MiB",
            figure: late.filter(|_| self.error.is_none()),
            peer: early.map(|figure| (figure, format!("after move {GROWN_UP}"))),
            target: early.filter(|_| self.subject.is_minivmm()).map(|figure| figure + GROWTH_MIB),
            at_least: false,
            digits: 2,
            disturbed: false,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const SUBJECT: Subject = Subject::Minivmm { connections: 1 };

    #[test]
    fn growth_is_from_the_fifth_move_to_the_last() {
        let mut growth = Growth {
            subject: SUBJECT,
            overhead_mib: vec![5.0, 6.0, 7.0, 7.0, 7.0, 7.5, 8.0],
            error: None,
        };
        assert_eq!(growth.verdict().met(), Some(true));
        growth.overhead_mib.push(8.1);
        assert_eq!(growth.verdict().met(), Some(false));
        growth.overhead_mib.truncate(5);
        assert_eq!(growth.verdict().met(), None);
    }

    #[test]
    fn unused_memory_may_cost_half_as_much_again() {
        let cells = idle_cells(false);
        let mut samples: Vec<Sample> =
            cells.map(|cell| Sample::new(cell, SUBJECT, 1, 0)).into_iter().collect();
        samples[0].set(TOTAL, 0.15);
        samples[1].set(TOTAL, 0.1);
        let verdict = &idle_verdicts(&samples, cells)[0];
        assert_eq!(verdict.met(), Some(true));
        assert_eq!(verdict.ratio(), Some(0.15 / 0.1));
        samples[0].set(TOTAL, 0.152);
        assert_eq!(idle_verdicts(&samples, cells)[0].met(), Some(false));
    }
}
