//! Where the queues are, and how they are used.

use std::time::Duration;

/// Bytes of a message, and of all messages of a call, by the limits of SQS; a queue's own limit may be lower.
pub const MAX_BYTES: usize = 1_048_576;

/// Where the queues are, and how they are used.
#[derive(Clone, Debug)]
pub struct SqsOptions {
    /// URL of the queue for live changes, or for all.
    pub url: String,
    /// URL of the queue for loads; none when one queue carries both lanes.
    pub bulk_url: Option<String>,
    /// URL of the dead-letter queue; none to take the one of the redrive policy.
    pub dead_url: Option<String>,
    /// How long a received message stays invisible.
    pub visibility: Duration,
    /// How long a receive waits for a message: whole seconds, 20 at most.
    pub wait: Duration,
    /// With one queue: how many changes of bulk may stand in it.
    pub shared_bound: u64,
    /// Our own count of receives, which the redrive policy must not undercut.
    pub max_receives: u32,
    /// The source, whose packing the relay remembers.
    pub source: String,
}
