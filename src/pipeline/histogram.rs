//! A histogram of freshness: the time from a statement until a search can find the change.

/// The binary logarithm of the number of buckets for each doubling of the time. With 16 buckets, the width of a
/// bucket is at most 1/16 of its value.
const STEPS_LOG2: u32 = 4;
const STEPS: u64 = 1 << STEPS_LOG2;

/// A histogram of durations in milliseconds. The width of a bucket grows with the value.
///
/// Quantiles below 16 ms are exact; larger ones are at most 6.25 % too high. Histograms of several workers can
/// be added. The layout of the buckets is log-linear, as in `HdrHistogram`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    counts: Vec<u64>,
}

impl Histogram {
    /// Counts one value, in milliseconds.
    pub fn record(&mut self, ms: u64) {
        self.add(bucket_of(ms), 1);
    }

    /// Counts `count` values of one bucket.
    pub fn add(&mut self, bucket: usize, count: u64) {
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += count;
    }

    /// The buckets that are not empty, with their counts.
    pub fn buckets(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        self.counts.iter().copied().enumerate().filter(|(_, count)| *count > 0)
    }

    /// The number of counted values.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The quantile `q` (0 to 1) in milliseconds: this part of all values does not exceed it. `None` without values.
    #[must_use]
    pub fn quantile(&self, q: f64) -> Option<u64> {
        let total = self.total();
        let rank = ((total as f64 * q).ceil() as u64).clamp(1, total.max(1));
        let mut seen = 0;
        for (bucket, count) in self.buckets() {
            seen += count;
            if seen >= rank {
                return Some(upper_bound(bucket));
            }
        }
        None
    }
}

fn bucket_of(ms: u64) -> usize {
    if ms < STEPS {
        return ms as usize;
    }
    let octave = ms.ilog2() - STEPS_LOG2;
    let step = (ms >> octave) - STEPS;
    (u64::from(octave + 1) * STEPS + step) as usize
}

/// The largest value that belongs to a bucket.
fn upper_bound(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < STEPS {
        return bucket;
    }
    let octave = bucket / STEPS - 1;
    ((STEPS + bucket % STEPS + 1) << octave) - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quantiles_of_nothing_are_none() {
        assert_eq!(Histogram::default().quantile(0.5), None);
    }

    #[test]
    fn small_values_are_exact() {
        let mut histogram = Histogram::default();
        (0..16).for_each(|ms| histogram.record(ms));
        assert_eq!(histogram.quantile(0.5), Some(7));
        assert_eq!(histogram.quantile(1.0), Some(15));
    }

    proptest! {
        #[test]
        fn a_bucket_holds_its_value_within_a_sixteenth(ms in 0_u64..10_000_000_000) {
            let bound = upper_bound(bucket_of(ms));
            prop_assert!(bound >= ms);
            prop_assert!(bound - ms <= ms / 16);
            prop_assert!(bucket_of(bound) == bucket_of(ms));
            prop_assert!(bucket_of(bound + 1) == bucket_of(ms) + 1);
        }
    }
}
