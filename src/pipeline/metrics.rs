//! What a process counts about its work: for its heartbeat, its summary, its log, and whoever watches it.
//!
//! Values only. How they are named and shown is not known here.

mod values;

use std::sync::Mutex;
use std::time::Duration;

use super::change::Lane;
use super::failure::FailureKind;
use super::histogram::Histogram;
use super::queue::Reason;
use super::scaling::ScalingGauges;

pub use values::{ByLane, Counter, Distributed, Distribution, Level};

/// Bounds of freshness and capture lag, in seconds.
const LAG_S: &[f64] =
    &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0];

/// Bounds of the time of one request, in seconds.
pub const REQUEST_S: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Bounds of the number of changes or texts in a batch.
const BATCH: &[f64] = &[1.0, 5.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0];

/// Tries that failed and are made again, by the kind of failure.
#[derive(Debug, Default)]
pub struct Retries([Counter; FailureKind::ALL.len()]);

impl Retries {
    /// Counts a try that failed and is made again.
    pub fn count(&self, kind: FailureKind) {
        self.0[kind as usize].add(1);
    }

    /// The kinds that occurred, with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (FailureKind, u64)> {
        let all = FailureKind::ALL.into_iter();
        all.map(|kind| (kind, self.0[kind as usize].get())).filter(|(_, count)| *count > 0)
    }
}

/// Searches of one process that read the outliers too, because their best match was weak.
#[derive(Debug, Default)]
pub struct SecondLooks {
    /// An outlier was the better match.
    pub found: Counter,
    /// No outlier was better.
    pub nothing: Counter,
}

/// What the relays of one process did.
#[derive(Debug)]
pub struct RelayMetrics {
    /// Changes that were sent to the queue.
    pub queued: ByLane<Counter>,
    /// Changes in a claim of the outbox.
    pub claims: Distribution,
    /// Age of the oldest change of a claim, in seconds.
    pub capture_lag: Distribution,
    /// Claims that failed.
    pub retries: Retries,
}

impl Default for RelayMetrics {
    fn default() -> Self {
        Self {
            queued: ByLane::default(),
            claims: Distribution::new(BATCH),
            capture_lag: Distribution::new(LAG_S),
            retries: Retries::default(),
        }
    }
}

/// What the indexers of one process did, shared by their tasks.
#[derive(Debug)]
pub struct Metrics {
    /// Changes that were received.
    pub received: ByLane<Counter>,
    /// Changes that were received, and are not finished.
    pub in_flight: ByLane<Level>,
    /// Changes in a batch.
    pub batches: ByLane<Distribution>,
    /// Changes whose outcome is in the index.
    pub applied: ByLane<Counter>,
    /// Texts that went through the model.
    pub embedded: ByLane<Counter>,
    /// Texts that needed no embedding, because the index has their vector.
    pub unchanged: Counter,
    /// Texts that needed no embedding, because another row of the group has the same text.
    pub same_text: Counter,
    /// Groups that were done again because a row or an entry changed meanwhile.
    pub conflicts: Counter,
    /// Time of one call of the embedder, in seconds.
    pub embedder: Distribution,
    /// Texts in one call of the embedder.
    pub slices: Distribution,
    /// Tokens that the embedder read.
    pub tokens: Counter,
    /// Tasks that panicked.
    pub panics: Counter,
    /// Time of one write of records to the index, in seconds.
    pub writes: Distribution,
    /// Time of one delete of records from the index, in seconds.
    pub deletes: Distribution,
    /// Receives that failed.
    pub receive_retries: Retries,
    /// Groups of changes, and requests to the index, that failed.
    pub apply_retries: Retries,
    /// Changes and messages that were moved to the dead letters, in the order of [`Reason::ALL`].
    dead_letters: [Counter; Reason::ALL.len()],
    /// What this process scales.
    pub scaling: ScalingGauges,
    /// Time from statement to searchable, in seconds.
    pub freshness: ByLane<Distribution>,
    /// A lane each: a load must not hide how fresh edits are.
    samples: Mutex<[Samples; Lane::ALL.len()]>,
}

/// Freshness in fine steps, in milliseconds.
#[derive(Debug, Default)]
struct Samples {
    all: Histogram,
    /// Since the last sample.
    recent: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            received: ByLane::default(),
            in_flight: ByLane::default(),
            batches: ByLane::new(|| Distribution::new(BATCH)),
            applied: ByLane::default(),
            embedded: ByLane::default(),
            unchanged: Counter::default(),
            same_text: Counter::default(),
            conflicts: Counter::default(),
            embedder: Distribution::new(REQUEST_S),
            slices: Distribution::new(BATCH),
            tokens: Counter::default(),
            panics: Counter::default(),
            writes: Distribution::new(REQUEST_S),
            deletes: Distribution::new(REQUEST_S),
            receive_retries: Retries::default(),
            apply_retries: Retries::default(),
            dead_letters: Default::default(),
            scaling: ScalingGauges::default(),
            freshness: ByLane::new(|| Distribution::new(LAG_S)),
            samples: Mutex::default(),
        }
    }
}

impl Metrics {
    /// Counts the time from statement to searchable of one change each, in milliseconds.
    pub fn record_freshness(&self, lane: Lane, ms: impl IntoIterator<Item = u64>) {
        let mut samples = self.samples();
        let Samples { all, recent } = &mut samples[lane as usize];
        for ms in ms {
            all.record(ms);
            recent.record(ms);
            self.freshness[lane].observe(ms as f64 / 1000.0);
        }
    }

    /// Counts a batch that was received.
    pub fn begin_batch(&self, lane: Lane, changes: u64) {
        self.received[lane].add(changes);
        self.in_flight[lane].raise(changes);
        self.batches[lane].observe(changes as f64);
    }

    /// Counts the end of a batch that was received.
    pub fn end_batch(&self, lane: Lane, changes: u64) {
        self.in_flight[lane].lower(changes);
    }

    /// Counts a call of the embedder.
    pub fn called_embedder(&self, texts: usize, tokens: u64, took: Duration) {
        self.slices.observe(texts as f64);
        self.tokens.add(tokens);
        self.embedder.observe(took.as_secs_f64());
    }

    /// Counts a change or a message that was moved to the dead letters.
    pub fn dead_lettered(&self, reason: Reason) {
        self.dead_letters[reason as usize].add(1);
    }

    /// Changes and messages that were moved to the dead letters.
    pub fn dead_letters(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.into_iter().map(|reason| (reason, self.dead_letters[reason as usize].get()))
    }

    /// Changes applied and texts embedded since the start.
    #[must_use]
    pub fn totals(&self) -> (u64, u64) {
        (self.applied.sum(), self.embedded.sum())
    }

    /// Freshness since the start, of both lanes.
    #[must_use]
    pub fn freshness(&self) -> Histogram {
        let mut all = Histogram::default();
        for (bucket, count) in self.samples().iter().flat_map(|lane| lane.all.buckets()) {
            all.add(bucket, count);
        }
        all
    }

    /// Freshness of a lane since the last call.
    #[must_use]
    pub fn take_recent(&self, lane: Lane) -> Histogram {
        std::mem::take(&mut self.samples()[lane as usize].recent)
    }

    fn samples(&self) -> std::sync::MutexGuard<'_, [Samples; Lane::ALL.len()]> {
        self.samples.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
