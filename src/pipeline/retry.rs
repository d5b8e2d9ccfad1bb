//! How long to wait before another try.

use std::time::Duration;

use super::clock::Clock;
use super::failure::Error;

/// First pause.
const BASE: Duration = Duration::from_millis(100);

/// Longest pause, so that work goes on within seconds of an outage's end.
const CAP: Duration = Duration::from_secs(10);

/// Longest pause that a backend may ask for: a wrong header must not stop the work for a day.
const MAX_ASKED: Duration = Duration::from_mins(5);

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

    /// The pause after one more failure; at least what the backend asks for.
    pub fn next(&mut self, error: &Error, clock: &dyn Clock) -> Duration {
        let ceiling = BASE.saturating_mul(1 << self.failures.min(10)).min(CAP);
        self.failures = self.failures.saturating_add(1);
        let jittered = ceiling.mul_f64(0.5 + clock.chance() / 2.0);
        jittered.max(error.retry_after().unwrap_or_default().min(MAX_ASKED))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::clock::BootClock;
    use crate::pipeline::failure::FailureKind;

    #[test]
    fn pauses_grow_to_a_bound_and_obey_the_backend() {
        let mut backoff = Backoff::default();
        let error = Error::new(FailureKind::Conflict, "x", "y");
        let first = backoff.next(&error, &BootClock);
        assert!(first >= BASE / 2 && first <= BASE);
        (0..50).for_each(|_| assert!(backoff.next(&error, &BootClock) <= CAP));
        let patient = error.with_pause(Some(CAP * 2));
        assert_eq!(backoff.next(&patient, &BootClock), CAP * 2);
        let lost = patient.with_pause(Some(Duration::MAX));
        assert_eq!(backoff.next(&lost, &BootClock), MAX_ASKED);
    }
}
