//! Whether things go through at all.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use super::group_failure::Failure;
use crate::pipeline::fault::{self, FaultBoard};

/// What has gone through in this process, and what has not.
#[derive(Debug, Default)]
pub(super) struct Health {
    failures_in_a_row: AtomicU32,
    /// Whether texts were what failed last: a delete that goes through says nothing of the embedder.
    at_embedder: AtomicBool,
    /// Batches that are under way.
    under_way: AtomicUsize,
    /// Where faults are shown; a board of its own unless one is given.
    faults: OnceLock<Arc<FaultBoard>>,
}

/// A batch that is under way, for as long as this lives.
pub(super) struct UnderWay<'a>(&'a Health);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        // What failed may have been taken away: then nothing will ever show that it would go through.
        if self.0.under_way.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.reset();
        }
    }
}

impl Health {
    /// Shows faults on this board from now on. To be called before anything is shown.
    pub(super) fn report_to(&self, faults: Arc<FaultBoard>) {
        let given = self.faults.set(faults);
        debug_assert!(given.is_ok(), "faults were shown on another board before");
    }

    /// Where faults are shown.
    pub(super) fn faults(&self) -> &FaultBoard {
        self.faults.get_or_init(Arc::default)
    }

    /// A batch begins.
    pub(super) fn begin(&self) -> UnderWay<'_> {
        self.under_way.fetch_add(1, Ordering::Relaxed);
        UnderWay(self)
    }

    /// A change went through, whether or not a text was embedded for it.
    pub(super) fn succeeded(&self) {
        if !self.at_embedder.load(Ordering::Relaxed) {
            self.recovered();
        }
    }

    /// Texts were embedded.
    pub(super) fn embedded(&self) {
        if self.at_embedder.load(Ordering::Relaxed) {
            self.recovered();
        }
    }

    /// Harmless work went the whole way.
    pub(super) fn recovered(&self) {
        self.at_embedder.store(false, Ordering::Relaxed);
        let failures = self.failures_in_a_row.swap(0, Ordering::Relaxed);
        if failures >= fault::FAILURE_THRESHOLD {
            self.faults().clear(fault::INDEXING_BLOCKED);
            tracing::info!("changes go through again");
        }
    }

    /// No batch is under way. The next one is tried as if nothing had been.
    fn reset(&self) {
        self.at_embedder.store(false, Ordering::Relaxed);
        self.failures_in_a_row.store(0, Ordering::Relaxed);
        self.faults().clear(fault::INDEXING_BLOCKED);
    }

    /// Something failed that another try may mend.
    pub(super) fn failed(&self, failure: &Failure) {
        self.add(1, failure);
    }

    /// Something failed that is nobody's change's fault and that no other try mends, until somebody does.
    pub(super) fn trip(&self, failure: &Failure) {
        self.add(fault::FAILURE_THRESHOLD, failure);
    }

    fn add(&self, failures: u32, failure: &Failure) {
        let Failure { error, at_embedder } = failure;
        self.at_embedder.store(*at_embedder, Ordering::Relaxed);
        let add = |before: u32| Some(before.saturating_add(failures));
        let before = self
            .failures_in_a_row
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add)
            .unwrap_or_default();
        if before.saturating_add(failures) >= fault::FAILURE_THRESHOLD {
            self.faults().report(fault::INDEXING_BLOCKED, format_args!("no change goes through: {error}"));
            // Told once; the fault shows how it goes on.
            if before < fault::FAILURE_THRESHOLD {
                tracing::warn!(%error, "nothing goes through: holding what was received, and receiving no more");
            }
        }
    }

    /// Whether nothing goes through.
    pub(super) fn is_outage(&self) -> bool {
        self.failures_in_a_row.load(Ordering::Relaxed) >= fault::FAILURE_THRESHOLD
    }
}
