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
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slice(tokens: u64) -> Slice {
        Slice { batch: Vec::new(), tokens, done: oneshot::channel().0 }
    }

    #[test]
    fn live_goes_first_but_one_in_eight_is_bulk() {
        let mut queues = Queues::default();
        (0..32).for_each(|_| queues.live.push_back(slice(1)));
        (0..32).for_each(|_| queues.bulk.push_back(slice(2)));
        let taken: Vec<u64> = (0..32).map(|_| queues.take().unwrap().tokens).collect();
        assert_eq!(taken[0], 1);
        for eight in taken.chunks(8) {
            assert_eq!(eight.iter().filter(|tokens| **tokens == 2).count(), 1, "{taken:?}");
        }
    }

    #[test]
    fn the_first_timing_replaces_the_guess_and_later_ones_are_smoothed() {
        let clock = Arc::new(crate::pipeline::clock::BootClock);
        let scheduler = EmbedScheduler::new(Arc::new(Noting::default()), Duration::from_secs(1), clock);
        assert_eq!(scheduler.tokens_per_second(), FIRST_GUESS);
        scheduler.record_speed(400, 10_000);
        assert_eq!(scheduler.tokens_per_second(), 40_000);
        scheduler.record_speed(100, 10_000);
        assert_eq!(scheduler.tokens_per_second(), 32_500);
        scheduler.record_speed(100, 0);
        assert_eq!(scheduler.tokens_per_second(), 32_500);
    }

    /// Notes what it reads, and how many texts come together.
    #[derive(Default)]
    struct Noting {
        read: Mutex<Vec<Arc<str>>>,
        batches: Mutex<Vec<usize>>,
    }

    #[async_trait::async_trait]
    impl Embedder for Noting {
        fn dimensions(&self) -> usize {
            1
        }

        fn model(&self) -> &'static str {
            "noting"
        }

        fn batch_size(&self) -> BatchSize {
            BatchSize::Bounded { texts: 3, tokens: 10 }
        }

        async fn tokenize(&self, texts: Vec<Arc<str>>) -> Result<Vec<Tokens>> {
            self.read.lock().unwrap().extend(texts.iter().cloned());
            Ok(texts.iter().map(|text| Tokens::Ids(text.bytes().map(u32::from).collect())).collect())
        }

        async fn embed(&self, batch: Vec<Tokens>) -> Result<Vec<Embedding>> {
            self.batches.lock().unwrap().push(batch.len());
            batch.iter().map(|tokens| Ok(Embedding::from([tokens.ids()?.len() as f32]))).collect()
        }
    }

    #[tokio::test]
    async fn each_text_is_read_once_and_goes_in_batches_of_the_embedders_own_size() {
        let embedder = Arc::new(Noting::default());
        let clock = Arc::new(crate::pipeline::clock::BootClock);
        let scheduler = EmbedScheduler::new(Arc::<Noting>::clone(&embedder), Duration::from_secs(1), clock);
        let texts: Vec<Arc<str>> =
            ["eight...", "a", "seven..", "b", "twelve......", "c", "d"].map(Arc::from).to_vec();
        let never = CancellationToken::new();
        let embeddings = tokio::select! {
            embeddings = scheduler.embed(Lane::Bulk, texts.clone()) => embeddings.unwrap(),
            _ = scheduler.work(&never) => unreachable!("it goes on for ever"),
        };
        let lengths: Vec<usize> = embeddings.iter().map(|embedding| embedding[0] as usize).collect();
        assert_eq!(lengths, texts.iter().map(|text| text.len()).collect::<Vec<_>>(), "in the texts' order");
        assert_eq!(*embedder.read.lock().unwrap(), texts);
        assert_eq!(*embedder.batches.lock().unwrap(), [3, 2, 1, 1]);
    }

    proptest! {
        #[test]
        fn slices_hold_every_text_once_within_the_budget(
            tokens in proptest::collection::vec(1_u64..300, 0..80),
            budget in 1_u64..600,
            least in 1_usize..9,
            more in 0_usize..9,
        ) {
            let order: Vec<(u64, usize)> = tokens.iter().copied().zip(0..).collect();
            let most = least + more;
            let parts = cut(&order, &Bounds { least, most, tokens: budget });
            prop_assert_eq!(parts.concat(), order.clone());
            for (at, part) in parts.iter().enumerate() {
                prop_assert!(part.len() >= least || at + 1 == parts.len());
                prop_assert!(part.len() <= most);
                prop_assert!(part.len() <= least || part.iter().map(|(t, _)| t).sum::<u64>() <= budget);
            }
        }
    }
}
