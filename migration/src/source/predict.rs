//! When to stop copying and pause the guest: a pure function of what was measured.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::address::PAGE_SIZE;

/// What to do when a limit is reached and the pause would be longer than wished.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum OnStall {
    /// Pause the guest for as long as it takes.
    #[default]
    Stop,
    /// Give up; the guest goes on here.
    Cancel,
    /// Slow the vCPUs that write down until it converges; where that is not enough, as [`OnStall::Stop`].
    Throttle,
    /// Let the guest move at once, and the rest of its memory follow it.
    Postcopy,
}

/// The classic limits of pre-copy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Live rounds.
    pub rounds: u32,
    /// Bytes sent, as a multiple of the memory that was in use at the beginning.
    pub bytes_factor: f64,
    /// So few dirty pages are good enough, whatever the prediction says.
    pub dirty_pages: u64,
    /// After so long it is given up.
    pub time: Option<Duration>,
}

impl Default for Limits {
    /// Rounds and bytes as Xen has them (Clark et al., NSDI 2005, section 5; tools/libs/guest), so
    /// many dirty pages as are below a millisecond at 1 Gbit/s.
    fn default() -> Self {
        Self { rounds: 30, bytes_factor: 3.0, dirty_pages: 16, time: None }
    }
}

/// Rounds that are made only because each makes the pause shorter.
const MAX_EXTRA_ROUNDS: u32 = 4;
/// Such a round must promise to leave at most this share of the pages.
const WORTHWHILE: f64 = 0.7;
/// Fewer bytes than this say nothing about the rate.
const MIN_SAMPLE_BYTES: u64 = 1 << 20;
/// Rate that is assumed before anything was measured: 1 Gbit/s.
const ASSUMED_BYTES_PER_SECOND: f64 = 125e6;

/// What the engine knows after a round.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured {
    /// Rounds made.
    pub(crate) rounds: u32,
    /// Pages that were written meanwhile, to be sent.
    pub(crate) remaining: u64,
    /// The same one round earlier.
    pub(crate) before: u64,
    /// Bytes sent in all rounds.
    pub(crate) bytes: u64,
    /// Memory in use at the beginning, bytes.
    pub(crate) used_bytes: u64,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Another round.
    Round,
    /// Pause.
    Pause,
    /// A limit is reached, and the pause would be too long.
    Stall,
}

/// Predicts the pause and decides over rounds.
#[derive(Debug)]
pub(crate) struct Predictor {
    limits: Limits,
    /// Bytes per second of the kind of pass that the pause will make; without waiting for the cap.
    rate: Option<f64>,
    /// Everything of the pause but pages.
    fixed: Duration,
    extra_rounds: u32,
}

impl Predictor {
    /// `fixed` is what the pause costs without any page.
    pub(crate) fn new(limits: Limits, fixed: Duration) -> Self {
        Self { limits, rate: None, fixed, extra_rounds: 0 }
    }

    /// Takes note of a pass: bytes, and the time that it took without waiting for the cap.
    pub(crate) fn sample(&mut self, bytes: u64, busy: Duration) {
        if bytes < MIN_SAMPLE_BYTES && self.rate.is_some() {
            return;
        }
        let seconds = busy.as_secs_f64();
        if bytes > 0 && seconds > 0.0 {
            let rate = bytes as f64 / seconds;
            // Half of the old value: a single odd round must not decide.
            self.rate = Some(self.rate.map_or(rate, |old| (old + rate) / 2.0));
        }
    }

    /// The pause that sending so many pages would make; an estimate.
    pub(crate) fn pause(&self, pages: u64) -> Duration {
        self.fixed + self.page_time(pages)
    }

    fn page_time(&self, pages: u64) -> Duration {
        let bytes = pages.saturating_mul(PAGE_SIZE) as f64;
        let seconds = bytes / self.rate.unwrap_or(ASSUMED_BYTES_PER_SECOND).max(1.0);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 2)
    }

    /// Whether a round left clearly less than the one before it.
    pub(crate) fn shrinks(&self, measured: &Measured) -> bool {
        (measured.remaining as f64) < WORTHWHILE * measured.before as f64
    }

    /// What to do after a round.
    pub(crate) fn decide(&mut self, measured: &Measured, target: Duration) -> Next {
        if measured.remaining <= self.limits.dirty_pages {
            return Next::Pause;
        }
        let over = measured.rounds >= self.limits.rounds
            || measured.bytes as f64 > self.limits.bytes_factor * measured.used_bytes as f64;
        if self.pause(measured.remaining) <= target {
            // A round that is shorter than the pause may be costs the guest little.
            let shrinks = self.shrinks(measured);
            let matters = self.page_time(measured.remaining) > self.fixed / 4;
            if !over && shrinks && matters && self.extra_rounds < MAX_EXTRA_ROUNDS {
                self.extra_rounds += 1;
                return Next::Round;
            }
            return Next::Pause;
        }
        if over {
            return Next::Stall;
        }
        Next::Round
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: Duration = Duration::from_millis(20);

    fn predictor() -> Predictor {
        let mut predictor = Predictor::new(Limits::default(), Duration::from_millis(2));
        predictor.sample(1 << 30, Duration::from_secs(1));
        predictor
    }

    fn measured(rounds: u32, remaining: u64, before: u64) -> Measured {
        Measured { rounds, remaining, before, bytes: 1 << 30, used_bytes: 1 << 30 }
    }

    #[test]
    fn the_prediction_is_pages_at_the_rate_plus_the_fixed_cost() {
        let pause = predictor().pause(2621);
        assert!(
            pause > Duration::from_millis(11) && pause < Duration::from_millis(13),
            "{pause:?}"
        );
        assert_eq!(predictor().pause(0), Duration::from_millis(2));
    }

    #[test]
    fn an_idle_guest_is_paused_after_one_round() {
        assert_eq!(predictor().decide(&measured(1, 0, 1 << 18), TARGET), Next::Pause);
        assert_eq!(predictor().decide(&measured(1, 16, 1 << 18), TARGET), Next::Pause);
    }

    #[test]
    fn rounds_go_on_while_they_are_needed_or_shorten_the_pause() {
        let mut predictor = predictor();
        assert_eq!(predictor.decide(&measured(1, 100_000, 1 << 18), TARGET), Next::Round);
        assert_eq!(predictor.decide(&measured(2, 4000, 100_000), TARGET), Next::Round, "extra");
        assert_eq!(predictor.decide(&measured(3, 3900, 4000), TARGET), Next::Pause, "no gain");
        for _ in 0..MAX_EXTRA_ROUNDS {
            predictor.decide(&measured(3, 1000, 4000), TARGET);
        }
        assert_eq!(predictor.decide(&measured(3, 1000, 4000), TARGET), Next::Pause, "enough");
    }

    #[test]
    fn every_limit_stalls_a_guest_that_does_not_converge() {
        let mut predictor = predictor();
        assert_eq!(predictor.decide(&measured(30, 100_000, 100_000), TARGET), Next::Stall);
        let bytes = Measured { bytes: 4 << 30, ..measured(3, 100_000, 100_000) };
        assert_eq!(predictor.decide(&bytes, TARGET), Next::Stall);
        assert_eq!(predictor.decide(&measured(30, 100, 100_000), TARGET), Next::Pause);
    }

    #[test]
    fn small_samples_do_not_change_the_rate() {
        let mut predictor = predictor();
        let before = predictor.pause(1000);
        predictor.sample(4096, Duration::from_secs(1));
        predictor.sample(0, Duration::ZERO);
        assert_eq!(predictor.pause(1000), before);
        predictor.sample(1 << 30, Duration::from_secs(3));
        assert!(predictor.pause(1000) > before);
    }
}
