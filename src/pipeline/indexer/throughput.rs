//! The throughput of changes, which decides the size of groups and receives.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A message's changes are written in groups that take about this long to embed. So an embedded text is
/// searchable soon, and a row that changes meanwhile costs little.
const WRITE_EVERY: Duration = Duration::from_millis(500);

/// Changes in a group at least: enough slices for every thread.
const MIN_GROUP: u64 = 32;

/// Changes in a group at most, so that a transaction stays short.
const MAX_GROUP: u64 = 1_000;

/// Changes a second of this process, smoothed.
#[derive(Debug, Default)]
pub(super) struct Throughput(AtomicU64);

impl Throughput {
    /// Records a group and the time that it took.
    pub(super) fn record(&self, changes: u64, took: Duration) {
        let measured = changes * 1000 / (took.as_millis() as u64).max(1);
        let old = self.0.load(Ordering::Relaxed);
        let new = if old == 0 { measured } else { (old * 3 + measured) / 4 };
        self.0.store(new, Ordering::Relaxed);
    }

    /// Changes that are applied in this time.
    pub(super) fn within(&self, time: Duration) -> u64 {
        self.0.load(Ordering::Relaxed) * time.as_millis() as u64 / 1000
    }

    /// Changes that are written together.
    pub(super) fn group_size(&self) -> usize {
        self.within(WRITE_EVERY).clamp(MIN_GROUP, MAX_GROUP) as usize
    }
}
