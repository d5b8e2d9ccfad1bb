//! The world that the real steps run in: a table with its outbox and ledger, a queue, an index, each
//! of which fails in the ways that the real ones do.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use rand::RngExt as _;
use rand::rngs::SmallRng;
use refarch::pipeline::change::{Job, Lane, Op};
use refarch::pipeline::clock::Clock;
use refarch::pipeline::embedder::{BatchSize, Embedder, Embedding, Tokens};
use refarch::pipeline::failure::{Error, FailureKind, Result};
use refarch::pipeline::index::{
    Applied, Desired, ExternalWrite, Listing, Match, OwnershipStore, Planned, Record, Stored,
    TransactionalWrite, VectorIndex, Writes,
};
use refarch::pipeline::ledger::{
    CloseResult, Closed, Entry, Ledger, Opened, Outcome, Peeked, Pending, Swept,
};
use refarch::pipeline::outbox::{BuildJobs, ClaimRequest, Outbox, OutboxRow, Transferred};
use refarch::pipeline::queue::{
    Backlog, DeadLetter, DeadLetterCause, DeadLetters, JobQueue, Message, QueueStats, Receipt,
};
use refarch::pipeline::source_row::{Hash, SourceRow};

use crate::executor::{SimClock, turn};

/// How long a write that was accepted may take to be applied.
pub const MAX_APPLY_DELAY: Duration = Duration::from_secs(12);

/// The workers' lease.
pub const LEASE: Duration = Duration::from_secs(6);

/// What the sweep is told: lease and settling time.
pub const SETTLE: Duration = Duration::from_secs(20);

/// A request's longest time.
const REQUEST: Duration = Duration::from_secs(2);

/// How long a received message stays invisible.
pub const VISIBILITY: Duration = Duration::from_secs(9);

/// A rule of the protocol left out. Each must make the simulation diverge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolMutation {
    NoOverlapRule,
    CleanCloseAfterDoubt,
    SweepWithoutSettling,
    SkipWhileOpen,
    ReadBeforeOpen,
    HashSkipWhileDirty,
    ConditionalUpsertAfterDelete,
    AcknowledgeBeforeClose,
    TruncateSkipsWhatIsOpen,
    LostOpeningStands,
    SweptAttemptNotPutBack,
    RepeatedClosingTakesAll,
    RestoreWithoutSettling,
}

/// What becomes of an extension of visibility.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extensions {
    Work,
    Fail,
    /// No answer comes.
    Hang,
}

/// What the index can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IndexKind {
    Transactional,
    External,
}

#[derive(Clone)]
struct QueuedMessage {
    id: u64,
    job: Job,
    visible_at: Duration,
    receive_count: u32,
}

#[derive(Clone)]
struct TrackedWrite {
    worker: String,
    ids: Vec<String>,
    abandoned_at: Option<Duration>,
}

/// The database's tables at an earlier moment.
#[derive(Clone)]
struct Backup {
    rows: BTreeMap<String, RowText>,
    outbox: Vec<OutboxRow>,
    truncations: BTreeSet<i64>,
    ledger: BTreeMap<String, (Entry, i32)>,
    attempts: BTreeMap<String, TrackedWrite>,
}

enum DelayedWrite {
    Upsert(Record),
    Delete(String),
}

/// A record as the index holds it: which text, with which metadata.
#[derive(Clone, Debug, PartialEq)]
pub struct Content {
    pub text: Hash,
    pub metadata: Hash,
    /// What the vector was made of.
    pub vector: f32,
    version: i64,
}

/// A row of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowText {
    pub text: String,
    pub metadata: String,
}

pub struct World {
    pub rng: SmallRng,
    pub clock: Arc<SimClock>,
    pub kind: IndexKind,
    pub mutation: Option<ProtocolMutation>,
    /// While this holds, things go wrong.
    pub faults: bool,
    pub counts: BTreeMap<&'static str, u64>,
    pub rows: BTreeMap<String, RowText>,
    outbox: Vec<OutboxRow>,
    truncations: BTreeSet<i64>,
    seq: i64,
    xid: u64,
    ledger: BTreeMap<String, (Entry, i32)>,
    attempts: BTreeMap<String, TrackedWrite>,
    /// Workers whose session lives.
    pub worker_locks: BTreeSet<String>,
    lanes: [Vec<QueuedMessage>; 2],
    pub extensions: Extensions,
    messages: u64,
    pub dead: Vec<(Job, DeadLetterCause)>,
    pub index: BTreeMap<String, Content>,
    late: Vec<(Duration, DelayedWrite)>,
    backup: Option<Backup>,
    /// When every row is queued, after the database was restored.
    distrust_at: Option<Duration>,
    /// Attempts that the restored database does not know of. Once every row was queued, they are as if swept.
    lost_by_restore: BTreeMap<String, TrackedWrite>,
    /// Attempts that were swept and that their workers have not closed since.
    swept: BTreeMap<String, TrackedWrite>,
    /// Workers that must not die now, with the attempts that they must close before: they wrote under an
    /// attempt that had been swept, which is the residue that the protocol names.
    overwriting: BTreeMap<String, BTreeSet<String>>,
    /// The first invariant of the ledger that did not hold.
    pub broken: Option<String>,
    /// Rows as first peeked, for a plant.
    peeked: BTreeMap<String, Option<RowText>>,
    /// How each receive fails, while they do.
    pub cannot_receive: Option<FailureKind>,
    /// Whether what happens is printed.
    is_recorded: bool,
}

impl World {
    pub fn new(
        rng: SmallRng,
        clock: Arc<SimClock>,
        kind: IndexKind,
        mutation: Option<ProtocolMutation>,
    ) -> Self {
        Self {
            rng,
            clock,
            kind,
            mutation,
            faults: true,
            counts: BTreeMap::new(),
            rows: BTreeMap::new(),
            outbox: Vec::new(),
            truncations: BTreeSet::new(),
            seq: 0,
            xid: 0,
            ledger: BTreeMap::new(),
            attempts: BTreeMap::new(),
            worker_locks: BTreeSet::new(),
            lanes: [Vec::new(), Vec::new()],
            extensions: Extensions::Work,
            messages: 0,
            dead: Vec::new(),
            index: BTreeMap::new(),
            late: Vec::new(),
            backup: None,
            distrust_at: None,
            lost_by_restore: BTreeMap::new(),
            swept: BTreeMap::new(),
            overwriting: BTreeMap::new(),
            broken: None,
            peeked: BTreeMap::new(),
            cannot_receive: None,
            is_recorded: std::env::var_os("REFARCH_HISTORY").is_some(),
        }
    }

    /// Prints what happened, if `REFARCH_HISTORY` is set: for reading a schedule that diverged.
    pub fn record(&self, what: impl FnOnce() -> String) {
        if self.is_recorded {
            println!("{:>12.6} {}", self.clock.now().as_secs_f64() - 3_600.0, what());
        }
    }

    pub fn count(&mut self, what: &'static str) {
        self.record(|| what.to_owned());
        *self.counts.entry(what).or_default() += 1;
    }

    fn is_mutated(&self, mutation: ProtocolMutation) -> bool {
        self.mutation == Some(mutation)
    }

    fn now_us(&self) -> i64 {
        self.clock.now().as_micros() as i64
    }

    fn chance(&mut self, one_in: u32) -> bool {
        self.faults && self.rng.random_ratio(1, one_in)
    }

    fn capture(&mut self, seq: i64, op: Op, ids: Vec<String>, xid_changes: u64) {
        self.xid += 1;
        let row = OutboxRow { seq, op, ids, xid: self.xid, changed_at_us: self.now_us(), xid_changes };
        self.outbox.push(row);
    }

    fn next_seq(&mut self) -> i64 {
        // Sequence order is not commit order.
        self.seq += 1;
        (self.seq + self.rng.random_range(0..3)) * 100_000 + self.seq
    }

    /// Commits a statement of the application.
    pub fn write(&mut self, id: &str, row: Option<RowText>) {
        let op = if row.is_some() { Op::Upsert } else { Op::Delete };
        self.record(|| format!("the application writes {id}: {row:?}"));
        match row {
            Some(row) => drop(self.rows.insert(id.to_owned(), row)),
            None => drop(self.rows.remove(id)),
        }
        let seq = self.next_seq();
        let large = if self.rng.random_ratio(1, 3) { 1_000 } else { 1 };
        self.capture(seq, op, vec![id.to_owned()], large);
    }

    /// Commits a TRUNCATE.
    pub fn truncate(&mut self) {
        self.rows.clear();
        let seq = self.next_seq();
        self.truncations.insert(seq);
        self.capture(seq, Op::Delete, Vec::new(), 1_000);
        self.count("truncate");
    }

    /// Copies the database. An index in the database would go back together with it. A restore has every row written
    /// anew, which hides what another mutation did: then there is no copy.
    pub fn back_up(&mut self) {
        let is_hidden = self.mutation.is_some() && !self.is_mutated(ProtocolMutation::RestoreWithoutSettling);
        if self.kind == IndexKind::External && !is_hidden {
            self.backup = Some(Backup {
                rows: self.rows.clone(),
                outbox: self.outbox.clone(),
                truncations: self.truncations.clone(),
                ledger: self.ledger.clone(),
                attempts: self.attempts.clone(),
            });
        }
    }

    /// Restores the database's copy. The queue and the index stay as they are, and the index still applies what it
    /// accepted.
    pub fn restore(&mut self) {
        let Some(backup) = self.backup.clone() else { return };
        let mut lost = std::mem::take(&mut self.attempts);
        lost.retain(|name, _| !backup.attempts.contains_key(name));
        self.lost_by_restore.append(&mut lost);
        Backup {
            rows: self.rows,
            outbox: self.outbox,
            truncations: self.truncations,
            ledger: self.ledger,
            attempts: self.attempts,
        } = backup;
        self.worker_locks.clear();
        let settle = if self.is_mutated(ProtocolMutation::RestoreWithoutSettling) {
            Duration::ZERO
        } else {
            LEASE + SETTLE
        };
        self.distrust_at = Some(self.clock.now() + settle);
        self.count("database restored");
    }

    /// Queues every row and entry, and trusts no entry. Records without either get an entry and are queued too, as
    /// the proof does it.
    fn invalidate(&mut self) {
        self.distrust_at = None;
        self.record(|| "every entry is invalidated".into());
        // A worker that writes under one of these now must live until it closes it. Its request was sent, or about to
        // be sent, before the worker was frozen for longer than lease and settling time.
        self.swept.append(&mut self.lost_by_restore);
        for id in self.index.keys() {
            self.ledger.entry(id.clone()).or_default();
        }
        self.ledger.values_mut().for_each(|(entry, _)| entry.invalidate());
        let ids: BTreeSet<String> = self.rows.keys().chain(self.ledger.keys()).cloned().collect();
        self.requeue(ids.into_iter().collect());
    }

    /// Applies late writes that are due, and handles a restore after the settling time.
    pub fn pass_time(&mut self) {
        let now = self.clock.now();
        if self.distrust_at.is_some_and(|at| at <= now) {
            self.invalidate();
        }
        if self.late.is_empty() {
            return;
        }
        let (due, later) = std::mem::take(&mut self.late).into_iter().partition(|(at, _)| *at <= now);
        self.late = later;
        let due: Vec<(Duration, DelayedWrite)> = due;
        for (_, write) in due {
            self.apply(write);
        }
    }

    fn apply(&mut self, write: DelayedWrite) {
        match write {
            DelayedWrite::Upsert(record) => {
                self.record(|| format!("the index takes {}: {:?}", record.row.id, record.row.text));
                let content = Content {
                    text: record.row.content_hash,
                    metadata: record.row.metadata_hash,
                    vector: record.embedding[0],
                    version: record.version,
                };
                self.index.insert(record.row.id, content);
            }
            DelayedWrite::Delete(id) => {
                self.record(|| format!("the index loses {id}"));
                self.index.remove(&id);
            }
        }
    }

    /// Between transactions `open` is the number of attempts that name the id.
    fn check_invariant(&mut self) {
        if self.broken.is_some() {
            return;
        }
        for (id, (entry, _)) in &self.ledger {
            let naming = self.attempts.values().filter(|attempt| attempt.ids.contains(id)).count();
            if entry.open != naming as i32 {
                self.broken =
                    Some(format!("id {id} is open {} times and {naming} attempts name it", entry.open));
                return;
            }
        }
    }

    /// Whether the worker must not die now.
    pub fn must_survive(&self, worker: &str) -> bool {
        self.overwriting.get(worker).is_some_and(|attempts| !attempts.is_empty())
    }

    /// Messages of a lane that are not acknowledged.
    pub fn queued(&self, lane: Lane) -> usize {
        self.lanes[lane as usize].len()
    }

    /// Whether nothing is under way. A worker that wrote late has still to say so.
    pub fn is_quiet(&self) -> bool {
        self.overwriting.values().all(BTreeSet::is_empty)
            && self.outbox.is_empty()
            && self.lanes.iter().all(Vec::is_empty)
            && self.attempts.is_empty()
            && self.late.is_empty()
            && self.distrust_at.is_none()
    }

    /// Whether a message can be received now.
    pub fn is_any_visible(&self) -> bool {
        let now = self.clock.now();
        self.lanes.iter().flatten().any(|held| held.visible_at <= now)
    }

    /// Tries of a change that stand in the count.
    pub fn tries(&self, id: &str) -> i32 {
        self.ledger.get(id).map_or(0, |(_, tries)| *tries)
    }

    /// Makes some message come again, or come now though somebody holds it.
    pub fn inject_queue_fault(&mut self) {
        let lane = self.rng.random_range(0..2);
        if self.lanes[lane].is_empty() {
            return;
        }
        let at = self.rng.random_range(0..self.lanes[lane].len());
        if self.rng.random() {
            self.messages += 1;
            let copy = QueuedMessage {
                id: self.messages,
                visible_at: Duration::ZERO,
                ..self.lanes[lane][at].clone()
            };
            self.lanes[lane].push(copy);
            self.count("duplicated message");
        } else {
            self.lanes[lane][at].visible_at = Duration::ZERO;
            self.count("message visible too early");
        }
    }

    /// Puts dead letters back.
    pub fn redrive(&mut self) {
        for (job, _) in std::mem::take(&mut self.dead) {
            self.messages += 1;
            let lane = job.lane as usize;
            self.lanes[lane].push(QueuedMessage {
                id: self.messages,
                job,
                visible_at: Duration::ZERO,
                receive_count: 0,
            });
        }
    }

    /// Takes every id that the outbox holds, sorted.
    pub fn take_outbox(&mut self) -> Vec<String> {
        let mut ids: Vec<String> = self.outbox.drain(..).flat_map(|row| row.ids).collect();
        ids.sort();
        ids
    }

    /// What keeps the world from being quiet, for messages.
    pub fn leftovers(&self) -> String {
        format!(
            "outbox {}, queue {}, attempts {:?}, ledger {:?}",
            self.outbox.len(),
            self.lanes.iter().map(Vec::len).sum::<usize>(),
            self.attempts.keys().collect::<Vec<_>>(),
            self.ledger
                .iter()
                .map(|(id, (entry, _))| (id, entry.open, entry.dirty, entry.deleted))
                .collect::<Vec<_>>()
        )
    }

    fn entry(&mut self, id: &str) -> &mut Entry {
        &mut self.ledger.entry(id.to_owned()).or_default().0
    }

    fn requeue(&mut self, ids: Vec<String>) {
        for id in ids {
            let seq = self.next_seq();
            self.capture(seq, Op::Upsert, vec![id], 1);
        }
    }

    fn source_row(&self, id: &str) -> Option<SourceRow> {
        self.rows.get(id).map(|row| source_row(id, row))
    }

    /// A rule is broken by keeping what should have been forgotten.
    fn restore_hashes(&mut self, id: &str, before: &Entry) {
        if self.is_mutated(ProtocolMutation::HashSkipWhileDirty) {
            let entry = self.entry(id);
            if entry.dirty {
                entry.content_hash = before.content_hash;
                entry.metadata_hash = before.metadata_hash;
                entry.deleted = before.deleted;
            }
        }
    }
}

pub fn source_row(id: &str, row: &RowText) -> SourceRow {
    // A plain number instead of SHA-256: fast, and as good for telling texts apart.
    let number = |text: &str| {
        let mut bytes = [0; 32];
        for (at, byte) in text.bytes().enumerate() {
            bytes[at % 32] ^= byte.wrapping_add(at as u8);
        }
        Hash(bytes)
    };
    SourceRow {
        id: id.to_owned(),
        text: row.text.as_str().into(),
        content_hash: number(&row.text),
        metadata: row.metadata.as_str().into(),
        metadata_hash: number(&row.metadata),
    }
}

/// The vector of a text: exact in a float.
pub fn vector_of(text: &str) -> f32 {
    text.bytes().fold(7_u32, |sum, byte| (sum.wrapping_mul(31) + u32::from(byte)) % (1 << 24)) as f32
}

/// Rows with such a text are refused by the index for good.
pub const REFUSED: &str = "refused";

/// Rows with such a text fail each time, as if the index were away.
pub const FAILING: &str = "failing";

/// One process's view of the world.
#[derive(Clone)]
pub struct View {
    pub world: Arc<Mutex<World>>,
    pub worker: String,
}

impl View {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// A round trip to the database: may fail before anything was done.
    async fn database(&self) -> Result<()> {
        turn().await;
        let mut world = self.world();
        if world.chance(120) {
            world.count("database call lost");
            return Err(Error::new(FailureKind::ConnectionLost, "simulated", "connection lost before"));
        }
        Ok(())
    }

    /// The answer: a committed call may be reported as failed.
    async fn answer<T>(&self, value: T) -> Result<T> {
        turn().await;
        let mut world = self.world();
        if world.chance(120) {
            world.count("database commit told as failed");
            return Err(Error::new(FailureKind::ConnectionLost, "simulated", "connection lost after"));
        }
        Ok(value)
    }
}

#[async_trait]
impl Ledger for View {
    async fn peek(&self, ids: &[String]) -> Result<Vec<Peeked>> {
        self.database().await?;
        let mut peeked = Vec::with_capacity(ids.len());
        {
            let mut world = self.world();
            for id in ids {
                let mut entry = world.ledger.get(id).map(|(entry, _)| entry.clone());
                let mut row = world.rows.get(id).cloned();
                if world.is_mutated(ProtocolMutation::ReadBeforeOpen) {
                    let is_open = entry.as_ref().is_some_and(|entry| entry.open > 0);
                    if is_open {
                        row = world.peeked.get(id).cloned().unwrap_or(row);
                    } else {
                        world.peeked.insert(id.clone(), row.clone());
                    }
                }
                if world.is_mutated(ProtocolMutation::SkipWhileOpen)
                    && let Some(entry) = &mut entry
                {
                    entry.open = 0;
                }
                if world.is_mutated(ProtocolMutation::HashSkipWhileDirty)
                    && let Some(entry) = &mut entry
                {
                    entry.dirty &= entry.content_hash.is_none();
                }
                peeked.push(Peeked { id: id.clone(), row: row.map(|row| source_row(id, &row)), entry });
            }
        }
        turn().await;
        Ok(peeked)
    }

    async fn rows_after(&self, _: Option<&str>, _: usize) -> Result<Vec<Peeked>> {
        unreachable!("the steps do not walk the table")
    }

    async fn open(&self, attempt: &str, worker: &str, ids: &[String]) -> Result<Vec<Opened>> {
        self.database().await?;
        let opened = {
            let mut world = self.world();
            let opened = ids.iter().map(|id| world.entry(id).open(id)).collect();
            let held = TrackedWrite { worker: worker.into(), ids: ids.to_vec(), abandoned_at: None };
            world.attempts.insert(attempt.into(), held);
            world.record(|| format!("attempt {attempt} opens {opened:?}"));
            opened
        };
        self.answer(opened).await
    }

    async fn close(&self, attempt: &str, worker: &str, closing: &[(Opened, Outcome)]) -> Result<Closed> {
        self.database().await?;
        let closed = {
            let mut world = self.world();
            let mut closed = Closed::default();
            let mut open = Vec::new();
            let mut requeue = Vec::new();
            let forgetful = world.is_mutated(ProtocolMutation::RepeatedClosingTakesAll);
            if let Some(named) = world.attempts.get(attempt).map(|attempt| attempt.ids.clone()) {
                let still = |opened: &Opened| forgetful || named.contains(&opened.id);
                for (opened, outcome) in closing.iter().filter(|(opened, _)| still(opened)) {
                    let before = world.entry(&opened.id).clone();
                    let mut seen = opened.clone();
                    if world.is_mutated(ProtocolMutation::NoOverlapRule) {
                        seen.revision = before.revision;
                        seen.shared = false;
                    }
                    match world.entry(&opened.id).close(&seen, outcome) {
                        CloseResult::Settled => {
                            closed.settled.push(opened.id.clone());
                            world.ledger.entry(opened.id.clone()).or_default().1 = 0;
                        }
                        CloseResult::Open => open.push(opened.id.clone()),
                        CloseResult::Requeue => requeue.push(opened.id.clone()),
                        CloseResult::Dirty | CloseResult::Unchanged => {}
                    }
                    if matches!(outcome, Outcome::Settled { .. }) && world.entry(&opened.id).dirty {
                        closed.overlapped += 1;
                        world.count("overlap noticed");
                    }
                    world.restore_hashes(&opened.id, &before);
                }
                if open.is_empty() {
                    world.attempts.remove(attempt);
                }
            } else if !world.is_mutated(ProtocolMutation::SweptAttemptNotPutBack) {
                for (opened, outcome) in closing {
                    if *outcome != Outcome::Unwritten {
                        world.entry(&opened.id).reopen();
                        open.push(opened.id.clone());
                        world.count("swept attempt put back");
                    }
                }
            }
            if !open.is_empty() {
                closed.abandoned = open.len() as u64;
                let held =
                    TrackedWrite { worker: worker.into(), ids: open, abandoned_at: Some(world.clock.now()) };
                world.attempts.insert(attempt.into(), held);
            }
            world.requeue(requeue);
            world.swept.remove(attempt);
            if let Some(attempts) = world.overwriting.get_mut(&self.worker) {
                attempts.remove(attempt);
            }
            world.check_invariant();
            world.record(|| format!("attempt {attempt} closes {closing:?}: {closed:?}"));
            closed.clock_us = world.now_us();
            closed
        };
        self.answer(closed).await
    }

    async fn abandon_orphans(&self, worker: &str, in_hand: &[String]) -> Result<u64> {
        self.database().await?;
        let mut world = self.world();
        // What a worker does not know of it will never close.
        world.swept.retain(|name, attempt| attempt.worker != worker || in_hand.contains(name));
        if let Some(attempts) = world.overwriting.get_mut(worker) {
            attempts.retain(|name| in_hand.contains(name));
        }
        if world.is_mutated(ProtocolMutation::LostOpeningStands) {
            return Ok(0);
        }
        let now = world.clock.now();
        let mut disowned = 0;
        for (name, attempt) in &mut world.attempts {
            if attempt.worker == worker && attempt.abandoned_at.is_none() && !in_hand.contains(name) {
                attempt.abandoned_at = Some(now);
                disowned += 1;
            }
        }
        if disowned > 0 {
            world.count("attempt disowned");
        }
        Ok(disowned)
    }

    async fn sweep(&self, settle: Duration, limit: usize) -> Result<Swept> {
        self.database().await?;
        let mut world = self.world();
        let now = world.clock.now();
        let settle =
            if world.is_mutated(ProtocolMutation::SweepWithoutSettling) { Duration::ZERO } else { settle };
        let World { attempts, worker_locks, .. } = &mut *world;
        let mut swept = Swept::default();
        for attempt in attempts.values_mut() {
            if attempt.abandoned_at.is_none() && !worker_locks.contains(&attempt.worker) {
                attempt.abandoned_at = Some(now);
                swept.abandoned += 1;
            }
        }
        let due: Vec<String> = attempts
            .iter()
            .filter(|(_, attempt)| attempt.abandoned_at.is_some_and(|at| at + settle <= now))
            .map(|(name, _)| name.clone())
            .take(limit)
            .collect();
        for name in due {
            let attempt = world.attempts.remove(&name).unwrap();
            world.record(|| format!("attempt {name} of {:?} is swept", attempt.ids));
            if world.worker_locks.contains(&attempt.worker) {
                world.count("attempt swept while its worker lived");
            }
            let mut requeue = Vec::new();
            for id in &attempt.ids {
                let before = world.entry(id).clone();
                if world.entry(id).sweep() == CloseResult::Requeue {
                    requeue.push(id.clone());
                }
                world.restore_hashes(id, &before);
            }
            world.swept.insert(name, attempt);
            swept.requeued += requeue.len() as u64;
            swept.writes += 1;
            world.requeue(requeue);
            world.count("attempt swept");
        }
        world.check_invariant();
        Ok(swept)
    }

    async fn requeue(&self, ids: &[String]) -> Result<()> {
        let mut world = self.world();
        for id in ids {
            world.entry(id).invalidate();
        }
        world.requeue(ids.to_vec());
        Ok(())
    }

    async fn pending(&self) -> Result<Pending> {
        unreachable!("the steps do not ask for it")
    }

    async fn park(&self, id: &str) -> Result<()> {
        self.database().await?;
        {
            let mut world = self.world();
            let (entry, tries) = world.ledger.entry(id.to_owned()).or_default();
            entry.park();
            *tries = 0;
        }
        self.answer(()).await
    }

    async fn count_try(&self, id: &str, by: i32) -> Result<u32> {
        self.database().await?;
        let tries = {
            let mut world = self.world();
            let tries = &mut world.ledger.entry(id.to_owned()).or_default().1;
            *tries = tries.saturating_add(by).max(0);
            *tries as u32
        };
        self.answer(tries).await
    }
}

#[async_trait]
impl Outbox for View {
    async fn transfer(&mut self, _: ClaimRequest, build_jobs: BuildJobs<'_>) -> Result<Transferred> {
        self.database().await?;
        let (jobs, claimed) = {
            let mut world = self.world();
            let take = world.rng.random_range(1..4).min(world.outbox.len());
            let claimed: Vec<OutboxRow> = world.outbox[..take].to_vec();
            let mut rows = Vec::new();
            for row in &claimed {
                if world.truncations.contains(&row.seq) {
                    let skip = world.is_mutated(ProtocolMutation::TruncateSkipsWhatIsOpen);
                    let ids: Vec<String> = world
                        .ledger
                        .iter()
                        .filter(|(_, (e, _))| !(e.deleted && (skip || (e.open == 0 && !e.dirty))))
                        .map(|(id, _)| id.clone())
                        .collect();
                    rows.push(OutboxRow { ids, ..row.clone() });
                } else {
                    rows.push(row.clone());
                }
            }
            (build_jobs(rows), claimed)
        };
        let done = Transferred { rows: claimed.len(), ..Transferred::default() };
        // A queue elsewhere: sent first, deleted after. In the same database it is one transaction.
        let elsewhere = self.world().rng.random();
        self.world().send_all(&jobs);
        if elsewhere {
            self.answer(()).await?;
        }
        {
            let mut world = self.world();
            let gone: BTreeSet<(i64, u64)> = claimed.iter().map(|row| (row.seq, row.xid)).collect();
            world.outbox.retain(|row| !gone.contains(&(row.seq, row.xid)));
        }
        self.answer(done).await
    }

    async fn wait(&mut self, timeout: Duration) {
        let clock = Arc::clone(&self.world().clock);
        clock.sleep(timeout).await;
    }
}

impl World {
    fn send_all(&mut self, jobs: &[Job]) {
        for job in jobs {
            self.messages += 1;
            let delay = if self.chance(6) {
                Duration::from_millis(self.rng.random_range(0..8_000))
            } else {
                Duration::ZERO
            };
            let held = QueuedMessage {
                id: self.messages,
                job: job.clone(),
                visible_at: self.clock.now() + delay,
                receive_count: 0,
            };
            let lane = job.lane as usize;
            // Order is not kept.
            let at = self.rng.random_range(0..=self.lanes[lane].len());
            self.lanes[lane].insert(at, held);
        }
    }
}

#[async_trait]
impl JobQueue for View {
    async fn send(&self, jobs: &[Job]) -> Result<()> {
        self.world().send_all(jobs);
        Ok(())
    }

    async fn receive(&self, lane: Lane, max: usize) -> Result<Vec<Message>> {
        self.database().await?;
        let cannot_receive = self.world().cannot_receive;
        if let Some(kind) = cannot_receive {
            return Err(Error::new(kind, "simulated", "nothing can be received"));
        }
        let messages = {
            let mut world = self.world();
            let now = world.clock.now();
            // A queue need not give all that it has, and so workers share.
            let max = max.min(world.rng.random_range(1..4));
            let taken: Vec<QueuedMessage> = world.lanes[lane as usize]
                .iter_mut()
                .filter(|held| held.visible_at <= now)
                .take(max)
                .map(|held| {
                    held.receive_count += 1;
                    held.visible_at = now + VISIBILITY;
                    held.clone()
                })
                .collect();
            if world.is_mutated(ProtocolMutation::AcknowledgeBeforeClose) {
                world.lanes[lane as usize].retain(|held| !taken.iter().any(|t| t.id == held.id));
            }
            taken
                .into_iter()
                .map(|held| Message {
                    id: held.id.to_string(),
                    receipt: Receipt { lane, handle: held.id.to_string() },
                    receive_count: held.receive_count,
                    body: Ok(held.job),
                })
                .collect()
        };
        self.answer(messages).await
    }

    async fn wait(&self, _: Lane, timeout: Duration) {
        let clock = Arc::clone(&self.world().clock);
        clock.sleep(timeout).await;
    }

    async fn acknowledge(&self, receipts: &[Receipt]) -> Result<()> {
        self.database().await?;
        {
            let mut world = self.world();
            for receipt in receipts {
                world.lanes[receipt.lane as usize].retain(|held| held.id.to_string() != receipt.handle);
            }
        }
        self.answer(()).await
    }

    async fn extend_visibility(&self, receipts: &[Receipt], timeout: Duration) -> Result<()> {
        self.database().await?;
        if timeout.is_zero() {
            self.world().count("message released");
        }
        let extensions = self.world().extensions;
        match extensions {
            Extensions::Work => {}
            Extensions::Fail => {
                return Err(Error::new(
                    FailureKind::ConnectionLost,
                    "simulated",
                    "visibility is not extended",
                ));
            }
            Extensions::Hang => std::future::pending().await,
        }
        let mut world = self.world();
        let until = world.clock.now() + timeout;
        for receipt in receipts {
            for held in &mut world.lanes[receipt.lane as usize] {
                if held.id.to_string() == receipt.handle {
                    held.visible_at = until;
                }
            }
        }
        Ok(())
    }

    fn visibility_timeout(&self) -> Duration {
        VISIBILITY
    }
}

#[async_trait]
impl DeadLetters for View {
    async fn store(&self, message: &Message, part: Option<&Job>, why: &DeadLetterCause) -> Result<()> {
        self.database().await?;
        {
            let mut world = self.world();
            let job = part.or(message.body.as_ref().ok()).expect("only jobs are sent").clone();
            world.dead.push((job, why.clone()));
            world.count("dead letter");
            if part.is_none() {
                let lane = message.receipt.lane as usize;
                world.lanes[lane].retain(|held| held.id.to_string() != message.receipt.handle);
            }
        }
        self.answer(()).await
    }

    async fn count(&self) -> Result<u64> {
        Ok(self.world().dead.len() as u64)
    }

    async fn list(&self, _: Option<&str>, _: usize) -> Result<Vec<DeadLetter>> {
        unreachable!("the steps do not read them")
    }

    async fn redrive(&self, _: &[String]) -> Result<Vec<String>> {
        unreachable!("the steps do not bring them back")
    }
}

#[async_trait]
impl QueueStats for View {
    async fn backlog(&self, lane: Lane) -> Result<Backlog> {
        let world = self.world();
        let visible = world.lanes[lane as usize].iter().map(|held| held.job.changes() as u64).sum();
        Ok(Backlog::counted(visible, 0))
    }

    async fn oldest(&self) -> Result<Option<Timestamp>> {
        unreachable!("the steps do not ask for it")
    }
}

/// What becomes of a request to the index.
enum FaultDecision {
    Done,
    NotDone(Error),
    DoneButFailed(Error),
    Late(Error),
}

impl View {
    /// A request to the index: its fate is decided while it is under way.
    async fn request(&self, writes: Vec<DelayedWrite>) -> Result<()> {
        // Long enough that a worker is frozen now and then amid a request.
        let travels = self.world().rng.random_range(1..8);
        for _ in 0..travels {
            turn().await;
        }
        {
            let mut world = self.world();
            for write in &writes {
                let id = match write {
                    DelayedWrite::Upsert(record) => &record.row.id,
                    DelayedWrite::Delete(id) => id,
                };
                // Which of its attempts a worker writes under cannot be seen: it may be any that names the id.
                let swept = world.swept.iter().filter(|(_, a)| a.worker == self.worker && a.ids.contains(id));
                let swept: Vec<String> = swept.map(|(name, _)| name.clone()).collect();
                if !swept.is_empty() {
                    world.overwriting.entry(self.worker.clone()).or_default().extend(swept);
                    world.count("write that may be under a swept attempt");
                }
            }
            let texts: Vec<&str> = writes
                .iter()
                .filter_map(|write| match write {
                    DelayedWrite::Upsert(record) => Some(&*record.row.text),
                    DelayedWrite::Delete(_) => None,
                })
                .collect();
            if texts.contains(&REFUSED) {
                return Err(Error::new(FailureKind::RefusedData, "simulated index", "400"));
            }
            if texts.contains(&FAILING) {
                return Err(Error::new(
                    FailureKind::Overloaded,
                    "simulated index",
                    "500 for this one always",
                ));
            }
            let decision = world.decide_fault();
            let now = world.clock.now();
            match decision {
                FaultDecision::Done => writes.into_iter().for_each(|write| world.apply(write)),
                FaultDecision::NotDone(error) => return Err(error),
                FaultDecision::DoneButFailed(error) => {
                    for write in writes {
                        world.apply(write);
                    }
                    return Err(error);
                }
                FaultDecision::Late(error) => {
                    let within = MAX_APPLY_DELAY.as_millis() as u64;
                    for write in writes {
                        let after = Duration::from_millis(world.rng.random_range(1..within));
                        world.late.push((now + after, write));
                    }
                    return Err(error);
                }
            }
        }
        turn().await;
        Ok(())
    }
}

impl World {
    fn decide_fault(&mut self) -> FaultDecision {
        if !self.faults {
            return FaultDecision::Done;
        }
        let kind = if self.is_mutated(ProtocolMutation::CleanCloseAfterDoubt) {
            FailureKind::Conflict
        } else {
            FailureKind::TimedOut
        };
        let doubtful = Error::new(kind, "simulated index", "5xx or timeout");
        match self.rng.random_range(0..40) {
            0 => {
                self.count("index 429");
                FaultDecision::NotDone(Error::new(FailureKind::RateLimited, "simulated index", "429"))
            }
            1 => {
                self.count("index 503, not done");
                FaultDecision::NotDone(doubtful)
            }
            2 => {
                self.count("index 500, but done");
                FaultDecision::DoneButFailed(doubtful)
            }
            3 | 4 => {
                self.count("index timeout, done late");
                FaultDecision::Late(doubtful)
            }
            _ => FaultDecision::Done,
        }
    }
}

#[async_trait]
impl ExternalWrite for View {
    async fn upsert(&self, records: &[Record]) -> Result<()> {
        self.request(records.iter().cloned().map(DelayedWrite::Upsert).collect()).await
    }

    async fn delete(&self, ids: &[String]) -> Result<()> {
        self.request(ids.iter().cloned().map(DelayedWrite::Delete).collect()).await
    }

    fn fits(&self, _: &[Record]) -> usize {
        2
    }

    fn max_deletes(&self) -> usize {
        2
    }

    fn request_timeout(&self) -> Duration {
        REQUEST
    }

    async fn probe_record(&self) -> Result<()> {
        self.request(Vec::new()).await
    }
}

#[async_trait]
impl TransactionalWrite for View {
    async fn apply(&self, planned: &[Planned]) -> Result<Applied> {
        self.database().await?;
        let applied =
            {
                let mut world = self.world();
                let mut applied = Applied { clock_us: world.now_us(), ..Applied::default() };
                if planned.iter().any(
                    |plan| matches!(&plan.desired, Desired::Present { row, .. } if &*row.text == REFUSED),
                ) {
                    return Err(Error::new(FailureKind::RefusedData, "simulated index", "refused"));
                }
                if planned.iter().any(
                    |plan| matches!(&plan.desired, Desired::Present { row, .. } if &*row.text == FAILING),
                ) {
                    let said = "fails for this one always";
                    return Err(Error::new(FailureKind::SuspectRows, "simulated index", said));
                }
                for plan in planned {
                    if world.is_mutated(ProtocolMutation::ConditionalUpsertAfterDelete) {
                        world.apply_by_version(plan);
                        continue;
                    }
                    let row = world.source_row(&plan.id);
                    if !world.settle(plan, row.as_ref()) {
                        applied.conflicted.push(plan.id.clone());
                        world.count("transactional write conflicted");
                    }
                }
                applied
            };
        self.answer(applied).await
    }
}

impl World {
    /// Writes index and ledger if the write still rests on what is there.
    fn settle(&mut self, plan: &Planned, row: Option<&SourceRow>) -> bool {
        let (entry, tries) = self.ledger.entry(plan.id.clone()).or_default();
        if !entry.settle_transactional(plan, row) {
            return false;
        }
        *tries = 0;
        match &plan.desired {
            Desired::Present { row, embedding: Some(embedding) } => {
                let record = Record { embedding: embedding.clone(), row: row.clone(), version: plan.version };
                self.apply(DelayedWrite::Upsert(record));
            }
            Desired::Present { row, embedding: None } => {
                if let Some(content) = self.index.get_mut(&plan.id) {
                    content.metadata = row.metadata_hash;
                }
            }
            Desired::Textless { .. } | Desired::Absent => drop(self.index.remove(&plan.id)),
        }
        true
    }

    /// What a peer does: the newer version wins, and a delete leaves nothing to compare with.
    fn apply_by_version(&mut self, plan: &Planned) {
        let newer = self.index.get(&plan.id).is_none_or(|held| held.version <= plan.version);
        if newer || !matches!(plan.desired, Desired::Present { .. }) {
            let revision = Some(self.entry(&plan.id).revision);
            self.settle(&Planned { revision, ..plan.clone() }, plan.desired.row());
        }
    }
}

#[async_trait]
impl VectorIndex for View {
    async fn query(&self, _: &[f32], _: usize) -> Result<Vec<Match>> {
        Ok(Vec::new())
    }

    async fn count(&self) -> Result<u64> {
        Ok(self.world().index.len() as u64)
    }

    async fn list(&self, _: Option<&str>, _: usize) -> Result<Listing> {
        Ok(Listing::default())
    }

    async fn fetch(&self, ids: &[String]) -> Result<Vec<Stored>> {
        turn().await;
        let world = self.world();
        let found = ids.iter().filter_map(|id| {
            world.index.get(id).map(|content| Stored {
                id: id.clone(),
                content_hash: Some(content.text),
                metadata_hash: Some(content.metadata),
                embedding: Arc::new([content.vector]),
            })
        });
        Ok(found.collect())
    }

    fn ownership_store(&self) -> Option<&dyn OwnershipStore> {
        None
    }

    async fn check_writable(&self) -> Result<()> {
        self.request(Vec::new()).await
    }

    fn writes(&self) -> Writes<'_> {
        match self.world().kind {
            IndexKind::Transactional => Writes::Transactional(self),
            IndexKind::External => Writes::External(self),
        }
    }

    async fn maintain(&self, _: u64) -> Result<bool> {
        Ok(false)
    }
}

/// Embeds at once, into a number that tells what text it is of.
pub struct InstantEmbedder;

#[async_trait]
impl Embedder for InstantEmbedder {
    fn dimensions(&self) -> usize {
        0
    }

    fn model(&self) -> &'static str {
        "none"
    }

    fn batch_size(&self) -> BatchSize {
        BatchSize::Timed
    }

    async fn tokenize(&self, texts: Vec<Arc<str>>) -> Result<Vec<Tokens>> {
        Ok(texts.into_iter().map(|text| Tokens::Text { count: 1, text }).collect())
    }

    async fn embed(&self, batch: Vec<Tokens>) -> Result<Vec<Embedding>> {
        turn().await;
        batch.iter().map(|tokens| Ok(Embedding::from([vector_of(tokens.text()?)]))).collect()
    }
}
