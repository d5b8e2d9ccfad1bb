//! The job queue on Amazon SQS: a queue a lane (or one for both), and a dead-letter queue.
//!
//! SQS is at least once and unordered, which the contract allows; it bills by the request, which is why
//! everything here goes in batches of ten and receives wait.

mod batch;
mod client;
mod dead;
mod failure;
mod intake;
mod stats;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_sqs::Client;

use super::postgres::Postgres;
use crate::pipeline::change::{Job, Lane};
use crate::pipeline::failure::{Error, Result};
use crate::pipeline::queue::{DeadLetter, JobQueue, Message, Receipt, decode};
use intake::Intake;
use stats::Packing;

pub use client::{connect, connect_to};

/// Bytes of a message, and of all messages of a call, by the limits of SQS; a queue's own limit may be lower.
pub const MAX_BYTES: usize = 1_048_576;

/// Where the queues are, and how they are used.
#[derive(Clone, Debug)]
pub struct Options {
    /// URL of the queue for live changes, or for all.
    pub url: String,
    /// URL of the queue for loads; none when one queue carries both lanes.
    pub bulk_url: Option<String>,
    /// URL of the dead-letter queue; none to take the one of the redrive policy.
    pub dead_url: Option<String>,
    /// How long a received message stays invisible.
    pub visibility: Duration,
    /// How long a receive waits for a message: whole seconds, 20 at most.
    pub wait: Duration,
    /// With one queue: how many changes of bulk may stand in it.
    pub shared_bound: u64,
    /// Our own count of receives, which the redrive policy must not undercut.
    pub max_receives: u32,
    /// The source, whose packing the relay remembers.
    pub source: String,
}

/// Two lanes and a dead-letter queue in SQS.
pub struct Sqs {
    client: Client,
    postgres: Postgres,
    options: Options,
    dead_url: String,
    /// Bytes of a message at most: in each lane's queue, and in that of the dead letters.
    max_bytes: [usize; 2],
    dead_max_bytes: usize,
    intakes: Vec<Intake>,
    packing: Mutex<[Packing; 2]>,
    letters: tokio::sync::Mutex<Vec<DeadLetter>>,
}

/// What the queues' own settings will lose: warnings, and notes on what they may lose after a long time.
pub async fn remarks(client: &Client, options: &Options) -> Result<(Vec<String>, Vec<String>)> {
    let looked = client::look(client, options).await?;
    Ok((looked.warnings, looked.notes))
}

impl Sqs {
    /// Looks at the queues, and refuses those that can't serve.
    pub async fn open(client: Client, postgres: Postgres, options: Options) -> Result<Self> {
        let client::Looked { dead_url, max_bytes, dead_max_bytes, warnings, .. } =
            client::look(&client, &options).await?;
        for warning in warnings {
            tracing::warn!(warning, "looked at the queues");
        }
        let intakes = match &options.bulk_url {
            None => vec![Intake::new(&options.url, &Lane::ALL)],
            Some(bulk) => {
                vec![Intake::new(&options.url, &[Lane::Live]), Intake::new(bulk, &[Lane::Bulk])]
            }
        };
        Ok(Self {
            client,
            postgres,
            options,
            dead_url,
            max_bytes,
            dead_max_bytes,
            intakes,
            packing: Mutex::default(),
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

    fn packing(&self) -> MutexGuard<'_, [Packing; 2]> {
        self.packing.lock().unwrap_or_else(PoisonError::into_inner)
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
            let sent = Packing::of_jobs(jobs.iter().filter(|job| job.lane == lane));
            let sent = Packing { messages: bodies.len() as u64, ..sent };
            self.send_bodies(lane, bodies).await?;
            self.packing()[lane as usize].add(sent);
        }
        Ok(())
    }

    async fn receive(&self, lane: Lane, max: usize) -> Result<Vec<Message>> {
        let intake = self.intakes.iter().find(|intake| intake.carries(lane));
        let Some(intake) = intake else { return Ok(Vec::new()) };
        let messages = self.take_in(intake, lane, max).await?;
        let jobs = messages.iter().filter_map(|message| message.body.as_ref().ok());
        self.packing()[lane as usize].add(Packing::of_jobs(jobs));
        Ok(messages)
    }

    async fn wait(&self, _lane: Lane, _timeout: Duration) {
        // The receive before has waited.
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

    fn visibility(&self) -> Duration {
        self.options.visibility
    }
}

/// A queue's answer that lacks what it must hold.
fn lacking(what: &str, field: &str) -> Error {
    Error::retryable(what, format!("the answer has no {field}"))
}
