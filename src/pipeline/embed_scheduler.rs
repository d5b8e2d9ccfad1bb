//! The order of embedding: slices of two lanes, live slices first.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use tokio::sync::{Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

use super::change::Lane;
use super::clock::Clock;
use super::embedder::{BatchSize, Embedder, Embedding, Tokens};
use super::failure::{Error, FailureKind, Result};
use super::metrics::Metrics;

/// While both lanes have work, one slice in this many is a bulk one, so that bulk is never starved.
const BULK_SHARE: u32 = 8;

/// Speed that is assumed before the first slice was timed, in tokens a second and thread. Low, so
/// that the first slice is short. The first timing replaces it.
const FIRST_GUESS: u64 = 2_000;

/// Bulk slices hold at least this many texts, however slow the model: with fewer, reading the weights
/// takes longer than the arithmetic, and a load takes up to three times as long.
const MIN_BULK_TEXTS: usize = 8;

/// Weight of a new timing against the older ones: 1/4.
const SMOOTHING: u64 = 4;

struct Slice {
    batch: Vec<Tokens>,
    tokens: u64,
    done: oneshot::Sender<Result<Vec<Embedding>>>,
}

#[derive(Default)]
struct Queues {
    live: VecDeque<Slice>,
    bulk: VecDeque<Slice>,
    live_in_a_row: u32,
}

impl Queues {
    fn take(&mut self) -> Option<Slice> {
        let bulk_turn = self.live_in_a_row + 1 >= BULK_SHARE && !self.bulk.is_empty();
        if !bulk_turn && let Some(slice) = self.live.pop_front() {
            self.live_in_a_row += 1;
            return Some(slice);
        }
        self.live_in_a_row = 0;
        self.bulk.pop_front()
    }
}

/// Cuts texts into slices of a bounded time and hands them to the embedder, live ones first.
///
/// Sorted by length, so that a padding embedder wastes little; how much waits in here is bounded by
/// what the indexer holds.
pub struct EmbedScheduler {
    embedder: Arc<dyn Embedder>,
    clock: Arc<dyn Clock>,
    queues: Mutex<Queues>,
    /// One permit a waiting slice.
    waiting: Semaphore,
    slice: Duration,
    /// Tokens a second of one thread, smoothed; 0 before the first timing.
    speed: AtomicU64,
    metrics: Arc<Metrics>,
    /// Slices that are being embedded.
    in_work: AtomicUsize,
    /// Slices that were embedded.
    embedded: AtomicU64,
}

impl EmbedScheduler {
    /// A scheduler whose slices take about `slice`.
    #[must_use]
    pub fn new(embedder: Arc<dyn Embedder>, slice: Duration, clock: Arc<dyn Clock>) -> Self {
        Self {
            embedder,
            clock,
            queues: Mutex::default(),
            waiting: Semaphore::new(0),
            slice,
            speed: AtomicU64::new(0),
            metrics: Arc::default(),
            in_work: AtomicUsize::new(0),
            embedded: AtomicU64::new(0),
        }
    }

    /// The same scheduler, which counts the calls of the embedder here.
    #[must_use]
    pub fn measuring(self, metrics: Arc<Metrics>) -> Self {
        Self { metrics, ..self }
    }

    /// Slices that are being embedded or wait for it.
    #[must_use]
    pub fn slices(&self) -> usize {
        self.in_work.load(Ordering::Relaxed) + self.waiting.available_permits()
    }

    /// Slices that were embedded since the start.
    #[must_use]
    pub fn embedded(&self) -> u64 {
        self.embedded.load(Ordering::Relaxed)
    }

    /// Tells the embedder that so many [`Self::work`] are running from now on.
    pub async fn resize(&self, workers: usize) {
        self.embedder.resize(workers).await;
    }

    /// Tokens a second of one thread, as measured, or as assumed before the first timing.
    #[must_use]
    pub fn tokens_per_second(&self) -> u64 {
        match self.speed.load(Ordering::Relaxed) {
            0 => FIRST_GUESS,
            measured => measured,
        }
    }

    /// Records the time of a slice.
    fn record_speed(&self, tokens: u64, took_us: u64) {
        if took_us == 0 {
            return;
        }
        let measured = tokens * 1_000_000 / took_us;
        let new = match self.speed.load(Ordering::Relaxed) {
            0 => measured,
            old => (old * (SMOOTHING - 1) + measured) / SMOOTHING,
        };
        self.speed.store(new.max(1), Ordering::Relaxed);
    }

    /// Embeds texts in their order; at least one [`Self::work`] must be running.
    pub async fn embed(&self, lane: Lane, texts: Vec<Arc<str>>) -> Result<Vec<Embedding>> {
        let count = texts.len();
        let tokenized = self.embedder.tokenize(texts).await?;
        if tokenized.len() != count {
            return Err(Error::new(
                FailureKind::UnexpectedAnswer,
                "embed texts",
                "the embedder read another number of texts",
            ));
        }
        let mut order: Vec<(u64, usize)> =
            tokenized.iter().enumerate().map(|(at, text)| (text.count() as u64, at)).collect();
        order.sort_unstable();
        let mut tokenized: Vec<Option<Tokens>> = tokenized.into_iter().map(Some).collect();
        let mut pending = Vec::new();
        for part in cut(&order, &self.bounds(lane)) {
            let (done, result) = oneshot::channel();
            let slice = Slice {
                batch: part.iter().filter_map(|(_, at)| tokenized[*at].take()).collect(),
                tokens: part.iter().map(|(tokens, _)| tokens).sum(),
                done,
            };
            {
                let mut queues = self.queues();
                match lane {
                    Lane::Live => queues.live.push_back(slice),
                    Lane::Bulk => queues.bulk.push_back(slice),
                }
            }
            self.waiting.add_permits(1);
            pending.push((part, result));
        }
        let mut embeddings: Vec<Option<Embedding>> = vec![None; count];
        for (part, result) in pending {
            let vectors = result.await.map_err(|_| {
                Error::new(FailureKind::ConnectionLost, "embed texts", "the embedder stopped")
            })??;
            if vectors.len() != part.len() {
                return Err(Error::new(
                    FailureKind::UnexpectedAnswer,
                    "embed texts",
                    "the embedder returned another number of vectors",
                ));
            }
            for ((_, at), vector) in part.iter().zip(vectors) {
                embeddings[*at] = Some(vector);
            }
        }
        embeddings
            .into_iter()
            .collect::<Option<_>>()
            .ok_or_else(|| Error::new(FailureKind::UnexpectedAnswer, "embed texts", "a text was left out"))
    }

    /// How much a slice of this lane holds.
    fn bounds(&self, lane: Lane) -> Bounds {
        match self.embedder.batch_size() {
            BatchSize::Bounded { texts, tokens } => {
                Bounds { least: 1, most: texts.max(1), tokens: tokens as u64 }
            }
            BatchSize::Timed => Bounds {
                least: match lane {
                    Lane::Live => 1,
                    Lane::Bulk => MIN_BULK_TEXTS,
                },
                most: usize::MAX,
                tokens: (self.tokens_per_second() * self.slice.as_millis() as u64 / 1000).max(1),
            },
        }
    }

    /// Takes slices and embeds them, one at a time, until `retired`. A slice that was taken is embedded to its end.
    ///
    /// # Errors
    ///
    /// If the embedder panicked. The texts of the slice have failed then, with the same error.
    pub async fn work(&self, retired: &CancellationToken) -> Result<()> {
        // The semaphore is never closed.
        while let Some(Ok(permit)) = retired.run_until_cancelled(self.waiting.acquire()).await {
            permit.forget();
            let _in_work = InWork::count(&self.in_work);
            // What comes meanwhile may be live, and goes first.
            let ready = caught(self.embedder.ready()).await;
            let Some(slice) = self.queues().take() else { continue };
            if slice.done.is_closed() {
                continue;
            }
            let (started, texts) = (self.clock.now(), slice.batch.len());
            let result = match ready {
                Ok(()) => caught(self.embedder.embed(slice.batch)).await.flatten(),
                Err(error) => Err(error),
            };
            let took = self.clock.now().saturating_sub(started);
            self.metrics.called_embedder(texts, slice.tokens, took);
            if result.is_ok() {
                self.embedded.fetch_add(1, Ordering::Relaxed);
                self.record_speed(slice.tokens, took.as_micros() as u64);
            }
            let panic = result.as_ref().err().filter(|error| error.kind() == FailureKind::Panicked);
            let panic = panic.map(|error| Error::new(error.kind(), error.what(), error.message()));
            // The caller may have been cancelled.
            let _ = slice.done.send(result);
            if let Some(panic) = panic {
                return Err(panic);
            }
        }
        Ok(())
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The work's result, or its panic as an error. What the embedder shares with other calls is its own matter.
async fn caught<T>(work: impl Future<Output = T>) -> Result<T> {
    let panicked = |payload: Box<dyn Any + Send>| Error::panicked("embed texts", &*payload);
    AssertUnwindSafe(work).catch_unwind().await.map_err(panicked)
}

/// A slice that is in work, as long as this exists.
struct InWork<'a>(&'a AtomicUsize);

impl<'a> InWork<'a> {
    fn count(slices: &'a AtomicUsize) -> Self {
        slices.fetch_add(1, Ordering::Relaxed);
        Self(slices)
    }
}

impl Drop for InWork<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Bounds of a slice.
struct Bounds {
    /// Texts at least, as far as there are as many, whatever their tokens.
    least: usize,
    /// Texts at most.
    most: usize,
    /// Tokens at most.
    tokens: u64,
}

/// Cuts texts, in order, into runs within the bounds.
fn cut<'a>(order: &'a [(u64, usize)], bounds: &Bounds) -> Vec<&'a [(u64, usize)]> {
    let mut parts = Vec::new();
    let (mut start, mut tokens) = (0, 0_u64);
    for (at, (count, _)) in order.iter().enumerate() {
        let is_too_long = at >= start + bounds.least && tokens.saturating_add(*count) > bounds.tokens;
        if is_too_long || at - start >= bounds.most {
            parts.push(&order[start..at]);
            (start, tokens) = (at, 0);
        }
        tokens = tokens.saturating_add(*count);
    }
    if start < order.len() {
        parts.push(&order[start..]);
    }
    parts
}

#[cfg(test)]
mod tests;
