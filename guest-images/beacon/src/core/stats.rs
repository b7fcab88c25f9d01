//! The histogram of heartbeat gaps and the list of the largest.

/// Buckets of a gap histogram.
pub const BUCKETS: usize = 28;
/// Gaps below this many nanoseconds fall into bucket 0; each further bucket is twice as wide.
pub const FIRST_BUCKET_NS: u64 = 1024;
/// Largest gaps that are kept.
pub const TOP: usize = 4;

/// The bucket of a gap: 0 below 1.024 µs, i for 2^(9+i)..2^(10+i) ns, the last for all longer ones.
#[must_use]
pub fn bucket(nanoseconds: u64) -> usize {
    let doublings = 64 - (nanoseconds / FIRST_BUCKET_NS).leading_zeros();
    (doublings as usize).min(BUCKETS - 1)
}

/// One gap between two beats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gap {
    /// Its length in nanoseconds.
    pub nanoseconds: u64,
    /// The TSC at its end.
    pub tsc: u64,
    /// The vCPU that saw it.
    pub cpu: u64,
}

/// The largest gaps, in falling order.
#[derive(Clone, Copy, Debug, Default)]
pub struct TopGaps {
    gaps: [Gap; TOP],
}

impl TopGaps {
    /// Takes a gap in if it is among the largest.
    pub fn add(&mut self, gap: Gap) {
        let Some(place) = self.gaps.iter().position(|kept| kept.nanoseconds < gap.nanoseconds)
        else {
            return;
        };
        self.gaps.copy_within(place..TOP - 1, place + 1);
        self.gaps[place] = gap;
    }

    /// The smallest that is kept: anything up to it is not taken in.
    #[must_use]
    pub fn threshold(&self) -> u64 {
        self.gaps[TOP - 1].nanoseconds
    }

    /// All places, in falling order; unused ones have length 0.
    #[must_use]
    pub fn as_slice(&self) -> &[Gap] {
        &self.gaps
    }
}

/// The value at `percent` of a sorted, non-empty slice (nearest rank).
#[must_use]
pub fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100).clamp(1, sorted.len().max(1));
    sorted.get(rank - 1).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_borders() {
        for (ns, expected) in
            [(0, 0), (1023, 0), (1024, 1), (2047, 1), (2048, 2), (1 << 20, 11), (u64::MAX, 27)]
        {
            assert_eq!(bucket(ns), expected, "{ns} ns");
        }
    }

    #[test]
    fn keeps_the_largest_in_order() {
        let mut top = TopGaps::default();
        for ns in [5, 1, 9, 3, 7, 9, 2] {
            top.add(Gap { nanoseconds: ns, tsc: ns * 10, cpu: 0 });
        }
        let kept: Vec<_> = top.as_slice().iter().map(|gap| gap.nanoseconds).collect();
        assert_eq!(kept, [9, 9, 7, 5]);
        assert_eq!(top.threshold(), 5);
        assert_eq!(top.as_slice()[2].tsc, 70);
    }

    #[test]
    fn percentiles_by_nearest_rank() {
        let sorted: Vec<u64> = (1..=200).collect();
        assert_eq!(percentile(&sorted, 50), 100);
        assert_eq!(percentile(&sorted, 99), 198);
        assert_eq!(percentile(&[7], 99), 7);
        assert_eq!(percentile(&[], 50), 0);
    }
}
