//! Whether things go through at all.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::pipeline::failure::Error;
use crate::pipeline::fault::{self, Board};

/// What has gone through in this process, and what has not.
#[derive(Debug, Default)]
pub(super) struct Health {
    failures_in_a_row: AtomicU32,
    /// Whether texts were what failed last: a delete that goes through says nothing of the embedder.
    at_embedder: AtomicBool,
    faults: Arc<Board>,
}

impl Health {
    pub(super) fn new(faults: Arc<Board>) -> Self {
        Self { faults, ..Self::default() }
    }

    /// A change went through, whether or not a text was embedded for it.
    pub(super) fn succeeded(&self) {
        if !self.at_embedder.load(Ordering::Relaxed) {
            self.is_over();
        }
    }

    /// Texts were embedded.
    pub(super) fn embedded(&self) {
        if self.at_embedder.load(Ordering::Relaxed) {
            self.is_over();
        }
    }

    /// Harmless work went the whole way.
    pub(super) fn is_over(&self) {
        self.at_embedder.store(false, Ordering::Relaxed);
        let failures = self.failures_in_a_row.swap(0, Ordering::Relaxed);
        if failures >= fault::IN_A_ROW {
            self.faults.clear(fault::HELD);
            tracing::info!("changes go through again");
        }
    }

    /// No batch is under way. The next one is tried as if nothing had been.
    pub(super) fn nothing_is_held(&self) {
        self.at_embedder.store(false, Ordering::Relaxed);
        self.failures_in_a_row.store(0, Ordering::Relaxed);
        self.faults.clear(fault::HELD);
    }

    /// Something failed that another try may mend.
    pub(super) fn failed(&self, error: &Error, at_embedder: bool) {
        self.add(1, error, at_embedder);
    }

    /// Something failed that is nobody's change's fault and that no other try mends, until somebody does.
    pub(super) fn concerns_all(&self, error: &Error, at_embedder: bool) {
        self.add(fault::IN_A_ROW, error, at_embedder);
    }

    fn add(&self, failures: u32, error: &Error, at_embedder: bool) {
        self.at_embedder.store(at_embedder, Ordering::Relaxed);
        let add = |before: u32| Some(before.saturating_add(failures));
        let before = self
            .failures_in_a_row
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add)
            .unwrap_or_default();
        if before.saturating_add(failures) >= fault::IN_A_ROW {
            self.faults.report(fault::HELD, format_args!("no change goes through: {error}"));
            // Told once; the fault shows how it goes on.
            if before < fault::IN_A_ROW {
                tracing::warn!(%error, "nothing goes through: holding what was received, and receiving no more");
            }
        }
    }

    /// Whether nothing goes through.
    pub(super) fn is_outage(&self) -> bool {
        self.failures_in_a_row.load(Ordering::Relaxed) >= fault::IN_A_ROW
    }
}
