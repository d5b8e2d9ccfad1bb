//! Isolating poison: finding the one change that fails by itself, and moving it to the dead-letter queue.
//!
//! **A failure that concerns all changes dead-letters none.** Neither an outage nor a wrong setting is
//! poison. A group that fails with a retryable error is split and put last. After a few failures in a row the
//! batch is held as it is, and nothing is counted. A fatal failure (a refused key, a missing index) holds the
//! batch too, and the work continues by itself after the repair. A group that is refused permanently is split
//! until the refused change stands alone. Then a harmless change, the canary, is sent the same way: read,
//! embedded and written. If the canary fails, with whatever error, all changes are concerned and the batch is
//! held. If the canary succeeds, the change is tried once more, because the refusal may just have ended. The
//! change is dead-lettered if it is refused again and the canary succeeds again. The same is done where the
//! embedder or the index answers as it does to a wrong key: a filter in front of it may answer so to one text
//! or record. In that case the index must also accept a harmless record among the other records. A failure
//! that holds the work is one fault: logged once, and shown in the status for as long as it lasts.
//!
//! A change that fails by itself, while canaries succeed, is counted. It is dead-lettered at the fourth
//! failure that one worker sees.
//!
//! **A change that takes the process down** can only be found by a count made before the try. From a
//! message's third receive on, its changes are tried one by one and counted first. Unless the process dies,
//! every end of a try takes the count back, except for a failure of the change itself. A process that is
//! killed for another reason (by an operator, another message, the kernel) also leaves a count behind, so a
//! count alone proves nothing. Once [`MAX_UNFINISHED`] tries were left unfinished, each further try is
//! counted only after canaries succeeded, and is made while nothing else is tried in the process. After
//! [`MAX_UNFINISHED_ALONE`] of those tries the change is dead-lettered, if canaries still succeed. A try that
//! comes to an end in between sets the count to zero. A message is never dead-lettered as a whole for its
//! receive count, which only tells of workers. Over `max_receives`, nothing of the message is read before it
//! is counted.
//!
//! The counts are in the ledger, so that tries of all workers are included.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::batch::{Batch, ids};
use super::group_failure::Failure;
use super::health::Health;
use super::writer::Writer;
use crate::pipeline::change::Lane;
use crate::pipeline::failure::{Class, Error, FailureKind, Result};
use crate::pipeline::ledger::Ledger;
use crate::pipeline::queue::{DeadLetterCause, DeadLetters, Message, Reason};

/// A change that failed by itself this often is dead-lettered.
const MAX_TRIES: u32 = 4;

/// A change whose tries began this often and did not end is under suspicion. More than of those that
/// failed: copies of its message may be at it in other processes right now, or in frozen ones.
const MAX_UNFINISHED: u32 = 10;

/// Such a change is dead-lettered after this many more, made with nothing else going on in the process.
const MAX_UNFINISHED_ALONE: u32 = 3;

/// Redelivered changes that are checked together for being in sync.
const REDELIVERED_AT_ONCE: usize = 100;

/// Canaries that must go through in a row before a change is to blame for its failure.
const CANARIES: u32 = 3;

/// The same for each refusal: a change is only to blame at its second refusal.
const CANARIES_PER_REFUSAL: u32 = 1;

/// How a group may be tried.
pub(super) enum Admitted<'a> {
    /// Beside others.
    Together,
    /// While nothing else is tried in this process.
    Alone { _exclusive: RwLockWriteGuard<'a, ()> },
    /// Not at all: its change was dead-lettered.
    DeadLettered,
}

/// Isolates the poison of all batches of one process.
pub(super) struct Isolation {
    ledger: Arc<dyn Ledger>,
    dead_letters: Arc<dyn DeadLetters>,
    writer: Arc<Writer>,
    health: Arc<Health>,
    /// Of a message that was received more often nothing is read before its change is counted.
    max_receives: u32,
    /// Held by every try, and alone by one that is under suspicion.
    exclusive: RwLock<()>,
}

impl Isolation {
    pub(super) fn new(
        ledger: Arc<dyn Ledger>,
        dead_letters: Arc<dyn DeadLetters>,
        writer: Arc<Writer>,
        health: Arc<Health>,
        max_receives: u32,
    ) -> Self {
        Self { ledger, dead_letters, writer, health, max_receives, exclusive: RwLock::const_new(()) }
    }

    /// Removes ids that are in sync, which need not be tried one by one: earlier receivers have applied most
    /// changes of a redelivered message.
    pub(super) async fn drop_synced_redelivered(&self, batch: &mut Batch) -> Result<()> {
        let too_often = |message: &&Message| message.receive_count > self.max_receives;
        let unread: HashSet<&String> = batch
            .messages()
            .iter()
            .filter(too_often)
            .filter_map(|message| message.body.as_ref().ok())
            .flat_map(ids)
            .collect();
        let redelivered: Vec<String> = batch
            .tries
            .redelivered
            .iter()
            .filter(|id| batch.has(id) && !unread.contains(id))
            .cloned()
            .collect();
        let mut rest = redelivered.as_slice();
        while !rest.is_empty() {
            let at_once = &rest[..rest.len().min(REDELIVERED_AT_ONCE)];
            let (now, later) = rest.split_at(self.writer.fits(at_once).await?);
            rest = later;
            let peeked = match self.ledger.peek(now).await {
                Ok(peeked) => peeked,
                // One of them cannot be read: they are tried one by one.
                Err(error) if error.class() == Class::Permanent || error.is_about_change() => continue,
                Err(error) => return Err(error),
            };
            for peeked in peeked.iter().filter(|one| one.is_in_sync()) {
                batch.finish(&peeked.id);
            }
        }
        batch.drop_finished();
        Ok(())
    }

    /// Decides how a group is tried. A try that is counted is counted here, before it is made.
    pub(super) async fn admit(
        &self,
        lane: Lane,
        batch: &mut Batch,
        group: &[String],
    ) -> Result<Admitted<'_>> {
        let Some(id) = batch.tries.counts(group) else { return Ok(Admitted::Together) };
        let tries = self.count(batch, id).await?;
        if tries <= MAX_UNFINISHED {
            return Ok(Admitted::Together);
        }
        // The change must not be blamed for failures of other changes, or of all changes.
        self.uncount_try(batch).await;
        let exclusive = self.exclusive.write().await;
        self.send_canaries(lane, CANARIES, false).await?;
        if tries > MAX_UNFINISHED + MAX_UNFINISHED_ALONE {
            let error = "whoever worked on it did not come to an end, with nothing else going on".to_owned();
            self.dead_letter(batch, id, &DeadLetterCause { reason: Reason::Failed, error, tries: tries - 1 })
                .await?;
            return Ok(Admitted::DeadLettered);
        }
        self.count(batch, id).await?;
        Ok(Admitted::Alone { _exclusive: exclusive })
    }

    /// Prevents tries of suspected changes beside this group, unless the group is such a change.
    pub(super) async fn beside(&self, admitted: &Admitted<'_>) -> Option<RwLockReadGuard<'_, ()>> {
        match admitted {
            Admitted::Alone { .. } => None,
            Admitted::Together | Admitted::DeadLettered => Some(self.exclusive.read().await),
        }
    }

    /// Counts a try that is about to begin.
    async fn count(&self, batch: &mut Batch, id: &str) -> Result<u32> {
        // A try that may be counted already is not counted again: a lost answer is not the change's fault.
        let by = i32::from(!batch.tries.counted.remove(id));
        let counted = self.ledger.count_try(id, by).await;
        match counted {
            Ok(_) => batch.tries.in_try = Some(id.to_owned()),
            Err(_) => {
                batch.tries.counted.insert(id.to_owned());
            }
        }
        counted
    }

    /// Takes back the count of a try that has not ended, for a reason that is not the change's own.
    pub(super) async fn uncount_try(&self, batch: &mut Batch) {
        let Some(id) = batch.tries.in_try.take() else { return };
        if let Err(error) = self.ledger.count_try(&id, -1).await {
            tracing::debug!(row.id = id, %error, "cannot take back the count of a try");
            batch.tries.counted.insert(id);
        }
    }

    /// Records the end of a try. A write that settles the entry sets the count to zero. If no entry was
    /// settled, the count is set to zero here.
    pub(super) async fn ended(&self, batch: &mut Batch, group: &[String], settled: u64) -> Result<()> {
        batch.tries.in_try = None;
        if let Some(id) = batch.tries.counts(group).filter(|_| settled == 0) {
            self.ledger.count_try(id, i32::MIN).await?;
        }
        Ok(())
    }

    /// A change failed by itself: counts the failure if canaries succeed. Several must succeed in a row,
    /// because an index that fails every other time would let one through.
    pub(super) async fn failed_alone(
        &self,
        lane: Lane,
        batch: &mut Batch,
        group: Vec<String>,
        error: &Error,
    ) -> Result<()> {
        let was_counted = batch.tries.counts(&group).is_some();
        let id = group[0].clone();
        batch.try_last(group);
        batch.tries.failed_alone.entry(id.clone()).or_default();
        if !was_counted {
            return Ok(());
        }
        let others_go_through =
            error.is_about_change() && self.send_canaries(lane, CANARIES, false).await.is_ok();
        // The count made before the try stays only if the failure is the change's own.
        if !others_go_through {
            self.uncount_try(batch).await;
            return Ok(());
        }
        batch.tries.in_try = None;
        let tries = match self.ledger.count_try(&id, 0).await {
            Ok(tries) => tries,
            Err(error) => {
                batch.tries.counted.insert(id);
                return Err(error);
            }
        };
        let failures = batch.tries.failed_alone.entry(id.clone()).or_default();
        *failures += 1;
        // The ledger's count may include tries that other workers left unfinished.
        if tries.min(*failures) >= MAX_TRIES {
            let cause = DeadLetterCause { reason: Reason::Failed, error: error.to_string(), tries };
            self.dead_letter(batch, &id, &cause).await?;
            batch.drop_alone(&id);
        }
        Ok(())
    }

    /// Splits a group that was refused permanently. If a change stands alone and canaries succeed, tries it
    /// once more, and dead-letters it at the second refusal.
    pub(super) async fn isolate_refused(
        &self,
        lane: Lane,
        batch: &mut Batch,
        group: Vec<String>,
        refusal: &Failure,
    ) -> Result<()> {
        if group.len() > 1 {
            batch.split_next(group);
            return Ok(());
        }
        let decided = self.is_refused_again(lane, batch, &group[0], refusal).await;
        if !matches!(decided, Ok(true)) {
            batch.try_next(group);
        }
        decided.map(drop)
    }

    /// Whether a change that stands alone was refused for the second time and therefore dead-lettered.
    async fn is_refused_again(
        &self,
        lane: Lane,
        batch: &mut Batch,
        id: &str,
        refusal: &Failure,
    ) -> Result<bool> {
        if let Err(error) = self.others_are_taken(lane, refusal).await {
            batch.tries.refused.remove(id);
            self.uncount_try(batch).await;
            return Err(error);
        }
        if batch.tries.refused.insert(id.to_owned()) {
            // The same try goes on, as far as the count is concerned.
            if batch.tries.in_try.take().is_some() {
                batch.tries.counted.insert(id.to_owned());
            }
            return Ok(false);
        }
        let tries = self.ledger.count_try(id, 0).await?.max(1);
        let cause = DeadLetterCause { reason: Reason::Refused, error: refusal.error.to_string(), tries };
        self.dead_letter(batch, id, &cause).await?;
        Ok(true)
    }

    /// Whether canaries are taken where a change was refused. An index that answers as it does to a wrong key
    /// must take several in a row, among the records.
    pub(super) async fn others_are_taken(&self, lane: Lane, refusal: &Failure) -> Result<()> {
        let by_the_index = refusal.error.class() == Class::Fatal && !refusal.at_embedder;
        let times = if by_the_index { CANARIES } else { CANARIES_PER_REFUSAL };
        self.send_canaries(lane, times, by_the_index).await
    }

    /// Whether canaries go the whole way, one after the other; with `among_records` to where records are. If
    /// not, all changes are concerned; then the error is one that no other try mends, or an outage's.
    async fn send_canaries(&self, lane: Lane, times: u32, among_records: bool) -> Result<()> {
        for _ in 0..times {
            let Err(failure) = self.writer.send_canary(lane, among_records).await else { continue };
            if failure.error.class() == Class::Retryable {
                self.health.failed(&failure);
                return Err(failure.error);
            }
            self.health.trip(&failure);
            let error = failure.error;
            let is_refusal = error.class() == Class::Permanent;
            return Err(if is_refusal { error.of_kind(FailureKind::RefusesAll) } else { error });
        }
        self.health.recovered();
        Ok(())
    }

    /// Dead-letters one change, for every message that carries it.
    async fn dead_letter(&self, batch: &mut Batch, id: &str, cause: &DeadLetterCause) -> Result<()> {
        // One dead letter is enough: the change belongs to the row, not to the message.
        if let Some((message, part)) = batch.part_about(id) {
            self.dead_letters.store(message, Some(&part), cause).await?;
        }
        self.writer.metrics.dead_lettered(cause.reason);
        tracing::error!(
            row.id = id,
            tries = cause.tries,
            error = cause.error,
            "a change {}: moved to the dead letters",
            cause.reason.describe()
        );
        // A redrive follows a repair, so the tries start again from zero.
        self.ledger.park(id).await?;
        batch.finish(id);
        batch.tries.in_try = None;
        batch.done.dead_lettered += 1;
        Ok(())
    }
}
