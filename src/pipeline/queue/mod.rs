//! The contracts of the queue, one for each use of it.
//!
//! [`JobQueue`] moves messages and is all that relay and indexer need for their work. [`DeadLetters`] holds
//! dead-lettered changes and messages. [`QueueStats`] reports the backlog. One backend implements all three.

mod dead_letters;
mod message;
mod stats;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

pub use dead_letters::{DeadLetter, DeadLetterCause, DeadLetters, Reason};
pub use message::{Message, Receipt, Undecodable, decode};
pub use stats::{Backlog, QueueStats};

use crate::pipeline::change::{Job, Lane};
use crate::pipeline::failure::Result;

/// Messages in two lanes.
///
/// Delivery is at least once and unordered: a message may come again after it was acknowledged, and two
/// receivers may hold copies of it. The receiver of a message owns it for the visibility timeout. If it is
/// neither acknowledged nor extended by then, it comes again, with a receive count that is one higher.
#[async_trait]
pub trait JobQueue: Send + Sync {
    /// Adds messages to their lanes. An error says that none of them can be relied on. Sending them again
    /// may duplicate some, which is harmless.
    async fn send(&self, jobs: &[Job]) -> Result<()>;

    /// Takes up to `max` messages of a lane; none when the lane is empty. A queue that is paid by the call
    /// waits a while for the first one, and then [`Self::wait`] returns at once. If the caller gives up, the
    /// messages come to others: at once, or when their visibility timeout ends.
    async fn receive(&self, lane: Lane, max: usize) -> Result<Vec<Message>>;

    /// Returns when the lane may hold something, or after `timeout`. May return early for no reason. What is
    /// sent after the last [`Self::receive`] of the lane is not slept through.
    async fn wait(&self, lane: Lane, timeout: Duration);

    /// Removes messages for good. A receipt whose visibility timeout has ended may be ignored; an empty
    /// slice does nothing.
    async fn acknowledge(&self, receipts: &[Receipt]) -> Result<()>;

    /// Makes the visibility timeout of messages end in `timeout` from now; zero releases them at once. A
    /// receipt whose visibility timeout has ended may be ignored. After an error some may be extended.
    async fn extend_visibility(&self, receipts: &[Receipt], timeout: Duration) -> Result<()>;

    /// The visibility timeout of a received message.
    fn visibility_timeout(&self) -> Duration;
}

/// One backend of the queue, by its three contracts.
#[derive(Clone)]
pub struct Queue {
    /// The messages.
    pub jobs: Arc<dyn JobQueue>,
    /// The dead-letter queue.
    pub dead_letters: Arc<dyn DeadLetters>,
    /// How full the lanes are.
    pub stats: Arc<dyn QueueStats>,
}

impl Queue {
    /// A backend that keeps all three contracts.
    #[must_use]
    pub fn new<Q: JobQueue + DeadLetters + QueueStats + 'static>(backend: Arc<Q>) -> Self {
        Self { jobs: Arc::clone(&backend) as _, dead_letters: Arc::clone(&backend) as _, stats: backend }
    }
}
