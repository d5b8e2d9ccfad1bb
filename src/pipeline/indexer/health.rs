//! Whether things go through at all.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::pipeline::failure::Error;

/// Failures in a row, with nothing going through in between, from which on it is an outage.
const OUTAGE: u32 = 3;

/// What has gone through in this process, and what has not.
#[derive(Debug, Default)]
pub(super) struct Health {
    failures_in_a_row: AtomicU32,
}

impl Health {
    /// Something went through.
    pub(super) fn succeeded(&self) {
        let failures = self.failures_in_a_row.swap(0, Ordering::Relaxed);
        if failures >= OUTAGE {
            tracing::info!(failures, "changes go through again");
        }
    }

    /// Something failed that another try may mend.
    pub(super) fn failed(&self, error: &Error) {
        let failures = self.failures_in_a_row.fetch_add(1, Ordering::Relaxed) + 1;
        if failures == OUTAGE {
            tracing::warn!(%error, "nothing goes through: holding what was received, and receiving no more");
        }
    }

    /// Whether nothing goes through.
    pub(super) fn is_outage(&self) -> bool {
        self.failures_in_a_row.load(Ordering::Relaxed) >= OUTAGE
    }
}
