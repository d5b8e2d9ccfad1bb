//! Whether changes succeed at all.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use super::group_failure::Failure;
use crate::pipeline::fault::{self, FaultBoard};

/// Successes and failures of this process.
#[derive(Debug, Default)]
pub(super) struct Health {
    failures_in_a_row: AtomicU32,
    /// Whether the last failure was at the embedder: a successful delete does not prove that the embedder
    /// works.
    at_embedder: AtomicBool,
    /// Batches that are under way.
    under_way: AtomicUsize,
    /// The board for faults; a new one unless a board is given.
    faults: OnceLock<Arc<FaultBoard>>,
}

/// A batch that is under way, for as long as this lives.
pub(super) struct UnderWay<'a>(&'a Health);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        // The failed work may have been removed. Then no success would ever end the outage.
        if self.0.under_way.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.reset();
        }
    }
}

impl Health {
    /// Shows faults on this board from now on. Call it before the first fault.
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

    /// A change succeeded, with or without a text to embed.
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

    /// A canary or a change succeeded.
    pub(super) fn recovered(&self) {
        self.at_embedder.store(false, Ordering::Relaxed);
        let failures = self.failures_in_a_row.swap(0, Ordering::Relaxed);
        if failures >= fault::FAILURE_THRESHOLD {
            self.faults().clear(fault::INDEXING_BLOCKED);
            tracing::info!("changes go through again");
        }
    }

    /// No batch is under way. The next batch starts without counted failures.
    fn reset(&self) {
        self.at_embedder.store(false, Ordering::Relaxed);
        self.failures_in_a_row.store(0, Ordering::Relaxed);
        self.faults().clear(fault::INDEXING_BLOCKED);
    }

    /// Counts a retryable failure.
    pub(super) fn failed(&self, failure: &Failure) {
        self.add(1, failure);
    }

    /// Records a failure that concerns all changes and lasts until somebody repairs its cause.
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
            // Logged once; the fault shows the current state.
            if before < fault::FAILURE_THRESHOLD {
                tracing::warn!(%error, "nothing goes through: holding what was received, and receiving no more");
            }
        }
    }

    /// Whether no change succeeds.
    pub(super) fn is_outage(&self) -> bool {
        self.failures_in_a_row.load(Ordering::Relaxed) >= fault::FAILURE_THRESHOLD
    }
}
