//! The kinds of numbers that are counted: counters, levels and distributions. No lock is held while one is updated.

use std::ops::Index;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::pipeline::change::Lane;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to the number.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// The number.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that grows and shrinks.
#[derive(Debug, Default)]
pub struct Level(AtomicU64);

impl Level {
    /// Adds to the number.
    pub fn raise(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// Takes from the number what was added before.
    pub fn lower(&self, less: u64) {
        self.0.fetch_sub(less, Ordering::Relaxed);
    }

    /// The number.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A value for each lane.
#[derive(Debug, Default)]
pub struct ByLane<T>([T; Lane::ALL.len()]);

impl<T> ByLane<T> {
    /// Makes the value of each lane.
    pub fn new(mut make: impl FnMut() -> T) -> Self {
        Self(Lane::ALL.map(|_| make()))
    }

    /// Each lane with its value.
    pub fn iter(&self) -> impl Iterator<Item = (Lane, &T)> {
        Lane::ALL.into_iter().zip(&self.0)
    }
}

impl ByLane<Level> {
    /// The sum over the lanes.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.0.iter().map(Level::get).sum()
    }
}

impl ByLane<Counter> {
    /// The sum over the lanes.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.0.iter().map(Counter::get).sum()
    }
}

impl<T> Index<Lane> for ByLane<T> {
    type Output = T;

    fn index(&self, lane: Lane) -> &T {
        &self.0[lane as usize]
    }
}

/// How many values fell between given bounds.
#[derive(Debug)]
pub struct Distribution {
    bounds: &'static [f64],
    /// One for each bound, and one for the values above all bounds.
    counts: Box<[AtomicU64]>,
    /// The sum of the values, in millionths.
    sum: AtomicU64,
}

/// The state of a [`Distribution`] at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Distributed {
    /// Upper bound (included) and number of values of each part; the last bound is infinite.
    pub buckets: Vec<(f64, u64)>,
    /// The sum of the values.
    pub sum: f64,
}

impl Distributed {
    /// How many values there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|(_, count)| count).sum()
    }
}

impl Distribution {
    /// A distribution over parts with these upper bounds, which must grow.
    #[must_use]
    pub fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum: AtomicU64::new(0) }
    }

    /// Counts a value that is not negative.
    pub fn observe(&self, value: f64) {
        let at = self.bounds.partition_point(|bound| *bound < value);
        self.counts[at].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add((value * 1e6).round() as u64, Ordering::Relaxed);
    }

    /// The counts and the sum.
    #[must_use]
    pub fn get(&self) -> Distributed {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed));
        Distributed {
            buckets: bounds.zip(counts).collect(),
            sum: self.sum.load(Ordering::Relaxed) as f64 / 1e6,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_on_a_bound_counts_below_it() {
        let distribution = Distribution::new(&[1.0, 2.5]);
        for value in [0.0, 1.0, 1.000_001, 2.5, 9.0] {
            distribution.observe(value);
        }
        let seen = distribution.get();
        assert_eq!(seen.buckets, [(1.0, 2), (2.5, 2), (f64::INFINITY, 1)]);
        assert_eq!(seen.count(), 5);
        assert!((seen.sum - 13.500_001).abs() < 1e-9, "{}", seen.sum);
    }
}
