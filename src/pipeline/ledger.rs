//! The ledger's contract: what the index is known to hold, row by row, and which worker is writing.
//!
//! An index that shares a transaction with the ledger needs the entries only. Any other index is written to
//! under *attempts* (tracked writes), and safety rests on two rules: rows are read after the attempt that
//! will write them was opened, and attempts that overlap on an id notice it. The rules are the pure functions
//! on [`Entry`]. A backend locks the entries, applies the functions, and commits.
//!
//! Invariants, between transactions:
//!
//! - `open` is the number of attempts that name the id;
//! - `open == 0 && !dirty`: the index equals the hashes;
//! - `open == 0 && dirty`: an outbox row, an unacknowledged message or a dead letter for the id exists;
//! - a dirty entry has a content hash only after the database went back to an earlier state. The index may be
//!   ahead of the entry, but a record in the index that carries this hash has the vector of this text.

use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;

use super::failure::Result;
use super::index::Planned;
use super::source_row::{Hash, SourceRow};
use super::unchanged::{Known, Need, needed};

/// The ledger's entry for an id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Attempts under way that name the id.
    pub open: i32,
    /// Grows with every attempt and every transactional write.
    pub revision: i64,
    /// Whether the index may differ from the hashes.
    pub dirty: bool,
    /// Content hash of what the index holds, if it is known.
    pub content_hash: Option<Hash>,
    /// Metadata hash of what the index holds, if it is known.
    pub metadata_hash: Option<Hash>,
    /// Whether the index is known to hold nothing because the row was gone.
    pub deleted: bool,
    /// Whether the id's change is in the dead-letter queue, so that a sweep need not queue it.
    pub parked: bool,
}

impl Default for Entry {
    /// An entry without any knowledge.
    fn default() -> Self {
        Self {
            open: 0,
            revision: 0,
            dirty: true,
            content_hash: None,
            metadata_hash: None,
            deleted: false,
            parked: false,
        }
    }
}

/// An id of an attempt, as it was when the attempt was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// The row's id.
    pub id: String,
    /// The entry's revision with this opening counted.
    pub revision: i64,
    /// Whether another attempt was open.
    pub shared: bool,
    /// Whether the entry was dirty.
    pub dirty: bool,
    /// What the index was known to hold.
    pub content_hash: Option<Hash>,
}

impl Opened {
    /// What is known of the index's record: only the text's hash, because the record is written whole.
    #[must_use]
    pub fn known(&self) -> Known {
        if self.shared {
            return Known::Unknown;
        }
        Known::Hashes { content: self.content_hash, metadata: None }
    }
}

/// The outcome of an attempt for an id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The index holds this.
    Settled {
        /// Content hash of the row, unless it is gone.
        content_hash: Option<Hash>,
        /// Metadata hash of the row, unless it is gone.
        metadata_hash: Option<Hash>,
        /// Whether the row is gone.
        deleted: bool,
        /// Version of the newest change that led here, for display.
        version: i64,
    },
    /// A write was sent, and it is unknown whether or when it is applied.
    Doubtful,
    /// No write was sent.
    Unwritten,
}

/// How an entry left an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseResult {
    /// Clean: the index equals the hashes.
    Settled,
    /// Stays open until it is swept.
    Open,
    /// As before the attempt, which wrote nothing and did not overlap.
    Unchanged,
    /// Dirty; the last attempt on the id to be closed or swept will queue it.
    Dirty,
    /// Dirty, and no other attempt will queue it: the id must go back into the outbox.
    Requeue,
}

impl Entry {
    /// Whether nothing is to be done for the id, given its row.
    ///
    /// Holds only if no attempt is open, the entry is clean, and what it says equals the row.
    #[must_use]
    pub fn matches(&self, row: Option<&SourceRow>) -> bool {
        needed(row, self.known()) == Need::Nothing
    }

    /// What is known of the index's record: nothing while an attempt is open or the entry is dirty.
    #[must_use]
    pub fn known(&self) -> Known {
        if self.open != 0 || self.dirty {
            Known::Unknown
        } else if self.deleted {
            Known::Deleted
        } else {
            Known::Hashes { content: self.content_hash, metadata: self.metadata_hash }
        }
    }

    /// Opens the entry for one more attempt.
    pub fn open(&mut self, id: &str) -> Opened {
        let shared = self.open > 0;
        self.open += 1;
        self.revision += 1;
        self.parked = false;
        Opened {
            id: id.into(),
            revision: self.revision,
            shared,
            dirty: self.dirty,
            content_hash: self.content_hash.filter(|_| !self.deleted),
        }
    }

    /// Closes the entry for an attempt that still stands.
    ///
    /// An attempt that overlapped with another one cannot know which write came last. Then nothing is known
    /// of the index, and the last attempt to be closed puts the id back into the outbox.
    pub fn close(&mut self, opened: &Opened, outcome: &Outcome) -> CloseResult {
        match outcome {
            Outcome::Doubtful => CloseResult::Open,
            Outcome::Settled { content_hash, metadata_hash, deleted, .. }
                if self.revision == opened.revision && !opened.shared =>
            {
                self.open -= 1;
                self.dirty = false;
                self.content_hash = *content_hash;
                self.metadata_hash = *metadata_hash;
                self.deleted = *deleted;
                CloseResult::Settled
            }
            Outcome::Settled { .. } => {
                // A change that was written is no dead letter.
                self.parked = false;
                self.sweep()
            }
            // Nothing was written: the entry is as before, and its outbox row, message or dead letter still
            // exists.
            Outcome::Unwritten if self.revision == opened.revision && !opened.shared => {
                self.open -= 1;
                CloseResult::Unchanged
            }
            // Other attempts may have left the id to the last attempt to be closed, which may be this one.
            // This worker still holds a message with the id, but a copy of the message may have been
            // acknowledged.
            Outcome::Unwritten => self.sweep(),
        }
    }

    /// Settles the entry for a transactional write, if entry and row are still as planned. The write's
    /// transaction has locked the entry, and read the row after that. Returns false if entry or row has
    /// changed: then the entry stays as it was, and nothing may be written.
    pub fn settle_transactional(&mut self, plan: &Planned, row: Option<&SourceRow>) -> bool {
        if !plan.still_holds(Some(self.revision), row) {
            return false;
        }
        let row = plan.desired.row();
        self.revision += 1;
        self.dirty = false;
        self.content_hash = row.map(|row| row.content_hash);
        self.metadata_hash = row.map(|row| row.metadata_hash);
        self.deleted = row.is_none();
        self.parked = false;
        true
    }

    /// Removes an attempt with an unknown result (overlapped or swept) from the entry.
    pub fn sweep(&mut self) -> CloseResult {
        self.open = (self.open - 1).max(0);
        self.forget();
        if self.open == 0 && !self.parked { CloseResult::Requeue } else { CloseResult::Dirty }
    }

    /// Adds an attempt again that was swept while its worker lived and wrote. The attempt is abandoned, and
    /// is swept again once its writes have certainly been applied.
    pub fn reopen(&mut self) {
        self.open += 1;
        self.revision += 1;
        self.forget();
    }

    /// Marks the entry as dirty, so that the id is done again and attempts under way notice the change.
    pub fn invalidate(&mut self) {
        self.revision += 1;
        self.parked = false;
        self.forget();
    }

    /// Records that the id's change is in the dead-letter queue. Otherwise a change whose every write is
    /// doubtful, because the server fails, would be swept, queued and dead-lettered again and again.
    pub fn park(&mut self) {
        self.parked = true;
    }

    fn forget(&mut self) {
        self.dirty = true;
        self.content_hash = None;
        self.metadata_hash = None;
        self.deleted = false;
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

impl Peeked {
    /// The work that is left until the index holds the row.
    #[must_use]
    pub fn need(&self) -> Need {
        needed(self.row.as_ref(), self.entry.as_ref().map_or(Known::Never, Entry::known))
    }

    /// Whether the row has a text whose vector the index holds.
    #[must_use]
    pub fn keeps_vector(&self) -> bool {
        self.row.as_ref().is_some_and(SourceRow::has_text) && self.need().keeps_vector()
    }

    /// Whether nothing is to be done.
    #[must_use]
    pub fn is_in_sync(&self) -> bool {
        self.need() == Need::Nothing
    }
}

/// The result of closing an attempt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Closed {
    /// Ids whose entry is clean.
    pub settled: Vec<String>,
    /// Ids on which another attempt overlapped: they are done again.
    pub overlapped: u64,
    /// Ids that are swept and done again once the settling time has passed.
    pub abandoned: u64,
    /// The database's clock when this was about to commit, in microseconds since the epoch.
    pub clock_us: i64,
}

/// The result of a sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Attempts of dead workers that were found.
    pub abandoned: u64,
    /// Attempts removed.
    pub writes: u64,
    /// Ids put back into the outbox.
    pub requeued: u64,
}

/// The state of the outbox at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// The database's clock.
    pub now: Timestamp,
    /// When the oldest change that is not in the queue yet was made.
    pub oldest: Option<Timestamp>,
    /// Whether a backfill still has to put rows of the table into the outbox.
    pub rereads: bool,
}

/// Source and ledger of one target, read and written together.
#[async_trait]
pub trait Ledger: Send + Sync {
    /// Row and entry of each id, in one snapshot of the primary. The answer has the ids in the
    /// order asked; an id that the source's key type can't hold has no row.
    async fn peek(&self, ids: &[String]) -> Result<Vec<Peeked>>;

    /// How many of the first ids have rows that together take at most so many bytes to read; at least one
    /// if there is any. Rows may change before they are read.
    async fn fits(&self, ids: &[String], bytes: u64) -> Result<usize> {
        let _ = bytes;
        Ok(ids.len())
    }

    /// The next rows of the source by its own order, with their entries, after a row's id; all that
    /// is left when fewer than `limit`.
    async fn rows_after(&self, id: Option<&str>, limit: usize) -> Result<Vec<Peeked>>;

    /// The ids of the rows that [`Self::rows_after`] gives, without reading them: it fails when one of them
    /// cannot be read.
    async fn ids_after(&self, id: Option<&str>, limit: usize) -> Result<Vec<String>> {
        Ok(self.rows_after(id, limit).await?.into_iter().map(|row| row.id).collect())
    }

    /// Ids of the next entries by some order that stays, after one of them; all that is left when fewer
    /// than `limit`. The default has no entries.
    async fn entries_after(&self, _id: Option<&str>, _limit: usize) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Opens an attempt: one transaction that calls [`Entry::open`] on each id, in id order, and
    /// records the attempt under the name that the worker chose. Ids must be distinct; the answer
    /// has them in the order asked. After an error the attempt may exist all the same:
    /// [`Self::abandon_orphans`] marks it as abandoned.
    async fn open(&self, write_id: &str, worker: &str, ids: &[String]) -> Result<Vec<Opened>>;

    /// Closes an attempt: one transaction that calls [`Entry::close`] on each id, puts what must be
    /// done again into the outbox, and keeps the attempt, as abandoned, for what is doubtful. If the
    /// attempt was swept meanwhile, what it wrote is put back as abandoned. May be repeated after an
    /// error: of an attempt that stands, ids that it does not name any more are left alone, because
    /// their entries were closed by the call that was told as failed.
    async fn close(&self, write_id: &str, worker: &str, closing: &[(Opened, Outcome)]) -> Result<Closed>;

    /// Marks a worker's attempts as abandoned, except its open ones.
    async fn abandon_orphans(&self, worker: &str, open_writes: &[String]) -> Result<u64>;

    /// Marks the attempts of dead workers as abandoned, and takes away (as [`Entry::sweep`] says)
    /// those that have been abandoned for `settle`, at most `limit` of them.
    async fn sweep(&self, settle: Duration, limit: usize) -> Result<Swept>;

    /// Marks ids as dirty ([`Entry::invalidate`]) and puts them into the outbox.
    async fn requeue(&self, ids: &[String]) -> Result<()>;

    /// The oldest change that has not reached the queue.
    async fn pending(&self) -> Result<Pending>;

    /// How many changes have not reached the queue. A large number need not be exact. The default is none.
    async fn waiting(&self) -> Result<u64> {
        Ok(0)
    }

    /// Tidies what the ledger keeps beside its entries. Called by each worker once a second; cheap if there is
    /// nothing to do.
    async fn tidy(&self) -> Result<()> {
        Ok(())
    }

    /// Adds to the count of a change's tries and returns it; zero is the least. A write that settles
    /// the entry sets it to zero.
    async fn count_try(&self, id: &str, by: i32) -> Result<u32>;

    /// Records that a change was dead-lettered ([`Entry::park`]), and forgets its tries.
    async fn park(&self, id: &str) -> Result<()>;
}
