//! Counts by powers of two.

use serde::{Serialize, Serializer};

/// Buckets: bucket n counts values from 2^n up to 2^(n+1), bucket 0 also the value 0.
pub const BUCKETS: usize = 64;

/// How many values there were of which size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram {
    counts: [u64; BUCKETS],
    sum: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: [0; BUCKETS], sum: 0 }
    }
}

impl Histogram {
    /// Counts a value.
    pub fn add(&mut self, value: u64) {
        let bucket = u64::BITS - 1 - (value | 1).leading_zeros();
        self.counts[bucket as usize] += 1;
        self.sum = self.sum.saturating_add(value);
    }

    /// How many values there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The value that a share of all values (0 to 1) does not exceed, estimated within its bucket: values are taken to be
    /// spread evenly there.
    pub fn quantile(&self, share: f64) -> u64 {
        let wanted = share.clamp(0.0, 1.0) * self.count() as f64;
        let mut below = 0.0;
        for (bucket, count) in self.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            let count = *count as f64;
            if below + count >= wanted {
                let start = if bucket == 0 { 0.0 } else { (1u64 << bucket) as f64 };
                let width = if bucket == 0 { 2.0 } else { start };
                return (start + width * ((wanted - below) / count).clamp(0.0, 1.0)) as u64;
            }
            below += count;
        }
        0
    }

    /// The counts of the buckets up to the last one that counts anything.
    pub fn buckets(&self) -> &[u64] {
        let used = self.counts.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
        &self.counts[..used]
    }

    /// From the counts of buckets, as a peer claims them. Counts beyond the last bucket are left out.
    pub(crate) fn from_buckets(buckets: &[u64]) -> Self {
        let mut histogram = Self::default();
        for (count, claimed) in histogram.counts.iter_mut().zip(buckets) {
            // The sum of all must not overflow.
            *count = (*claimed).min(u64::MAX / BUCKETS as u64);
        }
        histogram
    }
}

impl Serialize for Histogram {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Form<'a> {
            count: u64,
            p50_ns: u64,
            p99_ns: u64,
            log2_ns: &'a [u64],
        }
        let form = Form {
            count: self.count(),
            p50_ns: self.quantile(0.5),
            p99_ns: self.quantile(0.99),
            log2_ns: self.buckets(),
        };
        form.serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_by_powers_of_two() {
        let mut histogram = Histogram::default();
        assert_eq!(
            (histogram.count(), histogram.quantile(0.5), histogram.buckets().len()),
            (0, 0, 0)
        );
        for value in [0, 1, 2, 3, 4, 1 << 20, u64::MAX] {
            histogram.add(value);
        }
        assert_eq!(histogram.count(), 7);
        assert_eq!(histogram.buckets()[..3], [2, 2, 1]);
        assert_eq!(histogram.buckets().len(), 64);
        assert!(Histogram::from_buckets(&[u64::MAX; 70]).count() > 0);
    }

    #[test]
    fn quantiles_are_within_their_bucket() {
        let mut histogram = Histogram::default();
        for value in 1..=1000 {
            histogram.add(value * 100);
        }
        let (median, p99) = (histogram.quantile(0.5), histogram.quantile(0.99));
        assert!((45_000..=55_000).contains(&median), "{median}");
        assert!((90_000..=131_072).contains(&p99), "{p99}");
        assert!(histogram.quantile(1.0) >= p99);
    }
}
