//! The indexer: jobs from the queue into the index.
//!
//! The step takes messages and returns when the index holds, for every id in them, what the row said
//! when the write was fenced. It rests on three things. The job is a hint: rows are read here, never
//! taken from the message. Nothing is written unless row and ledger entry are, under the entry's
//! lock, as they were when the vector was made; what changed meanwhile goes round again. A message is
//! acknowledged last, so that a crash at any point repeats work, which is idempotent.

mod run;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::pipeline::catalog::Hash;
use crate::pipeline::change::{Job, Lane};
use crate::pipeline::embedder::Embedding;
use crate::pipeline::failure::{Error, Result};
use crate::pipeline::index::{Desired, FencedWrite, Planned, VectorIndex};
use crate::pipeline::ledger::{Ledger, Peeked};
use crate::pipeline::meter::Meter;
use crate::pipeline::queue::{JobQueue, Message, Receipt};
use crate::pipeline::schedule::Scheduler;

/// A message's changes are written in parts that take about this long to embed: what is embedded is
/// found soon, and a row that changes meanwhile costs little.
const WRITE_EVERY: Duration = Duration::from_millis(500);

/// Changes in a part at least: enough slices for every thread.
const MIN_PART: u64 = 32;

/// Changes in a part at most, so that a transaction stays short.
const MAX_PART: u64 = 1_000;

/// Rounds of peek, embed and fenced write before a message is put back: more means that somebody
/// rewrites these very rows all the time.
const MAX_ROUNDS: u32 = 10;

/// What the indexer needs of the settings.
#[derive(Clone, Debug)]
pub struct Options {
    /// The source's name: messages of another source are not ours.
    pub source: String,
    /// Embedding threads.
    pub workers: usize,
    /// A lane holds at most what is embedded in this time.
    pub hold: Duration,
    /// How often a lane is looked at when no wake-up comes.
    pub poll: Duration,
    /// A message received more often, and undecodable or failing for good, is dead-lettered.
    pub max_receives: u32,
}

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stepped {
    /// Distinct ids in the messages.
    pub changes: u64,
    /// Ids that were written or deleted in the index.
    pub applied: u64,
    /// Distinct texts that went through the model.
    pub embedded: u64,
    /// Rounds that fenced writes had to repeat.
    pub conflicts: u64,
}

/// Applies jobs to an index.
pub struct Indexer {
    queue: Arc<dyn JobQueue>,
    ledger: Arc<dyn Ledger>,
    index: Arc<dyn VectorIndex>,
    scheduler: Scheduler,
    meter: Arc<Meter>,
    options: Options,
    /// Changes a second, smoothed, to size receives by.
    pace: AtomicU64,
}

/// The content hash of the text whose vector a write wants, if it wants one.
type Wants = Option<Hash>;

/// Texts by their content hash.
type Texts = HashMap<Hash, Arc<str>>;

/// A change as the messages tell it.
#[derive(Clone, Copy, Debug)]
struct Hint {
    version: i64,
    /// When its statement ran, by the database's clock, in microseconds since the epoch.
    stated_us: i64,
}

impl Indexer {
    /// An indexer over these backends.
    #[must_use]
    pub fn new(
        queue: Arc<dyn JobQueue>,
        ledger: Arc<dyn Ledger>,
        index: Arc<dyn VectorIndex>,
        scheduler: Scheduler,
        meter: Arc<Meter>,
        options: Options,
    ) -> Self {
        Self { queue, ledger, index, scheduler, meter, options, pace: AtomicU64::new(0) }
    }

    /// Applies messages of one lane and acknowledges them. On an error none of them is acknowledged.
    pub async fn step(&self, lane: Lane, messages: &[Message]) -> Result<Stepped> {
        let mut ours = Vec::new();
        for message in messages {
            match self.check(message) {
                Ok(job) => ours.push((message, job)),
                Err(reason) => {
                    tracing::error!(
                        message.id,
                        reason,
                        "message is not a job of ours: moved to the dead letters"
                    );
                    self.queue.dead_letter(message, &reason).await?;
                }
            }
        }
        let mut hints: BTreeMap<String, Hint> = BTreeMap::new();
        for job in ours.iter().map(|(_, job)| job) {
            let oldest_us = job.oldest.as_microsecond();
            for group in &job.groups {
                let hint =
                    Hint { version: group.version, stated_us: oldest_us + group.after_ms as i64 * 1000 };
                for id in &group.ids {
                    let known = hints.entry(id.clone()).or_insert(hint);
                    if hint.version > known.version {
                        *known = hint;
                    }
                }
            }
        }
        let mut done = Stepped { changes: hints.len() as u64, ..Stepped::default() };
        let ids: Vec<String> = hints.keys().cloned().collect();
        let mut made = HashMap::new();
        for part in ids.chunks(self.part()) {
            let started = Instant::now();
            let mut rest = part.to_vec();
            for round in 0.. {
                if rest.is_empty() {
                    break;
                }
                if round == MAX_ROUNDS {
                    return Err(Error::retryable("apply changes", "the rows kept changing meanwhile"));
                }
                rest = self.round(lane, rest, &hints, &mut made, &mut done).await?;
                done.conflicts += u64::from(!rest.is_empty());
            }
            self.keep_pace(part.len() as u64, started.elapsed());
        }
        let receipts: Vec<Receipt> = ours.iter().map(|(message, _)| message.receipt.clone()).collect();
        self.queue.acknowledge(&receipts).await?;
        Ok(done)
    }

    /// One round of peek, embed and fenced write; returns the ids that must go round again.
    async fn round(
        &self,
        lane: Lane,
        ids: Vec<String>,
        hints: &BTreeMap<String, Hint>,
        made: &mut HashMap<Hash, Embedding>,
        done: &mut Stepped,
    ) -> Result<Vec<String>> {
        let peeked = self.ledger.peek(&ids).await?;
        let (planned, texts) = plan(peeked, hints);
        if planned.is_empty() {
            return Ok(Vec::new());
        }
        let (hashes, texts): (Vec<Hash>, Vec<Arc<str>>) =
            texts.into_iter().filter(|(hash, _)| !made.contains_key(hash)).unzip();
        if !texts.is_empty() {
            let vectors = self.scheduler.embed(lane, &texts).await?;
            done.embedded += texts.len() as u64;
            self.meter.embedded(texts.len() as u64);
            made.extend(hashes.into_iter().zip(vectors));
        }
        let planned = with_vectors(planned, made);
        let applied = self.fence()?.apply(&planned).await?;
        let committed = Instant::now();
        let written = planned.len() - applied.conflicted.len();
        done.applied += written as u64;
        self.meter.applied(written as u64);
        let conflicted: std::collections::HashSet<&str> =
            applied.conflicted.iter().map(String::as_str).collect();
        let stated = planned
            .iter()
            .filter(|write| !conflicted.contains(write.id.as_str()))
            .filter_map(|write| hints.get(&write.id));
        // Both times are the database's, so that no clock has to agree with another.
        let after_commit_us = committed.elapsed().as_micros() as i64;
        self.meter.fresh(
            stated.map(|hint| ((applied.clock_us + after_commit_us - hint.stated_us) / 1000).max(0) as u64),
        );
        Ok(applied.conflicted)
    }

    fn fence(&self) -> Result<&dyn FencedWrite> {
        self.index
            .fenced()
            .ok_or_else(|| Error::fatal("write to the index", "this index cannot write under a fence"))
    }

    fn check<'a>(&self, message: &'a Message) -> Result<&'a Job, String> {
        match &message.body {
            Err(undecodable) => Err(undecodable.reason.clone()),
            Ok(job) if job.source != self.options.source => {
                Err(format!("its source is {:?} and this indexer's {:?}", job.source, self.options.source))
            }
            Ok(job) => Ok(job),
        }
    }

    fn keep_pace(&self, changes: u64, took: Duration) {
        let measured = changes * 1000 / (took.as_millis() as u64).max(1);
        let old = self.pace.load(Ordering::Relaxed);
        let new = if old == 0 { measured } else { (old * 3 + measured) / 4 };
        self.pace.store(new, Ordering::Relaxed);
    }

    /// Changes that are written together.
    fn part(&self) -> usize {
        let pace = self.pace.load(Ordering::Relaxed);
        (pace * WRITE_EVERY.as_millis() as u64 / 1000).clamp(MIN_PART, MAX_PART) as usize
    }
}

/// Decides what is to be done for each id, dropping those that are in sync, and lists the distinct
/// texts whose vectors are wanted.
fn plan(peeked: Vec<Peeked>, hints: &BTreeMap<String, Hint>) -> (Vec<(Planned, Wants)>, Texts) {
    let mut planned = Vec::new();
    let mut texts = HashMap::new();
    for Peeked { id, row, entry } in peeked {
        if entry.as_ref().is_some_and(|entry| entry.matches(row.as_ref())) {
            continue;
        }
        // Never worked on and not there: nothing to take out of the index.
        if entry.is_none() && row.is_none() {
            continue;
        }
        let mut wants = None;
        let desired = match row {
            None => Desired::Absent,
            Some(row) if !row.has_text() => Desired::Textless { row },
            Some(row) => {
                let vector_stands = entry.as_ref().is_some_and(|entry| {
                    entry.open == 0
                        && !entry.dirty
                        && !entry.deleted
                        && entry.content_hash == Some(row.content_hash)
                });
                if !vector_stands {
                    texts.entry(row.content_hash).or_insert_with(|| row.text.clone());
                    wants = Some(row.content_hash);
                }
                Desired::Present { row, embedding: None }
            }
        };
        let version = hints.get(&id).map_or(0, |hint| hint.version);
        planned.push((Planned { id, epoch: entry.map(|entry| entry.epoch), version, desired }, wants));
    }
    (planned, texts)
}

/// Gives each write the vector that it wants.
fn with_vectors(planned: Vec<(Planned, Wants)>, made: &HashMap<Hash, Embedding>) -> Vec<Planned> {
    planned
        .into_iter()
        .map(|(mut write, wants)| {
            if let Desired::Present { embedding, .. } = &mut write.desired {
                *embedding = wants.and_then(|hash| made.get(&hash).cloned());
            }
            write
        })
        .collect()
}
