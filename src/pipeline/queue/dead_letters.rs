//! The contract of the dead-letter queue: changes and messages that were given up, with the reason.

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Message;
use crate::pipeline::change::{Job, Lane};
use crate::pipeline::failure::Result;

/// The dead-letter queue.
///
/// No dead letter is lost: a call that failed may have stored or redriven some dead letters all the same. So
/// a dead letter may exist twice, but never disappears.
#[async_trait]
pub trait DeadLetters: Send + Sync {
    /// Stores a message with the reason, and acknowledges it. With `part`, stores only that part of it, and
    /// the message stays as it is: in flight, and not acknowledged.
    async fn store(&self, message: &Message, part: Option<&Job>, cause: &DeadLetterCause) -> Result<()>;

    /// Changes in the dead-letter queue. A queue that counts by messages takes each for one change.
    async fn count(&self) -> Result<u64>;

    /// At most `limit` letters in their order, from the first one behind the letter `after` on; none at the
    /// end. Takes nothing away. A queue that cannot be listed hides letters from others for a moment.
    async fn list(&self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>>;

    /// Puts letters back into the lanes that they came from, and returns the ids of those that were there.
    async fn redrive(&self, ids: &[String]) -> Result<Vec<String>>;

    /// Puts every letter back by a means of the queue's own, and returns how many. None if the queue has no
    /// such means: then nothing was done.
    async fn redrive_all(&self) -> Result<Option<u64>> {
        Ok(None)
    }
}

/// Why a change or a message is given up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeadLetterCause {
    /// The rule that dead-lettered the change or message.
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
    /// Every rule.
    pub const ALL: [Self; 4] = [Self::Undecodable, Self::Refused, Self::Failed, Self::Received];

    /// The rule's name in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Undecodable => "undecodable",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Received => "received",
        }
    }

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
    /// The rule that dead-lettered the message; none if another program put it there.
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
