//! The indexer's loop: receiving, holding, failing and stopping around the step.
//!
//! Each lane has a loop of its own, so that a live message is received while a bulk one is worked on;
//! between slices the scheduler lets the live one go first.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::Indexer;
use super::batch::Batch;
use super::visibility::Visibility;
use crate::pipeline::change::{Lane, MAX_CHANGES_PER_JOB};
use crate::pipeline::failure::{Class, Error, Result};
use crate::pipeline::fault;
use crate::pipeline::index::Writes;
use crate::pipeline::ledger::Swept;
use crate::pipeline::queue::Message;
use crate::pipeline::retry::Backoff;

/// Batches of one lane that are under way at once: one is embedded while the next is received and
/// peeked and the last is written.
const BATCHES_PER_LANE: usize = 3;

/// Batches that are received ahead of the one that is worked on, however much is held.
const PREFETCHED: usize = 1;

/// Messages in one receive; SQS allows no more.
const MAX_RECEIVE: usize = 10;

/// Changes that a lane may always hold, however slow the embedder is: some for every thread.
const MIN_HELD: u64 = 64;

/// Changes that a lane holds at most, so that memory stays bounded when nothing has to be embedded.
const MAX_HELD: u64 = 20_000;

/// Attempts that are swept in one go.
const SWEEP_AT_ONCE: usize = 100;

/// During an outage, how often it is looked at whether it is over.
const OUTAGE_LOOK: Duration = Duration::from_millis(100);

/// How long a receive may still take once the work is to stop: what it brings would else stay invisible.
const LAST_RECEIVE: Duration = Duration::from_millis(200);

/// How often the index's search structures are looked after.
const MAINTAIN_EVERY: Duration = Duration::from_secs(1);

/// What a batch's task came to; one that panicked is as bad as one that failed for good.
fn ended_well(ended: Result<Result<()>, tokio::task::JoinError>) -> Result<()> {
    ended.unwrap_or_else(|error| Err(Error::fatal("apply changes", error)))
}

/// A batch that is under way, for as long as this lives.
struct UnderWay<'a>(&'a Indexer);

impl<'a> UnderWay<'a> {
    fn begin(indexer: &'a Indexer) -> Self {
        indexer.under_way.fetch_add(1, Ordering::Relaxed);
        Self(indexer)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        // What failed may have been taken away: then nothing will ever show that it would go through.
        if self.0.under_way.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.health.nothing_is_held();
        }
    }
}

impl Indexer {
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
        self.ends_when_idle.store(until_idle, Ordering::Relaxed);
        let lanes_done = CancellationToken::new();
        let mut threads = JoinSet::new();
        for _ in 0..self.options.workers.max(1) {
            let indexer = Arc::clone(self);
            threads.spawn(async move { indexer.embed_slices().await });
        }
        let maintain = lanes_done.clone();
        let indexer = Arc::clone(self);
        let maintenance = tokio::spawn(async move {
            maintain.run_until_cancelled(indexer.maintain()).await;
        });
        let (watch, indexer) = (lanes_done.clone(), Arc::clone(self));
        let watching = tokio::spawn(async move {
            watch.run_until_cancelled(indexer.watch()).await;
        });
        // A lane that fails for good must not leave the other one working, nor either one holding what may never
        // go through.
        let (stop, abort) = (stop.child_token(), abort.child_token());
        let (live, bulk) = tokio::join!(
            self.run_lane(Lane::Live, &stop, &abort, until_idle),
            self.run_lane(Lane::Bulk, &stop, &abort, until_idle)
        );
        lanes_done.cancel();
        let _ = tokio::join!(maintenance, watching);
        if let Some(visibility) = self.index.visibility() {
            self.look(visibility).await;
        }
        if let Err(error) = self.close_left().await {
            tracing::warn!(%error, "cannot close attempts: others will sweep them");
        }
        threads.shutdown().await;
        live.and(bulk)
    }

    async fn maintain(&self) {
        let mut tick = tokio::time::interval(MAINTAIN_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            // An index that can't fence is a service that looks after itself, and a count may cost a call.
            if matches!(self.index.writes(), Writes::Fenced(_)) {
                let result = async {
                    let backlog = self.backlog().await?;
                    self.index.maintain(backlog).await
                };
                if let Err(error) = result.await {
                    tracing::debug!(%error, "cannot look after the index's search structures");
                }
            }
            if let Err(error) = self.sweep().await {
                tracing::debug!(%error, "cannot sweep attempts");
            }
        }
    }

    async fn backlog(&self) -> Result<u64> {
        let mut sum = 0;
        for lane in Lane::ALL {
            let backlog = self.stats.backlog(lane).await?;
            sum += backlog.visible + backlog.in_flight;
        }
        Ok(sum)
    }

    /// Whether nothing is left that this worker could do. What it put back for others stays in the queue.
    async fn is_idle(&self) -> Result<bool> {
        let mut left = 0;
        let mut visible = 0;
        for lane in Lane::ALL {
            let backlog = self.stats.backlog(lane).await?;
            visible += backlog.visible;
            left += backlog.visible + backlog.in_flight;
        }
        Ok(left == 0 || (visible == 0 && self.has_put_back()))
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
        let mut has_received = false;
        while !stop.is_cancelled() {
            while let Some(ended) = running.try_join_next() {
                result = result.and(ended_well(ended));
            }
            if result.is_err() {
                stop.cancel();
                break;
            }
            let Some(Ok(permit)) = stop.run_until_cancelled(Arc::clone(&batches).acquire_owned()).await
            else {
                break;
            };
            if self.health.is_outage() && !running.is_empty() {
                // What is held is tried again and again; when it goes through, so will the rest.
                drop(permit);
                stop.run_until_cancelled(self.clock().sleep(OUTAGE_LOOK)).await;
                continue;
            }
            let room = self.may_hold().saturating_sub(held.load(Ordering::Relaxed));
            let received = if room == 0 && running.len() > PREFETCHED {
                drop(permit);
                // Something ends soon, since something is held.
                if let Some(Some(ended)) = stop.run_until_cancelled(running.join_next()).await {
                    result = result.and(ended_well(ended));
                }
                continue;
            } else {
                let wanted = (room as f64 / per_message).ceil() as usize;
                let receive = self.queue.receive(lane, wanted.clamp(1, MAX_RECEIVE));
                match self.receive_beside(receive, &mut running, stop).await {
                    Ok(Some(received)) => received,
                    Ok(None) => break,
                    Err(error) => {
                        result = Err(error);
                        stop.cancel();
                        break;
                    }
                }
            };
            if received.is_ok() && backoff.failures() > 0 {
                tracing::info!(
                    lane = lane.name(),
                    failures = backoff.failures(),
                    "messages are received again"
                );
                self.faults.clear(fault::QUEUE);
            }
            has_received |= received.is_ok();
            match received {
                Ok(messages) if messages.is_empty() => {
                    backoff.reset();
                    drop(permit);
                    if until_idle && running.is_empty() && self.is_idle().await.unwrap_or(false) {
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
                        let result = indexer.process_with_visibility(lane, &messages, &abort).await;
                        held.fetch_sub(changes, Ordering::Relaxed);
                        drop(permit);
                        result
                    });
                }
                // A queue that was there comes back: a database that is restored, a right that is granted.
                Err(error)
                    if error.class == Class::Fatal && (error.of_process || until_idle || !has_received) =>
                {
                    result = Err(error);
                    stop.cancel();
                }
                Err(error) => {
                    drop(permit);
                    let pause = backoff.next(&error, self.clock());
                    let retry_in_ms = pause.as_millis() as u64;
                    // Told once, and shown for as long as it lasts.
                    if backoff.failures() == 1 {
                        tracing::warn!(lane = lane.name(), %error, retry_in_ms, "cannot receive: trying again until it works");
                    } else {
                        tracing::debug!(lane = lane.name(), %error, retry_in_ms, "cannot receive");
                    }
                    if error.class == Class::Fatal || backoff.failures() >= fault::IN_A_ROW {
                        self.faults.report(fault::QUEUE, format_args!("nothing can be received: {error}"));
                    }
                    stop.run_until_cancelled(tokio::time::sleep(pause)).await;
                }
            }
        }
        if result.is_err() {
            abort.cancel();
        }
        while let Some(ended) = running.join_next().await {
            result = result.and(ended_well(ended));
        }
        result
    }

    /// Receives while batches run; ends with the first of these that fails for good, and with `stop`.
    async fn receive_beside(
        &self,
        receive: impl Future<Output = Result<Vec<Message>>>,
        running: &mut JoinSet<Result<()>>,
        stop: &CancellationToken,
    ) -> Result<Option<Result<Vec<Message>>>> {
        let mut receive = std::pin::pin!(receive);
        let mut stopped = std::pin::pin!(async {
            stop.cancelled().await;
            self.clock().sleep(LAST_RECEIVE).await;
        });
        loop {
            tokio::select! {
                biased;
                received = &mut receive => return Ok(Some(received)),
                () = &mut stopped => return Ok(None),
                Some(ended) = running.join_next() => ended_well(ended)?,
            }
        }
    }

    /// Works until the messages are done with, extending their visibility meanwhile. An outage is
    /// sat out, with the messages held, and so is a wrong setting, unless the run ends when nothing is left;
    /// on `abort`, or when this worker can't go on, they are released. When their visibility cannot be extended
    /// any more, others get them, and the work ends as on `abort`.
    pub async fn process_with_visibility(
        &self,
        lane: Lane,
        messages: &[Message],
        abort: &CancellationToken,
    ) -> Result<()> {
        let _under_way = UnderWay::begin(self);
        let mut batch = self.batch(messages, self.group_size());
        let visibility = Visibility::of_received(&*self.queue, self.clock(), lane, batch.held());
        let mut is_ours = true;
        let finished = tokio::select! {
            biased;
            () = abort.cancelled() => None,
            result = self.finish(lane, &mut batch) => Some(result),
            () = visibility.keep() => {
                is_ours = false;
                None
            }
        };
        // A try was cut off by us. Any other end has seen to its count.
        if finished.is_none() {
            self.take_back(&mut batch).await;
        }
        let receipts = batch.receipts();
        // What others may have by now is not released: a receipt may be good for theirs, too.
        if is_ours && !receipts.is_empty() {
            // Others may try at once; if this fails too, the visibility timeout does the same.
            if let Err(error) = self.queue.extend_visibility(&receipts, Duration::ZERO).await {
                tracing::debug!(%error, "cannot release messages");
            }
        }
        finished.unwrap_or(Ok(()))
    }

    async fn finish(&self, lane: Lane, batch: &mut Batch) -> Result<()> {
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
                // Cannot be; but what is left is released, and comes again.
                Ok(()) => {
                    tracing::warn!(
                        lane = lane.name(),
                        messages = batch.receipts().len(),
                        "messages were left over"
                    );
                    return Ok(());
                }
                Err(error)
                    if error.class == Class::Fatal
                        && (error.of_process || self.ends_when_idle.load(Ordering::Relaxed)) =>
                {
                    return Err(error);
                }
                Err(error) => {
                    if batch.done.applied > before {
                        backoff.reset();
                    }
                    let pause = backoff.next(&error, self.clock());
                    tracing::debug!(lane = lane.name(), %error, retry_in_ms = pause.as_millis() as u64, "cannot apply changes yet");
                    self.clock().sleep(pause).await;
                }
            }
        }
    }

    /// Closes attempts that were left, sweeps those that nobody will close, and disowns what stands under this worker's name
    /// without being in its hand.
    pub async fn sweep(&self) -> Result<Swept> {
        if matches!(self.index.writes(), Writes::Fenced(_)) {
            return Ok(Swept::default());
        }
        self.close_left().await?;
        self.ledger.disown(&self.options.worker, &self.own_attempts()).await?;
        let swept = self.ledger.sweep(self.options.settle, SWEEP_AT_ONCE).await?;
        if swept.attempts > 0 || swept.abandoned > 0 {
            tracing::info!(
                attempts = swept.attempts,
                abandoned = swept.abandoned,
                requeued = swept.requeued,
                "swept attempts that nobody closed"
            );
        }
        Ok(swept)
    }
}
