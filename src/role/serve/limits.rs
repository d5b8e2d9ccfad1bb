//! Limits on requests.

use std::time::Duration;

/// How long a request may take. Its database statements have the same timeout.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// Searches at once. More searches wait for a permit, because all of them embed on one thread.
const SEARCHES: usize = 16;

/// Memory for responses that clients have not read yet, in KiB. A page of a hundred long texts may take a
/// hundred megabytes, and a client may be slow.
const ANSWERS_KIB: u32 = 256 * 1024;

/// How long a request waits for a permit.
const PERMIT_TIMEOUT: Duration = Duration::from_secs(5);

/// Limits on requests. Requests that need the database leave a few of its connections to status and
/// readiness.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long a request may take.
    pub request: Duration,
    /// How long a request waits for a permit.
    pub permit_timeout: Duration,
    /// Searches at once, embedding included.
    pub searches: usize,
    /// Searches at once in the database and the index. Each takes two connections.
    pub queries: usize,
    /// Reads of pages and rows at once.
    pub reads: usize,
    /// Edits at once.
    pub edits: usize,
    /// Memory for responses that clients have not read yet, in KiB.
    pub answers_kib: u32,
}

impl Limits {
    /// The limits for this number of connections to the database.
    #[must_use]
    pub fn new(connections: usize) -> Self {
        Self {
            request: REQUEST_TIMEOUT,
            permit_timeout: PERMIT_TIMEOUT,
            searches: SEARCHES,
            queries: (connections / 4).max(1),
            reads: (connections / 4).max(1),
            edits: (connections / 6).max(1),
            answers_kib: ANSWERS_KIB,
        }
    }
}
