//! Messages on their way to a queue outside of the database.
//!
//! A shipment holds the messages of one claim. It is booked by the transaction that takes their changes
//! out of the outbox, sent after it, and struck off when the queue has taken all of it. Whoever books it
//! has it leased; when that runs out, or the sending failed, anybody sends it (again). Packed messages
//! are leased rather than rows of the outbox, since a lease on a million of those would be two million
//! writes more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::task::{JoinError, JoinSet};
use tokio_postgres::Transaction;

use crate::backend::postgres::{Postgres, failure};
use crate::pipeline::change::{Job, Lane};
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::outbox::Transferred;
use crate::pipeline::queue::JobQueue;

/// How long nobody else sends a shipment: far longer than its calls take. Were it sent twice, no harm would be done.
const LEASE_S: f64 = 15.0;

/// Shipments that are sent at once: while these are on their way, the next ones are claimed.
const AT_ONCE: usize = 4;

/// How often it is looked for shipments that were left.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// Messages in a shipment that is left for later, so that few are read back at a time.
const LEFT_TOGETHER: usize = 100;

/// Sums of the packing above this are halved.
const MAX_DENSITY_MESSAGES: i64 = 1_000;

const DELETE_SENT: &str = "DELETE FROM refarch.shipment WHERE id = $1";

const RECORD_DENSITY: &str = "INSERT INTO refarch.packing AS p (source, lane, messages, changes) VALUES ($1, $2, $3, $4) \
    ON CONFLICT (source, lane) DO UPDATE SET \
      messages = p.messages / CASE WHEN p.messages > $5 THEN 2 ELSE 1 END + excluded.messages, \
      changes = p.changes / CASE WHEN p.messages > $5 THEN 2 ELSE 1 END + excluded.changes";

const STAGE: &str = "INSERT INTO refarch.shipment (source, bodies, changes, oldest, claimed_until) \
    VALUES ($1, $2, $3, $4, clock_timestamp() + make_interval(secs => $5)) RETURNING id";

/// Of those that stand past their time, the oldest is leased anew.
const RESUME_LEFTOVER: &str = "UPDATE refarch.shipment SET claimed_until = clock_timestamp() + make_interval(secs => $2) \
    WHERE id = (SELECT id FROM refarch.shipment WHERE source = $1 AND claimed_until < clock_timestamp() \
                ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED) \
    RETURNING id, bodies";

const RELEASE: &str = "UPDATE refarch.shipment SET claimed_until = '-infinity' WHERE id = $1";

/// A shipment that is ours to send.
pub(super) struct Shipment {
    id: i64,
    jobs: Vec<Job>,
}

/// What became of a shipment.
enum Sent {
    /// The queue has it, and it is struck off.
    StruckOff,
    /// The queue does not have it, and its lease was given up.
    PutBack(Error),
    /// It stands until its lease has run out: the database could not be told.
    Ownership(Error),
}

/// Sends what is booked.
pub(super) struct Shipping {
    postgres: Postgres,
    source: String,
    queue: Arc<dyn JobQueue>,
    sending: JoinSet<Sent>,
    /// When it was last looked for shipments that were left.
    looked_at: Option<Instant>,
    /// Whether something is known to have been left.
    is_left: bool,
}

impl Shipping {
    pub(super) fn new(postgres: Postgres, source: &str, queue: Arc<dyn JobQueue>) -> Self {
        Self {
            postgres,
            source: source.into(),
            queue,
            sending: JoinSet::new(),
            looked_at: None,
            is_left: false,
        }
    }

    /// Returns when another shipment may be sent, with the failure of an earlier one if there is one.
    pub(super) async fn make_room(&mut self) -> Result<()> {
        while let Some(ended) = self.sending.try_join_next() {
            self.note(ended)?;
        }
        while self.sending.len() >= AT_ONCE
            && let Some(ended) = self.sending.join_next().await
        {
            self.note(ended)?;
        }
        Ok(())
    }

    /// Returns when nothing is on its way.
    pub(super) async fn finish(&mut self) -> Result<()> {
        while let Some(ended) = self.sending.join_next().await {
            self.note(ended)?;
        }
        Ok(())
    }

    /// Notes what became of a shipment.
    fn note(&mut self, ended: Result<Sent, JoinError>) -> Result<()> {
        match ended {
            Ok(Sent::StruckOff) => Ok(()),
            Ok(Sent::PutBack(error)) => {
                self.is_left = true;
                Err(error)
            }
            Ok(Sent::Ownership(error)) => Err(error),
            Err(error) => Err(Error::caused(FailureKind::ConnectionLost, "send a shipment", error)),
        }
    }

    /// Books jobs as a shipment that this relay sends after the transaction.
    pub(super) async fn stage(
        &self,
        transaction: &Transaction<'_>,
        jobs: Vec<Job>,
    ) -> Result<Option<Shipment>> {
        if jobs.is_empty() {
            return Ok(None);
        }
        let id = self.insert(transaction, &jobs, LEASE_S).await?;
        Ok(Some(Shipment { id, jobs }))
    }

    /// Books jobs for whoever comes next, this relay among others: there may be more than memory should
    /// hold.
    pub(super) async fn stage_unleased(&mut self, transaction: &Transaction<'_>, jobs: &[Job]) -> Result<()> {
        for jobs in jobs.chunks(LEFT_TOGETHER) {
            self.insert(transaction, jobs, 0.0).await?;
        }
        self.is_left = true;
        Ok(())
    }

    async fn insert(&self, transaction: &Transaction<'_>, jobs: &[Job], lease_s: f64) -> Result<i64> {
        let bodies = jobs
            .iter()
            .map(serde_json::to_string)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| Error::caused(FailureKind::Malformed, "book a shipment", error))?;
        let changes = jobs.iter().map(|job| job.changes() as i64).sum::<i64>();
        let oldest = jobs.iter().map(|job| job.oldest).min().unwrap_or(Timestamp::UNIX_EPOCH);
        transaction
            .query_one(STAGE, &[&self.source, &bodies, &changes, &oldest, &lease_s])
            .await
            .map(|row| row.get(0))
            .map_err(|error| failure("book a shipment", error))
    }

    /// Starts to send a shipment whose booking has been committed.
    pub(super) fn start(&mut self, shipment: Option<Shipment>) {
        let Some(shipment) = shipment else { return };
        let (postgres, source, queue) = (self.postgres.clone(), self.source.clone(), Arc::clone(&self.queue));
        self.sending.spawn(async move {
            let done = match queue.send(&shipment.jobs).await {
                Ok(()) => delete_sent(&postgres, &source, &shipment).await.map(|()| Sent::StruckOff),
                Err(error) => put_back(&postgres, &shipment).await.map(|()| Sent::PutBack(error)),
            };
            done.unwrap_or_else(Sent::Ownership)
        });
    }

    /// Takes over a shipment that was left, if there is one.
    pub(super) async fn resume_leftover(&mut self, done: &mut Transferred) -> Result<()> {
        let is_due = self.looked_at.is_none_or(|at| at.elapsed() >= CHECK_EVERY);
        if !std::mem::take(&mut self.is_left) && !is_due {
            return Ok(());
        }
        self.looked_at = Some(Instant::now());
        let client = self.postgres.client().await?;
        let row = client
            .query_opt(RESUME_LEFTOVER, &[&self.source, &LEASE_S])
            .await
            .map_err(|error| failure("look for shipments that were left", error))?;
        let Some(row) = row else { return Ok(()) };
        // Where one was, others may be.
        self.is_left = true;
        let bodies: Vec<String> = row.get(1);
        let jobs = bodies
            .iter()
            .map(|body| serde_json::from_str(body))
            .collect::<Result<Vec<Job>, _>>()
            .map_err(|error| {
                Error::new(FailureKind::WrongVersion, "read a shipment that was left", &error).because(error)
            })?;
        done.rows += 1;
        done.changes += jobs.iter().map(|job| job.changes() as u64).sum::<u64>();
        self.start(Some(Shipment { id: row.get(0), jobs }));
        Ok(())
    }
}

/// Strikes off a shipment that the queue has taken, and remembers how it was packed.
async fn delete_sent(postgres: &Postgres, source: &str, shipment: &Shipment) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("strike off a shipment", error);
    let mut client = postgres.client().await?;
    let transaction = client.transaction().await.map_err(fail)?;
    transaction.execute(DELETE_SENT, &[&shipment.id]).await.map_err(fail)?;
    for lane in Lane::ALL {
        let of_lane = shipment.jobs.iter().filter(|job| job.lane == lane);
        let (messages, changes) = of_lane
            .fold((0_i64, 0_i64), |(messages, changes), job| (messages + 1, changes + job.changes() as i64));
        if messages > 0 {
            let values: [&(dyn tokio_postgres::types::ToSql + Sync); 5] =
                [&source, &lane.name(), &messages, &changes, &MAX_DENSITY_MESSAGES];
            transaction.execute(RECORD_DENSITY, &values).await.map_err(fail)?;
        }
    }
    transaction.commit().await.map_err(fail)
}

/// Gives up the lease on a shipment that the queue has not taken, so that it is sent again soon.
async fn put_back(postgres: &Postgres, shipment: &Shipment) -> Result<()> {
    let client = postgres.client().await?;
    let put_back = client.execute(RELEASE, &[&shipment.id]).await;
    put_back.map(drop).map_err(|error| failure("put a shipment back", error))
}
