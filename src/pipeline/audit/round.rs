//! The progress of the continuous proof: how far a round is, and the store that keeps the progress.

use std::collections::HashSet;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::pipeline::failure::Result;

/// Options of the proof.
#[derive(Clone, Debug)]
pub struct ProofOptions {
    /// How long a round takes; `None` turns the proof off.
    pub period: Option<Duration>,
    /// Whether every record is fetched and compared, even if the index is outside of the database.
    pub full: bool,
    /// A difference that lasts at least this long counts as the result of a lost message.
    pub lost_after: Duration,
    /// Whether a read of the dead letters leaves them visible to other readers.
    pub read_letters: bool,
    /// The number of rows of a page.
    pub page: usize,
}

/// What a round reads, page by page, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Walk {
    /// The ids in the index.
    Records,
    /// The rows of the source.
    Rows,
    /// The entries of the ledger.
    Entries,
    /// Nothing is left to read. The round waits until each suspect is settled.
    Done,
}

/// How far a round has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// When the round began, by the database's clock.
    pub began_at: Timestamp,
    /// Whether every record is fetched and compared.
    pub full: bool,
    /// What the round reads now.
    pub walk: Walk,
    /// The last id, or the index's place, of the page before; `None` for the first page.
    pub cursor: Option<String>,
    /// The number of rows read.
    pub rows: u64,
    /// The number of records that the index listed.
    pub records: u64,
    /// The number of entries read.
    pub entries: u64,
    /// The number of ids that differed for certain.
    pub differences: u64,
    /// The number of ids that were queued again.
    pub mended: u64,
    /// The number of rows that could not be read.
    pub unreadable: u64,
    /// Ids that differ. A later look decides whether a message is on its way or was lost.
    pub suspects: Vec<String>,
}

impl Round {
    /// A round at its beginning.
    pub(super) fn new(began_at: Timestamp, full: bool) -> Self {
        Self {
            began_at,
            full,
            walk: Walk::Records,
            cursor: None,
            rows: 0,
            records: 0,
            entries: 0,
            differences: 0,
            mended: 0,
            unreadable: 0,
            suspects: Vec::new(),
        }
    }

    /// The number of rows, records and entries read.
    pub(super) fn seen(&self) -> u64 {
        self.rows + self.records + self.entries
    }
}

/// The saved progress, as a worker finds it when the worker takes the right to prove.
#[derive(Clone, Debug)]
pub struct SavedProgress {
    /// The time now, by the database's clock.
    pub now: Timestamp,
    /// The round that is under way; `None` if there is none.
    pub round: Option<Round>,
    /// Of the last round that ended: when it began, and the number of rows, records and entries that it read.
    pub last: Option<(Timestamp, u64)>,
}

/// Keeps the progress of rounds, and gives one worker at a time the right to prove.
#[async_trait]
pub trait RoundStore: Send + Sync {
    /// Takes or extends the right to prove, for `lease`. `None` if another worker has the right.
    async fn acquire(&self, lease: Duration) -> Result<Option<SavedProgress>>;

    /// Gives the right to prove back.
    async fn release(&self) -> Result<()>;

    /// Saves the progress of a round. Returns false, and saves nothing, if this worker lost the right to prove.
    async fn save(&self, round: &Round) -> Result<bool>;

    /// Records the end of a round. Returns false, and records nothing, if this worker lost the right to prove.
    async fn end(&self, round: &Round) -> Result<bool>;

    /// Records ids that the index listed in this round.
    async fn record_listed(&self, ids: &[String]) -> Result<()>;

    /// Returns those of `ids` that the index listed in this round.
    async fn listed(&self, ids: &[String]) -> Result<HashSet<String>>;

    /// Deletes the recorded ids.
    async fn forget_listed(&self) -> Result<()>;
}
