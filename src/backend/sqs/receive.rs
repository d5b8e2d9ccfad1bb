//! Receiving: at most one long poll a queue at a time, however many callers wait.
//!
//! If both lanes share a queue, a poll for one lane also brings messages of the other lane. Those are
//! buffered: few, because the relay bounds the bulk changes in a shared queue, and hidden in SQS as long as
//! they are buffered.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aws_sdk_sqs::Client;
use aws_sdk_sqs::config::timeout::TimeoutConfig;
use aws_sdk_sqs::types::{Message as Raw, MessageSystemAttributeName};
use tokio::sync::{Notify, oneshot};

use super::batch::change_visibility;
use super::client::ATTEMPT;
use super::error_policy::failure;
use super::options::SqsOptions;
use crate::pipeline::change::Lane;
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::queue::{Message, Receipt, decode};

/// The most messages buffered for the other lane: what one poll brings.
const MAX_BUFFERED: usize = 10;

/// A message that was received but not yet handed out.
struct Buffered {
    message: Message,
    /// When its visibility timeout was last set.
    hidden: Instant,
}

/// The receiver of one queue, with the messages buffered for each lane.
pub(super) struct Receiver {
    pub(super) url: String,
    lanes: Vec<Lane>,
    buffered: Mutex<[VecDeque<Buffered>; 2]>,
    /// Held by the caller that polls.
    poll: tokio::sync::Mutex<()>,
    changed: Notify,
}

impl Receiver {
    pub(super) fn new(url: &str, lanes: &[Lane]) -> Self {
        Self {
            url: url.into(),
            lanes: lanes.into(),
            buffered: Mutex::default(),
            poll: tokio::sync::Mutex::default(),
            changed: Notify::new(),
        }
    }

    pub(super) fn carries(&self, lane: Lane) -> bool {
        self.lanes.contains(&lane)
    }

    fn buffered(&self) -> MutexGuard<'_, [VecDeque<Buffered>; 2]> {
        self.buffered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes buffered messages of a lane.
    fn take(&self, lane: Lane, max: usize) -> Vec<Message> {
        let taken: Vec<Message> = {
            let mut buffered = self.buffered();
            let queue = &mut buffered[lane as usize];
            let count = queue.len().min(max);
            queue.drain(..count).map(|buffered| buffered.message).collect()
        };
        if !taken.is_empty() {
            self.changed.notify_waiters();
        }
        taken
    }

    fn keep(&self, messages: Vec<Message>) {
        let hidden = Instant::now();
        {
            let mut buffered = self.buffered();
            for message in messages {
                buffered[message.receipt.lane as usize].push_back(Buffered { message, hidden });
            }
        }
        self.changed.notify_waiters();
    }

    /// Whether the buffer of another lane is full.
    fn is_full_for_others(&self, lane: Lane) -> bool {
        let buffered = self.buffered();
        self.lanes.iter().any(|other| *other != lane && buffered[*other as usize].len() >= MAX_BUFFERED)
    }

    /// Handles of the buffered messages whose visibility must be extended, because `age` has passed. Drops
    /// messages whose visibility timeout has passed: another receiver may have them by now.
    fn aged(&self, age: Duration, visibility: Duration) -> Vec<String> {
        let mut aged = Vec::new();
        for queue in self.buffered().iter_mut() {
            queue.retain(|buffered| buffered.hidden.elapsed() < visibility);
            for buffered in queue.iter_mut().filter(|buffered| buffered.hidden.elapsed() >= age) {
                buffered.hidden = Instant::now();
                aged.push(buffered.message.receipt.handle.clone());
            }
        }
        aged
    }
}

impl Receiver {
    /// Messages for a lane: what is kept, or what comes within the wait.
    pub(super) async fn receive_for_lane(
        &self,
        client: &Client,
        options: &SqsOptions,
        lane: Lane,
        max: usize,
    ) -> Result<Vec<Message>> {
        let until = Instant::now() + options.wait;
        loop {
            let changed = self.changed.notified();
            let mut changed = std::pin::pin!(changed);
            // From here on, no notification is missed.
            changed.as_mut().enable();
            let taken = self.take(lane, max);
            let left = until.saturating_duration_since(Instant::now());
            if !taken.is_empty() || left.is_zero() {
                return Ok(taken);
            }
            let age = options.visibility / 3;
            let aged = self.aged(age, options.visibility);
            if !aged.is_empty() {
                change_visibility(client, &self.url, aged, options.visibility).await?;
            }
            if self.is_full_for_others(lane) {
                // Until the other lane has taken some.
                let _ = tokio::time::timeout(left.min(age), changed).await;
                continue;
            }
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep(left) => {}
                _polling = self.poll.lock() => {
                    if self.take_is_possible(lane) {
                        continue;
                    }
                    let messages = self.poll(client, options.visibility, max, left).await?;
                    if messages.is_empty() {
                        return Ok(self.take(lane, max));
                    }
                    self.keep(messages);
                }
            }
        }
    }

    /// One receive. In a task of its own: if nobody waits for it any more, what it brought is released.
    async fn poll(
        &self,
        client: &Client,
        visibility: Duration,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<Message>> {
        let (client, url) = (client.clone(), self.url.clone());
        let only = if let [lane] = self.lanes[..] { Some(lane) } else { None };
        let (answer, answered) = oneshot::channel();
        tokio::spawn(async move {
            let messages = receive(&client, &url, max, wait, visibility).await;
            let messages = messages.map(|raw| raw.into_iter().filter_map(|raw| read(raw, only)).collect());
            if let Err(Ok(unwanted)) = answer.send(messages) {
                let unwanted: Vec<Message> = unwanted;
                let handles = unwanted.into_iter().map(|message| message.receipt.handle).collect();
                if let Err(error) = change_visibility(&client, &url, handles, Duration::ZERO).await {
                    tracing::debug!(%error, "cannot release messages; they can be received again after the visibility timeout");
                }
            }
        });
        answered
            .await
            .map_err(|_| Error::new(FailureKind::Overloaded, "receive jobs", "the receiving task ended"))?
    }
}

impl Receiver {
    fn take_is_possible(&self, lane: Lane) -> bool {
        !self.buffered()[lane as usize].is_empty()
    }
}

/// Receives up to ten messages, and waits for at most `wait`.
pub(super) async fn receive(
    client: &Client,
    url: &str,
    max: usize,
    wait: Duration,
    visibility: Duration,
) -> Result<Vec<Raw>> {
    // Whole seconds, at least one: without a wait, SQS asks only some of its servers, and may answer that a
    // queue with messages is empty.
    let wait = Duration::from_secs(wait.as_secs().clamp(1, 20));
    let patience = TimeoutConfig::builder().operation_attempt_timeout(wait + ATTEMPT).build();
    let answer = client
        .receive_message()
        .queue_url(url)
        .max_number_of_messages(max.clamp(1, 10) as i32)
        .wait_time_seconds(wait.as_secs() as i32)
        .visibility_timeout(i32::try_from(visibility.as_secs()).unwrap_or(i32::MAX))
        .message_system_attribute_names(MessageSystemAttributeName::All)
        .message_attribute_names("All")
        .customize()
        .config_override(aws_sdk_sqs::config::Builder::default().timeout_config(patience))
        .send()
        .await
        .map_err(|error| failure("receive jobs from", url, error))?;
    Ok(answer.messages.unwrap_or_default())
}

/// A system attribute that is a number.
pub(super) fn number(raw: &Raw, name: &MessageSystemAttributeName) -> Option<i64> {
    raw.attributes()?.get(name)?.parse().ok()
}

/// Reads a message. Its lane is the queue's lane, or for a shared queue the lane in its body. `None` if there
/// is no receipt handle, since such a message cannot be acknowledged.
fn read(raw: Raw, lane: Option<Lane>) -> Option<Message> {
    let receive_count = number(&raw, &MessageSystemAttributeName::ApproximateReceiveCount);
    let body = decode(raw.body.unwrap_or_default());
    // A body that is not a job has no lane. The live lane takes such a message.
    let lane = lane.unwrap_or_else(|| body.as_ref().map_or(Lane::Live, |job| job.lane));
    Some(Message {
        id: raw.message_id.unwrap_or_default(),
        receipt: Receipt { lane, handle: raw.receipt_handle? },
        receive_count: receive_count.and_then(|count| count.try_into().ok()).unwrap_or(1),
        body,
    })
}
