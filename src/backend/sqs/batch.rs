//! Batch calls of ten entries each. The failures of a call are read entry by entry. Written by hand, because
//! the SDK sends a batch as given: the SDK neither packs entries by bytes nor sends failed entries again.

use std::time::Duration;

use aws_sdk_sqs::Client;
use aws_sdk_sqs::error::BuildError;
use aws_sdk_sqs::types::{
    BatchResultErrorEntry, ChangeMessageVisibilityBatchRequestEntry, DeleteMessageBatchRequestEntry,
    SendMessageBatchRequestEntry,
};
use futures::{StreamExt as _, TryStreamExt as _, stream};

use super::error_policy::failure;
use crate::pipeline::change::{Group, Job};
use crate::pipeline::clock::BootClock;
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::retry::Backoff;

/// The most entries in one call (a limit of SQS).
pub(super) const MAX_ENTRIES: usize = 10;

/// Calls in flight at once.
const AT_ONCE: usize = 16;

/// A call may always hold this many bytes, however small the queue's messages must be. Some servers limit a
/// whole call to the queue's message size, and none of them limits a call to less than this.
const MIN_CALL_BYTES: usize = 65_536;

/// How often entries are sent that failed through no fault of the sender.
const TRIES: u32 = 5;

/// Appends the body of a job, or the bodies of its parts if the job is longer than a message may be.
pub(super) fn bodies(job: &Job, max: usize, to: &mut Vec<String>) -> Result<()> {
    let body = serde_json::to_string(job)
        .map_err(|error| Error::caused(FailureKind::Malformed, "send jobs", error))?;
    let body = sendable(body);
    if body.len() <= max {
        to.push(body);
        return Ok(());
    }
    let Some((left, right)) = halves(job) else {
        return Err(Error::new(
            FailureKind::RefusedData,
            "send jobs",
            format!(
                "a single change makes a message of {} bytes, and the queue has MaximumMessageSize = {max}: raise MaximumMessageSize",
                body.len()
            ),
        ));
    };
    bodies(&left, max, to)?;
    bodies(&right, max, to)
}

/// Escapes the two characters U+FFFE and U+FFFF, which SQS refuses. JSON already escapes control characters.
fn sendable(body: String) -> String {
    if body.contains(['\u{fffe}', '\u{ffff}']) {
        return body.replace('\u{fffe}', "\\ufffe").replace('\u{ffff}', "\\uffff");
    }
    body
}

/// Splits a job into two with half of the changes each. `None` if the job has only one change.
fn halves(job: &Job) -> Option<(Job, Job)> {
    let half = job.changes() / 2;
    if half == 0 {
        return None;
    }
    let with = |groups| Job { groups, ..job.clone() };
    let (mut left, mut right, mut taken) = (Vec::new(), Vec::new(), 0);
    for group in &job.groups {
        let (now, later) = group.ids.split_at(group.ids.len().min(half - taken));
        taken += now.len();
        for (ids, to) in [(now, &mut left), (later, &mut right)] {
            if !ids.is_empty() {
                to.push(Group { ids: ids.to_vec(), ..group.clone() });
            }
        }
    }
    Some((with(left), with(right)))
}

/// Packs bodies into calls, by count and by bytes.
fn calls(bodies: Vec<String>, max: usize) -> Vec<Vec<String>> {
    let max = max.max(MIN_CALL_BYTES);
    let mut calls: Vec<Vec<String>> = Vec::new();
    let mut bytes = 0;
    for body in bodies {
        let fits = calls.last().is_some_and(|call| call.len() < MAX_ENTRIES && bytes + body.len() <= max);
        if !fits {
            calls.push(Vec::new());
            bytes = 0;
        }
        bytes += body.len();
        if let Some(call) = calls.last_mut() {
            call.push(body);
        }
    }
    calls
}

/// The operation that a call does to its messages.
#[derive(Clone, Copy)]
enum BatchOperation {
    Send,
    Delete,
    /// Hides the messages for that many seconds from now.
    Hide(i32),
}

impl BatchOperation {
    fn describe(self) -> &'static str {
        match self {
            Self::Send => "send jobs to",
            Self::Delete => "acknowledge jobs of",
            Self::Hide(_) => "extend visibility in",
        }
    }

    /// Whether an entry's code says that the message is gone or its visibility timeout has passed. Then
    /// nothing is left to do, and the failure is no error.
    fn is_over(self, code: &str) -> bool {
        const OVER: [&str; 3] = ["ReceiptHandleIsInvalid", "MessageNotInflight", "InvalidParameterValue"];
        !matches!(self, Self::Send) && OVER.iter().any(|over| code.ends_with(over))
    }

    /// Makes one call with bodies or receipt handles. Returns the entries that failed.
    async fn call(
        self,
        client: &Client,
        url: &str,
        entries: &[String],
    ) -> Result<Vec<BatchResultErrorEntry>> {
        let what = self.describe();
        let wrong = |error: BuildError| Error::caused(FailureKind::Malformed, what, error);
        let numbered = entries.iter().enumerate().map(|(at, entry)| (at.to_string(), entry));
        match self {
            Self::Send => {
                let entry = |(id, body): (String, &String)| {
                    SendMessageBatchRequestEntry::builder().id(id).message_body(body).build()
                };
                let entries = numbered.map(entry).collect::<Result<Vec<_>, _>>().map_err(wrong)?;
                let answer =
                    client.send_message_batch().queue_url(url).set_entries(Some(entries)).send().await;
                answer.map(|answer| answer.failed).map_err(|error| failure(what, url, error))
            }
            Self::Delete => {
                let entry = |(id, handle): (String, &String)| {
                    DeleteMessageBatchRequestEntry::builder().id(id).receipt_handle(handle).build()
                };
                let entries = numbered.map(entry).collect::<Result<Vec<_>, _>>().map_err(wrong)?;
                let answer =
                    client.delete_message_batch().queue_url(url).set_entries(Some(entries)).send().await;
                answer.map(|answer| answer.failed).map_err(|error| failure(what, url, error))
            }
            Self::Hide(seconds) => {
                let entry = |(id, handle): (String, &String)| {
                    let entry = ChangeMessageVisibilityBatchRequestEntry::builder();
                    entry.id(id).receipt_handle(handle).visibility_timeout(seconds).build()
                };
                let entries = numbered.map(entry).collect::<Result<Vec<_>, _>>().map_err(wrong)?;
                let call = client.change_message_visibility_batch();
                let answer = call.queue_url(url).set_entries(Some(entries)).send().await;
                answer.map(|answer| answer.failed).map_err(|error| failure(what, url, error))
            }
        }
    }

    /// Makes one call, then repeats the call with the entries that failed through no fault of the sender.
    async fn settle(self, client: Client, url: String, entries: Vec<String>) -> Result<()> {
        let what = || format!("{} {url}", self.describe());
        let said = |entry: &BatchResultErrorEntry| {
            format!("{}: {}", entry.code(), entry.message().unwrap_or_default())
        };
        let mut left = entries;
        let mut backoff = Backoff::default();
        loop {
            let mut failed = self.call(&client, &url, &left).await?;
            failed.retain(|entry| !self.is_over(entry.code()));
            if let Some(refused) = failed.iter().find(|entry| entry.sender_fault()) {
                return Err(Error::new(FailureKind::RefusedData, what(), said(refused)));
            }
            let Some(first) = failed.first() else { return Ok(()) };
            let error = Error::new(FailureKind::Overloaded, what(), said(first));
            let pause = backoff.next(&BootClock);
            if backoff.failures() >= TRIES {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
            left = failed
                .iter()
                .filter_map(|entry| left.get(entry.id().parse::<usize>().ok()?).cloned())
                .collect();
        }
    }

    /// Makes several calls at once.
    async fn all(self, client: &Client, url: &str, calls: Vec<Vec<String>>) -> Result<()> {
        stream::iter(calls)
            .map(|entries| self.settle(client.clone(), url.to_owned(), entries))
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await
    }
}

/// Sends bodies, ten a call, several calls at a time. A call has at most `max` bytes.
pub(super) async fn send(client: &Client, url: &str, bodies: Vec<String>, max: usize) -> Result<()> {
    BatchOperation::Send.all(client, url, calls(bodies, max)).await
}

/// Deletes messages; one that is out of our hands is no error.
pub(super) async fn delete(client: &Client, url: &str, handles: Vec<String>) -> Result<()> {
    BatchOperation::Delete.all(client, url, chunks_of_ten(handles)).await
}

/// Hides messages for `timeout` from now. A message that is gone, or whose visibility timeout has passed, is
/// no error.
pub(super) async fn change_visibility(
    client: &Client,
    url: &str,
    handles: Vec<String>,
    timeout: Duration,
) -> Result<()> {
    let seconds = i32::try_from(timeout.as_secs()).unwrap_or(i32::MAX);
    BatchOperation::Hide(seconds).all(client, url, chunks_of_ten(handles)).await
}

fn chunks_of_ten(mut handles: Vec<String>) -> Vec<Vec<String>> {
    // SQS refuses a call that names the same message twice.
    handles.sort_unstable();
    handles.dedup();
    handles.chunks(MAX_ENTRIES).map(<[String]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::sqs::MAX_BYTES;
    use crate::pipeline::change::Lane;
    use crate::pipeline::change::{JOB_VERSION, Op};

    fn job(ids: usize, bytes: usize) -> Job {
        let id = |n: usize| format!("{n}-{}", "x".repeat(bytes));
        let group = |range: std::ops::Range<usize>| Group {
            version: 1,
            op: Op::Upsert,
            after_ms: 0,
            ids: range.map(id).collect(),
        };
        Job {
            v: JOB_VERSION,
            source: "products".into(),
            lane: Lane::Bulk,
            oldest: "2026-01-02T03:04:05Z".parse().unwrap(),
            trace: None,
            groups: vec![group(0..ids / 3), group(ids / 3..ids)],
        }
    }

    #[test]
    fn a_job_too_long_for_a_message_travels_in_parts() {
        let job = job(500, 5_000);
        let mut parts = Vec::new();
        bodies(&job, MAX_BYTES, &mut parts).unwrap();
        assert!(parts.len() >= 3 && parts.iter().all(|body| body.len() <= MAX_BYTES));
        let ids: Vec<String> = parts
            .iter()
            .flat_map(|body| serde_json::from_str::<Job>(body).unwrap().groups)
            .flat_map(|group| group.ids)
            .collect();
        assert_eq!(ids, job.groups.iter().flat_map(|group| group.ids.clone()).collect::<Vec<_>>());
        assert!(bodies(&self::job(1, MAX_BYTES), MAX_BYTES, &mut parts).is_err());
        let mut small = Vec::new();
        bodies(&self::job(9, 300), 1_024, &mut small).unwrap();
        assert!(small.len() >= 4 && small.iter().all(|body| body.len() <= 1_024));
    }

    #[test]
    fn calls_keep_to_ten_entries_and_to_the_bytes() {
        let sizes = |bodies: Vec<usize>| -> Vec<usize> {
            calls(bodies.into_iter().map(|n| "x".repeat(n)).collect(), MAX_BYTES)
                .iter()
                .map(Vec::len)
                .collect()
        };
        assert_eq!(sizes(vec![1; 25]), [10, 10, 5]);
        assert_eq!(sizes(vec![MAX_BYTES, 1, MAX_BYTES - 1, 1]), [1, 2, 1]);
        assert!(sizes(vec![]).is_empty());
    }

    #[test]
    fn characters_that_sqs_refuses_are_escaped() {
        let mut odd = job(3, 1);
        odd.groups[0].ids = vec!["a\u{ffff}\u{1}\u{fffe}".into()];
        let mut sent = Vec::new();
        bodies(&odd, MAX_BYTES, &mut sent).unwrap();
        assert!(sent[0].chars().all(|c| !c.is_control() && c != '\u{ffff}' && c != '\u{fffe}'));
        assert_eq!(serde_json::from_str::<Job>(&sent[0]).unwrap(), odd);
    }
}
