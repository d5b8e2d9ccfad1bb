//! Whether to try again, and how long to wait before.

use std::time::Duration;

use super::clock::Clock;
use super::failure::{Class, Error};

/// First pause.
const BASE: Duration = Duration::from_millis(100);

/// Longest pause, so that work goes on within seconds of an outage's end.
const CAP: Duration = Duration::from_secs(10);

/// Exponential backoff with equal jitter (AWS Architecture Blog, "Exponential backoff and jitter"): half of
/// a pause is certain, so that a server that is down is left alone, and half is chance.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Forgets earlier failures.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Failures in a row.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// The pause after one more failure. How long a backend asks to be left alone is not looked at here: a
    /// request waits for that when it is sent.
    pub fn next(&mut self, clock: &dyn Clock) -> Duration {
        let ceiling = BASE.saturating_mul(1 << self.failures.min(10)).min(CAP);
        self.failures = self.failures.saturating_add(1);
        ceiling.mul_f64(0.5 + clock.chance() / 2.0)
    }
}

/// Decides whether a loop ends on a fatal failure.
///
/// A loop that has worked before waits for the repair without a bound, unless it is to end when it is idle. At
/// its first tries a setting may be wrong, so the loop waits for a limited time, and only for a failure that may
/// pass by itself.
#[derive(Debug)]
pub struct FatalPolicy {
    started: Duration,
    start_timeout: Duration,
    until_idle: bool,
    has_worked: bool,
}

impl FatalPolicy {
    /// The policy of a loop that starts now.
    #[must_use]
    pub fn new(clock: &dyn Clock, start_timeout: Duration, until_idle: bool) -> Self {
        Self { started: clock.now(), start_timeout, until_idle, has_worked: false }
    }

    /// A try succeeded.
    pub fn worked(&mut self) {
        self.has_worked = true;
    }

    /// Whether the loop ends with this failure.
    #[must_use]
    pub fn ends(&self, error: &Error, clock: &dyn Clock) -> bool {
        if error.class() != Class::Fatal {
            return false;
        }
        if self.has_worked {
            return error.is_of_process() || self.until_idle;
        }
        !error.may_pass() || clock.now().saturating_sub(self.started) >= self.start_timeout
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::clock::BootClock;
    use crate::pipeline::failure::FailureKind;

    #[test]
    fn only_what_may_pass_is_waited_for_at_the_start() {
        let error = |kind| Error::new(kind, "try", "no");
        let ends = |policy: &FatalPolicy, kind| policy.ends(&error(kind), &BootClock);
        let mut policy = FatalPolicy::new(&BootClock, Duration::MAX, false);
        let mut command = FatalPolicy::new(&BootClock, Duration::MAX, true);
        let late = FatalPolicy::new(&BootClock, Duration::ZERO, false);
        for kind in FailureKind::ALL {
            let is_fatal = kind.class() == Class::Fatal;
            assert_eq!(ends(&policy, kind), is_fatal && !kind.may_pass(), "{kind:?}");
            assert_eq!(ends(&command, kind), is_fatal && !kind.may_pass(), "{kind:?}");
            assert_eq!(ends(&late, kind), is_fatal, "{kind:?}");
        }
        policy.worked();
        command.worked();
        for kind in FailureKind::ALL {
            assert_eq!(ends(&policy, kind), kind.is_of_process(), "{kind:?}");
            assert_eq!(ends(&command, kind), kind.class() == Class::Fatal, "{kind:?}");
        }
    }

    #[test]
    fn pauses_grow_to_a_bound() {
        let mut backoff = Backoff::default();
        let first = backoff.next(&BootClock);
        assert!(first >= BASE / 2 && first <= BASE);
        (0..50).for_each(|_| assert!(backoff.next(&BootClock) <= CAP));
        assert!(backoff.next(&BootClock) >= CAP / 2);
    }
}
