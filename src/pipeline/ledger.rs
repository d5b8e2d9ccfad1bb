//! The ledger's contract: what the index is known to hold, row by row, and who is writing.
//!
//! An index that can fence needs the entries only. One that can't is written to under *attempts*,
//! and safety rests on two things: rows are read after the attempt that will write them was opened,
//! and attempts that overlap on an id notice it. The rules are the pure functions on [`Entry`] here;
//! a backend locks the entries, applies them, and commits.
//!
//! Invariants, between transactions:
//!
//! - `open` is the number of attempts that name the id;
//! - `open == 0 && !dirty`: the index equals the hashes;
//! - `open == 0 && dirty`: an outbox row, an unacknowledged job or a dead letter for the id exists;
//! - a dirty entry has a content hash only after the database went back: the index may be ahead of it, but a
//!   record in it that carries this hash carries its vector.

use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;

use super::failure::Result;
use super::index::Planned;
use super::source_row::{Hash, SourceRow};
use super::unchanged::{Known, Need, needed};

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
    /// Whether the id's change stands in the dead letters, so that sweeping need not queue it.
    pub parked: bool,
}

impl Default for Entry {
    /// An entry of which nothing is known.
    fn default() -> Self {
        Self {
            open: 0,
            epoch: 0,
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
    /// The entry's epoch with this opening counted.
    pub epoch: i64,
    /// Whether another attempt was open.
    pub shared: bool,
    /// Whether the entry was dirty.
    pub dirty: bool,
    /// What the index was known to hold.
    pub content_hash: Option<Hash>,
}

impl Opened {
    /// What is known of the index's record. Only that of the text: the record is written whole.
    #[must_use]
    pub fn known(&self) -> Known {
        if self.shared {
            return Known::Unknown;
        }
        Known::Hashes { content: self.content_hash, metadata: None }
    }
}

/// What became of an id in an attempt.
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
    /// A write was sent, and nobody knows whether or when it is applied.
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
    /// As it was before the attempt, which wrote nothing and was alone.
    Unchanged,
    /// Dirty, and the last to close or sweep it will see to it.
    Dirty,
    /// Dirty, and nobody else will see to it: the id must go back into the outbox.
    Requeue,
}

impl Entry {
    /// Whether nothing is to be done for the id, seeing this row.
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
        self.epoch += 1;
        self.parked = false;
        Opened {
            id: id.into(),
            epoch: self.epoch,
            shared,
            dirty: self.dirty,
            content_hash: self.content_hash.filter(|_| !self.deleted),
        }
    }

    /// Closes the entry for an attempt that still stands.
    ///
    /// An attempt that was not alone, from its opening to here, cannot know whose write came last:
    /// then nothing is known of the index, and the last to close sees that the id is done again.
    pub fn close(&mut self, opened: &Opened, outcome: &Outcome) -> CloseResult {
        match outcome {
            Outcome::Doubtful => CloseResult::Open,
            Outcome::Settled { content_hash, metadata_hash, deleted, .. }
                if self.epoch == opened.epoch && !opened.shared =>
            {
                self.open -= 1;
                self.dirty = false;
                self.content_hash = *content_hash;
                self.metadata_hash = *metadata_hash;
                self.deleted = *deleted;
                CloseResult::Settled
            }
            Outcome::Settled { .. } => {
                // Who got this far is no dead letter.
                self.parked = false;
                self.sweep()
            }
            // Nobody wrote anything: the entry is what it was, and so is whoever was to see to it.
            Outcome::Unwritten if self.epoch == opened.epoch && !opened.shared => {
                self.open -= 1;
                CloseResult::Unchanged
            }
            // The others may have left the id to the last to close, which may be this one; that it
            // still holds a message with the id is no comfort, for a copy may have been acknowledged.
            Outcome::Unwritten => self.sweep(),
        }
    }

    /// Settles the entry for a fenced write, if that still rests on what is there: the entry, which the
    /// write's transaction has locked, and the row, which it has read after that. Returns whether it does; if
    /// not, the entry is as it was, and nothing may be written.
    pub fn settle_transactional(&mut self, plan: &Planned, row: Option<&SourceRow>) -> bool {
        if !plan.still_holds(Some(self.epoch), row) {
            return false;
        }
        let row = plan.desired.row();
        self.epoch += 1;
        self.dirty = false;
        self.content_hash = row.map(|row| row.content_hash);
        self.metadata_hash = row.map(|row| row.metadata_hash);
        self.deleted = row.is_none();
        self.parked = false;
        true
    }

    /// Takes an attempt off the entry of which nothing is known, overlapped or swept.
    pub fn sweep(&mut self) -> CloseResult {
        self.open = (self.open - 1).max(0);
        self.forget();
        if self.open == 0 && !self.parked { CloseResult::Requeue } else { CloseResult::Dirty }
    }

    /// Puts an attempt back that was swept while its worker lived and wrote: as abandoned, to be
    /// swept again once what it wrote has surely been applied.
    pub fn reopen(&mut self) {
        self.open += 1;
        self.epoch += 1;
        self.forget();
    }

    /// Marks the entry as not to be trusted, so that the id is done anew and attempts under way
    /// notice.
    pub fn invalidate(&mut self) {
        self.epoch += 1;
        self.parked = false;
        self.forget();
    }

    /// Notes that the id's change stands in the dead letters. Without this a change that fails in
    /// doubt, by a server's own error each time, would be swept, queued and given up for ever.
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
    /// What is to be done so that the index holds the row.
    #[must_use]
    pub fn need(&self) -> Need {
        needed(self.row.as_ref(), self.entry.as_ref().map_or(Known::Never, Entry::known))
    }

    /// Whether nothing is to be done.
    #[must_use]
    pub fn is_in_sync(&self) -> bool {
        self.need() == Need::Nothing
    }
}

/// What closing an attempt did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Closed {
    /// Ids whose entry is clean.
    pub settled: Vec<String>,
    /// Ids that other attempts overlapped with: they are done again.
    pub overlapped: u64,
    /// Ids that are swept and done again once the settling time has passed.
    pub abandoned: u64,
    /// The database's clock when this was about to commit, in microseconds since the epoch.
    pub clock_us: i64,
}

/// What a sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Attempts found without a living worker.
    pub abandoned: u64,
    /// Attempts taken away.
    pub writes: u64,
    /// Ids put back into the outbox.
    pub requeued: u64,
}

/// What the outbox holds, seen at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// The database's clock.
    pub now: Timestamp,
    /// When the oldest change that is not in the queue yet was made.
    pub oldest: Option<Timestamp>,
    /// Whether rows of the table are still to be put into the outbox, since it is read anew.
    pub rereads: bool,
}

/// Source and ledger of one target, read and written together.
#[async_trait]
pub trait Ledger: Send + Sync {
    /// Row and entry of each id, in one snapshot of the primary. The answer has the ids in the
    /// order asked; an id that the source's key type can't hold has no row.
    async fn peek(&self, ids: &[String]) -> Result<Vec<Peeked>>;

    /// How many of the first ids have rows that together take at most so many bytes to read; at least one
    /// of several. Rows may change before they are read.
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
    /// than `limit`. A ledger that says nothing of its entries has none to show.
    async fn entries_after(&self, _id: Option<&str>, _limit: usize) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Opens an attempt: one transaction that calls [`Entry::open`] on each id, in id order, and
    /// records the attempt under the name that the worker chose. Ids must be distinct; the answer
    /// has them in the order asked. After an error the attempt may stand all the same:
    /// [`Self::abandon_orphans`] sees to it.
    async fn open(&self, write_id: &str, worker: &str, ids: &[String]) -> Result<Vec<Opened>>;

    /// Closes an attempt: one transaction that calls [`Entry::close`] on each id, puts what must be
    /// done again into the outbox, and keeps the attempt, as abandoned, for what is doubtful. If the
    /// attempt was swept meanwhile, what it wrote is put back as abandoned. May be repeated after an
    /// error: of an attempt that stands, ids that it does not name any more are left alone, because
    /// their entries were closed by the call that was told as failed.
    async fn close(&self, write_id: &str, worker: &str, closing: &[(Opened, Outcome)]) -> Result<Closed>;

    /// Marks as abandoned what stands under a worker's name and is none of its attempts in hand.
    async fn abandon_orphans(&self, worker: &str, open_writes: &[String]) -> Result<u64>;

    /// Marks the attempts of dead workers as abandoned, and takes away (as [`Entry::sweep`] says)
    /// those that have been abandoned for `settle`, at most `limit` of them.
    async fn sweep(&self, settle: Duration, limit: usize) -> Result<Swept>;

    /// Puts ids into the outbox as not to be trusted: see [`Entry::invalidate`].
    async fn requeue(&self, ids: &[String]) -> Result<()>;

    /// The oldest change that has not reached the queue.
    async fn pending(&self) -> Result<Pending>;

    /// How many changes have not reached the queue; what is far more than a few need not be counted. A ledger
    /// that says nothing of them has none.
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

    /// Notes that a change was given up, as [`Entry::park`] says, and forgets its tries.
    async fn park(&self, id: &str) -> Result<()>;
}
