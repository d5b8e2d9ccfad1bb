//! Where the rows of a run are.

/// Where the rows are, and what went through so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Amounts {
    /// Rows of the load that are not written yet.
    pub(super) unwritten: f64,
    pub(super) outbox_bulk: f64,
    pub(super) outbox_live: f64,
    pub(super) queue_bulk: f64,
    pub(super) queue_live: f64,
    /// Edits that left the outbox.
    pub(super) relayed_edits: f64,
    /// Edits that went to the bulk lane, because the live lane was full.
    pub(super) spilled: f64,
    pub(super) done_bulk: f64,
    pub(super) done_live: f64,
}

impl Amounts {
    /// Changes that wait: in the outbox, in the queue, or in flight.
    pub(super) fn backlog(&self) -> f64 {
        self.outbox_bulk + self.outbox_live + self.queue_bulk + self.queue_live
    }
}
