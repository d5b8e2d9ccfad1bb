//! How many changes a message holds.

use crate::pipeline::change::Job;

/// Messages and the changes in them, as this process saw them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MessageDensity {
    pub(super) messages: u64,
    pub(super) changes: u64,
}

impl MessageDensity {
    pub(super) fn of_jobs<'a>(jobs: impl Iterator<Item = &'a Job>) -> Self {
        jobs.fold(Self::default(), |sum, job| Self {
            messages: sum.messages + 1,
            changes: sum.changes + job.changes() as u64,
        })
    }

    /// Halved now and then, so that old messages weigh less.
    pub(super) fn add(&mut self, other: Self) {
        if self.messages > 1_000 {
            *self = Self { messages: self.messages / 2, changes: self.changes / 2 };
        }
        self.messages += other.messages;
        self.changes += other.changes;
    }

    /// Changes in that many messages.
    pub(super) fn estimate(self, messages: u64) -> u64 {
        if self.messages == 0 { messages } else { (messages * self.changes).div_ceil(self.messages) }
    }
}
