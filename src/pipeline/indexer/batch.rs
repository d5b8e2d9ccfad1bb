//! A batch of messages, from received to acknowledged: what is tried together, split and given up.
//!
//! An outage is not poison. A group of changes that fails in a way that another try may mend is split
//! and put last, and after a few failures in a row the batch is held as it is; nothing is counted. A
//! group that is refused for good is split until the refused change stands alone, and that one is
//! dead-lettered at once. A change that fails by itself, while harmless writes go through, is counted, and
//! dead-lettered at the fourth time. From a message's third receive on its changes are tried one by
//! one and counted *before* each try, so that one that takes the process down is found too. The counts
//! are the ledger's, so that redone work is included.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

use super::{Hint, Indexer, Made, Stepped, is_in_sync};
use crate::pipeline::change::{Group, Job, Lane};
use crate::pipeline::failure::{Class, Error, Result};
use crate::pipeline::queue::{Message, Reason, Receipt, Why};

/// From this receive on, a message is worked change by change.
const ONE_BY_ONE_FROM: u32 = 3;

/// A change that failed by itself this often is dead-lettered.
const MAX_TRIES: u32 = 4;

/// A change whose tries began this often and did not end is dead-lettered. More than of those that
/// failed: copies of its message may be at it in other processes right now, or in frozen ones.
const MAX_UNFINISHED: u32 = 10;

/// Groups that fail in a row before the batch is put aside for a while.
const FAILURES_IN_A_ROW: usize = 3;

/// Groups that have to be done again in a row before the batch is put aside for a while: more means
/// that somebody rewrites these very rows all the time.
const CONFLICTS_IN_A_ROW: usize = 10;

/// Harmless writes that must work in a row before a change is to blame for its failure.
const PROBES: u32 = 3;

/// A text that any embedder can take.
const PROBE: &str = "a plain text";

/// Messages that are worked on together.
pub(super) struct Batch {
    /// Those that are not acknowledged yet.
    messages: Vec<Message>,
    pub(super) hints: BTreeMap<String, Hint>,
    pub(super) made: Made,
    pub(super) done: Stepped,
    /// Ids to be tried together.
    groups: VecDeque<Vec<String>>,
    /// Ids that are not done with.
    left: HashSet<String>,
    /// Ids of messages that came too often.
    suspects: HashSet<String>,
    /// Ids that failed by themselves.
    failed_alone: HashSet<String>,
    /// Ids whose next try may stand in the count already.
    counted: HashSet<String>,
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
        let (alone, together): (BTreeSet<String>, BTreeSet<String>) =
            hints.keys().cloned().partition(|id| suspects.contains(id));
        let together: Vec<String> = together.into_iter().collect();
        let mut groups: VecDeque<Vec<String>> = together.chunks(size.max(1)).map(<[_]>::to_vec).collect();
        groups.extend(alone.into_iter().map(|id| vec![id]));
        Batch {
            messages: messages.to_vec(),
            done: Stepped { changes: hints.len() as u64, ..Stepped::default() },
            left: hints.keys().cloned().collect(),
            hints,
            made: HashMap::new(),
            groups,
            suspects,
            failed_alone: HashSet::new(),
            counted: HashSet::new(),
        }
    }

    /// Works until nothing of the batch is left. On an error the rest stays in it, to be tried again;
    /// messages that are done with are acknowledged all the same.
    pub(super) async fn work(&self, lane: Lane, batch: &mut Batch) -> Result<()> {
        self.give_up_foreign(batch).await?;
        self.drop_in_sync_suspects(batch).await?;
        let worked = self.work_groups(lane, batch).await;
        let acknowledged = self.acknowledge_done(batch).await;
        worked.and(acknowledged)
    }

    /// What is in sync need not be tried one by one: most of a message that came too often was done
    /// by whoever held it before.
    async fn drop_in_sync_suspects(&self, batch: &mut Batch) -> Result<()> {
        let suspects: Vec<String> =
            batch.suspects.iter().filter(|id| batch.left.contains(*id)).cloned().collect();
        if suspects.is_empty() {
            return Ok(());
        }
        for peeked in self.ledger.peek(&suspects).await?.iter().filter(|one| is_in_sync(one)) {
            batch.left.remove(&peeked.id);
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
                alone.clone().filter(|id| batch.suspects.contains(id) || batch.failed_alone.contains(id));
            if let Some(id) = &counted {
                // One that may stand already is not counted again: a lost answer is nobody's fault.
                let by = i32::from(!batch.counted.remove(id));
                match self.ledger.count_try(id, by).await {
                    Ok(tries) if tries > MAX_UNFINISHED => {
                        let error = "whoever worked on it did not come to an end".to_owned();
                        let why = Why { reason: Reason::Failed, error, tries: MAX_UNFINISHED };
                        if let Err(error) = self.give_up(batch, id, &why).await {
                            batch.groups.push_front(group);
                            return Err(error);
                        }
                        continue;
                    }
                    Ok(_) => {}
                    Err(error) => {
                        batch.counted.insert(id.clone());
                        batch.groups.push_front(group);
                        return Err(error);
                    }
                }
            }
            let started = self.clock().now();
            let round = match self.round(lane, &group, batch).await {
                Ok(round) => round,
                Err(error) if error.class == Class::Fatal => return Err(error),
                Err(error) if error.class == Class::Permanent => {
                    self.refuse(batch, group, &error).await?;
                    continue;
                }
                Err(error) => {
                    self.health.failed(&error);
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
            let mut pending: HashSet<&String> = round.again.iter().collect();
            if let Some((refused, _)) = &round.refused {
                pending.extend(refused);
            } else {
                self.health.succeeded();
                failures = 0;
            }
            for id in group.iter().filter(|id| !pending.contains(id)) {
                batch.left.remove(id);
            }
            self.keep_pace(group.len() as u64, self.clock().now().saturating_sub(started));
            let conflicted = !round.again.is_empty();
            if conflicted {
                batch.done.conflicts += 1;
                batch.groups.push_back(round.again);
            }
            conflicts = if conflicted { conflicts + 1 } else { 0 };
            // It came to an end, if not to a write that settles the entry.
            if let Some(id) = counted.filter(|_| round.refused.is_none() && round.settled == 0) {
                self.ledger.count_try(&id, i32::MIN).await?;
            }
            if let Some((refused, error)) = round.refused {
                self.refuse(batch, refused, &error).await?;
            }
            if conflicts >= CONFLICTS_IN_A_ROW {
                return Err(Error::retryable("apply changes", "the rows kept changing meanwhile"));
            }
        }
        Ok(())
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
        batch.failed_alone.insert(id.clone());
        if !counted {
            return Ok(());
        }
        let others_go_through = error.about_change && self.probe(lane).await.is_ok();
        // What was counted before the try stands only if it is the change's own fault.
        let tries = match self.ledger.count_try(&id, if others_go_through { 0 } else { -1 }).await {
            Ok(tries) => tries,
            Err(error) => {
                batch.counted.insert(id);
                return Err(error);
            }
        };
        if others_go_through && tries >= MAX_TRIES {
            let why = Why { reason: Reason::Failed, error: error.to_string(), tries };
            self.give_up(batch, &id, &why).await?;
            batch.groups.retain(|group| *group != [id.as_str()]);
        }
        Ok(())
    }

    /// Whether texts can be embedded and the index be written to, time and again.
    async fn probe(&self, lane: Lane) -> Result<()> {
        for _ in 0..PROBES {
            self.scheduler.embed(lane, &[PROBE.into()]).await?;
            self.index.probe().await?;
        }
        self.health.succeeded();
        Ok(())
    }

    /// Splits what was refused for good, or gives it up when it stands alone.
    async fn refuse(&self, batch: &mut Batch, group: Vec<String>, error: &Error) -> Result<()> {
        if group.len() > 1 {
            batch.split(group, true);
            return Ok(());
        }
        let id = group[0].clone();
        let given_up = async {
            let tries = self.ledger.count_try(&id, 0).await?.max(1);
            let why = Why { reason: Reason::Refused, error: error.to_string(), tries };
            self.give_up(batch, &id, &why).await
        };
        let given_up = given_up.await;
        if given_up.is_err() {
            batch.groups.push_front(group);
        }
        given_up
    }

    /// Dead-letters one change, for every message that carries it.
    async fn give_up(&self, batch: &mut Batch, id: &str, why: &Why) -> Result<()> {
        for message in &batch.messages {
            if let Some(part) = part_of(message, id) {
                self.queue.dead_letter(message, Some(&part), why).await?;
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
        batch.done.dead_lettered += 1;
        Ok(())
    }

    /// Dead-letters whole messages that are not ours to read, or that came too often.
    async fn give_up_foreign(&self, batch: &mut Batch) -> Result<()> {
        let mut at = 0;
        while at < batch.messages.len() {
            let message = &batch.messages[at];
            let why = match &message.body {
                Err(undecodable) => Some((Reason::Undecodable, undecodable.reason.clone())),
                Ok(job) if job.source != self.options.source => Some((
                    Reason::Undecodable,
                    format!("its source is {:?} and this indexer's {:?}", job.source, self.options.source),
                )),
                Ok(_) if message.receive_count > self.options.max_receives => Some((
                    Reason::Received,
                    format!("received {} times, and never finished", message.receive_count),
                )),
                Ok(_) => None,
            };
            let Some((reason, error)) = why else {
                at += 1;
                continue;
            };
            tracing::error!(
                message.id,
                receive_count = message.receive_count,
                error,
                "a message {}: moved to the dead letters",
                reason.describe()
            );
            self.queue.dead_letter(message, None, &Why { reason, error, tries: 0 }).await?;
            let gone = batch.messages.remove(at);
            // What another message of the batch carries too is still to be done.
            if let Ok(job) = gone.body {
                let kept: HashSet<&String> =
                    batch.messages.iter().filter_map(|m| m.body.as_ref().ok()).flat_map(ids).collect();
                let lost: HashSet<&String> = ids(&job).filter(|id| !kept.contains(*id)).collect();
                batch.left.retain(|id| !lost.contains(id));
                for group in &mut batch.groups {
                    group.retain(|id| !lost.contains(id));
                }
                batch.groups.retain(|group| !group.is_empty());
            }
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
        batch.messages.retain(|message| !receipts.contains(&message.receipt));
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
