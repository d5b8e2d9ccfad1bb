//! What is kept of the continuous proof: how far a round is, and where that stands.

use std::collections::HashSet;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::pipeline::failure::Result;

/// What the proof needs of the settings.
#[derive(Clone, Debug)]
pub struct ProofOptions {
    /// How long a round takes; none for no rounds.
    pub period: Option<Duration>,
    /// Whether every record is compared, of an index outside of the database too.
    pub full: bool,
    /// How long a difference must last until it is taken for a lost message.
    pub lost_after: Duration,
    /// Whether dead letters can be read without keeping them from others.
    pub read_letters: bool,
    /// Rows of a page.
    pub page: usize,
}

/// What is walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Walk {
    /// The index's ids.
    Records,
    /// The source's rows.
    Rows,
    /// The ledger's entries.
    Entries,
    /// Nothing any more: suspects are waited for.
    Done,
}

/// How far a round has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// When it began, by the database's clock.
    pub began_at: Timestamp,
    /// Whether every record is compared.
    pub full: bool,
    /// What is walked.
    pub walk: Walk,
    /// Where the walk is; none at its beginning.
    pub cursor: Option<String>,
    /// Rows seen.
    pub rows: u64,
    /// Records seen.
    pub records: u64,
    /// Entries seen.
    pub entries: u64,
    /// Ids that surely differed.
    pub differences: u64,
    /// Ids that were queued to be done again.
    pub mended: u64,
    /// Rows that could not be read.
    pub unreadable: u64,
    /// Ids that differ and are not settled yet.
    pub suspects: Vec<String>,
}

impl Round {
    /// A round that begins.
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

    /// Rows, records and entries seen.
    pub(super) fn seen(&self) -> u64 {
        self.rows + self.records + self.entries
    }
}

/// What is kept of the proof, as its holder finds it.
#[derive(Clone, Debug)]
pub struct SavedProgress {
    /// The database's clock.
    pub now: Timestamp,
    /// The round under way.
    pub round: Option<Round>,
    /// When the last round that ended began, and how many rows, records and entries it saw.
    pub last: Option<(Timestamp, u64)>,
}

/// Where rounds are kept, and who may prove.
#[async_trait]
pub trait RoundStore: Send + Sync {
    /// Takes the right to prove, or keeps it, for `lease`. None while another worker has it.
    async fn acquire(&self, lease: Duration) -> Result<Option<SavedProgress>>;

    /// Gives the right back.
    async fn release(&self) -> Result<()>;

    /// Keeps how far a round is. False if the right was lost, and then nothing is kept.
    async fn save(&self, round: &Round) -> Result<bool>;

    /// Keeps a round that has ended. False if the right was lost, and then nothing is kept.
    async fn end(&self, round: &Round) -> Result<bool>;

    /// Notes ids that the index listed in this round.
    async fn record_listed(&self, ids: &[String]) -> Result<()>;

    /// Those of the ids that the index listed in this round.
    async fn listed(&self, ids: &[String]) -> Result<HashSet<String>>;

    /// Forgets what was listed.
    async fn forget_listed(&self) -> Result<()>;
}
