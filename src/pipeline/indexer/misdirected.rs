//! Messages that this worker cannot work on: of a later build, of another source, or unreadable.
//!
//! During a rolling upgrade both builds receive from one queue, so a message of a later build or of another
//! source is no dead letter, however often it comes. It is put back for a growing pause, for a worker that
//! can read it, and reported as a fault. It waits for as long as the queue keeps it (SQS: the retention
//! period, or its redrive policy). A message that no build can read is a dead letter.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::batch::Batch;
use super::health::Health;
use crate::pipeline::change::JOB_VERSION;
use crate::pipeline::clock::Clock;
use crate::pipeline::failure::Result;
use crate::pipeline::fault;
use crate::pipeline::metrics::Metrics;
use crate::pipeline::queue::{DeadLetterCause, DeadLetters, JobQueue, Message, Reason};

/// How long such a message is put back for at first, and at most.
const FIRST_PAUSE: Duration = Duration::from_secs(30);
const LONGEST_PAUSE: Duration = Duration::from_mins(5);

/// A fault of this kind that no message confirms ends after this long.
const FORGOTTEN: Duration = Duration::from_mins(11);

/// Most kinds that are told apart. Names come from messages, so there may be any number.
const MAX_KINDS: usize = 8;

/// Characters of a foreign name that are shown.
const MAX_NAME: usize = 60;

/// Takes messages out of batches that this worker cannot work on.
pub(super) struct Misdirected {
    /// The source whose messages are ours.
    source: String,
    queue: Arc<dyn JobQueue>,
    dead_letters: Arc<dyn DeadLetters>,
    clock: Arc<dyn Clock>,
    health: Arc<Health>,
    metrics: Arc<Metrics>,
    seen: Mutex<Seen>,
}

/// Which kinds of messages were put back, and when each last was, by the worker's clock.
type Seen = BTreeMap<String, Duration>;

impl Misdirected {
    pub(super) fn new(
        source: String,
        queue: Arc<dyn JobQueue>,
        dead_letters: Arc<dyn DeadLetters>,
        clock: Arc<dyn Clock>,
        health: Arc<Health>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { source, queue, dead_letters, clock, health, metrics, seen: Mutex::default() }
    }

    /// Dead-letters messages that no build can read, and puts back messages that another worker can read.
    pub(super) async fn set_aside(&self, batch: &mut Batch) -> Result<()> {
        let mut at = 0;
        while let Some(message) = batch.messages().get(at) {
            if let Some(reason) = self.misdirected_reason(message) {
                self.return_to_queue(message, &reason).await?;
            } else if let Err(undecodable) = &message.body {
                let error = undecodable.reason.clone();
                tracing::error!(
                    message.id,
                    receive_count = message.receive_count,
                    error,
                    "a message {}: moved to the dead letters",
                    Reason::Undecodable.describe()
                );
                let cause = DeadLetterCause { reason: Reason::Undecodable, error, tries: 0 };
                self.dead_letters.store(message, None, &cause).await?;
                self.metrics.dead_lettered(cause.reason);
            } else {
                at += 1;
                continue;
            }
            // No change of the batch is its.
            let gone = message.receipt.clone();
            batch.retain(|message| message.receipt != gone);
        }
        Ok(())
    }

    /// Why a message is for another worker; none if it is for this worker.
    fn misdirected_reason(&self, message: &Message) -> Option<String> {
        match &message.body {
            Ok(job) if job.source != self.source => {
                let name: String = job.source.chars().take(MAX_NAME).collect();
                Some(format!(
                    "of source {name:?}, and this worker is source {:?}'s: start one for it",
                    self.source
                ))
            }
            Err(undecodable) => undecodable.later.map(|version| {
                format!("of job version {version}, and this build reads {JOB_VERSION}: use the newer build")
            }),
            Ok(_) => None,
        }
    }

    /// Hides a message from all workers for a while, and reports the fault.
    async fn return_to_queue(&self, message: &Message, reason: &str) -> Result<()> {
        let doublings = message.receive_count.saturating_sub(1).min(10);
        let pause = FIRST_PAUSE.saturating_mul(1 << doublings).min(LONGEST_PAUSE);
        self.queue.extend_visibility(std::slice::from_ref(&message.receipt), pause).await?;
        let now = self.clock.now();
        let mut seen = self.seen();
        seen.retain(|_, at| now.saturating_sub(*at) < FORGOTTEN);
        if !seen.contains_key(reason) {
            tracing::warn!(
                message.id,
                retry_in_ms = pause.as_millis() as u64,
                "a message is {reason}: it was put back"
            );
        }
        if seen.len() < MAX_KINDS || seen.contains_key(reason) {
            seen.insert(reason.to_owned(), now);
        }
        let kinds: Vec<&str> = seen.keys().map(String::as_str).collect();
        let message = format!("the queue holds messages {}", kinds.join("; "));
        self.health.faults().report_for(fault::MISDIRECTED, message, FORGOTTEN);
        Ok(())
    }

    /// Whether a message was put back lately, so that the queue need not become empty.
    pub(super) fn has_returned(&self) -> bool {
        let now = self.clock.now();
        self.seen().values().any(|at| now.saturating_sub(*at) < FORGOTTEN)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
