//! The job queue's contract.

use std::time::Duration;

use async_trait::async_trait;
use serde::Serialize;

use super::change::{Job, Lane};
use super::failure::Result;

/// A message taken from the queue, invisible to others until its visibility timeout ends.
#[derive(Clone, Debug)]
pub struct Message {
    /// The queue's name for the message, for logs and dead letters.
    pub id: String,
    /// What acknowledges, extends or releases this receipt of the message.
    pub receipt: Receipt,
    /// How often the message has been received, this time included.
    pub receive_count: u32,
    /// The decoded body, or why it could not be decoded together with the body as it came.
    pub body: Result<Job, Undecodable>,
}

/// A body that is not a [`Job`]: kept whole, to be dead-lettered with its reason.
#[derive(Clone, Debug)]
pub struct Undecodable {
    /// Why it could not be read.
    pub reason: String,
    /// The body as it came.
    pub body: String,
}

/// A receipt handle. Only the queue that issued it can read it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Receipt {
    /// The lane that the message came from.
    pub lane: Lane,
    /// The handle itself.
    pub handle: String,
}

/// Changes (not messages) that stand in a lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Backlog {
    /// Changes that can be received now.
    pub visible: u64,
    /// Changes that somebody holds.
    pub in_flight: u64,
}

/// A queue with two lanes and a dead-letter queue.
///
/// Delivery is at least once and unordered: a message may come again after it was acknowledged, and
/// two receivers may hold copies of it. Whoever receives a message owns it for the visibility
/// timeout; then it comes again.
#[async_trait]
pub trait JobQueue: Send + Sync {
    /// Adds messages to their lanes. Either all are added or the error says that none can be relied
    /// on: sending again may duplicate, which is harmless.
    async fn send(&self, jobs: &[Job]) -> Result<()>;

    /// Takes up to `max` messages of a lane; none when the lane is empty. Does not wait.
    async fn receive(&self, lane: Lane, max: usize) -> Result<Vec<Message>>;

    /// Returns when the lane may hold something, or after `timeout`. May return early for no reason.
    async fn wait(&self, lane: Lane, timeout: Duration);

    /// Removes messages for good. A receipt whose visibility ended may be ignored; an empty slice
    /// does nothing.
    async fn acknowledge(&self, receipts: &[Receipt]) -> Result<()>;

    /// Hides messages for `timeout` from now on; zero releases them at once.
    async fn extend(&self, receipts: &[Receipt], timeout: Duration) -> Result<()>;

    /// Moves a message to the dead-letter queue with the reason, and acknowledges it.
    async fn dead_letter(&self, message: &Message, reason: &str) -> Result<()>;

    /// Changes that stand in a lane.
    async fn backlog(&self, lane: Lane) -> Result<Backlog>;

    /// Changes that stand in the dead-letter queue.
    async fn dead_letters(&self) -> Result<u64>;

    /// How long a received message stays invisible.
    fn visibility(&self) -> Duration;
}
