//! The dead letters of pgmq: a queue of their own, with the reason in the message headers.

use async_trait::async_trait;
use jiff::Timestamp;
use serde::de::IgnoredAny;
use serde_json::json;
use tokio_postgres::Row;
use tokio_postgres::types::Json;

use super::queue::{CHANNEL, Pgmq, handles};
use super::stats::count;
use crate::backend::postgres::failure;
use crate::pipeline::change::{Job, Lane};
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::queue::{Backlog, DeadLetter, DeadLetterCause, DeadLetters, Message, Undecodable};

/// A count above this does not come from refarch. The pattern in [`count`] has the same limit.
const MAX_COUNT: u64 = 9_999;

#[async_trait]
impl DeadLetters for Pgmq {
    async fn store(&self, message: &Message, part: Option<&Job>, cause: &DeadLetterCause) -> Result<()> {
        let fail = |error: tokio_postgres::Error| failure("store a dead letter", error);
        let body = match (part, &message.body) {
            (Some(job), _) | (None, Ok(job)) => json!(job).to_string(),
            // Passed on as text, because a number in it may not fit any Rust type.
            (None, Err(Undecodable { body, .. })) => match serde_json::from_str::<IgnoredAny>(body) {
                Ok(_) => body.clone(),
                Err(_) => json!(body).to_string(),
            },
        };
        let changes = part.or(message.body.as_ref().ok()).map_or(1, Job::changes);
        // A server may put any character into its error, and neither `text` nor `jsonb` accepts NUL.
        let error = cause.error.replace('\0', "\u{fffd}");
        let headers = json!({
            "changes": changes,
            "reason": cause.reason,
            "error": error,
            "tries": cause.tries,
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

    async fn count(&self) -> Result<u64> {
        count(&self.postgres, self.names.dead()).await.map(Backlog::total)
    }

    async fn list(&self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>> {
        let after = after.map(dead_letter_id).transpose()?.unwrap_or(i64::MIN);
        let client = self.postgres.client().await?;
        let sql = format!(
            "SELECT msg_id, enqueued_at, headers::text, message::text FROM pgmq.q_{} WHERE msg_id > $1 ORDER BY msg_id LIMIT $2",
            self.names.dead()
        );
        let rows = client
            .query(&sql, &[&after, &(limit as i64)])
            .await
            .map_err(|error| failure("read the dead letters", error))?;
        // A time may be infinite if another program wrote the row.
        let at = |row: &Row| row.try_get(1).unwrap_or(Timestamp::UNIX_EPOCH);
        Ok(rows.iter().map(|row| letter(row.get(0), at(row), row.get(2), row.get(3))).collect())
    }

    async fn redrive(&self, ids: &[String]) -> Result<Vec<String>> {
        let fail = |error: tokio_postgres::Error| failure("redrive dead letters", error);
        let ids = ids.iter().map(|id| dead_letter_id(id)).collect::<Result<Vec<i64>>>()?;
        let mut client = self.postgres.client().await?;
        let transaction = client.transaction().await.map_err(fail)?;
        let mut back = Vec::new();
        for lane in Lane::ALL {
            // A dead letter without a lane was not stored by refarch. It goes to the live lane, since
            // somebody may wait for the change.
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
}

fn dead_letter_id(id: &str) -> Result<i64> {
    id.parse().map_err(|_| {
        Error::new(
            FailureKind::MissingResource,
            "find a dead letter",
            format!("{id:?} is not the id of a dead letter: refarch redrive lists the ids"),
        )
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
