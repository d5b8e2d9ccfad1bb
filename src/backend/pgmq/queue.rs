//! The messages of both lanes: send, receive, acknowledge, extend visibility.

use std::time::Duration;

use async_trait::async_trait;
use serde_json::json;
use tokio_postgres::Transaction;
use tokio_postgres::types::Json;

use crate::backend::postgres::listener::{Listener, WakeUp};
use crate::backend::postgres::{Postgres, failure};
use crate::pipeline::change::{Job, Lane};
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::queue::{self, JobQueue, Message, Receipt};

/// The channel that notifies workers of new messages.
pub(crate) const CHANNEL: &str = "refarch_jobs";

/// Queue names, from the settings' prefix.
#[derive(Clone, Debug)]
pub struct Names {
    prefix: String,
    live: String,
    bulk: String,
    dead: String,
}

impl Names {
    /// `PREFIX_live`, `PREFIX_bulk` and `PREFIX_dead`.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        let name = |suffix: &str| format!("{prefix}_{suffix}");
        Self { prefix: prefix.into(), live: name("live"), bulk: name("bulk"), dead: name("dead") }
    }

    /// The queue of a lane.
    #[must_use]
    pub fn lane(&self, lane: Lane) -> &str {
        match lane {
            Lane::Live => &self.live,
            Lane::Bulk => &self.bulk,
        }
    }

    /// The dead-letter queue.
    #[must_use]
    pub fn dead(&self) -> &str {
        &self.dead
    }

    /// All three.
    #[must_use]
    pub fn all(&self) -> [&str; 3] {
        [&self.live, &self.bulk, &self.dead]
    }
}

/// A queue for each lane and a dead-letter queue, in PostgreSQL.
pub struct Pgmq {
    pub(super) postgres: Postgres,
    pub(super) names: Names,
    visibility: Duration,
    _listener: Listener,
    /// One for each lane.
    wake_ups: [tokio::sync::Mutex<WakeUp>; 2],
}

impl Pgmq {
    /// Uses the queues whose names start with `prefix`. They must exist.
    #[must_use]
    pub fn new(postgres: Postgres, prefix: &str, visibility: Duration) -> Self {
        let listener = Listener::start(postgres.clone(), CHANNEL);
        let wake_ups = [listener.wake_up().into(), listener.wake_up().into()];
        Self { postgres, names: Names::new(prefix), visibility, _listener: listener, wake_ups }
    }

    fn wake_up(&self, lane: Lane) -> &tokio::sync::Mutex<WakeUp> {
        &self.wake_ups[lane as usize]
    }
}

/// Sends jobs within a transaction, so that changes leave the outbox and reach the queue together.
pub(crate) async fn send_within(transaction: &Transaction<'_>, prefix: &str, jobs: &[Job]) -> Result<()> {
    let names = Names::new(prefix);
    for lane in Lane::ALL {
        let of_lane: Vec<&Job> = jobs.iter().filter(|job| job.lane == lane).collect();
        if of_lane.is_empty() {
            continue;
        }
        let bodies: Vec<Json<&Job>> = of_lane.iter().map(|job| Json(*job)).collect();
        let headers: Vec<_> = of_lane.iter().map(|job| Json(json!({ "changes": job.changes() }))).collect();
        transaction
            .execute(
                "SELECT pgmq.send_batch($1::text, $2::jsonb[], $3::jsonb[])",
                &[&names.lane(lane), &bodies, &headers],
            )
            .await
            .map_err(|error| failure("send jobs", error))?;
    }
    Ok(())
}

#[async_trait]
impl JobQueue for Pgmq {
    async fn send(&self, jobs: &[Job]) -> Result<()> {
        let fail = |error: tokio_postgres::Error| failure("send jobs", error);
        let mut client = self.postgres.client().await?;
        let transaction = client.transaction().await.map_err(fail)?;
        send_within(&transaction, &self.names.prefix, jobs).await?;
        transaction.execute("SELECT pg_notify($1, '')", &[&CHANNEL]).await.map_err(fail)?;
        transaction.commit().await.map_err(fail)
    }

    async fn receive(&self, lane: Lane, max: usize) -> Result<Vec<Message>> {
        self.wake_up(lane).lock().await.arm();
        let fail = |error: tokio_postgres::Error| failure("receive jobs", error);
        let client = self.postgres.client().await?;
        let statement = client
            .prepare_cached(
                "SELECT msg_id, read_ct, message::text FROM pgmq.read($1::text, $2::integer, $3::integer)",
            )
            .await
            .map_err(fail)?;
        let seconds = i32::try_from(self.visibility.as_secs()).unwrap_or(i32::MAX);
        let rows = client
            .query(&statement, &[&self.names.lane(lane), &seconds, &i32::try_from(max).unwrap_or(i32::MAX)])
            .await
            .map_err(fail)?;
        Ok(rows.iter().map(|row| decode(lane, row.get(0), row.get(1), row.get(2))).collect())
    }

    async fn wait(&self, lane: Lane, timeout: Duration) {
        self.wake_up(lane).lock().await.wait(timeout).await;
    }

    async fn acknowledge(&self, receipts: &[Receipt]) -> Result<()> {
        if receipts.is_empty() {
            return Ok(());
        }
        let client = self.postgres.client().await?;
        for lane in Lane::ALL {
            let ids = handles(receipts, lane)?;
            if !ids.is_empty() {
                client
                    .execute("SELECT pgmq.delete($1::text, $2::bigint[])", &[&self.names.lane(lane), &ids])
                    .await
                    .map_err(|error| failure("acknowledge jobs", error))?;
            }
        }
        Ok(())
    }

    async fn extend_visibility(&self, receipts: &[Receipt], timeout: Duration) -> Result<()> {
        if receipts.is_empty() {
            return Ok(());
        }
        let client = self.postgres.client().await?;
        let seconds = i32::try_from(timeout.as_secs()).unwrap_or(i32::MAX);
        for lane in Lane::ALL {
            let ids = handles(receipts, lane)?;
            if !ids.is_empty() {
                client
                    .execute(
                        "SELECT pgmq.set_vt($1::text, $2::bigint[], $3::integer)",
                        &[&self.names.lane(lane), &ids, &seconds],
                    )
                    .await
                    .map_err(|error| failure("extend visibility", error))?;
            }
        }
        Ok(())
    }

    fn visibility_timeout(&self) -> Duration {
        self.visibility
    }
}

pub(super) fn handles(receipts: &[Receipt], lane: Lane) -> Result<Vec<i64>> {
    receipts
        .iter()
        .filter(|receipt| receipt.lane == lane)
        .map(|receipt| {
            receipt.handle.parse().map_err(|_| {
                Error::new(
                    FailureKind::Malformed,
                    "read a receipt",
                    format!("{:?} is not a message id of pgmq", receipt.handle),
                )
            })
        })
        .collect()
}

fn decode(lane: Lane, id: i64, receive_count: i32, body: Option<String>) -> Message {
    let body = body.unwrap_or_else(|| "null".into());
    Message {
        id: id.to_string(),
        receipt: Receipt { lane, handle: id.to_string() },
        receive_count: receive_count.try_into().unwrap_or_default(),
        body: queue::decode(body),
    }
}
