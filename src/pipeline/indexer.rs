//! The indexer: jobs from the queue into the index.
//!
//! The step takes messages and returns when the index holds, for every id in them, what the row said
//! when the write was fenced. It rests on three things. The job is a hint: rows are read here, never
//! taken from the message. Nothing is written unless row and ledger entry are, under the entry's
//! lock, as they were when the vector was made; what changed meanwhile goes round again. A message is
//! acknowledged last, so that a crash at any point repeats work, which is idempotent.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::catalog::Hash;
use super::change::{Job, Lane, MAX_CHANGES_PER_JOB};
use super::embedder::Embedding;
use super::failure::{Class, Error, Result};
use super::index::{Desired, FencedWrite, Planned, VectorIndex};
use super::ledger::{Ledger, Peeked};
use super::meter::Meter;
use super::queue::{JobQueue, Message, Receipt};
use super::retry::Backoff;
use super::schedule::Scheduler;

/// Batches of one lane that are under way at once: one is embedded while the next is received and
/// peeked and the last is written.
const BATCHES_PER_LANE: usize = 3;

/// Batches that are received ahead of the one that is worked on, however much is held.
const PREFETCHED: usize = 1;

/// Messages in one receive; SQS allows no more.
const MAX_RECEIVE: usize = 10;

/// Changes that a lane may always hold, however slow the embedder is: a message and a bit.
const MIN_HELD: u64 = 64;

/// Changes that a lane holds at most, so that memory stays bounded when nothing has to be embedded.
const MAX_HELD: u64 = 20_000;

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

/// Receives after which a message that fails for good is not tried any more.
const PERMANENT_TRIES: u32 = 3;

/// How often the index's search structures are looked after.
const MAINTAIN_EVERY: Duration = Duration::from_secs(1);

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

    fn may_hold(&self) -> u64 {
        let pace = self.pace.load(Ordering::Relaxed);
        (pace * self.options.hold.as_millis() as u64 / 1000).clamp(MIN_HELD, MAX_HELD)
    }

    /// Works until `stop`, then finishes what is held; what is not finished when `abort` comes is
    /// released to others. With `until_idle` ends once both lanes are empty.
    pub async fn run(
        self: &Arc<Self>,
        stop: &CancellationToken,
        abort: &CancellationToken,
        until_idle: bool,
    ) -> Result<()> {
        let lanes_done = CancellationToken::new();
        let mut threads = JoinSet::new();
        for _ in 0..self.options.workers.max(1) {
            let indexer = Arc::clone(self);
            threads.spawn(async move { indexer.scheduler.work().await });
        }
        let maintain = lanes_done.clone();
        let indexer = Arc::clone(self);
        let maintenance = tokio::spawn(async move {
            maintain.run_until_cancelled(indexer.maintain()).await;
        });
        // A lane that fails for good must not leave the other one working.
        let stop = stop.child_token();
        let (live, bulk) = tokio::join!(
            self.run_lane(Lane::Live, &stop, abort, until_idle),
            self.run_lane(Lane::Bulk, &stop, abort, until_idle)
        );
        lanes_done.cancel();
        let _ = maintenance.await;
        threads.shutdown().await;
        live.and(bulk)
    }

    async fn maintain(&self) {
        let mut tick = tokio::time::interval(MAINTAIN_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let result = async {
                let backlog = self.backlog().await?;
                self.index.maintain(backlog).await
            };
            if let Err(error) = result.await {
                tracing::warn!(%error, "cannot look after the index's search structures");
            }
        }
    }

    async fn backlog(&self) -> Result<u64> {
        let mut sum = 0;
        for lane in Lane::ALL {
            let backlog = self.queue.backlog(lane).await?;
            sum += backlog.visible + backlog.in_flight;
        }
        Ok(sum)
    }

    async fn run_lane(
        self: &Arc<Self>,
        lane: Lane,
        stop: &CancellationToken,
        abort: &CancellationToken,
        until_idle: bool,
    ) -> Result<()> {
        let held = Arc::new(AtomicU64::new(0));
        let batches = Arc::new(Semaphore::new(BATCHES_PER_LANE));
        let mut running: JoinSet<Result<()>> = JoinSet::new();
        let mut backoff = Backoff::default();
        // Full ones, until it is known better: ten of those at once would be hoarded.
        let mut per_message = MAX_CHANGES_PER_JOB as f64;
        let mut result = Ok(());
        while !stop.is_cancelled() {
            while let Some(ended) = running.try_join_next() {
                result = result.and(ended.unwrap_or_else(|error| Err(Error::fatal("apply changes", error))));
            }
            if result.is_err() {
                stop.cancel();
                break;
            }
            let Some(Ok(permit)) = stop.run_until_cancelled(Arc::clone(&batches).acquire_owned()).await
            else {
                break;
            };
            let room = self.may_hold().saturating_sub(held.load(Ordering::Relaxed));
            let received = if room == 0 && running.len() > PREFETCHED {
                drop(permit);
                // Something ends soon, since something is held.
                if let Some(Some(ended)) = stop.run_until_cancelled(running.join_next()).await {
                    result =
                        result.and(ended.unwrap_or_else(|error| Err(Error::fatal("apply changes", error))));
                }
                continue;
            } else {
                let wanted = (room as f64 / per_message).ceil() as usize;
                self.queue.receive(lane, wanted.clamp(1, MAX_RECEIVE)).await
            };
            match received {
                Ok(messages) if messages.is_empty() => {
                    backoff.reset();
                    drop(permit);
                    if until_idle && running.is_empty() && self.backlog().await.is_ok_and(|left| left == 0) {
                        break;
                    }
                    // A batch that ends makes no work, so there is no need to wake for it.
                    stop.run_until_cancelled(self.queue.wait(lane, self.options.poll)).await;
                }
                Ok(messages) => {
                    backoff.reset();
                    let changes: u64 =
                        messages.iter().map(|m| m.body.as_ref().map_or(1, |job| job.changes() as u64)).sum();
                    per_message = (changes as f64 / messages.len() as f64).max(1.0);
                    held.fetch_add(changes, Ordering::Relaxed);
                    let (indexer, held, abort) = (Arc::clone(self), Arc::clone(&held), abort.clone());
                    running.spawn(async move {
                        let result = indexer.hold(lane, &messages, &abort).await;
                        held.fetch_sub(changes, Ordering::Relaxed);
                        drop(permit);
                        result
                    });
                }
                Err(error) if error.class == Class::Fatal => {
                    result = Err(error);
                    stop.cancel();
                }
                Err(error) => {
                    drop(permit);
                    let pause = backoff.next(&error);
                    tracing::warn!(lane = lane.name(), %error, retry_in_ms = pause.as_millis() as u64, "cannot receive");
                    stop.run_until_cancelled(tokio::time::sleep(pause)).await;
                }
            }
        }
        while let Some(ended) = running.join_next().await {
            result = result.and(ended.unwrap_or_else(|error| Err(Error::fatal("apply changes", error))));
        }
        result
    }

    /// Steps until the messages are done with, extending their visibility meanwhile. An outage is
    /// sat out, with the messages held; on `abort` they are released.
    async fn hold(&self, lane: Lane, messages: &[Message], abort: &CancellationToken) -> Result<()> {
        let receipts: Vec<Receipt> = messages.iter().map(|message| message.receipt.clone()).collect();
        let visibility = self.queue.visibility();
        let extend = async {
            let mut tick = tokio::time::interval(visibility / 3);
            tick.tick().await;
            loop {
                tick.tick().await;
                if let Err(error) = self.queue.extend(&receipts, visibility).await {
                    tracing::warn!(lane = lane.name(), %error, "cannot extend visibility: others may repeat this work");
                }
            }
        };
        let finished = tokio::select! {
            result = self.finish(lane, messages) => Some(result),
            never = extend => never,
            () = abort.cancelled() => None,
        };
        match finished {
            Some(Ok(())) => Ok(()),
            other => {
                // Others may try at once; if this fails too, the visibility timeout does the same.
                if let Err(error) = self.queue.extend(&receipts, Duration::ZERO).await {
                    tracing::debug!(%error, "cannot release messages");
                }
                other.unwrap_or(Ok(()))
            }
        }
    }

    async fn finish(&self, lane: Lane, messages: &[Message]) -> Result<()> {
        let mut backoff = Backoff::default();
        loop {
            let error = match self.step(lane, messages).await {
                Ok(done) => {
                    tracing::debug!(
                        lane = lane.name(),
                        changes = done.changes,
                        applied = done.applied,
                        embedded = done.embedded,
                        conflicts = done.conflicts,
                        "changes applied"
                    );
                    return Ok(());
                }
                Err(error) => error,
            };
            match error.class {
                Class::Fatal => return Err(error),
                Class::Permanent => return self.give_up(messages, &error).await,
                Class::Retryable => {
                    let pause = backoff.next(&error);
                    tracing::warn!(lane = lane.name(), %error, retry_in_ms = pause.as_millis() as u64, "cannot apply changes");
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    /// Dead-letters what has failed for good often enough; the rest comes again by itself.
    async fn give_up(&self, messages: &[Message], error: &Error) -> Result<()> {
        let alone = messages.len() == 1;
        for message in messages {
            let tries = if alone { PERMANENT_TRIES } else { self.options.max_receives };
            if message.receive_count >= tries {
                tracing::error!(message.id, %error, "message fails for good: moved to the dead letters");
                self.queue.dead_letter(message, &error.to_string()).await?;
            } else {
                tracing::warn!(message.id, %error, receive_count = message.receive_count, "message failed");
                self.queue.extend(std::slice::from_ref(&message.receipt), Duration::ZERO).await?;
            }
        }
        Ok(())
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
