//! Keeping the messages of a batch invisible to others while it is worked on.
//!
//! A received message belongs to the worker until its visibility timeout ends, so the worker extends the
//! timeout again and again. Each successful extension moves the deadline. A failed extension is tried again
//! until the deadline has passed. Then other workers receive the messages, and this worker gives up the
//! batch, because to go on would only repeat their work.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::pipeline::change::Lane;
use crate::pipeline::clock::Clock;
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::queue::{JobQueue, Receipt};
use crate::pipeline::retry::Backoff;

/// Extensions in one visibility timeout: two thirds of it are left to try again.
const EXTENSIONS: u32 = 3;

/// The visibility timeout of the messages of a batch.
pub(super) struct Visibility<'a> {
    queue: &'a dyn JobQueue,
    clock: &'a dyn Clock,
    lane: Lane,
    /// Receipts of the messages that are still held.
    held: Arc<Mutex<Vec<Receipt>>>,
    /// How long an extension lasts.
    timeout: Duration,
    /// When the visibility timeout ends, by the last extension that succeeded. Never later than the queue
    /// has it, since it is counted from before the call.
    deadline: Duration,
}

impl<'a> Visibility<'a> {
    /// The visibility of messages that were received just now.
    pub(super) fn of_received(
        queue: &'a dyn JobQueue,
        clock: &'a dyn Clock,
        lane: Lane,
        held: Arc<Mutex<Vec<Receipt>>>,
    ) -> Self {
        let timeout = queue.visibility_timeout();
        Self { queue, clock, lane, held, timeout, deadline: clock.now() + timeout }
    }

    /// Extends the visibility for as long as it is polled. Returns when that failed until the deadline.
    pub(super) async fn keep(mut self) {
        let error = loop {
            self.clock.sleep(self.timeout / EXTENSIONS).await;
            if let Err(error) = self.extend().await {
                break error;
            }
        };
        tracing::warn!(
            lane = self.lane.name(),
            %error,
            "cannot extend visibility: giving messages up, which come again"
        );
    }

    /// Extends the visibility, trying until the deadline.
    async fn extend(&mut self) -> Result<()> {
        let mut backoff = Backoff::default();
        loop {
            let began = self.clock.now();
            let Err(error) = self.try_to_extend().await else {
                self.deadline = began + self.timeout;
                return Ok(());
            };
            let left = self.deadline.saturating_sub(self.clock.now());
            let pause = backoff.next(self.clock).min(left);
            tracing::debug!(
                lane = self.lane.name(),
                %error,
                left_ms = left.as_millis() as u64,
                retry_in_ms = pause.as_millis() as u64,
                "cannot extend visibility yet"
            );
            self.clock.sleep(pause).await;
            if pause == left {
                return Err(error);
            }
        }
    }

    /// One call, which may take until the deadline. A process that was stopped beyond it makes one all the
    /// same: the messages may not have been received by others yet.
    async fn try_to_extend(&self) -> Result<()> {
        let receipts = self.held.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let left = self.deadline.saturating_sub(self.clock.now());
        let patience = if left.is_zero() { self.timeout / EXTENSIONS } else { left };
        tokio::select! {
            biased;
            extended = self.queue.extend_visibility(&receipts, self.timeout) => extended,
            () = self.clock.sleep(patience) => Err(Error::new(FailureKind::TimedOut, "extend visibility", "no answer in time")),
        }
    }
}
