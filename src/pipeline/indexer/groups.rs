//! Working through a batch: the outcome of each group, and the reaction to it.

use std::collections::HashSet;
use std::time::Duration;

use super::batch::Batch;
use super::group_failure::Failure;
use super::poison::Admitted;
use super::step::Indexer;
use super::writer::Written;
use crate::pipeline::change::Lane;
use crate::pipeline::failure::{Class, Error, FailureKind, Result};

/// This many failed groups in a row put the batch aside for a while.
const MAX_CONSECUTIVE_FAILURES: usize = 3;

/// This many conflicted groups in a row put the batch aside for a while: an application rewrites these rows
/// all the time.
const MAX_CONSECUTIVE_CONFLICTS: usize = 10;

/// The outcome of a group.
enum GroupOutcome {
    /// It was written, as far as [`Written`] says. Some of its ids may have conflicted or be refused.
    Written { written: Written, took: Duration },
    /// Some change in it is refused permanently.
    Refused(Failure),
    /// Its only change failed with a retryable error.
    FailedAlone(Failure),
    /// It failed with a retryable error. Any of its changes may be the cause, or none.
    FailedTogether(Failure),
    /// It failed for a cause that concerns all changes, until somebody repairs the cause.
    HoldsAll(Failure),
    /// Its only change was dead-lettered before it was tried.
    DeadLettered,
    /// The check whether it may be tried failed.
    NotAdmitted(Error),
}

/// Failed and conflicted groups in a row.
#[derive(Default)]
struct Streak {
    failures: usize,
    conflicts: usize,
}

impl Indexer {
    /// Works until nothing of the batch is left. On an error, the rest stays in the batch and can be tried
    /// again. Finished messages are acknowledged even then.
    pub(super) async fn work(&self, lane: Lane, batch: &mut Batch) -> Result<()> {
        let sorted = async {
            self.misdirected.set_aside(batch).await?;
            self.isolation.drop_synced_redelivered(batch).await
        };
        if let Err(error) = sorted.await {
            let failure = Failure::from(error);
            self.health.failed(&failure);
            return Err(failure.error);
        }
        let worked = self.work_groups(lane, batch).await;
        let acknowledged = self.acknowledge_done(batch).await;
        worked.and(acknowledged)
    }

    async fn work_groups(&self, lane: Lane, batch: &mut Batch) -> Result<()> {
        let mut streak = Streak::default();
        while let Some(group) = batch.next_group() {
            let outcome = self.try_group(lane, batch, &group).await;
            self.act_on(lane, batch, group, outcome, &mut streak).await?;
        }
        Ok(())
    }

    /// Tries a group and returns its outcome.
    async fn try_group(&self, lane: Lane, batch: &mut Batch, group: &[String]) -> GroupOutcome {
        let admitted = match self.isolation.admit(lane, batch, group).await {
            Ok(Admitted::DeadLettered) => return GroupOutcome::DeadLettered,
            Ok(admitted) => admitted,
            Err(error) => return GroupOutcome::NotAdmitted(error),
        };
        let started = self.clock.now();
        let written = {
            let _beside = self.isolation.beside(&admitted).await;
            self.writer.write(lane, group, batch).await
        };
        // Canaries may have to be sent now. They need no exclusive access.
        drop(admitted);
        let failure = match written {
            Ok(written) => {
                let took = self.clock.now().saturating_sub(started);
                return GroupOutcome::Written { written, took };
            }
            Err(failure) => failure,
        };
        match failure.error.class() {
            Class::Permanent => GroupOutcome::Refused(failure),
            Class::Fatal if self.may_be_its_own(lane, group, &failure).await => {
                GroupOutcome::Refused(failure)
            }
            Class::Fatal => GroupOutcome::HoldsAll(failure),
            Class::Retryable if group.len() == 1 => GroupOutcome::FailedAlone(failure),
            Class::Retryable => GroupOutcome::FailedTogether(failure),
        }
    }

    /// Whether a fatal failure may belong to one change: a backend may refuse one text or record with the
    /// error of a wrong setting. A change that stands alone is compared with canaries when it is isolated.
    async fn may_be_its_own(&self, lane: Lane, group: &[String], failure: &Failure) -> bool {
        failure.error.is_about_change()
            && !failure.error.is_of_process()
            && (group.len() == 1 || self.isolation.others_are_taken(lane, failure).await.is_ok())
    }

    /// Reacts to a group's outcome. On an error the batch is put aside for a while.
    async fn act_on(
        &self,
        lane: Lane,
        batch: &mut Batch,
        group: Vec<String>,
        outcome: GroupOutcome,
        streak: &mut Streak,
    ) -> Result<()> {
        match outcome {
            GroupOutcome::Written { written, took } => {
                self.take_written(lane, batch, &group, written, took, streak).await
            }
            GroupOutcome::Refused(failure) => {
                self.isolation.isolate_refused(lane, batch, group, &failure).await
            }
            GroupOutcome::FailedAlone(failure) => {
                self.health.failed(&failure);
                self.isolation.failed_alone(lane, batch, group, &failure.error).await?;
                streak.failed(batch, failure)
            }
            GroupOutcome::FailedTogether(failure) => {
                self.health.failed(&failure);
                batch.split_last(group);
                streak.failed(batch, failure)
            }
            GroupOutcome::HoldsAll(failure) => {
                self.health.trip(&failure);
                batch.try_next(group);
                // The change may be the cause of a broken process, but not of a wrong setting.
                if !failure.error.is_of_process() {
                    self.isolation.uncount_try(batch).await;
                }
                Err(failure.error)
            }
            GroupOutcome::DeadLettered => Ok(()),
            GroupOutcome::NotAdmitted(error) => {
                batch.try_next(group);
                Err(error)
            }
        }
    }

    /// Removes the written ids from the batch, and puts the rest of the group back.
    async fn take_written(
        &self,
        lane: Lane,
        batch: &mut Batch,
        group: &[String],
        written: Written,
        took: Duration,
        streak: &mut Streak,
    ) -> Result<()> {
        let Written { conflicted, unread, refused, applied, settled } = written;
        batch.done.applied += applied;
        let mut pending: HashSet<&String> = conflicted.iter().chain(&unread).collect();
        if let Some((refused, _)) = &refused {
            pending.extend(refused);
        } else {
            self.health.succeeded();
            streak.failures = 0;
        }
        for id in group.iter().filter(|id| !pending.contains(id)) {
            batch.finish(id);
        }
        // The rest in groups of the size that could be read together: their rows are likely to be of similar
        // size.
        let read = group.len() - unread.len();
        for part in unread.chunks(read.max(1)).rev() {
            batch.try_next(part.to_vec());
        }
        self.throughput.record(read as u64, took);
        if conflicted.is_empty() {
            streak.conflicts = 0;
        } else {
            streak.conflicts += 1;
            batch.done.conflicts += 1;
            batch.try_last(conflicted);
        }
        match refused {
            // The try ended, although perhaps no write settled the entry.
            None => self.isolation.ended(batch, group, settled).await?,
            Some((refused, error)) => {
                self.isolation.isolate_refused(lane, batch, refused, &Failure::from(error)).await?;
            }
        }
        if streak.conflicts >= MAX_CONSECUTIVE_CONFLICTS {
            return Err(Error::new(
                FailureKind::Conflict,
                "apply changes",
                "the rows kept changing meanwhile",
            ));
        }
        Ok(())
    }

    /// Acknowledges messages without remaining ids.
    async fn acknowledge_done(&self, batch: &mut Batch) -> Result<()> {
        let receipts = batch.done_with();
        if receipts.is_empty() {
            return Ok(());
        }
        self.queue.acknowledge(&receipts).await?;
        batch.retain(|message| !receipts.contains(&message.receipt));
        Ok(())
    }
}

impl Streak {
    /// One more group failed. Fails when so many did that the batch is put aside for a while.
    fn failed(&mut self, batch: &Batch, failure: Failure) -> Result<()> {
        self.failures += 1;
        if self.failures >= MAX_CONSECUTIVE_FAILURES || batch.groups() <= self.failures {
            return Err(failure.error);
        }
        Ok(())
    }
}
