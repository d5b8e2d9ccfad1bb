//! A change, and the message that carries changes from the relay to the indexers.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Version of the message body that this build writes and reads.
pub const JOB_VERSION: u32 = 1;

/// The most changes of one message. In the worst case (500 groups of one id each) the message has about
/// 40 kB of JSON. SQS bills up to 64 KiB as one request.
pub const MAX_CHANGES_PER_JOB: usize = 500;

/// The queue that carries a change: one of two.
///
/// Live changes overtake bulk loads. The order of the lanes does not matter, because an indexer reads the row
/// itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lane {
    /// For edits, because a person waits for the result.
    Live,
    /// For loads, backfills, and changes for which the live lane has no room.
    Bulk,
}

impl Lane {
    /// Both lanes, in order of preference.
    pub const ALL: [Self; 2] = [Self::Live, Self::Bulk];

    /// The lane's name in messages and settings.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Bulk => "bulk",
        }
    }
}

/// What a statement did to a row. This is a hint: the indexer reads the row, and acts on what it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// The statement inserted or updated the row.
    Upsert,
    /// The statement deleted the row.
    Delete,
}

/// The changes of one version: ids of rows that one captured statement changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// The sequence number of the outbox row. It serves for lag and display; correctness does not depend on it.
    pub version: i64,
    /// What the statement did.
    pub op: Op,
    /// Milliseconds from [`Job::oldest`] to this group's statement.
    #[serde(default)]
    pub after_ms: u64,
    /// Row ids, as text.
    pub ids: Vec<String>,
}

/// The trace of a message, as it travels. A worker that does not know it ignores it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageTrace {
    /// A [`TraceContext`](super::trace::TraceContext). Kept as it came: a context that cannot be read is ignored.
    pub parent: String,
    /// When the message was packed, by the relay's clock.
    pub packed: Timestamp,
}

/// The body of a message. It holds ids and no texts: so no message exceeds a size limit, no message holds an
/// old text, and the queue holds nothing private.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// The version of this format, [`JOB_VERSION`].
    pub v: u32,
    /// The source (a settings name, not a table) whose rows changed.
    pub source: String,
    /// The lane that the relay chose.
    pub lane: Lane,
    /// When the oldest statement of the message ran, by the database's clock.
    pub oldest: Timestamp,
    /// The trace that the message continues, if it is traced. Builds that do not know it ignore it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<MessageTrace>,
    /// The changes, by version.
    pub groups: Vec<Group>,
}

impl Job {
    /// The number of changes in the message.
    #[must_use]
    pub fn changes(&self) -> usize {
        self.groups.iter().map(|group| group.ids.len()).sum()
    }
}
