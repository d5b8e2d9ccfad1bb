//! What decides about the number of workers.

use std::time::Duration;

/// The growth of a policy that asks for no other: one step at most doubles the workers, so that the next one can
/// take into account what they did.
pub const GROWTH: f64 = 2.0;

/// What is tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Seconds that the workers need for all changes that are not in the index.
    Backlog,
    /// Use of the CPU by a worker, in percent.
    Cpu,
}

/// How many workers there may be, and what decides about their number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// What is tracked.
    pub metric: Metric,
    /// The value that the metric should have: seconds or percent.
    pub target: f64,
    /// Workers at least; 1 or more.
    pub least: usize,
    /// Workers at most.
    pub most: usize,
    /// Time between two steps out.
    pub cooldown_out: Duration,
    /// Time between any step and a step in. So long fewer workers must have been enough.
    pub cooldown_in: Duration,
    /// One step out at most multiplies the number of workers by this; 1 or more. It always may add one worker.
    pub growth: f64,
}

impl Policy {
    /// Tracks backlog seconds: at most `target` seconds of work wait. The cooldowns of the reference
    /// architecture.
    #[must_use]
    pub const fn backlog(target: f64, least: usize, most: usize) -> Self {
        Self { metric: Metric::Backlog, target, ..Self::reference(least, most) }
    }

    /// The reference architecture's policy for the service that embeds: 2 to 50 tasks.
    #[must_use]
    pub const fn reference_embed() -> Self {
        Self::reference(2, 50)
    }

    /// The reference architecture's policy for the service that listens: 2 to 6 tasks.
    #[must_use]
    pub const fn reference_listen() -> Self {
        Self::reference(2, 6)
    }

    /// What both have in common: a CPU use of 25 %, cooldowns of 30 seconds. How far one step may go is not
    /// theirs.
    const fn reference(least: usize, most: usize) -> Self {
        Self {
            metric: Metric::Cpu,
            target: 25.0,
            least,
            most,
            cooldown_out: Duration::from_secs(30),
            cooldown_in: Duration::from_secs(30),
            growth: GROWTH,
        }
    }
}

/// The better signal with the reference's numbers: a backlog of 10 seconds, 2 to 50 workers, cooldowns of 30
/// seconds. A step at most doubles the workers.
impl Default for Policy {
    fn default() -> Self {
        Self::backlog(10.0, 2, 50)
    }
}
