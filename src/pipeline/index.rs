//! The vector index's contract.

use async_trait::async_trait;

use super::catalog::SourceRow;
use super::embedder::Embedding;
use super::failure::Result;

/// A match of a query.
#[derive(Clone, Debug, PartialEq)]
pub struct Match {
    /// The row's id.
    pub id: String,
    /// Cosine similarity to the query, from -1 to 1.
    pub score: f32,
}

/// What an id's record in the index must become.
#[derive(Clone, Debug)]
pub enum Desired {
    /// The record must hold this row with this vector; without a vector, the one that is there
    /// stays, as only metadata changed.
    Present {
        /// The row as it was peeked.
        row: SourceRow,
        /// The vector, unless only metadata changed.
        embedding: Option<Embedding>,
    },
    /// The row has no text, so there must be no record.
    Textless {
        /// The row as it was peeked.
        row: SourceRow,
    },
    /// The row is gone, so there must be no record.
    Absent,
}

/// One id's write, with what it rests on.
#[derive(Clone, Debug)]
pub struct Planned {
    /// The row's id.
    pub id: String,
    /// Epoch of the ledger's entry as peeked; none if there was no entry.
    pub epoch: Option<i64>,
    /// Version of the newest change that led here, for display.
    pub version: i64,
    /// What the record must become.
    pub desired: Desired,
}

/// What a fenced write did.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// Ids whose row or entry had changed since it was peeked: nothing was written for them.
    pub conflicted: Vec<String>,
    /// The database's clock when the write was about to commit, in microseconds since the epoch.
    pub clock_us: i64,
}

/// An index that shares a database with source and ledger, and so can write only if nothing changed.
#[async_trait]
pub trait FencedWrite: Send + Sync {
    /// In one transaction: lock the ids' ledger entries in id order, read their rows again, and
    /// where epoch and row are as planned write index and ledger. Ids must be distinct.
    async fn apply(&self, planned: &[Planned]) -> Result<Applied>;
}

/// A store of vectors that finds the nearest.
#[async_trait]
pub trait VectorIndex: Send + Sync {
    /// The `top` nearest records, best first.
    async fn query(&self, embedding: &[f32], top: usize) -> Result<Vec<Match>>;

    /// How many records there are.
    async fn count(&self) -> Result<u64>;

    /// The index's fenced write, if it can fence.
    fn fenced(&self) -> Option<&dyn FencedWrite>;

    /// Builds or drops search structures as the backlog asks for; called once in a while by one
    /// indexer at a time is enough, called by several is harmless.
    ///
    /// `backlog` is how many changes wait to be applied.
    async fn maintain(&self, backlog: u64) -> Result<()>;
}
