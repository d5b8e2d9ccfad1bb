//! How long to wait before another try.

use std::time::Duration;

use super::failure::Error;

/// First pause.
const BASE: Duration = Duration::from_millis(100);

/// Longest pause, so that work goes on within seconds of an outage's end.
const CAP: Duration = Duration::from_secs(10);

/// Exponential backoff with full jitter (AWS Architecture Blog, "Exponential backoff and jitter").
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
    pub fn next(&mut self, error: &Error) -> Duration {
        let ceiling = BASE.saturating_mul(1 << self.failures.min(10)).min(CAP);
        self.failures = self.failures.saturating_add(1);
        let jittered = ceiling.mul_f64(rand::random_range(0.5..=1.0));
        jittered.max(error.retry_after.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_obey_the_backend() {
        let mut backoff = Backoff::default();
        let error = Error::retryable("x", "y");
        let first = backoff.next(&error);
        assert!(first >= BASE / 2 && first <= BASE);
        (0..50).for_each(|_| assert!(backoff.next(&error) <= CAP));
        let patient = Error { retry_after: Some(CAP * 2), ..error };
        assert_eq!(backoff.next(&patient), CAP * 2);
    }
}
