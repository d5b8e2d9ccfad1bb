//! The options of the relay.

use std::time::Duration;

/// The options of the relay.
#[derive(Clone, Debug)]
pub struct RelayOptions {
    /// The source's name, for messages.
    pub source: String,
    /// Changes in one message at most.
    pub changes_per_message: usize,
    /// A transaction with more changes is bulk.
    pub bulk_threshold: u64,
    /// While more changes wait in the live lane, further ones are bulk.
    pub live_bound: u64,
    /// How often the outbox is polled when no wake-up comes.
    pub poll: Duration,
    /// How long the first step is tried again while it fails with a fatal error that may pass by itself.
    pub start_timeout: Duration,
}
