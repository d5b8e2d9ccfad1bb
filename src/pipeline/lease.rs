//! The lease: the right to send tracked writes.
//!
//! A worker is alive as long as its database session holds the worker lock. When the session is gone, other
//! workers treat the worker as dead and sweep its attempts. So a worker writes only while it knows that its
//! session was alive a moment ago, by a clock that also counts while the process is frozen or the machine
//! sleeps.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::clock::Clock;
use super::failure::{Error, FailureKind, Result};

/// How often a worker checks for a missing heartbeat.
const POLL_EVERY: Duration = Duration::from_millis(50);

/// A worker's knowledge of its own session.
pub struct Lease {
    clock: Arc<dyn Clock>,
    length: Duration,
    /// When the last good heartbeat was sent, in microseconds of the clock; 0 before the first.
    confirmed_us: AtomicU64,
    /// Counts the sessions, from 1.
    term: AtomicU64,
}

impl Lease {
    /// A lease of a worker that has no session yet.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>, length: Duration) -> Self {
        Self { clock, length, confirmed_us: AtomicU64::new(0), term: AtomicU64::new(0) }
    }

    /// The clock of the lease.
    #[must_use]
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// How long a heartbeat is valid.
    #[must_use]
    pub fn length(&self) -> Duration {
        self.length
    }

    /// A session was made and its lock taken, by a request sent at `at`.
    pub fn begin(&self, at: Duration) {
        self.term.fetch_add(1, Ordering::SeqCst);
        self.confirm(at);
    }

    /// The session answered a heartbeat that was sent at `at`.
    pub fn confirm(&self, at: Duration) {
        self.confirmed_us.fetch_max(at.as_micros() as u64, Ordering::SeqCst);
    }

    /// The number of the worker's current or last session. If it changed since the opening of an attempt, the
    /// attempt may have been swept.
    #[must_use]
    pub fn term(&self) -> u64 {
        self.term.load(Ordering::SeqCst)
    }

    /// Whether a request that takes up to `request` would end within the lease.
    #[must_use]
    pub fn covers(&self, request: Duration) -> bool {
        let confirmed = Duration::from_micros(self.confirmed_us.load(Ordering::SeqCst));
        !confirmed.is_zero() && self.clock.now().saturating_sub(confirmed) + request < self.length
    }

    /// How long the last heartbeat is still valid.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        let confirmed = Duration::from_micros(self.confirmed_us.load(Ordering::SeqCst));
        if confirmed.is_zero() {
            return Duration::ZERO;
        }
        (confirmed + self.length).saturating_sub(self.clock.now())
    }

    /// The session, once there is one that covers a request of up to `request`.
    pub async fn current(&self, request: Duration) -> Result<u64> {
        let started = self.clock.now();
        while !self.covers(request) {
            if self.clock.now().saturating_sub(started) > self.length {
                return Err(Error::new(
                    FailureKind::NoSession,
                    "write to the index",
                    "this worker has no session in the database",
                ));
            }
            self.clock.sleep(POLL_EVERY).await;
        }
        Ok(self.term())
    }

    /// Returns once the lease covers a request of up to `request`. After a freeze that takes one
    /// heartbeat. Fails when none comes, or when the worker lock was lost and taken again meanwhile.
    pub async fn ensure(&self, term: u64, request: Duration) -> Result<()> {
        let started = self.clock.now();
        loop {
            if self.term() != term {
                return Err(Error::new(
                    FailureKind::NoSession,
                    "write to the index",
                    "the worker's session was lost meanwhile",
                ));
            }
            if self.covers(request) {
                return Ok(());
            }
            if self.clock.now().saturating_sub(started) > self.length {
                return Err(Error::new(
                    FailureKind::NoSession,
                    "write to the index",
                    "no heartbeat reached the database in time",
                ));
            }
            self.clock.sleep(POLL_EVERY).await;
        }
    }
}
