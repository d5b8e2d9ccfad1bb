//! Isolating poison: finding the one change that fails by itself, and giving it up.
//!
//! **What concerns all changes is nobody's dead letter.** An outage is not poison, and neither is a wrong
//! setting. A group of changes that fails in a way that another try may mend is split and put last, and
//! after a few failures in a row the batch is held as it is; nothing is counted. A failure that only
//! somebody can mend (a refused key, a missing index) holds the batch, too, and the work goes on by itself
//! once it is mended. A group that is refused for good is split until the refused change stands alone. Then
//! a harmless change, the canary, is sent the same way: read, embedded and written. If it fails as well,
//! whatever its failure, all changes are concerned and the batch is held. If it goes through, the change is
//! tried once more, because the refusal may have ended just now; it is given up when it is refused again and
//! the canary goes through again. The same is done where the embedder or the index answers as it does to a
//! wrong key: a filter before it may say so to one text or record. The index must then take a harmless
//! record among the others, too. What holds the work is one fault, in the log once and in the status for as
//! long as it lasts.
//!
//! A change that fails by itself, while canaries go through, is counted, and dead-lettered at the fourth time
//! that one worker sees.
//!
//! **A change that takes the process down** can only be found by a count that is made before the try. From a
//! message's third receive on its changes are tried one by one and counted first; every way out but a dead
//! process takes the count back, unless it is the change's own failure. Whoever kills a process (an
//! operator, another message, the kernel) leaves a count behind, so a count by itself is no verdict. Once
//! [`MAX_UNFINISHED`] tries were left unfinished, each further try is counted only after canaries went
//! through, and made while nothing else is tried in the process; after [`MAX_UNFINISHED_ALONE`] of those the
//! change is given up, if canaries still go through. A change that comes to an end in between is counted
//! from zero. A message is never given up as a whole for how often it was received: that only tells of
//! workers. Over `max_receives`, nothing of it is read before it is counted.
//!
//! The counts are the ledger's, so that redone work is included.

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

/// Redelivered changes that are looked at together, whether they are in sync.
const REDELIVERED_AT_ONCE: usize = 100;

/// Canaries that must go through in a row before a change is to blame for its failure.
const CANARIES: u32 = 3;

/// The same for each refusal: a change is only to blame at its second one.
const CANARIES_PER_REFUSAL: u32 = 1;

/// How a group may be tried.
pub(super) enum Admitted<'a> {
    /// Beside others.
    Together,
    /// While nothing else is tried in this process.
    Alone { _exclusive: RwLockWriteGuard<'a, ()> },
    /// Not at all: its change was given up.
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

    /// What is in sync need not be tried one by one: most of a message that came too often was done
    /// by whoever had it before.
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
        // Nothing may be blamed on this change that others do, or that all meet.
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

    /// Keeps changes under suspicion from being tried beside this group, unless the group is one.
    pub(super) async fn beside(&self, admitted: &Admitted<'_>) -> Option<RwLockReadGuard<'_, ()>> {
        match admitted {
            Admitted::Alone { .. } => None,
            Admitted::Together | Admitted::DeadLettered => Some(self.exclusive.read().await),
        }
    }

    /// Counts a try that is about to begin.
    async fn count(&self, batch: &mut Batch, id: &str) -> Result<u32> {
        // One that may stand already is not counted again: a lost answer is nobody's fault.
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

    /// A try came to an end. If it settled no entry, whose write would have done it, its change is counted
    /// from zero again.
    pub(super) async fn ended(&self, batch: &mut Batch, group: &[String], settled: u64) -> Result<()> {
        batch.tries.in_try = None;
        if let Some(id) = batch.tries.counts(group).filter(|_| settled == 0) {
            self.ledger.count_try(id, i32::MIN).await?;
        }
        Ok(())
    }

    /// A change failed by itself: counts it if other things go through, which is tried out. That has
    /// to work several times in a row, or an index that fails every other time would do as a witness.
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
        // What was counted before the try stands only if it is the change's own fault.
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
        // The ledger's count may hold tries that others left unfinished.
        if tries.min(*failures) >= MAX_TRIES {
            let cause = DeadLetterCause { reason: Reason::Failed, error: error.to_string(), tries };
            self.dead_letter(batch, &id, &cause).await?;
            batch.drop_alone(&id);
        }
        Ok(())
    }

    /// Splits what was refused for good. When it stands alone and canaries go through, tries it once
    /// more, and gives it up the second time.
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

    /// Whether a change that stands alone was refused for the second time, and was given up for that.
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
        // One letter is enough: the change is the row's, not the message's.
        if let Some((message, part)) = batch.part_about(id) {
            self.dead_letters.store(message, Some(&part), cause).await?;
        }
        tracing::error!(
            row.id = id,
            tries = cause.tries,
            error = cause.error,
            "a change {}: moved to the dead letters",
            cause.reason.describe()
        );
        // Whoever brings it back has mended something: its tries start anew.
        self.ledger.park(id).await?;
        batch.finish(id);
        batch.tries.in_try = None;
        batch.done.dead_lettered += 1;
        Ok(())
    }
}
