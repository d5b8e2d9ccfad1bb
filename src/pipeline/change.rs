//! A change, and the message that carries changes from the relay to the indexers.

use serde::{Deserialize, Serialize};

use super::trace::MessageTrace;

/// Version of the message body that this build writes and reads.
pub const JOB_VERSION: u32 = 1;

/// At most this many changes travel in one message: some 40 kB of JSON in the worst case (500
/// groups of one id each), well under the 64 KiB that SQS bills as one request.
pub const MAX_CHANGES_PER_JOB: usize = 500;

/// Which of the two queues a change travels on.
///
/// Live changes overtake bulk loads. Order between the lanes does not matter, since an indexer
/// reads the row itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lane {
    /// Edits that somebody waits for.
    Live,
    /// Loads, backfills, and whatever exceeds the live lane's bound.
    Bulk,
}

impl Lane {
    /// Both lanes, in order of preference.
    pub const ALL: [Self; 2] = [Self::Live, Self::Bulk];

    /// The lane's name as it stands in messages and settings.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Bulk => "bulk",
        }
    }
}

/// What a change did to its row when it was captured. A hint: the indexer acts on the row as it
/// finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// The row came or was changed.
    Upsert,
    /// The row went.
    Delete,
}

/// Changes of one version: ids that one captured statement touched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// The outbox row's sequence number: for lag and display, never for safety.
    pub version: i64,
    /// What the statement did.
    pub op: Op,
    /// Milliseconds from [`Job::oldest`] to this group's statement.
    #[serde(default)]
    pub after_ms: u64,
    /// Row ids, as text.
    pub ids: Vec<String>,
}

/// The body of a message: thin on purpose, so that there is no size limit to hit, no stale
/// payload, and nothing private in the queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// [`JOB_VERSION`].
    pub v: u32,
    /// The source (a settings name, not a table) whose rows changed.
    pub source: String,
    /// The lane that the relay chose.
    pub lane: Lane,
    /// When the oldest statement in here ran, by the database's clock.
    pub oldest: jiff::Timestamp,
    /// The trace that the message continues, if it is traced. Builds that do not know it ignore it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<MessageTrace>,
    /// The changes, by version.
    pub groups: Vec<Group>,
}

impl Job {
    /// How many changes the message carries.
    #[must_use]
    pub fn changes(&self) -> usize {
        self.groups.iter().map(|group| group.ids.len()).sum()
    }
}
