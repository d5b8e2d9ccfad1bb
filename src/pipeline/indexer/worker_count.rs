//! How many workers a process should have, and has.

use std::sync::atomic::AtomicUsize;

use tokio::sync::watch;

/// How many loops there should be, and how many there are.
pub(super) struct Workers {
    pub(super) wanted: watch::Sender<usize>,
    pub(super) running: AtomicUsize,
}

impl Workers {
    pub(super) fn new(wanted: usize) -> Self {
        Self { wanted: watch::Sender::new(wanted.max(1)), running: AtomicUsize::new(0) }
    }
}
