//! A batch of messages, from received to acknowledged: what is tried together, split and given up.
//!
//! **What concerns all changes is nobody's dead letter.** An outage is not poison, and neither is a wrong
//! setting. A group of changes that fails in a way that another try may mend is split and put last, and after
//! a few failures in a row the batch is held as it is; nothing is counted. A failure that only somebody can
//! mend (a refused key, a missing index) holds the batch, too, and the work goes on by itself once it is
//! mended. A group that is refused for good is split until the refused change stands alone. Then a harmless
//! change is sent the same way: read, embedded and written. If it fails as well, whatever its failure, all
//! changes are concerned and the batch is held. If it goes through, the change is tried once more, because
//! the refusal may have ended just now; it is given up when it is refused again and the harmless one goes
//! through again. The same is done where the embedder or the index answers as it does to a wrong key: a filter
//! before it may say so to one text or record. The index must then take a harmless record among the others, too.
//! What holds the work is one fault, in the log once and in the status for as long as it lasts.
//!
//! A change that fails by itself, while harmless changes go through, is counted, and dead-lettered at the
//! fourth time that one worker sees.
//!
//! **A change that takes the process down** can only be found by a count that is made before the try. From a
//! message's third receive on its changes are tried one by one and counted first; every way out but a dead
//! process takes the count back, unless it is the change's own failure. Whoever kills a process (an operator,
//! another message, the kernel) leaves a count behind, so a count by itself is no verdict. Once
//! [`MAX_UNFINISHED`] tries were left unfinished, each further try is counted only after a harmless change went
//! through, and made while nothing else is tried in the process; after [`MAX_UNFINISHED_ALONE`] of those the
//! change is given up, if a harmless change still goes through. A change that comes to an end in between is
//! counted from zero. A message is never given up as a whole for how often it was received: that only tells of
//! workers. Over `max_receives`, nothing of it is read before it is counted.
//!
//! The counts are the ledger's, so that redone work is included.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::RwLockWriteGuard;

use super::{Hint, Indexer, Made, Stepped, is_in_sync};
use crate::pipeline::change::{Group, Job, Lane};
use crate::pipeline::failure::{Class, Error, Result};
use crate::pipeline::index::Writes;
use crate::pipeline::queue::{Message, Reason, Receipt, Why};

/// From this receive on, a message is worked change by change.
const ONE_BY_ONE_FROM: u32 = 3;

/// A change that failed by itself this often is dead-lettered.
const MAX_TRIES: u32 = 4;

/// A change whose tries began this often and did not end is under suspicion. More than of those that
/// failed: copies of its message may be at it in other processes right now, or in frozen ones.
const MAX_UNFINISHED: u32 = 10;

/// Such a change is dead-lettered after this many more, made with nothing else going on in the process.
const MAX_UNFINISHED_ALONE: u32 = 3;

/// Suspects that are looked at together, whether they are in sync.
const SUSPECTS_AT_ONCE: usize = 100;

/// Groups that fail in a row before the batch is put aside for a while.
const FAILURES_IN_A_ROW: usize = 3;

/// Groups that have to be done again in a row before the batch is put aside for a while: more means
/// that somebody rewrites these very rows all the time.
const CONFLICTS_IN_A_ROW: usize = 10;

/// Harmless changes that must go through in a row before a change is to blame for its failure.
const PROBES: u32 = 3;

/// The same for each refusal: a change is only to blame at its second one.
const PROBES_A_REFUSAL: u32 = 1;

/// An id that is looked up as a harmless read. No row has it, of whatever type ids are.
const PROBE_ID: &str = "\0";

/// A text that any embedder can take.
const PROBE: &str = "a plain text";

/// Messages that are worked on together.
pub(super) struct Batch {
    /// Those that are not acknowledged yet.
    messages: Vec<Message>,
    /// Their receipts, for whoever extends their visibility meanwhile.
    held: Arc<Mutex<Vec<Receipt>>>,
    pub(super) hints: BTreeMap<String, Hint>,
    pub(super) made: Made,
    pub(super) done: Stepped,
    /// Ids to be tried together.
    groups: VecDeque<Vec<String>>,
    /// Ids that are not done with.
    left: HashSet<String>,
    /// Ids of messages that came too often.
    suspects: HashSet<String>,
    /// Ids that failed by themselves, and how often that was counted here.
    failed_alone: HashMap<String, u32>,
    /// Ids that were refused for good, while a harmless change went through.
    refused: HashSet<String>,
    /// Ids whose next try may stand in the count already.
    counted: HashSet<String>,
    /// The id whose try stands in the count and has not ended.
    in_try: Option<String>,
    /// Whether texts were what failed last.
    pub(super) failed_at_embedder: bool,
}

impl Batch {
    /// Whether every message is acknowledged.
    pub(super) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Receipts of what is still held.
    pub(super) fn receipts(&self) -> Vec<Receipt> {
        self.messages.iter().map(|message| message.receipt.clone()).collect()
    }

    /// The receipts of what is still held, as they are at any time.
    pub(super) fn held(&self) -> Arc<Mutex<Vec<Receipt>>> {
        Arc::clone(&self.held)
    }

    /// Takes messages out that are done with or somebody else's: none of them is extended any more.
    fn keep(&mut self, is_held: impl FnMut(&Message) -> bool) {
        self.messages.retain(is_held);
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = self.receipts();
    }

    /// Puts the halves of a group where they are tried next, or last.
    fn split(&mut self, mut group: Vec<String>, first: bool) {
        let half = group.split_off(group.len().div_ceil(2));
        for part in if first { [half, group] } else { [group, half] } {
            if part.is_empty() {
                continue;
            }
            if first {
                self.groups.push_front(part);
            } else {
                self.groups.push_back(part);
            }
        }
    }
}

/// How a change that is counted is tried.
enum Admitted<'a> {
    Together,
    /// While nothing else is tried in this process.
    Alone {
        _quiet: RwLockWriteGuard<'a, ()>,
    },
    GivenUp,
}

fn ids(job: &Job) -> impl Iterator<Item = &String> {
    job.groups.iter().flat_map(|group| &group.ids)
}

impl Indexer {
    /// A batch of these messages, in groups of `size`.
    pub(super) fn batch(&self, messages: &[Message], size: usize) -> Batch {
        let mut hints: BTreeMap<String, Hint> = BTreeMap::new();
        let mut suspects = HashSet::new();
        for message in messages {
            let Ok(job) = &message.body else { continue };
            if job.source != self.options.source {
                continue;
            }
            if message.receive_count >= ONE_BY_ONE_FROM {
                suspects.extend(ids(job).cloned());
            }
            let oldest_us = job.oldest.as_microsecond();
            for group in &job.groups {
                // Anybody may have written the message.
                let after_us = i64::try_from(group.after_ms).unwrap_or(i64::MAX).saturating_mul(1000);
                let hint = Hint { version: group.version, stated_us: oldest_us.saturating_add(after_us) };
                // No row's id has a NUL.
                for id in group.ids.iter().filter(|id| !id.contains('\0')) {
                    let known = hints.entry(id.clone()).or_insert(hint);
                    if hint.version > known.version {
                        *known = hint;
                    }
                }
            }
        }
        let (alone, together): (BTreeSet<String>, BTreeSet<String>) =
            hints.keys().cloned().partition(|id| suspects.contains(id));
        let together: Vec<String> = together.into_iter().collect();
        let mut groups: VecDeque<Vec<String>> = together.chunks(size.max(1)).map(<[_]>::to_vec).collect();
        groups.extend(alone.into_iter().map(|id| vec![id]));
        Batch {
            messages: messages.to_vec(),
            held: Arc::new(Mutex::new(messages.iter().map(|message| message.receipt.clone()).collect())),
            done: Stepped { changes: hints.len() as u64, ..Stepped::default() },
            left: hints.keys().cloned().collect(),
            hints,
            made: HashMap::new(),
            groups,
            suspects,
            failed_alone: HashMap::new(),
            refused: HashSet::new(),
            counted: HashSet::new(),
            in_try: None,
            failed_at_embedder: false,
        }
    }

    /// Works until nothing of the batch is left. On an error the rest stays in it, to be tried again;
    /// messages that are done with are acknowledged all the same.
    pub(super) async fn work(&self, lane: Lane, batch: &mut Batch) -> Result<()> {
        let sorted = async {
            self.part_with_foreign(batch).await?;
            self.drop_in_sync_suspects(batch).await
        };
        sorted.await.inspect_err(|error| self.health.failed(error, false))?;
        let worked = self.work_groups(lane, batch).await;
        let acknowledged = self.acknowledge_done(batch).await;
        worked.and(acknowledged)
    }

    /// What is in sync need not be tried one by one: most of a message that came too often was done
    /// by whoever held it before.
    async fn drop_in_sync_suspects(&self, batch: &mut Batch) -> Result<()> {
        let too_often = |message: &&Message| message.receive_count > self.options.max_receives;
        let uncounted: HashSet<&String> = batch
            .messages
            .iter()
            .filter(too_often)
            .filter_map(|message| message.body.as_ref().ok())
            .flat_map(ids)
            .collect();
        let suspects: Vec<String> = batch
            .suspects
            .iter()
            .filter(|id| batch.left.contains(*id) && !uncounted.contains(id))
            .cloned()
            .collect();
        let mut rest = suspects.as_slice();
        while !rest.is_empty() {
            let at_once = &rest[..rest.len().min(SUSPECTS_AT_ONCE)];
            let (suspects, later) = rest.split_at(self.fits(at_once).await?);
            rest = later;
            let peeked = match self.ledger.peek(suspects).await {
                Ok(peeked) => peeked,
                // One of them cannot be read: they are tried one by one.
                Err(error) if error.class == Class::Permanent || error.about_change => continue,
                Err(error) => return Err(error),
            };
            for peeked in peeked.iter().filter(|one| is_in_sync(one)) {
                batch.left.remove(&peeked.id);
            }
        }
        let left = &batch.left;
        for group in &mut batch.groups {
            group.retain(|id| left.contains(id));
        }
        batch.groups.retain(|group| !group.is_empty());
        Ok(())
    }

    async fn work_groups(&self, lane: Lane, batch: &mut Batch) -> Result<()> {
        let (mut failures, mut conflicts) = (0, 0);
        while let Some(group) = batch.groups.pop_front() {
            let alone = (group.len() == 1).then(|| group[0].clone());
            let counted =
                alone.clone().filter(|id| batch.suspects.contains(id) || batch.failed_alone.contains_key(id));
            let admitted = match &counted {
                None => Admitted::Together,
                Some(id) => match self.admit(lane, batch, id).await {
                    Ok(admitted) => admitted,
                    Err(error) => {
                        batch.groups.push_front(group);
                        return Err(error);
                    }
                },
            };
            if matches!(admitted, Admitted::GivenUp) {
                continue;
            }
            let started = self.clock().now();
            batch.failed_at_embedder = false;
            let round = {
                let _beside = match &admitted {
                    Admitted::Alone { .. } => None,
                    _ => Some(self.quiet.read().await),
                };
                self.round(lane, &group, batch).await
            };
            drop(admitted);
            let at_embedder = batch.failed_at_embedder;
            let round = match round {
                Ok(round) => round,
                Err(error) if error.class == Class::Fatal => {
                    // One text or record may be refused as a wrong setting has all of them refused. A change that
                    // stands alone is tried against a harmless one below.
                    let may_be_its_own = error.about_change && !error.of_process;
                    if may_be_its_own
                        && (group.len() == 1 || self.others_are_taken(lane, batch, &error).await.is_ok())
                    {
                        self.refuse(lane, batch, group, &error).await?;
                        continue;
                    }
                    self.health.concerns_all(&error, at_embedder);
                    batch.groups.push_front(group);
                    // What ends this process now may be the change's own doing; a setting is not.
                    if !error.of_process {
                        self.take_back(batch).await;
                    }
                    return Err(error);
                }
                Err(error) if error.class == Class::Permanent => {
                    self.refuse(lane, batch, group, &error).await?;
                    continue;
                }
                Err(error) => {
                    self.health.failed(&error, at_embedder);
                    failures += 1;
                    match alone {
                        Some(id) => self.retry_alone(lane, batch, id, counted.is_some(), &error).await?,
                        None => batch.split(group, false),
                    }
                    if failures >= FAILURES_IN_A_ROW || batch.groups.len() <= failures {
                        return Err(error);
                    }
                    continue;
                }
            };
            batch.done.applied += round.applied;
            self.meter.applied(round.applied);
            let mut pending: HashSet<&String> = round.again.iter().chain(&round.unread).collect();
            if let Some((refused, _)) = &round.refused {
                pending.extend(refused);
            } else {
                self.health.succeeded();
                failures = 0;
            }
            for id in group.iter().filter(|id| !pending.contains(id)) {
                batch.left.remove(id);
            }
            // The rest in groups of as many as could be read together: it is likely to be alike.
            let read = group.len() - round.unread.len();
            for part in round.unread.chunks(read.max(1)).rev() {
                batch.groups.push_front(part.to_vec());
            }
            self.keep_pace(read as u64, self.clock().now().saturating_sub(started));
            let conflicted = !round.again.is_empty();
            if conflicted {
                batch.done.conflicts += 1;
                batch.groups.push_back(round.again);
            }
            conflicts = if conflicted { conflicts + 1 } else { 0 };
            // It came to an end, if not to a write that settles the entry.
            if round.refused.is_none() {
                batch.in_try = None;
                if let Some(id) = counted.filter(|_| round.settled == 0) {
                    self.ledger.count_try(&id, i32::MIN).await?;
                }
            }
            if let Some((refused, error)) = round.refused {
                self.refuse(lane, batch, refused, &error).await?;
            }
            if conflicts >= CONFLICTS_IN_A_ROW {
                return Err(Error::retryable("apply changes", "the rows kept changing meanwhile"));
            }
        }
        Ok(())
    }

    /// Counts a try before it is made, and decides how it is made.
    async fn admit<'a>(&'a self, lane: Lane, batch: &mut Batch, id: &str) -> Result<Admitted<'a>> {
        let tries = self.count(batch, id).await?;
        if tries <= MAX_UNFINISHED {
            return Ok(Admitted::Together);
        }
        // Nothing may be blamed on this change that others do, or that all meet.
        self.take_back(batch).await;
        let alone = self.quiet.write().await;
        self.probe(lane, PROBES, false).await?;
        if tries > MAX_UNFINISHED + MAX_UNFINISHED_ALONE {
            let error = "whoever worked on it did not come to an end, with nothing else going on".to_owned();
            self.give_up(batch, id, &Why { reason: Reason::Failed, error, tries: tries - 1 }).await?;
            return Ok(Admitted::GivenUp);
        }
        self.count(batch, id).await?;
        Ok(Admitted::Alone { _quiet: alone })
    }

    /// Counts a try that is about to begin.
    async fn count(&self, batch: &mut Batch, id: &str) -> Result<u32> {
        // One that may stand already is not counted again: a lost answer is nobody's fault.
        let by = i32::from(!batch.counted.remove(id));
        let counted = self.ledger.count_try(id, by).await;
        match counted {
            Ok(_) => batch.in_try = Some(id.to_owned()),
            Err(_) => {
                batch.counted.insert(id.to_owned());
            }
        }
        counted
    }

    /// Takes back the count of a try that has not ended, for a reason that is not the change's own.
    pub(super) async fn take_back(&self, batch: &mut Batch) {
        let Some(id) = batch.in_try.take() else { return };
        if let Err(error) = self.ledger.count_try(&id, -1).await {
            tracing::debug!(product.id = id, %error, "cannot take back the count of a try");
            batch.counted.insert(id);
        }
    }

    /// A change failed by itself: counts it if other things go through, which is tried out. That has
    /// to work several times in a row, or an index that fails every other time would do as a witness.
    async fn retry_alone(
        &self,
        lane: Lane,
        batch: &mut Batch,
        id: String,
        counted: bool,
        error: &Error,
    ) -> Result<()> {
        batch.groups.push_back(vec![id.clone()]);
        batch.failed_alone.entry(id.clone()).or_default();
        if !counted {
            return Ok(());
        }
        let others_go_through = error.about_change && self.probe(lane, PROBES, false).await.is_ok();
        // What was counted before the try stands only if it is the change's own fault.
        if !others_go_through {
            self.take_back(batch).await;
            return Ok(());
        }
        batch.in_try = None;
        let tries = match self.ledger.count_try(&id, 0).await {
            Ok(tries) => tries,
            Err(error) => {
                batch.counted.insert(id);
                return Err(error);
            }
        };
        let failures = batch.failed_alone.entry(id.clone()).or_default();
        *failures += 1;
        // The ledger's count may hold tries that others left unfinished.
        if tries.min(*failures) >= MAX_TRIES {
            let why = Why { reason: Reason::Failed, error: error.to_string(), tries };
            self.give_up(batch, &id, &why).await?;
            batch.groups.retain(|group| *group != [id.as_str()]);
        }
        Ok(())
    }

    /// Whether harmless changes are taken where one was refused. An index that answers as it does to a wrong key
    /// must take several in a row, among the records.
    async fn others_are_taken(&self, lane: Lane, batch: &Batch, refusal: &Error) -> Result<()> {
        let by_the_index = refusal.class == Class::Fatal && !batch.failed_at_embedder;
        let times = if by_the_index { PROBES } else { PROBES_A_REFUSAL };
        self.probe(lane, times, by_the_index).await
    }

    /// Whether a harmless change goes the whole way (read, embedded and written), time and again; with
    /// `among_records` to where records are. If not, all changes are concerned; then the error is one that no other
    /// try mends, or an outage's.
    async fn probe(&self, lane: Lane, times: u32, among_records: bool) -> Result<()> {
        for _ in 0..times {
            let mut at_embedder = false;
            let gone = async {
                self.ledger.peek(&[PROBE_ID.into()]).await?;
                at_embedder = true;
                self.scheduler.embed(lane, &[PROBE.into()]).await?;
                at_embedder = false;
                self.index.probe().await?;
                match self.index.writes() {
                    Writes::Plain(plain) if among_records => plain.probe_record().await,
                    _ => Ok(()),
                }
            };
            if let Err(error) = gone.await {
                if error.class == Class::Retryable {
                    self.health.failed(&error, at_embedder);
                    return Err(error);
                }
                self.health.concerns_all(&error, at_embedder);
                return Err(Error { class: Class::Fatal, ..error });
            }
        }
        self.health.is_over();
        Ok(())
    }

    /// Splits what was refused for good. When it stands alone and harmless changes go through, tries it
    /// once more, and gives it up the second time.
    async fn refuse(&self, lane: Lane, batch: &mut Batch, group: Vec<String>, error: &Error) -> Result<()> {
        if group.len() > 1 {
            batch.split(group, true);
            return Ok(());
        }
        let id = group[0].clone();
        let decided = async {
            if let Err(error) = self.others_are_taken(lane, batch, error).await {
                batch.refused.remove(&id);
                self.take_back(batch).await;
                return Err(error);
            }
            if batch.refused.insert(id.clone()) {
                // The same try goes on, as far as the count is concerned.
                if batch.in_try.take().is_some() {
                    batch.counted.insert(id.clone());
                }
                return Ok(false);
            }
            let tries = self.ledger.count_try(&id, 0).await?.max(1);
            let why = Why { reason: Reason::Refused, error: error.to_string(), tries };
            self.give_up(batch, &id, &why).await?;
            Ok(true)
        };
        let decided = decided.await;
        if !matches!(decided, Ok(true)) {
            batch.groups.push_front(group);
        }
        decided.map(drop)
    }

    /// Dead-letters one change, for every message that carries it.
    async fn give_up(&self, batch: &mut Batch, id: &str, why: &Why) -> Result<()> {
        for message in &batch.messages {
            if let Some(part) = part_of(message, id) {
                self.dead_letters.store(message, Some(&part), why).await?;
                // One letter is enough: the change is the row's, not the message's.
                break;
            }
        }
        tracing::error!(
            product.id = id,
            tries = why.tries,
            error = why.error,
            "a change {}: moved to the dead letters",
            why.reason.describe()
        );
        // Whoever brings it back has mended something: its tries start anew.
        self.ledger.park(id).await?;
        batch.left.remove(id);
        batch.in_try = None;
        batch.done.dead_lettered += 1;
        Ok(())
    }

    /// Dead-letters messages that nobody can read, and puts back those that somebody else can.
    async fn part_with_foreign(&self, batch: &mut Batch) -> Result<()> {
        let mut at = 0;
        while at < batch.messages.len() {
            let message = &batch.messages[at];
            if let Some(whose) = self.somebody_elses(message) {
                self.put_back(message, whose).await?;
            } else if let Err(undecodable) = &message.body {
                let error = undecodable.reason.clone();
                tracing::error!(
                    message.id,
                    receive_count = message.receive_count,
                    error,
                    "a message {}: moved to the dead letters",
                    Reason::Undecodable.describe()
                );
                let why = Why { reason: Reason::Undecodable, error, tries: 0 };
                self.dead_letters.store(message, None, &why).await?;
            } else {
                at += 1;
                continue;
            }
            // No change of the batch is its.
            let gone = batch.messages[at].receipt.clone();
            batch.keep(|message| message.receipt != gone);
        }
        Ok(())
    }

    /// Acknowledges messages of which nothing is left.
    async fn acknowledge_done(&self, batch: &mut Batch) -> Result<()> {
        let left = &batch.left;
        let is_done =
            |message: &&Message| message.body.as_ref().is_ok_and(|job| ids(job).all(|id| !left.contains(id)));
        let receipts: Vec<Receipt> =
            batch.messages.iter().filter(is_done).map(|message| message.receipt.clone()).collect();
        if receipts.is_empty() {
            return Ok(());
        }
        self.queue.acknowledge(&receipts).await?;
        batch.keep(|message| !receipts.contains(&message.receipt));
        Ok(())
    }
}

/// The part of a message that is about one id.
fn part_of(message: &Message, id: &str) -> Option<Job> {
    let job = message.body.as_ref().ok()?;
    let groups: Vec<Group> = job
        .groups
        .iter()
        .filter(|group| group.ids.iter().any(|one| one == id))
        .map(|group| Group { ids: vec![id.to_owned()], ..group.clone() })
        .collect();
    (!groups.is_empty()).then(|| Job { groups, ..job.clone() })
}
