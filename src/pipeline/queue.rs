//! The job queue's contract.

use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::change::{JOB_VERSION, Job, Lane};
use super::failure::Result;

/// A message taken from the queue, invisible to others until its visibility timeout ends.
#[derive(Clone, Debug)]
pub struct Message {
    /// The queue's name for the message, for logs and dead letters.
    pub id: String,
    /// What acknowledges, extends or releases this receipt of the message.
    pub receipt: Receipt,
    /// How often the message has been received, this time included.
    pub receive_count: u32,
    /// The decoded body, or why it could not be decoded together with the body as it came.
    pub body: Result<Job, Undecodable>,
}

/// A body that is not a [`Job`] that this build can read, kept whole.
#[derive(Clone, Debug)]
pub struct Undecodable {
    /// Why it could not be read.
    pub reason: String,
    /// The job's version, if it is a later one than this build reads: a later build can read it. Anything
    /// else can be read by nobody, and is dead-lettered with its reason.
    pub later: Option<u64>,
    /// The body as it came.
    pub body: String,
}

/// Reads a message's body. A later version than ours may have any shape.
pub fn decode(body: String) -> Result<Job, Undecodable> {
    let not_a_job = |error: serde_json::Error| (format!("not a job: {error}"), None);
    let read = || {
        // There may be JSON that serde does not take: numbers beyond `f64`, any depth.
        let value: serde_json::Value = serde_json::from_str(&body).map_err(not_a_job)?;
        match value.get("v").and_then(serde_json::Value::as_u64) {
            Some(v) if v > u64::from(JOB_VERSION) => {
                Err((format!("job version {v}; this build reads {JOB_VERSION}"), Some(v)))
            }
            Some(1..) => serde_json::from_value(value).map_err(not_a_job),
            Some(0) => Err(("not a job: its version is 0".into(), None)),
            None => Err(("not a job: it has no version".into(), None)),
        }
    };
    read().map_err(|(reason, later)| Undecodable { reason, later, body })
}

/// A receipt handle. Only the queue that issued it can read it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Receipt {
    /// The lane that the message came from.
    pub lane: Lane,
    /// The handle itself.
    pub handle: String,
}

/// Changes (not messages) that stand in a lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Backlog {
    /// Changes that can be received now.
    pub visible: u64,
    /// Changes that somebody holds.
    pub in_flight: u64,
}

/// Why a change or a message is given up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Why {
    /// Which rule gave it up.
    pub reason: Reason,
    /// The error, in the backend's own words.
    pub error: String,
    /// How often the change was tried by itself, this time included.
    pub tries: u32,
}

/// The rules by which something is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reason {
    /// The body is not a job of ours.
    Undecodable,
    /// The index, the embedder or the database refuses the change for good.
    Refused,
    /// The change failed by itself too often, while others went through.
    Failed,
    /// The message was received too often without anybody finishing it: the last resort.
    Received,
}

impl Reason {
    /// The rule as a sentence's end: "the change ...".
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Undecodable => "is not a job of ours",
            Self::Refused => "was refused for good",
            Self::Failed => "failed by itself too often",
            Self::Received => "was received too often and never finished",
        }
    }
}

/// A message in the dead-letter queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeadLetter {
    /// The queue's name for it, for `redrive`.
    pub id: String,
    /// When it was given up.
    pub at: Timestamp,
    /// The lane it came from.
    pub lane: Lane,
    /// Which rule gave it up; none if somebody else put it there.
    pub reason: Option<Reason>,
    /// The error, in the backend's own words.
    pub error: String,
    /// How often the change was tried by itself.
    pub tries: u32,
    /// How often the message had been received.
    pub receive_count: u32,
    /// Changes in it.
    pub changes: u64,
    /// Ids of the rows, as far as the body could be read.
    pub ids: Vec<String>,
    /// The body, if it could not be read.
    pub body: Option<String>,
}

/// A queue with two lanes and a dead-letter queue.
///
/// Delivery is at least once and unordered: a message may come again after it was acknowledged, and
/// two receivers may hold copies of it. Whoever receives a message owns it for the visibility
/// timeout; then it comes again. Counts may be estimates, but for this: a queue that holds nothing, and
/// nothing in flight, comes to be counted as empty, and one that stays filled does not.
#[async_trait]
pub trait JobQueue: Send + Sync {
    /// Adds messages to their lanes. Either all are added or the error says that none can be relied
    /// on: sending again may duplicate, which is harmless.
    async fn send(&self, jobs: &[Job]) -> Result<()>;

    /// Takes up to `max` messages of a lane; none when the lane is empty. A queue that is paid by the
    /// call waits a while for the first one, and then [`Self::wait`] returns at once. What a caller that
    /// gives up would have got comes to others at once, or when its visibility timeout ends.
    async fn receive(&self, lane: Lane, max: usize) -> Result<Vec<Message>>;

    /// Returns when the lane may hold something, or after `timeout`. May return early for no reason.
    async fn wait(&self, lane: Lane, timeout: Duration);

    /// Removes messages for good. A receipt whose visibility ended may be ignored; an empty slice
    /// does nothing.
    async fn acknowledge(&self, receipts: &[Receipt]) -> Result<()>;

    /// Hides messages for `timeout` from now on; zero releases them at once.
    async fn extend(&self, receipts: &[Receipt], timeout: Duration) -> Result<()>;

    /// Puts a message into the dead-letter queue and acknowledges it; with `part`, only that part of
    /// it, and the message stays as it is. May happen twice after an error, and never not at all.
    async fn dead_letter(&self, message: &Message, part: Option<&Job>, why: &Why) -> Result<()>;

    /// Changes that stand in a lane.
    async fn backlog(&self, lane: Lane) -> Result<Backlog>;

    /// Changes that stand in the dead-letter queue.
    async fn dead_letters(&self) -> Result<u64>;

    /// Dead letters in their order, page by page: those after a letter's id.
    async fn read_dead_letters(&self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>>;

    /// Brings every dead letter back by a means of the queue's own, and returns how many went; none if
    /// it has no such means, and nothing was done.
    async fn redrive_all(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Puts dead letters back into the lanes they came from, and returns the ids of those that were
    /// there. May happen twice after an error, and never not at all.
    async fn redrive(&self, ids: &[String]) -> Result<Vec<String>>;

    /// Where both lanes share one queue, nobody can take the live messages first: while more changes
    /// than this stand in it, bulk ones are best kept out. None where each lane has its own.
    fn shared_bound(&self) -> Option<u64> {
        None
    }

    /// When the oldest change in the lanes was made, by the database's clock; none when there is
    /// none. A queue that can't tell answers with the beginning of time while it holds anything.
    async fn oldest(&self) -> Result<Option<Timestamp>>;

    /// How long a received message stays invisible.
    fn visibility(&self) -> Duration;
}
