//! Dead letters: stored with their reason, listed, and redriven.
//!
//! SQS has no call that lists a queue. To list dead letters, they are received, which hides them from other
//! receivers for a moment, and released once all have been seen.

use std::collections::HashSet;
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_sqs::types::{Message as Raw, MessageAttributeValue, MessageSystemAttributeName};
use jiff::Timestamp;
use serde_json::Value;

use super::batch::{self, MAX_ENTRIES, change_visibility};
use super::client;
use super::error_policy::{failure, lacking};
use super::queue::Sqs;
use super::receive::{number, receive};
use super::stats::Messages;
use crate::pipeline::change::{Job, Lane};
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::queue::{DeadLetter, DeadLetterCause, DeadLetters, Message, Undecodable, decode};

/// The most dead letters that one listing reads. Each is held in memory, and hidden from other receivers
/// meanwhile.
const MAX_LETTERS: usize = 20_000;

/// The visibility timeout of dead letters while they are read.
const HIDDEN: Duration = Duration::from_mins(2);

/// How long a receive waits for another dead letter before the queue counts as empty.
const EMPTY_AFTER: Duration = Duration::from_secs(1);

/// A listing ends after this many receives in a row that brought only dead letters already seen.
const KNOWN_ONLY: u32 = 3;

/// The most bytes of an error that a dead letter carries.
const MAX_ERROR: usize = 8_192;

/// How often the state of a move task is polled.
const MOVE_POLL: Duration = Duration::from_millis(500);

/// Names of a dead letter's message attributes.
const REASON: &str = "refarch.reason";
const ERROR: &str = "refarch.error";
const TRIES: &str = "refarch.tries";
const RECEIVE_COUNT: &str = "refarch.receive_count";
const LANE: &str = "refarch.lane";
const CHANGES: &str = "refarch.changes";
const MESSAGE_ID: &str = "refarch.message_id";

/// Bytes that a dead letter's attributes take, without the error.
const ATTRIBUTES: usize = 384;

/// Bytes kept free for the error in a dead letter.
const MIN_ERROR: usize = 128;

/// The start of a text, at most `max` bytes, cut between characters.
fn cut_to(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// A text that SQS accepts: characters that XML does not allow are replaced, the length is bounded, and an
/// empty text becomes `-`.
fn sendable(text: &str, max: usize) -> String {
    let fits = |c: char| matches!(c, '\t' | '\n' | '\r' | ' '..='\u{fffd}' | '\u{10000}'..);
    let text: String = text.chars().map(|c| if fits(c) { c } else { '\u{fffd}' }).collect();
    match cut_to(&text, max.min(MAX_ERROR)) {
        "" => "-".into(),
        cut => cut.to_owned(),
    }
}

fn attribute(value: impl std::fmt::Display) -> Result<MessageAttributeValue> {
    MessageAttributeValue::builder()
        .data_type("String")
        .string_value(sendable(&value.to_string(), MAX_ERROR))
        .build()
        .map_err(|error| Error::caused(FailureKind::Malformed, "write a dead letter", error))
}

fn attribute_of<'a>(raw: &'a Raw, name: &str) -> Option<&'a str> {
    raw.message_attributes()?.get(name)?.string_value()
}

/// The lane that a dead letter came from. A message that SQS moved by its redrive policy has no attribute;
/// its body says the lane.
fn lane_of(raw: &Raw) -> Lane {
    match attribute_of(raw, LANE) {
        Some("bulk") => Lane::Bulk,
        Some(_) => Lane::Live,
        None => decode(raw.body().unwrap_or_default().to_owned()).map_or(Lane::Live, |job| job.lane),
    }
}

fn letter(raw: &Raw) -> DeadLetter {
    let body = raw.body().unwrap_or_default();
    let job: Option<Job> = serde_json::from_str(body).ok();
    let count = |name| attribute_of(raw, name).and_then(|text| text.parse::<u64>().ok());
    let sent = number(raw, &MessageSystemAttributeName::SentTimestamp).unwrap_or_default();
    let reason = attribute_of(raw, REASON).map(|text| Value::String(text.into()));
    DeadLetter {
        id: raw.message_id().unwrap_or_default().to_owned(),
        at: Timestamp::from_millisecond(sent).unwrap_or(Timestamp::UNIX_EPOCH),
        lane: lane_of(raw),
        reason: reason.and_then(|reason| serde_json::from_value(reason).ok()),
        error: attribute_of(raw, ERROR).unwrap_or_default().to_owned(),
        tries: count(TRIES).unwrap_or_default() as u32,
        receive_count: count(RECEIVE_COUNT).unwrap_or_default() as u32,
        changes: count(CHANGES).unwrap_or_else(|| job.as_ref().map_or(1, |job| job.changes() as u64)),
        ids: job.iter().flat_map(|job| &job.groups).flat_map(|group| group.ids.clone()).collect(),
        body: job.is_none().then(|| body.to_owned()),
    }
}

impl Sqs {
    /// Sends one dead letter, with as much of the error as fits.
    async fn write_letter(
        &self,
        body: String,
        error: &str,
        message: &Message,
        cause: &DeadLetterCause,
    ) -> Result<()> {
        let changes = serde_json::from_str(&body).map_or(1, |job: Job| job.changes());
        let reason = serde_json::to_value(cause.reason).ok();
        let reason = reason.as_ref().and_then(Value::as_str).unwrap_or_default();
        let room = self.dead_max_bytes.saturating_sub(body.len() + ATTRIBUTES);
        let mut call = self.client.send_message().queue_url(&self.dead_url).message_body(body);
        if room > 0 {
            call = call
                .message_attributes(REASON, attribute(reason)?)
                .message_attributes(ERROR, attribute(sendable(error, room))?)
                .message_attributes(TRIES, attribute(cause.tries)?)
                .message_attributes(RECEIVE_COUNT, attribute(message.receive_count)?)
                .message_attributes(LANE, attribute(message.receipt.lane.name())?)
                .message_attributes(CHANGES, attribute(changes)?)
                .message_attributes(MESSAGE_ID, attribute(&message.id)?);
        }
        call.send().await.map(drop).map_err(|error| failure("write a dead letter to", &self.dead_url, error))
    }

    async fn record_event(&self, message: &Message, cause: &DeadLetterCause) -> Result<()> {
        let client = self.postgres.client().await?;
        client
            .execute(
                "INSERT INTO refarch.event (kind, detail) VALUES ('dead_letter', jsonb_build_object('message_id', $1::text, 'error', $2::text))",
                &[&message.id, &sendable(&cause.error, MAX_ERROR)],
            )
            .await
            .map(drop)
            .map_err(|error| crate::backend::postgres::failure("record a dead letter", error))
    }

    /// Receives dead letters until none are left, or until `wanted` returns true.
    async fn receive_letters(&self, mut wanted: impl FnMut(&Raw) -> bool) -> Result<Vec<Raw>> {
        let mut seen = HashSet::new();
        let mut letters = Vec::new();
        let mut known_only = 0;
        loop {
            let received = receive(&self.client, &self.dead_url, MAX_ENTRIES, EMPTY_AFTER, HIDDEN).await?;
            let is_empty = received.is_empty();
            let mut is_new = false;
            let mut enough = false;
            for raw in received {
                if seen.insert(raw.message_id().unwrap_or_default().to_owned()) {
                    is_new = true;
                    enough |= wanted(&raw);
                    letters.push(raw);
                }
            }
            if letters.len() >= MAX_LETTERS {
                tracing::warn!(
                    letters = letters.len(),
                    "there are more dead letters than one listing reads; redrive some, then list again"
                );
                return Ok(letters);
            }
            // SQS may return a dead letter twice before it has returned all others. After several receives
            // without a new one, all have been seen.
            known_only = if is_new { 0 } else { known_only + 1 };
            if is_empty || enough || known_only >= KNOWN_ONLY {
                return Ok(letters);
            }
        }
    }

    async fn release(&self, letters: &[Raw]) {
        let handles = letters.iter().filter_map(|raw| raw.receipt_handle().map(str::to_owned)).collect();
        if let Err(error) = change_visibility(&self.client, &self.dead_url, handles, Duration::ZERO).await {
            tracing::warn!(%error, "cannot release dead letters; they can be listed again after {HIDDEN:?}");
        }
    }

    /// Appends the bodies that redrive a dead letter into a lane. Returns false if the lane's queue takes no
    /// message of that length.
    fn bodies_for(&self, lane: Lane, body: &str, to: &mut Vec<String>) -> bool {
        let max = self.max_bytes(lane);
        if body.len() <= max {
            to.push(body.to_owned());
            return true;
        }
        let mut parts = Vec::new();
        let cut =
            serde_json::from_str(body).is_ok_and(|job: Job| batch::bodies(&job, max, &mut parts).is_ok());
        if cut {
            to.append(&mut parts);
        } else {
            tracing::warn!(
                queue.url = self.url(lane),
                bytes = body.len(),
                "a dead letter is too long to be redriven: raise MaximumMessageSize of the queue, which is {max}"
            );
        }
        cut
    }
}

#[async_trait]
impl DeadLetters for Sqs {
    async fn store(&self, message: &Message, part: Option<&Job>, cause: &DeadLetterCause) -> Result<()> {
        let room = self.dead_max_bytes.saturating_sub(ATTRIBUTES + MIN_ERROR);
        match (part, &message.body) {
            (Some(job), _) | (None, Ok(job)) => {
                let mut bodies = Vec::new();
                // Leave room for the reason. If a single change needs the whole message, only the event log
                // keeps the reason.
                if batch::bodies(job, room, &mut bodies).is_err() {
                    bodies.clear();
                    batch::bodies(job, self.dead_max_bytes, &mut bodies)?;
                }
                for body in bodies {
                    self.write_letter(body, &cause.error, message, cause).await?;
                }
            }
            (None, Err(Undecodable { body, .. })) if body.len() > self.dead_max_bytes => {
                let cut = format!("the body was cut from {} bytes: {}", body.len(), cause.error);
                self.write_letter(cut_to(body, room).to_owned(), &cut, message, cause).await?;
            }
            (None, Err(Undecodable { body, .. })) => {
                self.write_letter(body.clone(), &cause.error, message, cause).await?;
            }
        }
        if part.is_none() {
            self.delete(self.url(message.receipt.lane), vec![message.receipt.handle.clone()]).await?;
        }
        if let Err(error) = self.record_event(message, cause).await {
            tracing::warn!(%error, "cannot record a dead letter in refarch.event");
        }
        Ok(())
    }

    async fn count(&self) -> Result<u64> {
        // A dead letter usually holds one change, so messages are counted as changes. A message that was
        // given up as a whole may hold more.
        self.count_messages(&self.dead_url).await.map(Messages::total)
    }

    // Dead letters after that id, from the last listing. Without an id, reads the queue anew.
    async fn list(&self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>> {
        let mut letters = self.letters.lock().await;
        let Some(after) = after else {
            let raw = self.receive_letters(|_| false).await?;
            self.release(&raw).await;
            *letters = raw.iter().map(letter).collect();
            letters.sort_by(|a, b| (a.at, &a.id).cmp(&(b.at, &b.id)));
            return Ok(letters.iter().take(limit).cloned().collect());
        };
        let next = letters.iter().position(|letter| letter.id == after).map_or(letters.len(), |at| at + 1);
        Ok(letters.iter().skip(next).take(limit).cloned().collect())
    }

    // Sends the dead letters with these ids to the lanes that they came from.
    async fn redrive(&self, ids: &[String]) -> Result<Vec<String>> {
        let mut wanted: HashSet<&str> = ids.iter().map(String::as_str).collect();
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let found = self
            .receive_letters(|raw| {
                wanted.remove(raw.message_id().unwrap_or_default());
                wanted.is_empty()
            })
            .await?;
        let asked: HashSet<&str> = ids.iter().map(String::as_str).collect();
        let (chosen, others): (Vec<Raw>, Vec<Raw>) =
            found.into_iter().partition(|raw| asked.contains(raw.message_id().unwrap_or_default()));
        self.release(&others).await;
        let mut back = Vec::new();
        for lane in Lane::ALL {
            let mut of_lane: Vec<&Raw> = chosen.iter().filter(|raw| lane_of(raw) == lane).collect();
            let mut bodies = Vec::new();
            let mut stay = Vec::new();
            of_lane.retain(|raw| {
                let fits = self.bodies_for(lane, raw.body().unwrap_or_default(), &mut bodies);
                if !fits {
                    stay.push((*raw).clone());
                }
                fits
            });
            self.release(&stay).await;
            self.send_bodies(lane, bodies).await?;
            let handles = of_lane.iter().filter_map(|raw| raw.receipt_handle().map(str::to_owned)).collect();
            self.delete(&self.dead_url, handles).await?;
            back.extend(of_lane.iter().map(|raw| raw.message_id().unwrap_or_default().to_owned()));
        }
        Ok(back)
    }

    // SQS moves all dead letters in one task, which costs no calls here. A task has only one destination, so
    // all go to the bulk lane's queue, where they do not delay live changes.
    async fn redrive_all(&self) -> Result<Option<u64>> {
        let from = client::arn(&self.client, &self.dead_url).await?;
        let to = client::arn(&self.client, self.url(Lane::Bulk)).await?;
        let started =
            self.client.start_message_move_task().source_arn(&from).destination_arn(to).send().await;
        let handle = match started {
            Ok(task) => task.task_handle.ok_or_else(|| lacking("move dead letters", "TaskHandle"))?,
            Err(error) => {
                let error = failure("move dead letters of", &self.dead_url, error);
                tracing::info!(%error, "SQS cannot move the dead letters itself; redriving them one by one");
                return Ok(None);
            }
        };
        loop {
            let answer = self
                .client
                .list_message_move_tasks()
                .source_arn(&from)
                .max_results(10)
                .send()
                .await
                .map_err(|error| failure("follow the move of dead letters of", &self.dead_url, error))?;
            // Only a running task has a handle. The newest task comes first.
            let running = answer.results().iter().any(|task| task.task_handle() == Some(&*handle));
            let Some(newest) = answer.results().first().filter(|_| !running) else {
                tokio::time::sleep(MOVE_POLL).await;
                continue;
            };
            if newest.status() == Some("FAILED") {
                let cause = newest.failure_reason().unwrap_or("SQS gives no reason").to_owned();
                return Err(Error::new(
                    FailureKind::Overloaded,
                    format!("move dead letters of {}", self.dead_url),
                    cause,
                ));
            }
            return Ok(Some(newest.approximate_number_of_messages_moved().max(0) as u64));
        }
    }
}
