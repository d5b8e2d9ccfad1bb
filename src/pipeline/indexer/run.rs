//! Running the indexer: its lanes, the tasks beside the lanes, and one batch until it is finished.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::task::JoinError;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::batch::Batch;
use super::receiver::Receiver;
use super::spawn::TokioTasks;
use super::step::Indexer;
use super::visibility::Visibility;
use crate::pipeline::change::Lane;
use crate::pipeline::failure::{Class, Error, FailureKind, Result};
use crate::pipeline::queue::{Backlog, Message};
use crate::pipeline::retry::Backoff;

/// How often attempts are swept and the ledger is tidied; also the pause between two steps of the index's maintenance.
const MAINTAIN_EVERY: Duration = Duration::from_secs(1);

/// How often a look is taken at the index's search structures while nothing is to be done about them.
const LOOK_EVERY: Duration = Duration::from_secs(10);

impl Indexer {
    /// Works until `stop`, then finishes the received messages. On `abort`, releases unfinished messages to
    /// other workers. With `until_idle`, ends once both lanes are empty.
    pub async fn run(
        self: &Arc<Self>,
        stop: &CancellationToken,
        abort: &CancellationToken,
        until_idle: bool,
    ) -> Result<()> {
        let lanes_done = CancellationToken::new();
        // If one lane or all workers end with an error, the (other) lane must end too, and hold no messages that
        // may never succeed.
        let (stop, abort) = (stop.child_token(), abort.child_token());
        let (indexer, ends) = (Arc::clone(self), [&stop, &abort].map(|token| token.clone().drop_guard()));
        let workers = AbortOnDropHandle::new(tokio::spawn(async move {
            let broken = indexer.keep_workers().await;
            drop(ends);
            broken
        }));
        let aside = |task, work: fn(Arc<Self>) -> BoxFuture<'static, ()>| {
            tokio::spawn(Arc::clone(self).keep_running(task, lanes_done.clone(), work))
        };
        let maintenance =
            aside("the sweep of attempts", |indexer| async move { indexer.maintain().await }.boxed());
        let polling = aside("the measuring of freshness", |indexer| {
            async move { indexer.writer.freshness.poll().await }.boxed()
        });
        let lane = |lane| {
            let (indexer, stop, abort) = (Arc::clone(self), stop.clone(), abort.clone());
            Receiver::new(indexer, lane, Arc::new(TokioTasks), stop, abort, until_idle).run()
        };
        let (live, bulk) = tokio::join!(lane(Lane::Live), lane(Lane::Bulk));
        lanes_done.cancel();
        let _ = tokio::join!(maintenance, polling);
        self.writer.freshness.look(true).await;
        if let Err(error) = self.writer.close_leftover().await {
            tracing::warn!(%error, "cannot close attempts: others will sweep them");
        }
        workers.abort();
        let broken = match workers.await.map_err(JoinError::try_into_panic) {
            Ok(error) => Err(error),
            Err(Ok(payload)) => {
                Err(Error::panicked("embed texts", &*payload).of_kind(FailureKind::ProcessBroken))
            }
            Err(Err(_aborted)) => Ok(()),
        };
        broken.and(live).and(bulk)
    }

    async fn maintain(&self) {
        let mut next_look = self.clock.now();
        loop {
            if self.clock.now() >= next_look {
                let is_busy = self.maintain_index().await.unwrap_or_else(|error| {
                    tracing::debug!(%error, "cannot look after the index's search structures");
                    false
                });
                next_look = self.clock.now() + if is_busy { MAINTAIN_EVERY } else { LOOK_EVERY };
            }
            if let Err(error) = self.sweep().await {
                tracing::debug!(%error, "cannot sweep attempts");
            }
            if let Err(error) = self.writer.ledger.tidy().await {
                tracing::debug!(%error, "cannot tidy the ledger");
            }
            self.clock.sleep(MAINTAIN_EVERY).await;
        }
    }

    /// Returns whether something was done.
    async fn maintain_index(&self) -> Result<bool> {
        // Any other index is a service that maintains itself, and a count may cost a paid call.
        if !self.writer.is_transactional() {
            return Ok(false);
        }
        let backlog = Backlog::of_both_lanes(&*self.stats).await?;
        self.writer.index.maintain(backlog.total()).await
    }

    /// Whether no work is left for this worker. Messages for other workers stay in the queue.
    pub(super) async fn is_idle(&self) -> Result<bool> {
        let backlog = Backlog::of_both_lanes(&*self.stats).await?;
        Ok(backlog.total() == 0 || (backlog.visible == 0 && self.misdirected.has_returned()))
    }

    /// Works until the messages are finished, and extends their visibility meanwhile. Waits for the end of an
    /// outage with the messages held. Waits for the repair of a wrong setting too, except with `until_idle`.
    /// On `abort`, or when this worker cannot continue, releases the messages. If their visibility cannot be
    /// extended any more, other workers receive the messages, and the work ends as on `abort`.
    pub async fn process_with_visibility(
        &self,
        lane: Lane,
        messages: &[Message],
        abort: &CancellationToken,
        until_idle: bool,
    ) -> Result<()> {
        let _under_way = self.health.begin();
        let mut batch = self.batch(messages);
        let receipts = batch.receipts_in_flight();
        let visibility = Visibility::of_received(&*self.queue, &*self.clock, lane, receipts);
        let mut is_ours = true;
        let finished = tokio::select! {
            biased;
            () = abort.cancelled() => None,
            result = self.finish(lane, &mut batch, until_idle) => Some(result),
            () = visibility.keep() => {
                is_ours = false;
                None
            }
        };
        if matches!(finished, Some(Ok(()))) {
            batch.trace.applied();
        }
        // This worker cut off a try, so its count is taken back. Any other end has settled its count already.
        if finished.is_none() {
            self.isolation.uncount_try(&mut batch).await;
        }
        let receipts = batch.receipts();
        // Messages that other workers may hold by now are not released: the receipt may be valid for them
        // too.
        if is_ours && !receipts.is_empty() {
            // Other workers may try at once. If the release fails, the visibility timeout does the same.
            if let Err(error) = self.queue.extend_visibility(&receipts, Duration::ZERO).await {
                tracing::debug!(%error, "cannot release messages");
            }
        }
        finished.unwrap_or(Ok(()))
    }

    async fn finish(&self, lane: Lane, batch: &mut Batch, until_idle: bool) -> Result<()> {
        let mut backoff = Backoff::default();
        loop {
            let before = batch.done.applied;
            let result = self.work(lane, batch).await;
            match result {
                Ok(()) if batch.is_empty() => {
                    let done = batch.done;
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
                // Impossible; but remaining messages are released, and come again.
                Ok(()) => {
                    tracing::warn!(
                        lane = lane.name(),
                        messages = batch.receipts().len(),
                        "messages were left over"
                    );
                    return Ok(());
                }
                Err(error) if error.class() == Class::Fatal && (error.is_of_process() || until_idle) => {
                    return Err(error);
                }
                Err(error) => {
                    if batch.done.applied > before {
                        backoff.reset();
                    }
                    let pause = backoff.next(&*self.clock);
                    tracing::debug!(lane = lane.name(), %error, retry_in_ms = pause.as_millis() as u64, "cannot apply changes yet");
                    self.clock.sleep(pause).await;
                }
            }
        }
    }
}
