//! Working off a batch: what became of trying a group, and what is done about it.

use std::collections::HashSet;
use std::time::Duration;

use super::Indexer;
use super::batch::Batch;
use super::group_failure::Failure;
use super::poison::Admitted;
use super::writer::Written;
use crate::pipeline::change::Lane;
use crate::pipeline::failure::{Class, Error, FailureKind, Result};

/// Groups that fail in a row before the batch is put aside for a while.
const MAX_CONSECUTIVE_FAILURES: usize = 3;

/// Groups that have to be done again in a row before the batch is put aside for a while: more means
/// that somebody rewrites these very rows all the time.
const MAX_CONSECUTIVE_CONFLICTS: usize = 10;

/// What became of trying a group.
enum GroupOutcome {
    /// It was written, as far as [`Written`] says. Some of its ids may have conflicted or be refused.
    Written { written: Written, took: Duration },
    /// Some change in it is refused for good.
    Refused(Failure),
    /// Its only change failed, in a way that another try may mend.
    FailedAlone(Failure),
    /// It failed, in a way that another try may mend; any of its changes may be why, or none.
    FailedTogether(Failure),
    /// It failed over what concerns all changes, until somebody mends that.
    HoldsAll(Failure),
    /// Its only change was given up before it was tried.
    DeadLettered,
    /// It could not be found out whether it may be tried.
    NotAdmitted(Error),
}

/// How many groups in a row did not go through.
#[derive(Default)]
struct Streak {
    failures: usize,
    conflicts: usize,
}

impl Indexer {
    /// Works until nothing of the batch is left. On an error the rest stays in it, to be tried again;
    /// messages that are done with are acknowledged all the same.
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

    /// Tries a group, and tells what became of it.
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
        // Canaries may have to be sent now, which nobody needs to be kept away for.
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

    /// Whether a failure that would concern everything may be one change's own. One text or record may be
    /// refused as a wrong setting has all of them refused. A change that stands alone is tried against
    /// canaries when it is isolated.
    async fn may_be_its_own(&self, lane: Lane, group: &[String], failure: &Failure) -> bool {
        failure.error.is_about_change()
            && !failure.error.is_of_process()
            && (group.len() == 1 || self.isolation.others_are_taken(lane, failure).await.is_ok())
    }

    /// Does what a group's outcome asks for. On an error the batch is put aside for a while.
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
                // What ends this process now may be the change's own doing; a setting is not.
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

    /// Takes out of the batch what was written, and lets the rest of the group be tried again.
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
        // The rest in groups of as many as could be read together: it is likely to be alike.
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
            // It came to an end, if not to a write that settles the entry.
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

    /// Acknowledges messages of which nothing is left.
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
