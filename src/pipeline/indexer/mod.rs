//! The indexer: jobs from the queue into the index.
//!
//! The job is a hint: rows are read here, never taken from the message. Nothing is acknowledged
//! before the index holds, for every id in the message, what the row said, or the ledger says that
//! the id will be done again, or the change stands in the dead letters. A crash at any point repeats
//! work, which is idempotent.
//!
//! How a group of ids is written is the index's own capability: under a fence ([`fenced`]) or under
//! an attempt ([`attempt`]); each module says why it is safe. [`batch`] decides what is tried, split
//! and given up, [`run`] receives, holds and stops, and [`visibility`] keeps others from what is held.

mod attempt;
mod batch;
mod fenced;
mod health;
mod misdirected;
mod run;
mod searchable;
mod visibility;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::pipeline::catalog::Hash;
use crate::pipeline::change::Lane;
use crate::pipeline::clock::Clock;
use crate::pipeline::embedder::Embedding;
use crate::pipeline::failure::{Error, Result};
use crate::pipeline::fault::Board;
use crate::pipeline::index::{VectorIndex, Writes};
use crate::pipeline::lease::Lease;
use crate::pipeline::ledger::{Ledger, Opened, Outcome, Peeked};
use crate::pipeline::meter::Meter;
use crate::pipeline::queue::{DeadLetters, JobQueue, Message, Queue, QueueStats};
use crate::pipeline::schedule::Scheduler;
use batch::Batch;
use health::Health;
use searchable::AllAwaited;
use tokio::sync::RwLock;

/// A message's changes are written in groups that take about this long to embed: what is embedded is
/// found soon, and a row that changes meanwhile costs little.
const WRITE_EVERY: Duration = Duration::from_millis(500);

/// Changes in a group at least: enough slices for every thread.
const MIN_GROUP: u64 = 32;

/// Changes in a group at most, so that a transaction stays short.
const MAX_GROUP: u64 = 1_000;

/// Bytes of rows that are read together. A row is held a few times over (as it came, as it is hashed, and
/// as it is read again under its lock), and each lane has a few batches under way.
const GROUP_BYTES: u64 = 8 << 20;

/// So few rows are read without asking for their size first.
const UNASKED: usize = 2;

/// What the indexer needs of the settings.
#[derive(Clone, Debug)]
pub struct Options {
    /// The source's name: messages of another source are not ours.
    pub source: String,
    /// This worker's name, unique among all that ever were: attempts stand under it.
    pub worker: String,
    /// Embedding threads.
    pub workers: usize,
    /// A lane holds at most what is embedded in this time.
    pub hold: Duration,
    /// How often a lane is looked at when no wake-up comes.
    pub poll: Duration,
    /// Of a message that was received more often nothing is read before its change is counted: the last
    /// resort against one that takes the process down.
    pub max_receives: u32,
    /// After this long an accepted write has been applied, or never will be; the lease included.
    pub settle: Duration,
    /// How often an index whose queries are behind is asked how far they are.
    pub look: Duration,
}

/// What a batch came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stepped {
    /// Distinct ids in the messages.
    pub changes: u64,
    /// Ids that were written or deleted in the index.
    pub applied: u64,
    /// Distinct texts that went through the model.
    pub embedded: u64,
    /// Groups that had to be done again because a row or an entry changed meanwhile.
    pub conflicts: u64,
    /// Changes given up.
    pub dead_lettered: u64,
}

/// Applies jobs to an index.
pub struct Indexer {
    queue: Arc<dyn JobQueue>,
    dead_letters: Arc<dyn DeadLetters>,
    stats: Arc<dyn QueueStats>,
    ledger: Arc<dyn Ledger>,
    index: Arc<dyn VectorIndex>,
    scheduler: Scheduler,
    meter: Arc<Meter>,
    lease: Arc<Lease>,
    options: Options,
    faults: Arc<Board>,
    health: Health,
    /// Whether the run ends when nothing is left, so that it must not hold work for somebody to mend a setting.
    ends_when_idle: AtomicBool,
    /// Batches that are under way.
    under_way: AtomicUsize,
    /// Held by every try, and alone by one that is under suspicion.
    quiet: RwLock<()>,
    /// Messages of somebody else's that came.
    misdirected: Mutex<misdirected::Seen>,
    /// Changes a second, smoothed, to size receives by.
    pace: AtomicU64,
    /// Numbers this worker's attempts.
    attempts: AtomicU64,
    /// Attempts that are being worked on.
    in_hand: Mutex<Vec<String>>,
    /// Attempts that may have written and are not known to be closed, with how they are to be closed.
    unclosed: Mutex<BTreeMap<String, Vec<(Opened, Outcome)>>>,
    /// Changes that were written and are not found by queries yet.
    awaited: Mutex<AllAwaited>,
}

/// The vectors that a batch has made, so that a text is embedded once however often it is tried.
type Made = HashMap<Hash, Embedding>;

/// A change as the messages tell it.
#[derive(Clone, Copy, Debug)]
struct Hint {
    version: i64,
    /// When its statement ran, by the database's clock, in microseconds since the epoch.
    stated_us: i64,
}

/// What came of writing a group.
#[derive(Debug, Default)]
struct Round {
    /// Ids that changed meanwhile: to be done again.
    again: Vec<String>,
    /// Ids that were not looked at, because their rows are too large to be read with the others.
    unread: Vec<String>,
    /// Ids of a request that was refused for good, and why.
    refused: Option<(Vec<String>, Error)>,
    /// Ids written.
    applied: u64,
    /// Those of them whose entry is clean now.
    settled: u64,
}

impl Indexer {
    /// An indexer over these backends.
    #[must_use]
    pub fn new(
        queue: Queue,
        ledger: Arc<dyn Ledger>,
        index: Arc<dyn VectorIndex>,
        scheduler: Scheduler,
        meter: Arc<Meter>,
        lease: Arc<Lease>,
        options: Options,
    ) -> Self {
        let Queue { jobs, dead_letters, stats } = queue;
        Self {
            queue: jobs,
            dead_letters,
            stats,
            ledger,
            index,
            scheduler,
            meter,
            lease,
            options,
            faults: Arc::default(),
            health: Health::default(),
            ends_when_idle: AtomicBool::new(false),
            under_way: AtomicUsize::new(0),
            quiet: RwLock::const_new(()),
            misdirected: Mutex::default(),
            pace: AtomicU64::new(0),
            attempts: AtomicU64::new(0),
            in_hand: Mutex::default(),
            unclosed: Mutex::default(),
            awaited: Mutex::default(),
        }
    }

    /// The same, telling a board what holds the work.
    #[must_use]
    pub fn reporting(self, faults: Arc<Board>) -> Self {
        Self { health: Health::new(Arc::clone(&faults)), faults, ..self }
    }

    /// Applies messages of one lane and acknowledges them. On an error, those that are not done with
    /// stay unacknowledged.
    pub async fn step(&self, lane: Lane, messages: &[Message]) -> Result<Stepped> {
        let mut batch = self.batch(messages, self.group_size());
        self.work(lane, &mut batch).await?;
        Ok(batch.done)
    }

    /// Embeds slices for whoever asks, one at a time, for as long as it is polled.
    pub async fn embed_slices(&self) {
        self.scheduler.work().await;
    }

    /// Writes a group of ids, however this index is written to.
    async fn round(&self, lane: Lane, ids: &[String], batch: &mut Batch) -> Result<Round> {
        let (now, later) = ids.split_at(self.fits(ids).await?);
        let mut round = match self.index.writes() {
            Writes::Fenced(fence) => self.write_fenced(fence, lane, now, batch).await,
            Writes::Plain(plain) => self.write_attempt(plain, lane, now, batch).await,
        }?;
        round.unread = later.to_vec();
        Ok(round)
    }

    /// How many of the first ids can be read together.
    async fn fits(&self, ids: &[String]) -> Result<usize> {
        if ids.len() <= UNASKED {
            return Ok(ids.len());
        }
        Ok(self.ledger.fits(ids, GROUP_BYTES).await?.clamp(1, ids.len()))
    }

    /// Makes the vectors of texts that the batch has not made yet.
    async fn make(&self, lane: Lane, texts: BTreeMap<Hash, Arc<str>>, batch: &mut Batch) -> Result<()> {
        let (hashes, texts): (Vec<Hash>, Vec<Arc<str>>) =
            texts.into_iter().filter(|(hash, _)| !batch.made.contains_key(hash)).unzip();
        if texts.is_empty() {
            return Ok(());
        }
        let vectors = match self.scheduler.embed(lane, &texts).await {
            Ok(vectors) => vectors,
            Err(error) => {
                batch.failed_at_embedder = true;
                return Err(error.over_the_change());
            }
        };
        self.health.embedded();
        batch.done.embedded += texts.len() as u64;
        self.meter.embedded(texts.len() as u64);
        batch.made.extend(hashes.into_iter().zip(vectors));
        Ok(())
    }

    /// Tells the meter of ids that are searchable now.
    fn fresh<'a>(
        &self,
        lane: Lane,
        ids: impl Iterator<Item = &'a str>,
        hints: &BTreeMap<String, Hint>,
        committed: (i64, Duration),
    ) {
        let (clock_us, at) = committed;
        // Both times are the database's, so that no clock has to agree with another.
        let after_commit_us = self.clock().now().saturating_sub(at).as_micros() as i64;
        self.meter.fresh(
            lane,
            ids.filter_map(|id| hints.get(id))
                .map(|hint| ((clock_us + after_commit_us - hint.stated_us) / 1000).max(0) as u64),
        );
    }

    fn clock(&self) -> &dyn Clock {
        &**self.lease.clock()
    }

    fn keep_pace(&self, changes: u64, took: Duration) {
        let measured = changes * 1000 / (took.as_millis() as u64).max(1);
        let old = self.pace.load(Ordering::Relaxed);
        let new = if old == 0 { measured } else { (old * 3 + measured) / 4 };
        self.pace.store(new, Ordering::Relaxed);
    }

    /// Changes that are written together.
    fn group_size(&self) -> usize {
        let pace = self.pace.load(Ordering::Relaxed);
        (pace * WRITE_EVERY.as_millis() as u64 / 1000).clamp(MIN_GROUP, MAX_GROUP) as usize
    }
}

/// Whether nothing is to be done for an id.
fn is_in_sync(peeked: &Peeked) -> bool {
    match &peeked.entry {
        Some(entry) => entry.matches(peeked.row.as_ref()),
        // Never worked on and not there: nothing to take out of the index.
        None => peeked.row.is_none(),
    }
}
