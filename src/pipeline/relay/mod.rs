//! The relay: committed changes from the outbox to the queue.
//!
//! The step claims outbox rows, chooses a lane for each ([`lane`]), packs them into messages with each id
//! once ([`message`]), and sends the messages to the queue. A crash anywhere repeats changes and loses
//! none, since a row leaves the outbox only with or after its message.

mod lane;
mod message;
mod options;
#[cfg(test)]
mod test_rows;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::change::Lane;
use super::clock::Clock;
use super::failure::{Class, Result};
use super::fault::{self, FaultBoard};
use super::metrics::RelayMetrics;
use super::outbox::{ClaimRequest, Outbox, Transferred};
use super::queue::QueueStats;
use super::retry::{Backoff, FatalPolicy};
use super::trace::Sampler;
use message::build_jobs;

pub use options::RelayOptions;

/// Small outbox rows in one claim: an outbox calls rows of at most 100 ids small, so some 10 MB at worst.
const SMALL_ROWS: usize = 2_000;

/// Rows of large statements in one claim: with 500 ids each 100,000 changes, some 5 MB.
const LARGE_ROWS: usize = 200;

/// How long a count of the backlog is believed while changes come.
const BACKLOG_AGE: Duration = Duration::from_secs(1);

/// The same while no changes come: the backlog can only shrink, and a count may cost a paid call.
const IDLE_BACKLOG_AGE: Duration = Duration::from_mins(1);

/// Moves changes of one source from its outbox to the queue. Owned by the one task that steps it.
pub struct Relay {
    outbox: Box<dyn Outbox>,
    /// How full the queue is that the outbox sends to.
    queue: Arc<dyn QueueStats>,
    clock: Arc<dyn Clock>,
    options: RelayOptions,
    /// Changes in the lanes: as counted, and those that were sent since.
    live_backlog: u64,
    /// Counted only where the lanes share a queue.
    bulk_backlog: u64,
    /// When the lanes were last counted.
    counted_at: Option<Duration>,
    /// Whether the last step found the outbox empty.
    is_idle: bool,
    faults: Arc<FaultBoard>,
    metrics: Arc<RelayMetrics>,
    /// Chooses the messages that are traced; none if nothing is traced.
    sampler: Option<Sampler>,
}

impl Relay {
    /// A relay that moves changes from an outbox to its queue. `queue` reports the backlog of that queue.
    #[must_use]
    pub fn new(
        outbox: Box<dyn Outbox>,
        queue: Arc<dyn QueueStats>,
        clock: Arc<dyn Clock>,
        options: RelayOptions,
    ) -> Self {
        Self {
            outbox,
            queue,
            clock,
            options,
            live_backlog: 0,
            bulk_backlog: 0,
            counted_at: None,
            is_idle: false,
            faults: Arc::default(),
            metrics: Arc::default(),
            sampler: None,
        }
    }

    /// The same relay, which reports to a board when nothing can be queued.
    #[must_use]
    pub fn reporting(self, faults: Arc<FaultBoard>) -> Self {
        Self { faults, ..self }
    }

    /// The same relay, which counts what it does here.
    #[must_use]
    pub fn measuring(self, metrics: Arc<RelayMetrics>) -> Self {
        Self { metrics, ..self }
    }

    /// The same relay, which begins traces if there is a sampler.
    #[must_use]
    pub fn tracing(self, sampler: Option<Sampler>) -> Self {
        Self { sampler, ..self }
    }

    /// Moves one claim; nothing moved means that the outbox was empty.
    pub async fn step(&mut self) -> Result<Transferred> {
        self.count_backlog().await?;
        let live_room = self.options.live_bound.saturating_sub(self.live_backlog);
        // In the outbox a load is stepped over; in a queue that the lanes share it stands in the way.
        let backlog_of = self.live_backlog + self.bulk_backlog;
        let is_full = self.queue.shared_bound().is_some_and(|bound| backlog_of >= bound);
        let large_rows = if is_full { 0 } else { LARGE_ROWS };
        let request = ClaimRequest {
            small_rows: SMALL_ROWS,
            large_rows,
            large_transaction: self.options.bulk_threshold,
        };
        let Some(sampler) = &self.sampler else {
            let build_jobs = |rows| build_jobs(rows, &self.options, live_room);
            let done = self.outbox.transfer(request, &build_jobs).await?;
            return Ok(self.moved(done, is_full));
        };
        let captured = Mutex::new(Vec::new());
        let build_jobs = |rows| {
            let mut jobs = build_jobs(rows, &self.options, live_room);
            captured.lock().unwrap_or_else(PoisonError::into_inner).extend(sampler.mark(&mut jobs));
            jobs
        };
        let done = self.outbox.transfer(request, &build_jobs).await?;
        sampler.transferred(captured.into_inner().unwrap_or_else(PoisonError::into_inner));
        Ok(self.moved(done, is_full))
    }

    /// Counts what was moved.
    fn moved(&mut self, done: Transferred, is_full: bool) -> Transferred {
        self.live_backlog += done.live;
        self.bulk_backlog += done.bulk;
        self.is_idle = done.rows == 0 && !is_full;
        if done.rows > 0 {
            self.metrics.queued[Lane::Live].add(done.live);
            self.metrics.queued[Lane::Bulk].add(done.bulk);
            self.metrics.claims.observe(done.changes as f64);
            self.metrics.capture_lag.observe(done.oldest_ms as f64 / 1000.0);
        }
        done
    }

    /// Steps until `stop`, or with `until_idle` until the outbox is empty.
    pub async fn run(&mut self, stop: &CancellationToken, until_idle: bool) -> Result<()> {
        let mut backoff = Backoff::default();
        let mut fatal = FatalPolicy::new(&*self.clock, self.options.start_timeout, until_idle);
        while !stop.is_cancelled() {
            let stepped = self.step().await;
            if stepped.is_ok() {
                fatal.worked();
                if backoff.failures() > 0 {
                    tracing::info!(failures = backoff.failures(), "changes are queued again");
                    self.faults.clear(fault::RELAY);
                }
            }
            match stepped {
                Ok(done) if done.rows == 0 => {
                    backoff.reset();
                    if until_idle && self.is_idle {
                        break;
                    }
                    stop.run_until_cancelled(self.outbox.wait(self.options.poll)).await;
                }
                Ok(done) => {
                    backoff.reset();
                    tracing::debug!(
                        changes = done.changes,
                        live = done.live,
                        bulk = done.bulk,
                        capture_lag_ms = done.oldest_ms,
                        "changes queued"
                    );
                }
                Err(error) if fatal.ends(&error, &*self.clock) => return Err(error),
                Err(error) => {
                    self.metrics.retries.count(error.kind());
                    let pause = backoff.next(&*self.clock);
                    let retry_in_ms = pause.as_millis() as u64;
                    // Logged once, and shown as a fault for as long as it lasts.
                    if backoff.failures() == 1 {
                        tracing::warn!(%error, class = %error.class(), retry_in_ms, "cannot queue changes: trying again until it works");
                    } else {
                        tracing::debug!(%error, class = %error.class(), retry_in_ms, "cannot queue changes");
                    }
                    if error.class() == Class::Fatal || backoff.failures() >= fault::FAILURE_THRESHOLD {
                        self.faults.report(fault::RELAY, format_args!("changes cannot be queued: {error}"));
                    }
                    stop.run_until_cancelled(self.clock.sleep(pause)).await;
                }
            }
        }
        Ok(())
    }

    /// Counts the lanes anew if the last count is too old.
    async fn count_backlog(&mut self) -> Result<()> {
        let age = if self.is_idle { IDLE_BACKLOG_AGE } else { BACKLOG_AGE };
        if self.counted_at.is_none_or(|at| self.clock.now().saturating_sub(at) > age) {
            self.live_backlog = self.queue.backlog(Lane::Live).await?.total();
            if self.queue.shared_bound().is_some() {
                self.bulk_backlog = self.queue.backlog(Lane::Bulk).await?.total();
            }
            self.counted_at = Some(self.clock.now());
        }
        Ok(())
    }
}
