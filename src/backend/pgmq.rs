//! The job queue on pgmq, in the source's database.
//!
//! pgmq is plain SQL (its authors' script, installed by the migrations). The number of changes in a
//! message stands in its headers, so that a backlog is counted without reading bodies.

use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::de::IgnoredAny;
use serde_json::json;
use tokio_postgres::types::Json;
use tokio_postgres::{Row, Transaction};

use super::postgres::listener::{Listener, WakeUp};
use super::postgres::{Postgres, failure};
use crate::pipeline::change::{Job, Lane};
use crate::pipeline::failure::{Error, Result};
use crate::pipeline::queue::{self, Backlog, DeadLetter, JobQueue, Message, Receipt, Undecodable, Why};

/// Channel on which the indexers are notified of messages.
pub(crate) const CHANNEL: &str = "refarch_jobs";

/// A header that counts more changes than this is not ours; the pattern in [`count`] says the same.
const MAX_COUNT: u64 = 9_999;

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

/// Two lanes and a dead-letter queue in PostgreSQL.
pub struct Pgmq {
    postgres: Postgres,
    names: Names,
    visibility: Duration,
    _listener: Listener,
    /// One for each lane.
    wake_ups: [tokio::sync::Mutex<WakeUp>; 2],
}

impl Pgmq {
    /// The queues that begin with `prefix`. They must exist.
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

/// Sends jobs within a transaction, so that they leave the outbox and reach the queue together.
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
            .map_err(|error| failure("send jobs", &error))?;
    }
    Ok(())
}

#[async_trait]
impl JobQueue for Pgmq {
    async fn send(&self, jobs: &[Job]) -> Result<()> {
        let fail = |error: tokio_postgres::Error| failure("send jobs", &error);
        let mut client = self.postgres.client().await?;
        let transaction = client.transaction().await.map_err(fail)?;
        send_within(&transaction, &self.names.prefix, jobs).await?;
        transaction.execute("SELECT pg_notify($1, '')", &[&CHANNEL]).await.map_err(fail)?;
        transaction.commit().await.map_err(fail)
    }

    async fn receive(&self, lane: Lane, max: usize) -> Result<Vec<Message>> {
        self.wake_up(lane).lock().await.arm();
        let fail = |error: tokio_postgres::Error| failure("receive jobs", &error);
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
                    .map_err(|error| failure("acknowledge jobs", &error))?;
            }
        }
        Ok(())
    }

    async fn extend(&self, receipts: &[Receipt], timeout: Duration) -> Result<()> {
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
                    .map_err(|error| failure("extend visibility", &error))?;
            }
        }
        Ok(())
    }

    async fn dead_letter(&self, message: &Message, part: Option<&Job>, why: &Why) -> Result<()> {
        let fail = |error: tokio_postgres::Error| failure("move to the dead letters", &error);
        let body = match (part, &message.body) {
            (Some(job), _) | (None, Ok(job)) => json!(job).to_string(),
            // Passed on as the text it is: a number may not fit any type of ours.
            (None, Err(Undecodable { body, .. })) => match serde_json::from_str::<IgnoredAny>(body) {
                Ok(_) => body.clone(),
                Err(_) => json!(body).to_string(),
            },
        };
        let changes = part.or(message.body.as_ref().ok()).map_or(1, Job::changes);
        // A server may put anything into its error, and neither text nor jsonb takes a NUL.
        let error = why.error.replace('\0', "\u{fffd}");
        let headers = json!({
            "changes": changes,
            "reason": why.reason,
            "error": error,
            "tries": why.tries,
            "receive_count": message.receive_count,
            "lane": message.receipt.lane,
            "message_id": message.id,
        });
        let handle: i64 = handles(std::slice::from_ref(&message.receipt), message.receipt.lane)?[0];
        let mut client = self.postgres.client().await?;
        let transaction = client.transaction().await.map_err(fail)?;
        transaction
            .execute(
                "SELECT pgmq.send($1::text, $2::text::jsonb, $3::jsonb)",
                &[&self.names.dead(), &body, &Json(headers)],
            )
            .await
            .map_err(fail)?;
        if part.is_none() {
            transaction
                .execute(
                    "SELECT pgmq.delete($1::text, $2::bigint)",
                    &[&self.names.lane(message.receipt.lane), &handle],
                )
                .await
                .map_err(fail)?;
        }
        transaction
            .execute(
                "INSERT INTO refarch.event (kind, detail) VALUES ('dead_letter', jsonb_build_object('message_id', $1::text, 'error', $2::text))",
                &[&message.id, &error],
            )
            .await
            .map_err(fail)?;
        transaction.commit().await.map_err(fail)
    }

    async fn read_dead_letters(&self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>> {
        let after = after.map(dead_letter_id).transpose()?.unwrap_or(i64::MIN);
        let client = self.postgres.client().await?;
        let sql = format!(
            "SELECT msg_id, enqueued_at, headers::text, message::text FROM pgmq.q_{} WHERE msg_id > $1 ORDER BY msg_id LIMIT $2",
            self.names.dead()
        );
        let rows = client
            .query(&sql, &[&after, &(limit as i64)])
            .await
            .map_err(|error| failure("read the dead letters", &error))?;
        // A time may be infinite, if somebody else wrote it.
        let at = |row: &Row| row.try_get(1).unwrap_or(Timestamp::UNIX_EPOCH);
        Ok(rows.iter().map(|row| letter(row.get(0), at(row), row.get(2), row.get(3))).collect())
    }

    async fn redrive(&self, ids: &[String]) -> Result<Vec<String>> {
        let fail = |error: tokio_postgres::Error| failure("bring dead letters back", &error);
        let ids = ids.iter().map(|id| dead_letter_id(id)).collect::<Result<Vec<i64>>>()?;
        let mut client = self.postgres.client().await?;
        let transaction = client.transaction().await.map_err(fail)?;
        let mut back = Vec::new();
        for lane in Lane::ALL {
            // What has no lane of ours was not put there by us; a change somebody waits for is the safer guess.
            let sql = format!(
                "WITH taken AS ( \
                   DELETE FROM pgmq.q_{dead} WHERE msg_id = ANY ($1) \
                     AND CASE headers ->> 'lane' WHEN 'bulk' THEN 'bulk' ELSE 'live' END = $2 \
                   RETURNING msg_id, message, headers \
                 ), sent AS ( \
                   SELECT pgmq.send($3::text, message, jsonb_build_object('changes', coalesce(headers -> 'changes', '1'))) \
                   FROM taken \
                 ) SELECT msg_id, (SELECT count(*) FROM sent) FROM taken",
                dead = self.names.dead()
            );
            let rows =
                transaction.query(&sql, &[&ids, &lane.name(), &self.names.lane(lane)]).await.map_err(fail)?;
            back.extend(rows.iter().map(|row| row.get::<_, i64>(0).to_string()));
        }
        transaction.execute("SELECT pg_notify($1, '')", &[&CHANNEL]).await.map_err(fail)?;
        transaction.commit().await.map_err(fail)?;
        Ok(back)
    }

    async fn oldest(&self) -> Result<Option<Timestamp>> {
        let client = self.postgres.client().await?;
        // Text sorts as time does without its Z. A cast would let one foreign body fail every look; a
        // date that is none (30 February) passes the pattern, so that the first few are tried.
        let sql = format!(
            "SELECT oldest FROM ( \
               SELECT message ->> 'oldest' AS oldest FROM pgmq.q_{} UNION ALL SELECT message ->> 'oldest' FROM pgmq.q_{} \
             ) m WHERE oldest ~ '^\\d{{4}}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\d([.]\\d+)?Z$' \
             ORDER BY rtrim(oldest, 'Z') COLLATE \"C\" LIMIT 100",
            self.names.lane(Lane::Live),
            self.names.lane(Lane::Bulk)
        );
        let rows =
            client.query(&sql, &[]).await.map_err(|error| failure("look for the oldest job", &error))?;
        Ok(rows.iter().find_map(|row| row.get::<_, &str>(0).parse().ok()))
    }

    async fn backlog(&self, lane: Lane) -> Result<Backlog> {
        let (visible, in_flight) = count(&self.postgres, self.names.lane(lane)).await?;
        Ok(Backlog { visible, in_flight })
    }

    async fn dead_letters(&self) -> Result<u64> {
        count(&self.postgres, self.names.dead()).await.map(|(visible, in_flight)| visible + in_flight)
    }

    fn visibility(&self) -> Duration {
        self.visibility
    }
}

/// Changes in a queue that are visible and in flight.
async fn count(postgres: &Postgres, queue: &str) -> Result<(u64, u64)> {
    let client = postgres.client().await?;
    // The name is of our own making: lower-case letters, digits and underscores. Headers may be anybody's:
    // a count that is none of ours is one, and cannot make the queue look full.
    let sql = format!(
        "SELECT coalesce(sum(n) FILTER (WHERE due), 0)::bigint, coalesce(sum(n) FILTER (WHERE NOT due), 0)::bigint FROM ( \
           SELECT CASE WHEN headers ->> 'changes' ~ '^[0-9]{{1,4}}$' THEN (headers ->> 'changes')::bigint ELSE 1 END AS n, \
                  vt <= clock_timestamp() AS due FROM pgmq.q_{queue} \
         ) q"
    );
    let row = client.query_one(&sql, &[]).await.map_err(|error| failure("count a queue", &error))?;
    let number = |at| u64::try_from(row.get::<_, i64>(at)).unwrap_or_default();
    Ok((number(0), number(1)))
}

fn dead_letter_id(id: &str) -> Result<i64> {
    id.parse().map_err(|_| {
        Error::fatal("find a dead letter", format!("{id:?} is no id of one: refarch redrive lists them"))
    })
}

fn letter(id: i64, at: Timestamp, headers: Option<String>, body: Option<String>) -> DeadLetter {
    let headers: serde_json::Value =
        headers.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    let body = body.unwrap_or_else(|| "null".into());
    let number = |key: &str| headers.get(key).and_then(serde_json::Value::as_u64);
    let read = |key: &str| headers.get(key).cloned().unwrap_or_default();
    let job: Option<Job> = serde_json::from_str(&body).ok();
    let ids = job.iter().flat_map(|job| &job.groups).flat_map(|group| group.ids.clone()).collect();
    DeadLetter {
        id: id.to_string(),
        at,
        lane: serde_json::from_value(read("lane")).unwrap_or(Lane::Live),
        reason: serde_json::from_value(read("reason")).ok(),
        error: read("error").as_str().unwrap_or_default().to_owned(),
        tries: number("tries").and_then(|count| count.try_into().ok()).unwrap_or_default(),
        receive_count: number("receive_count").and_then(|count| count.try_into().ok()).unwrap_or_default(),
        changes: number("changes").filter(|count| *count <= MAX_COUNT).unwrap_or(1),
        ids,
        body: job.is_none().then_some(body),
    }
}

fn handles(receipts: &[Receipt], lane: Lane) -> Result<Vec<i64>> {
    receipts
        .iter()
        .filter(|receipt| receipt.lane == lane)
        .map(|receipt| {
            receipt.handle.parse().map_err(|_| {
                Error::permanent("read a receipt", format!("{:?} is not one of pgmq's", receipt.handle))
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
