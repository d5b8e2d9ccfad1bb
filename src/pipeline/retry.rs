//! How long to wait before another try.

use std::time::Duration;

use super::clock::Clock;

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::clock::BootClock;

    #[test]
    fn pauses_grow_to_a_bound() {
        let mut backoff = Backoff::default();
        let first = backoff.next(&BootClock);
        assert!(first >= BASE / 2 && first <= BASE);
        (0..50).for_each(|_| assert!(backoff.next(&BootClock) <= CAP));
        assert!(backoff.next(&BootClock) >= CAP / 2);
    }
}
