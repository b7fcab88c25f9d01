//! How far a guest that writes faster than memory goes out is slowed down: a pure function of what was
//! measured.
//!
//! Each vCPU may run a share of the time. Those that write most are slowed first: the rates are cut at one
//! height, such that what is left fits the connection ("water filling"). A vCPU that hardly writes keeps all
//! of its time. Steps are limited, because a round only counts a page once however often it was written.

/// The least share of its time that a vCPU keeps.
pub(crate) const LEAST_RUN: f64 = 0.1;
/// The rate of writing that is aimed at, as a share of what goes out: each round is then half the last.
const AIM: f64 = 0.5;
/// A step leaves a vCPU that writes at least this and at most that share of what it had.
const STEP: (f64, f64) = (0.4, 0.8);

/// The share of time that each vCPU may run, 1 for all of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Throttle {
    run: Vec<f64>,
}

impl Throttle {
    pub(crate) fn new(vcpus: usize) -> Self {
        Self { run: vec![1.0; vcpus] }
    }

    /// The share of time that each may run.
    pub(crate) fn run(&self) -> &[f64] {
        &self.run
    }

    /// For a person.
    pub(crate) fn describe(&self) -> String {
        let percent = |run: &f64| format!("{:.0}", run * 100.0);
        let shares: Vec<_> = self.run.iter().map(percent).collect();
        format!("slowed down: vCPUs may run {} % of the time", shares.join(", "))
    }

    /// Slows down a step. `writes` is how much each vCPU wrote in the last round, in any unit; `dirty` pages
    /// per second were found written and `sent` pages per second went out. False: none that writes can be
    /// slowed further.
    pub(crate) fn step(&mut self, writes: &[f64], dirty: f64, sent: f64) -> bool {
        let total: f64 = writes.iter().sum();
        let even = 1.0 / self.run.len().max(1) as f64;
        // What each would write if it ran all the time.
        let rates: Vec<f64> = self
            .run
            .iter()
            .enumerate()
            .map(|(at, run)| {
                let share =
                    writes.get(at).map_or(even, |w| if total > 0.0 { w / total } else { even });
                dirty * share / run
            })
            .collect();
        let height = water_level(&rates, AIM * sent);
        let mut changed = false;
        for (run, rate) in self.run.iter_mut().zip(&rates) {
            // The least that matters: half of an even share of what may be written in all.
            if *rate * *run <= AIM * sent * even / 2.0 {
                continue;
            }
            let wanted = (height / rate).clamp(*run * STEP.0, *run * STEP.1).max(LEAST_RUN);
            changed |= wanted < *run;
            *run = run.min(wanted);
        }
        changed
    }
}

/// The height at which rates are cut so that their sum is `budget`; infinite if it is not more anyway.
fn water_level(rates: &[f64], budget: f64) -> f64 {
    let mut sorted = rates.to_vec();
    sorted.sort_by(f64::total_cmp);
    let mut left = budget;
    for (at, rate) in sorted.iter().enumerate() {
        let height = left / (sorted.len() - at) as f64;
        if *rate > height {
            return height.max(0.0);
        }
        left -= rate;
    }
    f64::INFINITY
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_level_leaves_small_rates_whole_and_cuts_the_others_alike() {
        assert_eq!(water_level(&[1.0, 10.0, 10.0], 11.0), 5.0);
        assert_eq!(water_level(&[1.0, 2.0], 4.0), f64::INFINITY);
        assert_eq!(water_level(&[8.0], 4.0), 4.0);
    }

    #[test]
    fn who_writes_is_slowed_and_who_does_not_is_left_alone() {
        let mut throttle = Throttle::new(2);
        assert!(throttle.step(&[99.0, 1.0], 100_000.0, 25_000.0));
        assert_eq!(throttle.run(), [0.4, 1.0]);
    }

    #[test]
    fn steps_lead_to_the_aim_and_end_at_the_least() {
        // The guest writes 100,000 pages a second when it may run, 25,000 go out.
        let mut throttle = Throttle::new(1);
        let mut steps = 0;
        while throttle.run()[0] * 100_000.0 > 0.8 * 25_000.0 {
            let dirty = throttle.run()[0] * 100_000.0;
            assert!(throttle.step(&[7.0], dirty, 25_000.0));
            steps += 1;
        }
        assert!(steps <= 3, "{steps}");
        assert!(throttle.run()[0] > 0.1);
        // One that cannot be slowed enough.
        while throttle.step(&[7.0], 1e9, 1.0) {}
        assert_eq!(throttle.run(), [LEAST_RUN]);
    }

    #[test]
    fn a_round_that_saturates_still_leads_to_a_step() {
        // All of memory was written, and more than once: the rate looks as if it just fitted.
        let mut throttle = Throttle::new(1);
        assert!(throttle.step(&[], 25_000.0, 25_000.0));
        assert!(throttle.run()[0] <= STEP.1);
    }

    #[test]
    fn unknown_shares_are_taken_as_even() {
        let mut throttle = Throttle::new(4);
        assert!(throttle.step(&[], 100_000.0, 50_000.0));
        assert!(throttle.run().iter().all(|run| *run == throttle.run()[0] && *run < 1.0));
    }
}
