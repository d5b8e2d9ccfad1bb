//! The receive loop of one lane.
//!
//! Each lane has a loop of its own, so that a live message is received while a bulk message is in work;
//! between slices the scheduler takes the live message first. The loop knows nothing of the tokio runtime:
//! batches run where [`Spawn`] puts them, and time comes from the clock only, so that a simulation runs the
//! same loop.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::spawn::{Spawn, Task};
use super::step::Indexer;
use crate::pipeline::change::{Lane, MAX_CHANGES_PER_JOB};
use crate::pipeline::failure::{Class, Error, Result};
use crate::pipeline::fault;
use crate::pipeline::queue::Message;
use crate::pipeline::retry::{Backoff, FatalPolicy};

/// Batches of one lane that are under way at once: one is embedded while the next is received and
/// peeked and the last is written.
const BATCHES_PER_LANE: usize = 3;

/// Batches that are received ahead of the batch in work, however many changes are in flight.
const PREFETCHED: usize = 1;

/// Messages in one receive; SQS allows no more.
const MAX_RECEIVE: usize = 10;

/// Changes that a lane may always have in flight, however slow the embedder is: some for every thread.
const MIN_IN_FLIGHT: u64 = 64;

/// Changes that a lane has in flight at most, so that memory stays bounded when nothing has to be embedded.
const MAX_IN_FLIGHT: u64 = 20_000;

/// How often the end of an outage is checked.
const OUTAGE_POLL: Duration = Duration::from_millis(100);

/// How long a receive may still take after `stop`: otherwise its messages would stay invisible.
const LAST_RECEIVE: Duration = Duration::from_millis(200);

/// Receives the messages of one lane and has them worked on.
pub struct Receiver {
    indexer: Arc<Indexer>,
    lane: Lane,
    /// Where batches run.
    spawn: Arc<dyn Spawn>,
    /// Whether the loop ends once both lanes are empty. Then it must not wait for the repair of a setting.
    until_idle: bool,
    /// The loop receives nothing more, and ends once its batches have.
    stop: CancellationToken,
    /// Batches that are under way are released to others.
    abort: CancellationToken,
    /// Batches that are under way, or whose end was not seen yet.
    running: FuturesUnordered<Task>,
    /// One permit for each batch that may be under way.
    permits: Arc<Semaphore>,
    /// Changes of the batches that are under way.
    in_flight: Arc<AtomicU64>,
    /// Changes in a message, by the last receive.
    per_message: f64,
    /// Of receives that fail.
    backoff: Backoff,
    /// Decides which receives that fail end the loop.
    fatal: FatalPolicy,
}

impl Receiver {
    /// The receive loop of a lane. It ends with `stop`, or with the first failure for which waiting does not
    /// help. Then it cancels `stop` and `abort`, so that the other lane ends too.
    #[must_use]
    pub fn new(
        indexer: Arc<Indexer>,
        lane: Lane,
        spawn: Arc<dyn Spawn>,
        stop: CancellationToken,
        abort: CancellationToken,
        until_idle: bool,
    ) -> Self {
        let fatal = FatalPolicy::new(&*indexer.clock, indexer.options.start_timeout, until_idle);
        Self {
            indexer,
            lane,
            spawn,
            until_idle,
            stop,
            abort,
            running: FuturesUnordered::new(),
            permits: Arc::new(Semaphore::new(BATCHES_PER_LANE)),
            in_flight: Arc::default(),
            // Messages are taken for full until the first receive, so that the first receive does not take
            // too many.
            per_message: MAX_CHANGES_PER_JOB as f64,
            backoff: Backoff::default(),
            fatal,
        }
    }

    /// Receives until `stop`, then finishes the batches in flight. On `abort`, releases unfinished batches to
    /// other workers. With `until_idle`, ends once both lanes are empty.
    pub async fn run(mut self) -> Result<()> {
        let mut result = Ok(());
        while !self.stop.is_cancelled() {
            match self.turn().await {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => break,
                Err(error) => {
                    self.stop.cancel();
                    self.abort.cancel();
                    result = Err(error);
                }
            }
        }
        while let Some(ended) = self.running.next().await {
            result = result.and(ended);
        }
        result
    }

    /// Receives once, if there is room, and starts a batch of the received messages.
    async fn turn(&mut self) -> Result<ControlFlow<()>> {
        while let Some(Some(ended)) = self.running.next().now_or_never() {
            ended?;
        }
        let permit = Arc::clone(&self.permits).acquire_owned();
        let Some(Ok(permit)) = self.stop.run_until_cancelled(permit).await else {
            return Ok(ControlFlow::Break(()));
        };
        if self.indexer.health.is_outage() && !self.running.is_empty() {
            // The batches in flight are tried again and again. Once they succeed, more is received.
            drop(permit);
            self.sleep(OUTAGE_POLL).await;
            return Ok(ControlFlow::Continue(()));
        }
        let room = self.max_in_flight().saturating_sub(self.in_flight.load(Ordering::Relaxed));
        if room == 0 && self.running.len() > PREFETCHED {
            drop(permit);
            // A batch ends soon, because batches are in flight.
            if let Some(Some(ended)) = self.stop.run_until_cancelled(self.running.next()).await {
                ended?;
            }
            return Ok(ControlFlow::Continue(()));
        }
        let wanted = (room as f64 / self.per_message).ceil() as usize;
        let Some(received) = self.receive(wanted.clamp(1, MAX_RECEIVE)).await? else {
            return Ok(ControlFlow::Break(()));
        };
        let messages = match received {
            Ok(messages) => messages,
            Err(error) => {
                drop(permit);
                self.sit_out(error).await?;
                return Ok(ControlFlow::Continue(()));
            }
        };
        self.it_works();
        if !messages.is_empty() {
            self.start(messages, permit);
            return Ok(ControlFlow::Continue(()));
        }
        drop(permit);
        if self.until_idle && self.running.is_empty() && self.indexer.is_idle().await.unwrap_or(false) {
            return Ok(ControlFlow::Break(()));
        }
        // A batch that ends makes no work, so there is no need to wake for it.
        let wait = self.indexer.queue.wait(self.lane, self.indexer.options.poll);
        self.stop.run_until_cancelled(wait).await;
        Ok(ControlFlow::Continue(()))
    }

    /// Changes that the lane may have in flight.
    fn max_in_flight(&self) -> u64 {
        let Indexer { throughput, options, .. } = &*self.indexer;
        throughput.within(options.prefetch).clamp(MIN_IN_FLIGHT, MAX_IN_FLIGHT)
    }

    /// Receives while batches run. Fails with the first batch that fails, and returns none on `stop`.
    async fn receive(&mut self, max: usize) -> Result<Option<Result<Vec<Message>>>> {
        let Self { indexer, lane, stop, running, .. } = self;
        let mut receive = std::pin::pin!(indexer.queue.receive(*lane, max));
        let mut stopped = std::pin::pin!(async {
            stop.cancelled().await;
            indexer.clock.sleep(LAST_RECEIVE).await;
        });
        loop {
            tokio::select! {
                biased;
                received = &mut receive => return Ok(Some(received)),
                () = &mut stopped => return Ok(None),
                Some(ended) = running.next() => ended?,
            }
        }
    }

    /// Records a successful receive.
    fn it_works(&mut self) {
        if self.backoff.failures() > 0 {
            tracing::info!(
                lane = self.lane.name(),
                failures = self.backoff.failures(),
                "messages are received again"
            );
            self.indexer.health.faults().clear(fault::QUEUE);
        }
        self.backoff.reset();
        self.fatal.worked();
    }

    /// Pauses after a failed receive. Returns the error if waiting does not help.
    async fn sit_out(&mut self, error: Error) -> Result<()> {
        if self.fatal.ends(&error, &*self.indexer.clock) {
            return Err(error);
        }
        let pause = self.backoff.next(&*self.indexer.clock);
        let retry_in_ms = pause.as_millis() as u64;
        let lane = self.lane.name();
        // Logged once, and shown as a fault for as long as it lasts.
        if self.backoff.failures() == 1 {
            tracing::warn!(lane, %error, retry_in_ms, "cannot receive messages: trying again until a receive succeeds");
        } else {
            tracing::debug!(lane, %error, retry_in_ms, "cannot receive messages");
        }
        if error.class() == Class::Fatal || self.backoff.failures() >= fault::FAILURE_THRESHOLD {
            let faults = self.indexer.health.faults();
            faults.report(fault::QUEUE, format_args!("nothing can be received: {error}"));
        }
        self.sleep(pause).await;
        Ok(())
    }

    /// Starts a batch of these messages. The permit is given back when it ends.
    fn start(&mut self, messages: Vec<Message>, permit: OwnedSemaphorePermit) {
        let changes: u64 =
            messages.iter().map(|message| message.body.as_ref().map_or(1, |job| job.changes() as u64)).sum();
        self.per_message = (changes as f64 / messages.len() as f64).max(1.0);
        self.in_flight.fetch_add(changes, Ordering::Relaxed);
        let (indexer, in_flight, abort) =
            (Arc::clone(&self.indexer), Arc::clone(&self.in_flight), self.abort.clone());
        let (lane, until_idle) = (self.lane, self.until_idle);
        let task = async move {
            let result = indexer.process_with_visibility(lane, &messages, &abort, until_idle).await;
            in_flight.fetch_sub(changes, Ordering::Relaxed);
            drop(permit);
            result
        };
        self.running.push(self.spawn.spawn(task.boxed()));
    }

    /// Sleeps, until `stop` at most.
    async fn sleep(&mut self, pause: Duration) {
        self.stop.run_until_cancelled(self.indexer.clock.sleep(pause)).await;
    }
}
