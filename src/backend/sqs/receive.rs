//! Receiving: one long poll a queue at a time, whoever waits.
//!
//! Where the lanes share a queue, a poll for one brings messages of the other, which are kept for it: few,
//! since the relay keeps a load out of a shared queue, and invisible to others for as long as they are kept.

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

/// Messages that are kept for the other lane at most: one poll's.
const MAX_BUFFERED: usize = 10;

/// A message that was received and not handed out yet.
struct Buffered {
    message: Message,
    /// When it was last hidden.
    hidden: Instant,
}

/// Who receives from a queue, and what came for whom.
pub(super) struct Receiver {
    pub(super) url: String,
    lanes: Vec<Lane>,
    buffered: Mutex<[VecDeque<Buffered>; 2]>,
    /// Held by whoever polls.
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

    /// Hands out what is there for a lane.
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

    /// Whether as much is kept for another lane as may be.
    fn is_full_for_others(&self, lane: Lane) -> bool {
        let buffered = self.buffered();
        self.lanes.iter().any(|other| *other != lane && buffered[*other as usize].len() >= MAX_BUFFERED)
    }

    /// What must be hidden again, being kept for longer than `age`; forgets what is visible to others by now.
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
            // From here on nothing is missed.
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
                    tracing::debug!(%error, "cannot release messages: they come again by themselves");
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

/// Receives up to ten messages, after at most `wait`.
pub(super) async fn receive(
    client: &Client,
    url: &str,
    max: usize,
    wait: Duration,
    visibility: Duration,
) -> Result<Vec<Raw>> {
    // Whole seconds; with none, only some of the servers are asked, and an answer may be empty for no reason.
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

/// A message, in its queue's lane or else in that of its body. One without a receipt can't be worked on.
fn read(raw: Raw, lane: Option<Lane>) -> Option<Message> {
    let receive_count = number(&raw, &MessageSystemAttributeName::ApproximateReceiveCount);
    let body = decode(raw.body.unwrap_or_default());
    // What is no job is looked at by whoever comes first.
    let lane = lane.unwrap_or_else(|| body.as_ref().map_or(Lane::Live, |job| job.lane));
    Some(Message {
        id: raw.message_id.unwrap_or_default(),
        receipt: Receipt { lane, handle: raw.receipt_handle? },
        receive_count: receive_count.and_then(|count| count.try_into().ok()).unwrap_or(1),
        body,
    })
}
