//! What happened: workers that joined and left, decisions about their number, dead letters.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};

use super::{Postgres, fail};
use crate::pipeline::failure::Result;
use crate::pipeline::fault::redacted;
use crate::pipeline::scaling::Decision;

/// The kind of a decision about the number of workers.
const SCALED: &str = "scaled";

/// Events in one answer, the newest ones.
const MAX_EVENTS: i64 = 10_000;

/// An event may be committed after one with a higher number. So many before the last one are read again.
const LATE: i64 = 1_000;

/// Decisions that the status shows, and how old they may be.
const SHOWN_DECISIONS: i64 = 5;
const SHOWN_FOR: &str = "1 day";

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    /// Its number.
    pub event_id: i64,
    /// When it happened, by the database's clock.
    pub at: Timestamp,
    /// Its kind: `joined`, `left`, `scaled`, `ended`, `panicked`, `rearmed`, `dead_letter`.
    pub kind: String,
    /// The worker that it happened to, or that told it.
    pub worker_id: Option<String>,
    /// A sentence.
    pub text: String,
    /// All that is known, by kind.
    pub detail: Value,
}

/// A decision about the number of workers, as the status shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ScalingEvent {
    /// When it was made.
    pub at: Timestamp,
    /// Who made it.
    pub worker_id: Option<String>,
    /// What is counted: `threads` or `processes`.
    pub workers: String,
    /// How many there were.
    pub from: i64,
    /// How many there are to be.
    pub to: i64,
    /// Why, such as `backlog 14 s > 10 s`.
    pub reason: String,
}

/// The sentence of an event.
fn text(kind: &str, worker: Option<&str>, detail: &Value) -> String {
    let worker = worker.unwrap_or("a worker");
    let said = |key: &str| detail[key].as_str().unwrap_or_default();
    match kind {
        "joined" => format!("{worker} joined"),
        "left" => format!("{worker} left"),
        SCALED => format!("{} -> {} {}: {}", detail["from"], detail["to"], said("workers"), said("reason")),
        "dead_letter" => format!("a change was given up: {}", redacted(said("error"))),
        "rearmed" => "capture was armed again".into(),
        "ended" | "panicked" => said("text").into(),
        _ if detail.as_object().is_none_or(serde_json::Map::is_empty) => kind.into(),
        _ => format!("{kind} {detail}"),
    }
}

async fn record(postgres: &Postgres, worker: &str, kind: &str, detail: &Value) -> Result<()> {
    let client = postgres.client().await?;
    client
        .execute(
            "INSERT INTO refarch.event (worker_id, kind, detail) VALUES ($1, $2, $3)",
            &[&worker, &kind, detail],
        )
        .await
        .map(drop)
        .map_err(fail("record an event"))
}

/// Records a decision about the number of `workers` (`threads` or `processes`).
pub async fn record_scaling(
    postgres: &Postgres,
    worker: &str,
    workers: &str,
    decision: &Decision,
) -> Result<()> {
    let Decision { current, desired, reason } = decision;
    let detail = json!({ "workers": workers, "from": current, "to": desired, "reason": reason.to_string() });
    record(postgres, worker, SCALED, &detail).await
}

/// Records that a process of a fleet ended by itself.
pub async fn record_ended(postgres: &Postgres, worker: &str, text: &str) -> Result<()> {
    record(postgres, worker, "ended", &json!({ "text": text })).await
}

/// Records that a task of a worker panicked.
pub async fn record_panic(postgres: &Postgres, worker: &str, text: &str) -> Result<()> {
    record(postgres, worker, "panicked", &json!({ "text": text })).await
}

/// Events in their order: those since a time, and those after a number. The numbers in `seen` are left out.
pub async fn read(postgres: &Postgres, since: Timestamp, after: i64, seen: &[i64]) -> Result<Vec<Event>> {
    let client = postgres.client().await?;
    let rows = client
        .query(
            "SELECT event_id, at, kind, worker_id, detail FROM refarch.event \
             WHERE at >= $1 AND event_id > $2::bigint - $3::bigint AND event_id <> ALL ($4) \
             ORDER BY event_id DESC LIMIT $5",
            &[&since, &after, &LATE, &seen, &MAX_EVENTS],
        )
        .await
        .map_err(fail("read the events"))?;
    let event = |row: &tokio_postgres::Row| {
        let (kind, worker_id, detail): (String, Option<String>, Value) = (row.get(2), row.get(3), row.get(4));
        let text = text(&kind, worker_id.as_deref(), &detail);
        Event { event_id: row.get(0), at: row.get(1), kind, worker_id, text, detail }
    };
    Ok(rows.iter().rev().map(event).collect())
}

/// The events that were committed since the last call, in their order.
#[derive(Debug)]
pub struct Follow {
    since: Timestamp,
    last: i64,
    seen: Vec<i64>,
}

impl Follow {
    /// Begins with the events since a time.
    #[must_use]
    pub fn since(since: Timestamp) -> Self {
        Self { since, last: 0, seen: Vec::new() }
    }

    /// The events that no call has returned yet.
    pub async fn next(&mut self, postgres: &Postgres) -> Result<Vec<Event>> {
        let events = read(postgres, self.since, self.last, &self.seen).await?;
        self.seen.extend(events.iter().map(|event| event.event_id));
        self.last = self.seen.iter().copied().max().unwrap_or(self.last);
        self.seen.retain(|id| *id > self.last - LATE);
        Ok(events)
    }
}

/// The last decisions about the number of workers, newest last.
pub async fn last_decisions(postgres: &Postgres) -> Result<Vec<ScalingEvent>> {
    let client = postgres.client().await?;
    let sql = format!(
        "SELECT at, worker_id, detail FROM refarch.event \
         WHERE kind = $1 AND at > now() - interval '{SHOWN_FOR}' ORDER BY event_id DESC LIMIT $2"
    );
    let rows = client
        .query(&sql, &[&SCALED, &SHOWN_DECISIONS])
        .await
        .map_err(fail("read the decisions about the number of workers"))?;
    let decision = |row: &tokio_postgres::Row| {
        let detail: Value = row.get(2);
        let (count, said) = (
            |key: &str| detail[key].as_i64().unwrap_or_default(),
            |key: &str| detail[key].as_str().unwrap_or_default().to_owned(),
        );
        ScalingEvent {
            at: row.get(0),
            worker_id: row.get(1),
            workers: said("workers"),
            from: count("from"),
            to: count("to"),
            reason: said("reason"),
        }
    };
    Ok(rows.iter().rev().map(decision).collect())
}
