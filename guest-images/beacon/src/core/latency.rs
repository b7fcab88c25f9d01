//! A histogram of times fine enough for percentiles: 32 buckets for each doubling.

/// Buckets for each power of two; the error of a percentile is at most 1/32.
const PER_OCTAVE: u64 = 32;
/// Times up to 2^40 ns, which is 18 minutes.
const BUCKETS: usize = 36 * PER_OCTAVE as usize;

/// Times in nanoseconds.
pub struct Latencies {
    buckets: [u32; BUCKETS],
    count: u64,
    min: u64,
    max: u64,
}

impl Latencies {
    /// None yet.
    pub const EMPTY: Self = Self { buckets: [0; BUCKETS], count: 0, min: u64::MAX, max: 0 };

    /// Forgets all.
    pub fn clear(&mut self) {
        self.buckets.fill(0);
        (self.count, self.min, self.max) = (0, u64::MAX, 0);
    }

    /// Adds a time.
    pub fn add(&mut self, nanoseconds: u64) {
        self.buckets[bucket(nanoseconds)] += 1;
        self.count += 1;
        self.min = self.min.min(nanoseconds);
        self.max = self.max.max(nanoseconds);
    }

    /// How many were added.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The shortest, 0 if there is none.
    #[must_use]
    pub fn min(&self) -> u64 {
        if self.count == 0 {
            0
        } else {
            self.min
        }
    }

    /// The longest.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The time that `percent` of the times do not exceed, within a bucket's width.
    #[must_use]
    pub fn percentile(&self, percent: u64) -> u64 {
        let rank = (self.count * percent).div_ceil(100).max(1);
        let mut seen = 0;
        for (index, &count) in (0..).zip(&self.buckets) {
            seen += u64::from(count);
            if seen >= rank {
                return upper(index).min(self.max).max(self.min());
            }
        }
        0
    }
}

/// Times below 32 ns have a bucket each; then each octave has 32.
fn bucket(nanoseconds: u64) -> usize {
    if nanoseconds < PER_OCTAVE {
        return nanoseconds as usize;
    }
    let octave = u64::from(nanoseconds.ilog2()) - 5;
    let index = (octave + 1) * PER_OCTAVE + (nanoseconds >> octave) - PER_OCTAVE;
    (index as usize).min(BUCKETS - 1)
}

/// The longest time of a bucket.
fn upper(index: u64) -> u64 {
    if index < PER_OCTAVE {
        return index;
    }
    let (octave, place) = (index / PER_OCTAVE - 1, index % PER_OCTAVE);
    ((PER_OCTAVE + place + 1) << octave) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_and_their_ends_agree() {
        let mut last = 0;
        for index in 0..BUCKETS as u64 - 1 {
            assert_eq!(bucket(upper(index)) as u64, index);
            assert_eq!(bucket(upper(index) + 1) as u64, index + 1);
            assert!(index == 0 || upper(index) > last);
            last = upper(index);
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_close() {
        let mut latencies = Latencies::EMPTY;
        assert_eq!((latencies.min(), latencies.percentile(50)), (0, 0));
        for microseconds in 1..=1000 {
            latencies.add(microseconds * 1000);
        }
        assert_eq!((latencies.count(), latencies.min()), (1000, 1000));
        assert_eq!(latencies.max(), 1_000_000);
        for (percent, exact) in [(50, 500_000), (99, 990_000), (100, 1_000_000)] {
            let found = latencies.percentile(percent);
            assert!((exact..=exact + exact / 32).contains(&found), "{percent}: {found}");
        }
        latencies.clear();
        assert_eq!(latencies.count(), 0);
    }
}
