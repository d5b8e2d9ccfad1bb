//! The job queue: sending, receiving and acknowledging.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_sqs::Client;

use super::density::MessageDensity;
use super::options::SqsOptions;
use super::receive::Receiver;
use super::{batch, client};
use crate::backend::postgres::Postgres;
use crate::pipeline::change::{Job, Lane};
use crate::pipeline::failure::Result;
use crate::pipeline::queue::{DeadLetter, JobQueue, Message, Receipt};

/// Two lanes and a dead-letter queue in SQS.
pub struct Sqs {
    pub(super) client: Client,
    pub(super) postgres: Postgres,
    pub(super) options: SqsOptions,
    pub(super) dead_url: String,
    /// Bytes of a message at most: in each lane's queue, and in that of the dead letters.
    pub(super) max_bytes: [usize; 2],
    pub(super) dead_max_bytes: usize,
    pub(super) receivers: Vec<Receiver>,
    pub(super) density: Mutex<[MessageDensity; 2]>,
    pub(super) letters: tokio::sync::Mutex<Vec<DeadLetter>>,
}

impl Sqs {
    /// Looks at the queues, and refuses those that can't serve.
    pub async fn open(client: Client, postgres: Postgres, options: SqsOptions) -> Result<Self> {
        let client::QueueInspection { dead_url, max_bytes, dead_max_bytes, warnings, .. } =
            client::inspect(&client, &options).await?;
        for warning in warnings {
            tracing::warn!(warning, "looked at the queues");
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

    pub(super) fn url(&self, lane: Lane) -> &str {
        match (&self.options.bulk_url, lane) {
            (Some(bulk), Lane::Bulk) => bulk,
            _ => &self.options.url,
        }
    }

    pub(super) fn max_bytes(&self, lane: Lane) -> usize {
        self.max_bytes[lane as usize]
    }

    pub(super) fn density(&self) -> MutexGuard<'_, [MessageDensity; 2]> {
        self.density.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends bodies, ten a call, several calls at a time.
    pub(super) async fn send_bodies(&self, lane: Lane, bodies: Vec<String>) -> Result<()> {
        batch::send(&self.client, self.url(lane), bodies, self.max_bytes(lane)).await
    }

    /// Deletes messages; one that is out of our hands is no error.
    pub(super) async fn delete(&self, url: &str, handles: Vec<String>) -> Result<()> {
        batch::delete(&self.client, url, handles).await
    }

    /// Receipt handles by the queue that they are of.
    pub(super) fn by_queue(&self, receipts: &[Receipt]) -> BTreeMap<String, Vec<String>> {
        let mut by_queue: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for receipt in receipts {
            by_queue.entry(self.url(receipt.lane).to_owned()).or_default().push(receipt.handle.clone());
        }
        by_queue
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
        let messages = receiver.receive_for_lane(&self.client, &self.options, lane, max).await?;
        let jobs = messages.iter().filter_map(|message| message.body.as_ref().ok());
        self.density()[lane as usize].add(MessageDensity::of_jobs(jobs));
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

    fn visibility_timeout(&self) -> Duration {
        self.options.visibility
    }
}
