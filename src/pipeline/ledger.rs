//! The ledger's contract: what the index is known to hold, row by row.

use async_trait::async_trait;

use super::catalog::{Hash, SourceRow};
use super::failure::Result;

/// What the ledger says of an id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Attempts under way that name the id.
    pub open: i32,
    /// Grows with every attempt and every fenced write.
    pub epoch: i64,
    /// Whether the index may differ from the hashes.
    pub dirty: bool,
    /// Content hash of what the index holds, if it is known.
    pub content_hash: Option<Hash>,
    /// Metadata hash of what the index holds, if it is known.
    pub metadata_hash: Option<Hash>,
    /// Whether the index is known to hold nothing because the row was gone.
    pub deleted: bool,
}

impl Entry {
    /// Whether nothing is to be done for the id, seeing this row.
    ///
    /// Holds only if no attempt is open, the entry is clean, and what it says equals the row.
    #[must_use]
    pub fn matches(&self, row: Option<&SourceRow>) -> bool {
        if self.open != 0 || self.dirty {
            return false;
        }
        match row {
            None => self.deleted,
            Some(row) => {
                !self.deleted
                    && self.content_hash == Some(row.content_hash)
                    && self.metadata_hash == Some(row.metadata_hash)
            }
        }
    }
}

/// One id, seen in source and ledger in one snapshot.
#[derive(Clone, Debug)]
pub struct Peeked {
    /// The row's id.
    pub id: String,
    /// The row, unless it is gone.
    pub row: Option<SourceRow>,
    /// The ledger's entry, unless the id has never been worked on.
    pub entry: Option<Entry>,
}

/// Reads source and ledger together.
#[async_trait]
pub trait Ledger: Send + Sync {
    /// Row and entry of each id, in one snapshot of the primary. The answer has the ids in the
    /// order asked; an id that the source's key type can't hold has neither row nor entry.
    async fn peek(&self, ids: &[String]) -> Result<Vec<Peeked>>;
}
