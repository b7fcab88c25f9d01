//! How much of a load is due, when it has a rate.

/// Time that is made up for at most, as a share of a second: 1/100.
const CATCH_UP: u64 = 100;

/// Hands out permissions at a rate. What was missed for longer than 10 ms, as in a pause of the
/// VM, is not made up for.
#[derive(Clone, Copy, Debug)]
pub struct Pacer {
    /// Per second; none is as many as possible.
    rate: Option<u64>,
    /// Ticks of a second.
    second: u64,
    /// In 1/second ticks.
    owed: u64,
}

impl Pacer {
    /// A rate per `second` ticks.
    #[must_use]
    pub const fn new(rate: Option<u64>, second: u64) -> Self {
        Self { rate, second, owed: 0 }
    }

    /// Lets time pass.
    pub fn pass(&mut self, ticks: u64) {
        if let Some(rate) = self.rate {
            let catch_up = self.second / CATCH_UP;
            self.owed =
                (self.owed + ticks.min(catch_up) * rate).min((catch_up * rate).max(self.second));
        }
    }

    /// Whether one more is due.
    #[must_use]
    pub const fn due(&self) -> bool {
        self.rate.is_none() || self.owed >= self.second
    }

    /// Counts one.
    pub fn spend(&mut self) {
        if self.rate.is_some() {
            self.owed = self.owed.saturating_sub(self.second);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_rate_and_forgets_a_pause() {
        let mut pacer = Pacer::new(Some(200), 1_000_000);
        let mut count = 0;
        for _ in 0..100_000 {
            pacer.pass(20);
            while pacer.due() {
                pacer.spend();
                count += 1;
            }
        }
        assert_eq!(count, 400);
        pacer.pass(1 << 40);
        for _ in 0..2 {
            assert!(pacer.due());
            pacer.spend();
        }
        assert!(!pacer.due(), "10 ms at 200 per second are two");
        assert!(Pacer::new(None, 1_000_000).due());
        // Slower than one in 10 ms.
        let mut slow = Pacer::new(Some(1), 1_000_000);
        (0..50_000).for_each(|_| slow.pass(20));
        assert!(slow.due());
    }
}
