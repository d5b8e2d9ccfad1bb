//! What a process scales, in numbers.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::Decision;

/// What a process scales, for whoever exports it. All values are those of the last decision.
#[derive(Debug, Default)]
pub struct ScalingGauges {
    desired: AtomicUsize,
    ready: AtomicUsize,
    steps_out: AtomicU64,
    steps_in: AtomicU64,
}

impl ScalingGauges {
    /// Notes a decision, and how many workers work.
    pub fn note(&self, decision: &Decision, ready: usize) {
        self.desired.store(decision.desired, Ordering::Relaxed);
        self.ready.store(ready, Ordering::Relaxed);
        if decision.desired > decision.current {
            self.steps_out.fetch_add(1, Ordering::Relaxed);
        } else if decision.is_change() {
            self.steps_in.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Workers that are asked for; 0 while this process scales nothing.
    #[must_use]
    pub fn desired(&self) -> usize {
        self.desired.load(Ordering::Relaxed)
    }

    /// Workers that work.
    #[must_use]
    pub fn ready(&self) -> usize {
        self.ready.load(Ordering::Relaxed)
    }

    /// Steps out and steps in since the start.
    #[must_use]
    pub fn steps(&self) -> (u64, u64) {
        (self.steps_out.load(Ordering::Relaxed), self.steps_in.load(Ordering::Relaxed))
    }
}
