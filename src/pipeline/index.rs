//! The vector index's contract.

use std::time::Duration;

use async_trait::async_trait;

use super::change::Lane;
use super::embedder::Embedding;
use super::failure::Result;
use super::source_row::{Hash, SourceRow};
use super::unchanged::{Known, Need, needed};

/// A match of a query.
#[derive(Clone, Debug, PartialEq)]
pub struct Match {
    /// The row's id.
    pub id: String,
    /// Cosine similarity to the query, from -1 to 1.
    pub score: f32,
}

/// The desired record of an id in the index.
#[derive(Clone, Debug)]
pub enum Desired {
    /// The record must hold this row with this vector. Without a vector, the record keeps its vector, because
    /// only metadata changed.
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

impl Desired {
    /// The peeked row, unless the row is gone.
    #[must_use]
    pub fn row(&self) -> Option<&SourceRow> {
        match self {
            Self::Present { row, .. } | Self::Textless { row } => Some(row),
            Self::Absent => None,
        }
    }
}

/// One id's write, with the entry and row on which it is based.
#[derive(Clone, Debug)]
pub struct Planned {
    /// The row's id.
    pub id: String,
    /// Revision of the ledger's entry as peeked; none if there was no entry.
    pub revision: Option<i64>,
    /// Version of the newest change of the id, for display.
    pub version: i64,
    /// The desired record.
    pub desired: Desired,
}

impl Planned {
    /// Whether the entry's revision (none if there is no entry) and the row, read with the entry locked, are
    /// still as planned.
    #[must_use]
    pub fn still_holds(&self, revision: Option<i64>, row: Option<&SourceRow>) -> bool {
        // An entry that did not exist has just been created, at revision 0.
        revision == Some(self.revision.unwrap_or(0))
            && needed(row, Known::written(self.desired.row())) == Need::Nothing
    }
}

/// The result of a transactional write.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// Ids whose row or entry had changed since it was peeked: nothing was written for them.
    pub conflicted: Vec<String>,
    /// The database's clock when the write was about to commit, in microseconds since the revision.
    pub clock_us: i64,
}

/// An index that shares a database with source and ledger, and so can write only if nothing changed.
#[async_trait]
pub trait TransactionalWrite: Send + Sync {
    /// In one transaction: lock the ids' ledger entries in id order, making those that are not there, read
    /// their rows again, and where
    /// [`Entry::settle_transactional`](super::ledger::Entry::settle_transactional) settles the entry write it
    /// and the index. Ids must be distinct.
    async fn apply(&self, planned: &[Planned]) -> Result<Applied>;
}

/// A record for an index without a shared transaction. Always written whole.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its vector.
    pub embedding: Embedding,
    /// The row: id, hashes and metadata.
    pub row: SourceRow,
    /// Version of the newest change that led here, for display.
    pub version: i64,
}

/// A record as an index holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// The row's id.
    pub id: String,
    /// The content hash that was written with the vector.
    pub content_hash: Option<Hash>,
    /// The metadata hash that was written with the metadata, where metadata is kept.
    pub metadata_hash: Option<Hash>,
    /// The vector.
    pub embedding: Embedding,
}

impl Stored {
    /// What is known by the record's own hashes.
    #[must_use]
    pub fn known(&self) -> Known {
        Known::Hashes { content: self.content_hash, metadata: self.metadata_hash }
    }
}

/// A page of the ids that an index holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// Ids, at most as many as asked for.
    pub ids: Vec<String>,
    /// Where to go on; none at the end.
    pub next: Option<String>,
}

/// An index that applies a request whenever the request arrives.
///
/// An error that [is doubtful](super::failure::Error::is_doubtful) may have been applied, or be applied
/// within the settling time; any other has done nothing and never will.
#[async_trait]
pub trait ExternalWrite: Send + Sync {
    /// Replaces records whole, in one request.
    async fn upsert(&self, records: &[Record]) -> Result<()>;

    /// Deletes records, in one request. A missing record is no error.
    async fn delete(&self, ids: &[String]) -> Result<()>;

    /// How many of the first records fit into one request; at least one.
    fn fits(&self, records: &[Record]) -> usize;

    /// How many ids fit into one delete.
    fn max_deletes(&self) -> usize;

    /// The timeout of a request.
    fn request_timeout(&self) -> Duration;

    /// Whether a record can be written among the others: writes a harmless one, and takes it out again. A
    /// query may find it in between, so that this is only asked before a refusal that would concern
    /// everything is blamed on one record.
    async fn probe_record(&self) -> Result<()>;
}

/// How an index is written to.
pub enum Writes<'a> {
    /// Only if nothing changed.
    Transactional(&'a dyn TransactionalWrite),
    /// Whenever the request arrives. This is why attempts exist.
    External(&'a dyn ExternalWrite),
}

/// A store of vectors that finds the nearest ones.
#[async_trait]
pub trait VectorIndex: Send + Sync {
    /// Returns when the index may be asked: at once, unless it asked to be left alone for a while. What comes
    /// sooner may fail, since a request that waits counts the waiting into the time that it may take.
    async fn ready(&self) {}

    /// The `top` nearest records, best first.
    async fn query(&self, embedding: &[f32], top: usize) -> Result<Vec<Match>>;

    /// How many records there are.
    async fn count(&self) -> Result<u64>;

    /// Ids that the index holds, page by page; none twice.
    async fn list(&self, cursor: Option<&str>, limit: usize) -> Result<Listing>;

    /// The records of these ids, as far as there are any, in any order.
    async fn fetch(&self, ids: &[String]) -> Result<Vec<Stored>>;

    /// How this index is written to.
    fn writes(&self) -> Writes<'_>;

    /// Builds or drops search structures as the backlog asks for; called once in a while by one
    /// indexer at a time is enough, called by several is harmless.
    ///
    /// `backlog` is how many changes wait to be applied. Returns whether something was done, so that something
    /// else may be due.
    async fn maintain(&self, backlog: u64) -> Result<bool>;

    /// Whether the index can be written to just now: writes in a way that changes nothing that can be
    /// seen, so that a change that fails can be told from an outage.
    async fn check_writable(&self) -> Result<()>;

    /// How far queries are behind writes; none if they find what was written at once.
    fn freshness(&self) -> Option<&dyn IndexFreshness> {
        None
    }

    /// The store of the ownership record; none if the index shares the database and cannot be ahead of it.
    fn ownership_store(&self) -> Option<&dyn OwnershipStore>;
}

/// An index whose queries find a write some time after it was answered, and that tells how far they are.
///
/// Marks grow in the order in which queries find the writes.
#[async_trait]
pub trait IndexFreshness: Send + Sync {
    /// The newest mark of this process's writes; 0 if the index gives none.
    fn last_written(&self) -> u64;

    /// The mark up to which a query finds what was written. Asks the index.
    async fn searchable_up_to(&self) -> Result<u64>;
}

/// Whose turn it is to learn when queries find what was written. Each question to the index is paid for, so a
/// fleet asks about few writes.
#[async_trait]
pub trait FreshnessTurns: Send + Sync {
    /// Takes the turn to follow what was just written in a lane. False if a worker of the fleet took it a
    /// short time ago.
    async fn take(&self, lane: Lane) -> Result<bool>;
}

/// The ownership record: a note beside the records of an index that names the database it belongs to.
#[async_trait]
pub trait OwnershipStore: Send + Sync {
    /// The ownership record, if there is one.
    async fn record(&self) -> Result<Option<String>>;

    /// Replaces the ownership record.
    async fn set_record(&self, record: &str) -> Result<()>;
}
