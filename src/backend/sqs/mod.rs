//! The job queue on Amazon SQS: one queue for each lane, or one queue for both, and a dead-letter queue.
//!
//! SQS delivers at least once and in no order, which the contract of [`JobQueue`] allows. SQS bills by the
//! request, so all calls here carry up to ten messages, and receives use long polling.

mod batch;
mod client;
mod dead_letters;
mod error_policy;
mod receive;
mod stats;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_sqs::Client;

use super::postgres::Postgres;
use crate::pipeline::change::{Job, Lane};
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::queue::{DeadLetter, JobQueue, Message, Receipt, decode};
use receive::Receiver;
use stats::MessageDensity;

pub use client::{connect, connect_to};

/// The most bytes of a message, and of all messages of a call (limits of SQS). A queue's own limit may be
/// lower.
pub const MAX_BYTES: usize = 1_048_576;

/// The queues' URLs, and how the queues are used.
#[derive(Clone, Debug)]
pub struct SqsOptions {
    /// URL of the queue for live changes, or for all changes.
    pub url: String,
    /// URL of the queue for loads; `None` when one queue carries both lanes.
    pub bulk_url: Option<String>,
    /// URL of the dead-letter queue; `None` to use the queue that the redrive policy names.
    pub dead_url: Option<String>,
    /// The visibility timeout of a received message.
    pub visibility: Duration,
    /// How long a receive waits for a message: whole seconds, at most 20.
    pub wait: Duration,
    /// With one queue for both lanes: the most changes of the bulk lane that may be in the queue.
    pub shared_bound: u64,
    /// The receive count after which refarch gives a message up. The redrive policy should not be lower.
    pub max_receives: u32,
    /// The source's name. The relay records under this name how many changes its messages hold.
    pub source: String,
}

/// A queue for each lane and a dead-letter queue, in SQS.
pub struct Sqs {
    client: Client,
    postgres: Postgres,
    options: SqsOptions,
    dead_url: String,
    /// The most bytes of a message: in each lane's queue, and in the dead-letter queue.
    max_bytes: [usize; 2],
    dead_max_bytes: usize,
    receivers: Vec<Receiver>,
    density: Mutex<[MessageDensity; 2]>,
    letters: tokio::sync::Mutex<Vec<DeadLetter>>,
}

/// Finds settings of the queues that lose messages. Returns warnings, and notes on what may be lost after a
/// long time.
pub async fn configuration_warnings(
    client: &Client,
    options: &SqsOptions,
) -> Result<(Vec<String>, Vec<String>)> {
    let inspection = client::inspect(client, options).await?;
    Ok((inspection.warnings, inspection.notes))
}

impl Sqs {
    /// Inspects the queues, and fails if a queue cannot be used.
    pub async fn open(client: Client, postgres: Postgres, options: SqsOptions) -> Result<Self> {
        let client::QueueInspection { dead_url, max_bytes, dead_max_bytes, warnings, .. } =
            client::inspect(&client, &options).await?;
        for warning in warnings {
            tracing::warn!(warning, "a setting of a queue may lose messages");
        }
        let receivers = match &options.bulk_url {
            None => vec![Receiver::new(&options.url, &Lane::ALL)],
            Some(bulk) => {
                vec![Receiver::new(&options.url, &[Lane::Live]), Receiver::new(bulk, &[Lane::Bulk])]
            }
        };
        Ok(Self {
            client,
            postgres,
            options,
            dead_url,
            max_bytes,
            dead_max_bytes,
            receivers,
            density: Mutex::default(),
            letters: tokio::sync::Mutex::default(),
        })
    }

    fn url(&self, lane: Lane) -> &str {
        match (&self.options.bulk_url, lane) {
            (Some(bulk), Lane::Bulk) => bulk,
            _ => &self.options.url,
        }
    }

    fn max_bytes(&self, lane: Lane) -> usize {
        self.max_bytes[lane as usize]
    }

    fn density(&self) -> MutexGuard<'_, [MessageDensity; 2]> {
        self.density.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl JobQueue for Sqs {
    async fn send(&self, jobs: &[Job]) -> Result<()> {
        for lane in Lane::ALL {
            let mut bodies = Vec::new();
            for job in jobs.iter().filter(|job| job.lane == lane) {
                batch::bodies(job, self.max_bytes(lane), &mut bodies)?;
            }
            let sent = MessageDensity::of_jobs(jobs.iter().filter(|job| job.lane == lane));
            let sent = MessageDensity { messages: bodies.len() as u64, ..sent };
            self.send_bodies(lane, bodies).await?;
            self.density()[lane as usize].add(sent);
        }
        Ok(())
    }

    async fn receive(&self, lane: Lane, max: usize) -> Result<Vec<Message>> {
        let receiver = self.receivers.iter().find(|receiver| receiver.carries(lane));
        let Some(receiver) = receiver else { return Ok(Vec::new()) };
        let messages = self.receive_for_lane(receiver, lane, max).await?;
        let jobs = messages.iter().filter_map(|message| message.body.as_ref().ok());
        self.density()[lane as usize].add(MessageDensity::of_jobs(jobs));
        Ok(messages)
    }

    async fn wait(&self, _lane: Lane, _timeout: Duration) {
        // The last receive has already waited (long polling).
    }

    async fn acknowledge(&self, receipts: &[Receipt]) -> Result<()> {
        for (url, handles) in self.by_queue(receipts) {
            self.delete(&url, handles).await?;
        }
        Ok(())
    }

    async fn extend_visibility(&self, receipts: &[Receipt], timeout: Duration) -> Result<()> {
        for (url, handles) in self.by_queue(receipts) {
            batch::change_visibility(&self.client, &url, handles, timeout).await?;
        }
        Ok(())
    }

    fn visibility_timeout(&self) -> Duration {
        self.options.visibility
    }
}

/// An answer lacks a field that SQS always sends.
fn lacking(what: &str, field: &str) -> Error {
    Error::new(FailureKind::UnexpectedAnswer, what, format!("the answer has no {field}"))
}
