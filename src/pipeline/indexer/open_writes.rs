//! The tracked writes of one worker that are not known to be closed.
//!
//! A write of this worker that is in the ledger but not in this list is orphaned: the ledger marks it as
//! abandoned ([`abandon_orphans`](crate::pipeline::ledger::Ledger::abandon_orphans)).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::pipeline::ledger::{Opened, Outcome};

/// How the ids of a tracked write are to be closed.
pub(super) type Closing = Vec<(Opened, Outcome)>;

/// The tracked writes of one worker.
#[derive(Debug)]
pub(super) struct OpenWrites {
    /// The worker's name, which no other worker ever had. The ledger records its writes under this name.
    worker: String,
    /// Numbers the writes.
    begun: AtomicU64,
    /// Ids of the writes that are being worked on.
    active: Mutex<Vec<String>>,
    /// Writes that may have sent something and are not known to be closed.
    unclosed: Mutex<BTreeMap<String, Closing>>,
}

/// A write that is being worked on, for as long as this lives.
pub(super) struct ActiveWrite<'a> {
    writes: &'a OpenWrites,
    /// The name that the ledger knows the write by.
    pub(super) id: String,
}

impl Drop for ActiveWrite<'_> {
    fn drop(&mut self) {
        self.writes.active().retain(|id| *id != self.id);
    }
}

impl OpenWrites {
    pub(super) fn new(worker: String) -> Self {
        Self { worker, begun: AtomicU64::new(0), active: Mutex::default(), unclosed: Mutex::default() }
    }

    /// The worker's name.
    pub(super) fn worker(&self) -> &str {
        &self.worker
    }

    /// Begins a write, under a name that no other write has.
    pub(super) fn begin(&self) -> ActiveWrite<'_> {
        let number = self.begun.fetch_add(1, Ordering::Relaxed);
        let id = format!("{}/{number}", self.worker);
        self.active().push(id.clone());
        ActiveWrite { writes: self, id }
    }

    /// Keeps how a write is to be closed, until [`Self::forget`].
    pub(super) fn keep_closing(&self, id: &str, closing: Closing) {
        self.unclosed().insert(id.to_owned(), closing);
    }

    /// A write is closed.
    pub(super) fn forget(&self, id: &str) {
        self.unclosed().remove(id);
    }

    /// Writes that are not in work any more, and that were not closed or whose closing failed.
    pub(super) fn leftover(&self) -> Vec<(String, Closing)> {
        let active = self.active();
        self.unclosed()
            .iter()
            .filter(|(id, _)| !active.contains(id))
            .map(|(id, closing)| (id.clone(), closing.clone()))
            .collect()
    }

    /// Ids of the writes that this worker will close.
    pub(super) fn ids(&self) -> Vec<String> {
        let mut ids = self.active().clone();
        ids.extend(self.unclosed().keys().cloned());
        ids
    }

    fn active(&self) -> MutexGuard<'_, Vec<String>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unclosed(&self) -> MutexGuard<'_, BTreeMap<String, Closing>> {
        self.unclosed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
