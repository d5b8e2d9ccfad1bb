//! The way of messages from the outbox to the queue.

use super::shipping::Shipping;
use crate::pipeline::change::{Job, Lane};
use crate::pipeline::outbox::Transferred;

/// How messages leave the database.
pub(super) enum Delivery {
    /// To the queues of pgmq with this prefix, in the transaction that claims the changes.
    Pgmq(String),
    /// To a queue outside of the database.
    Shipped(Box<Shipping>),
}

/// Counts the changes of each lane.
pub(super) fn count_lanes(jobs: &[Job], done: &mut Transferred) {
    for job in jobs {
        match job.lane {
            Lane::Live => done.live += job.changes() as u64,
            Lane::Bulk => done.bulk += job.changes() as u64,
        }
    }
}
