//! Messages on their way to a queue outside of the database.
//!
//! A shipment holds the messages of one claim. The transaction that deletes the changes from the outbox
//! stores the shipment. The relay sends it after the commit, and deletes it when the queue has taken all
//! messages. The relay that stored a shipment holds a lease on it. When the lease has expired or sending
//! failed, any relay sends the shipment again. Leases are on packed messages and not on rows of the outbox,
//! since leases on a million rows would cost two million more writes.

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

/// Length of a lease in seconds, far longer than the calls take. A shipment that is sent twice does no harm.
const LEASE_S: f64 = 15.0;

/// Shipments that are sent at the same time. Meanwhile the relay claims the next changes.
const AT_ONCE: usize = 4;

/// How often the relay looks for shipments whose lease has expired.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// Messages in a shipment without a lease, so that few are read back at a time.
const LEFT_TOGETHER: usize = 100;

/// Sums of messages and changes are halved when they are above this.
const MAX_DENSITY_MESSAGES: i64 = 1_000;

const DELETE_SENT: &str = "DELETE FROM refarch.shipment WHERE id = $1";

const RECORD_DENSITY: &str = "INSERT INTO refarch.packing AS p (source, lane, messages, changes) VALUES ($1, $2, $3, $4) \
    ON CONFLICT (source, lane) DO UPDATE SET \
      messages = p.messages / CASE WHEN p.messages > $5 THEN 2 ELSE 1 END + excluded.messages, \
      changes = p.changes / CASE WHEN p.messages > $5 THEN 2 ELSE 1 END + excluded.changes";

const STAGE: &str = "INSERT INTO refarch.shipment (source, bodies, changes, oldest, claimed_until) \
    VALUES ($1, $2, $3, $4, clock_timestamp() + make_interval(secs => $5)) RETURNING id";

/// Takes the lease on the oldest shipment whose lease has expired.
const RESUME_LEFTOVER: &str = "UPDATE refarch.shipment SET claimed_until = clock_timestamp() + make_interval(secs => $2) \
    WHERE id = (SELECT id FROM refarch.shipment WHERE source = $1 AND claimed_until < clock_timestamp() \
                ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED) \
    RETURNING id, bodies";

const RELEASE: &str = "UPDATE refarch.shipment SET claimed_until = '-infinity' WHERE id = $1";

/// A shipment on which this relay holds the lease.
pub(super) struct Shipment {
    id: i64,
    jobs: Vec<Job>,
}

/// The result of sending a shipment.
enum Sent {
    /// The queue has taken it, and it is deleted.
    Deleted,
    /// The queue has not taken it, and the lease was released.
    PutBack(Error),
    /// It stays until its lease expires, since writing to the database failed.
    Leased(Error),
}

/// Sends stored shipments.
pub(super) struct Shipping {
    postgres: Postgres,
    source: String,
    queue: Arc<dyn JobQueue>,
    sending: JoinSet<Sent>,
    /// When the relay last looked for shipments whose lease has expired.
    looked_at: Option<Instant>,
    /// Whether a shipment without a lease is known.
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

    /// Waits until another shipment may be sent. Returns the error of an earlier shipment, if there was one.
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

    /// Waits until every shipment was sent.
    pub(super) async fn finish(&mut self) -> Result<()> {
        while let Some(ended) = self.sending.join_next().await {
            self.note(ended)?;
        }
        Ok(())
    }

    /// Handles the result of sending a shipment.
    fn note(&mut self, ended: Result<Sent, JoinError>) -> Result<()> {
        match ended {
            Ok(Sent::Deleted) => Ok(()),
            Ok(Sent::PutBack(error)) => {
                self.is_left = true;
                Err(error)
            }
            Ok(Sent::Leased(error)) => Err(error),
            Err(error) => Err(Error::caused(FailureKind::ConnectionLost, "send a shipment", error)),
        }
    }

    /// Stores jobs as a shipment that this relay sends after the transaction.
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

    /// Stores jobs without a lease, for any relay, since there may be more than memory should hold.
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
            .map_err(|error| Error::caused(FailureKind::Malformed, "store a shipment", error))?;
        let changes = jobs.iter().map(|job| job.changes() as i64).sum::<i64>();
        let oldest = jobs.iter().map(|job| job.oldest).min().unwrap_or(Timestamp::UNIX_EPOCH);
        transaction
            .query_one(STAGE, &[&self.source, &bodies, &changes, &oldest, &lease_s])
            .await
            .map(|row| row.get(0))
            .map_err(|error| failure("store a shipment", error))
    }

    /// Starts to send a shipment whose booking has been committed.
    pub(super) fn start(&mut self, shipment: Option<Shipment>) {
        let Some(shipment) = shipment else { return };
        let (postgres, source, queue) = (self.postgres.clone(), self.source.clone(), Arc::clone(&self.queue));
        self.sending.spawn(async move {
            let done = match queue.send(&shipment.jobs).await {
                Ok(()) => delete_sent(&postgres, &source, &shipment).await.map(|()| Sent::Deleted),
                Err(error) => put_back(&postgres, &shipment).await.map(|()| Sent::PutBack(error)),
            };
            done.unwrap_or_else(Sent::Leased)
        });
    }

    /// Sends a shipment whose lease has expired, if there is one.
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
        // There may be more.
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

/// Deletes a shipment that the queue has taken, and records how many changes its messages held.
async fn delete_sent(postgres: &Postgres, source: &str, shipment: &Shipment) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("delete a shipment that was sent", error);
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

/// Releases the lease on a shipment that the queue has not taken, so that it is sent again soon.
async fn put_back(postgres: &Postgres, shipment: &Shipment) -> Result<()> {
    let client = postgres.client().await?;
    let put_back = client.execute(RELEASE, &[&shipment.id]).await;
    put_back.map(drop).map_err(|error| failure("put a shipment back", error))
}
