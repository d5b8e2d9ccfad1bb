//! The counters of a process, for its heartbeat and its summary.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::change::Lane;
use super::histogram::Histogram;
use super::scaling::ScalingGauges;

/// Counters of one process, shared by its tasks.
#[derive(Debug, Default)]
pub struct Metrics {
    applied: AtomicU64,
    embedded: AtomicU64,
    held: AtomicU64,
    /// What this process scales.
    pub scaling: ScalingGauges,
    /// A lane each: a load must not hide how fresh edits are.
    freshness: Mutex<[Freshness; Lane::ALL.len()]>,
}

#[derive(Debug, Default)]
struct Freshness {
    all: Histogram,
    /// Since the last sample.
    recent: Histogram,
}

impl Metrics {
    /// Counts changes whose outcome is in the index.
    pub fn applied(&self, changes: u64) {
        self.applied.fetch_add(changes, Ordering::Relaxed);
    }

    /// Counts texts that went through the model.
    pub fn embedded(&self, texts: u64) {
        self.embedded.fetch_add(texts, Ordering::Relaxed);
    }

    /// Counts changes that were received.
    pub fn hold(&self, changes: u64) {
        self.held.fetch_add(changes, Ordering::Relaxed);
    }

    /// Counts changes that were received and are finished or released.
    pub fn release(&self, changes: u64) {
        self.held.fetch_sub(changes, Ordering::Relaxed);
    }

    /// Changes that this process holds: received, and neither finished nor released.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Counts the time from statement to searchable of one change each, in milliseconds.
    pub fn record_freshness(&self, lane: Lane, ms: impl IntoIterator<Item = u64>) {
        let mut lanes = self.freshness.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let freshness = &mut lanes[lane as usize];
        for ms in ms {
            freshness.all.record(ms);
            freshness.recent.record(ms);
        }
    }

    /// Changes applied and texts embedded since the start.
    #[must_use]
    pub fn totals(&self) -> (u64, u64) {
        (self.applied.load(Ordering::Relaxed), self.embedded.load(Ordering::Relaxed))
    }

    /// Freshness since the start, of both lanes.
    #[must_use]
    pub fn freshness(&self) -> Histogram {
        let lanes = self.freshness.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut all = Histogram::default();
        for (bucket, count) in lanes.iter().flat_map(|lane| lane.all.buckets()) {
            all.add(bucket, count);
        }
        all
    }

    /// Freshness of a lane since the last call.
    #[must_use]
    pub fn take_recent(&self, lane: Lane) -> Histogram {
        let mut lanes = self.freshness.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        std::mem::take(&mut lanes[lane as usize].recent)
    }
}
