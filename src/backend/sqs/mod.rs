//! The job queue on Amazon SQS: a queue a lane (or one for both), and a dead-letter queue.
//!
//! SQS is at least once and unordered, which the contract allows; it bills by the request, which is why
//! everything here goes in batches of ten and receives wait. It counts messages, so that backlogs in
//! changes are estimates: messages by the changes that a message of late held.

mod batch;
mod client;
mod dead;
mod failure;
mod intake;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::QueueAttributeName;
use jiff::Timestamp;

use super::postgres::{self, Postgres};
use crate::pipeline::change::{Job, Lane};
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::queue::{Backlog, DeadLetter, JobQueue, Message, Receipt, Why, decode};
use failure::failure;
use intake::Intake;

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

/// Messages and the changes in them, as this process saw them.
#[derive(Clone, Copy, Debug, Default)]
struct Packing {
    messages: u64,
    changes: u64,
}

impl Packing {
    fn of_jobs<'a>(jobs: impl Iterator<Item = &'a Job>) -> Self {
        jobs.fold(Self::default(), |sum, job| Self {
            messages: sum.messages + 1,
            changes: sum.changes + job.changes() as u64,
        })
    }

    /// Halved now and then, so that old messages weigh less.
    fn add(&mut self, other: Self) {
        if self.messages > 1_000 {
            *self = Self { messages: self.messages / 2, changes: self.changes / 2 };
        }
        self.messages += other.messages;
        self.changes += other.changes;
    }

    /// Changes in that many messages.
    fn estimate(self, messages: u64) -> u64 {
        if self.messages == 0 { messages } else { (messages * self.changes).div_ceil(self.messages) }
    }
}

/// Messages in a queue, as SQS counts them.
#[derive(Clone, Copy, Debug)]
struct Counted {
    visible: u64,
    in_flight: u64,
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

    /// How messages were packed of late: as seen here, or else as the relay remembers.
    async fn packed(&self, lanes: &[Lane]) -> Result<Packing> {
        let mut sum = Packing::default();
        for lane in lanes {
            sum.add(self.packing()[*lane as usize]);
        }
        if sum.messages > 0 {
            return Ok(sum);
        }
        let names: Vec<&str> = lanes.iter().map(|lane| lane.name()).collect();
        let client = self.postgres.client().await?;
        let row = client
            .query_one(
                "SELECT coalesce(sum(messages), 0)::bigint, coalesce(sum(changes), 0)::bigint \
                 FROM refarch.packing WHERE source = $1 AND lane = ANY ($2)",
                &[&self.options.source, &names],
            )
            .await
            .map_err(|error| postgres::failure("read how messages are packed", error))?;
        let number = |at| row.get::<_, i64>(at).max(0) as u64;
        Ok(Packing { messages: number(0), changes: number(1) })
    }

    async fn count(&self, url: &str) -> Result<Counted> {
        use QueueAttributeName as Name;
        let names = [
            Name::ApproximateNumberOfMessages,
            Name::ApproximateNumberOfMessagesDelayed,
            Name::ApproximateNumberOfMessagesNotVisible,
        ];
        let answer = self
            .client
            .get_queue_attributes()
            .queue_url(url)
            .set_attribute_names(Some(names.to_vec()))
            .send()
            .await
            .map_err(|error| failure("count the queue", url, error))?;
        let number = |name| -> u64 {
            answer
                .attributes()
                .and_then(|all| all.get(&name))
                .and_then(|n| n.parse().ok())
                .unwrap_or_default()
        };
        let [visible, delayed, in_flight] = names;
        Ok(Counted { visible: number(visible) + number(delayed), in_flight: number(in_flight) })
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

    async fn extend(&self, receipts: &[Receipt], timeout: Duration) -> Result<()> {
        for (url, handles) in self.by_queue(receipts) {
            batch::change_visibility(&self.client, &url, handles, timeout).await?;
        }
        Ok(())
    }

    async fn dead_letter(&self, message: &Message, part: Option<&Job>, why: &Why) -> Result<()> {
        self.bury(message, part, why).await
    }

    async fn backlog(&self, lane: Lane) -> Result<Backlog> {
        if self.options.bulk_url.is_some() {
            let counted = self.count(self.url(lane)).await?;
            let packed = self.packed(&[lane]).await?;
            return Ok(Backlog {
                visible: packed.estimate(counted.visible),
                in_flight: packed.estimate(counted.in_flight),
            });
        }
        // Nobody can tell the lanes apart. What is within the bulk's bound is taken for bulk, so that
        // live changes are not called too many because of a load.
        let counted = self.count(&self.options.url).await?;
        let packed = self.packed(&Lane::ALL).await?;
        let (visible, in_flight) = (packed.estimate(counted.visible), packed.estimate(counted.in_flight));
        let bound = self.options.shared_bound;
        let bulk =
            Backlog { in_flight: in_flight.min(bound), visible: visible.min(bound - in_flight.min(bound)) };
        Ok(match lane {
            Lane::Bulk => bulk,
            Lane::Live => Backlog { visible: visible - bulk.visible, in_flight: in_flight - bulk.in_flight },
        })
    }

    async fn dead_letters(&self) -> Result<u64> {
        // A dead letter holds one change, but for a message that was given up whole.
        self.count(&self.dead_url).await.map(|counted| counted.visible + counted.in_flight)
    }

    async fn read_dead_letters(&self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>> {
        self.letters_after(after, limit).await
    }

    async fn redrive_all(&self) -> Result<Option<u64>> {
        self.move_all().await
    }

    async fn redrive(&self, ids: &[String]) -> Result<Vec<String>> {
        self.bring_back(ids).await
    }

    fn shared_bound(&self) -> Option<u64> {
        self.options.bulk_url.is_none().then_some(self.options.shared_bound)
    }

    async fn oldest(&self) -> Result<Option<Timestamp>> {
        for intake in &self.intakes {
            let counted = self.count(&intake.url).await?;
            if counted.visible + counted.in_flight > 0 {
                // SQS can't tell.
                return Ok(Some(Timestamp::UNIX_EPOCH));
            }
        }
        Ok(None)
    }

    fn visibility(&self) -> Duration {
        self.options.visibility
    }
}

/// A queue's answer that lacks what it must hold.
fn lacking(what: &str, field: &str) -> Error {
    Error::new(FailureKind::UnexpectedAnswer, what, format!("the answer has no {field}"))
}
