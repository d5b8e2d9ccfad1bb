//! The outbox's contract: committed changes that have not reached the queue.

use async_trait::async_trait;

use super::change::{Job, Op};
use super::failure::Result;

/// A packed row of the outbox: up to 500 ids that one statement touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutboxRow {
    /// Sequence number; becomes the changes' version. Not the order of commits.
    pub seq: i64,
    /// What the statement did.
    pub op: Op,
    /// Row ids, as text.
    pub ids: Vec<String>,
    /// The transaction that captured it.
    pub xid: u64,
    /// When the statement ran, by the database's clock, in microseconds since the epoch.
    pub changed_at_us: i64,
    /// The number of changes of the same transaction in the outbox, this row's included. The count may stop once it
    /// exceeds [`ClaimRequest::large_transaction`].
    pub xid_changes: u64,
}

/// What to claim in one step.
#[derive(Clone, Copy, Debug)]
pub struct ClaimRequest {
    /// At most this many outbox rows that are small, of transactions not known to be large.
    pub small_rows: usize,
    /// At most this many rows of large statements, and if it is zero none of transactions that are known to
    /// be large.
    pub large_rows: usize,
    /// A transaction with more changes than this is large: its changes are counted this far, and once it is
    /// known its rows are stepped over by the claim of small ones.
    pub large_transaction: u64,
}

/// Turns claimed rows into messages. Pure: no effect, same rows same messages (a traced one says when it was made).
pub type BuildJobs<'a> = &'a (dyn Fn(Vec<OutboxRow>) -> Vec<Job> + Send + Sync);

/// What one transfer did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transferred {
    /// Outbox rows taken.
    pub rows: usize,
    /// Changes in them.
    pub changes: u64,
    /// Changes sent to the live lane, after packing.
    pub live: u64,
    /// Changes sent to the bulk lane, after packing.
    pub bulk: u64,
    /// Age of the oldest change taken, in milliseconds: capture lag.
    pub oldest_ms: u64,
}

/// Committed changes on their way to the queue. One relay owns it; another relay has one of its own, over the
/// same rows.
#[async_trait]
pub trait Outbox: Send {
    /// Claims rows (small ones first), packs them, sends them to the queue and deletes them. Skips rows that another
    /// relay holds. A crash at any point may send a change twice, but never loses a change. Sending may continue
    /// after this method has returned: then a later call returns the failure. A call that finds no row returns after
    /// everything has been sent.
    async fn transfer(&mut self, request: ClaimRequest, build_jobs: BuildJobs<'_>) -> Result<Transferred>;

    /// Returns when a change may have been committed, or after `timeout`. Arms the wake-up before it looks for rows,
    /// so that it does not miss a change that is committed meanwhile.
    async fn wait(&mut self, timeout: std::time::Duration);
}
