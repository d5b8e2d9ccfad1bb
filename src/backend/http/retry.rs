//! Retries of a request.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::rate_limit::RateLimit;
use crate::pipeline::clock::BootClock;
use crate::pipeline::failure::{Class, FailureKind, Result};
use crate::pipeline::retry::Backoff;

/// The most attempts of one request. The caller waits out longer failures.
const TRIES: u32 = 4;

/// The retry budget: how many retries a process may make in a row, and the share of a retry that each success
/// adds.
const BUDGET: f64 = 10.0;
const SHARE: f64 = 0.1;

/// Decides when a failed request is retried.
#[derive(Debug)]
pub(in crate::backend) struct Retry {
    /// A retry that needs a longer pause is left to the caller.
    longest_pause: Duration,
    /// The retries that are left; `None` for no budget.
    budget: Option<Mutex<f64>>,
}

impl Retry {
    /// Retries unless the pause would be longer than `longest_pause`.
    pub(in crate::backend) fn within(longest_pause: Duration) -> Self {
        Self { longest_pause, budget: None }
    }

    /// Adds a retry budget: when most requests fail, retries make the overload worse.
    pub(in crate::backend) fn with_budget(self) -> Self {
        Self { budget: Some(Mutex::new(BUDGET)), ..self }
    }

    /// The longest pause before a retry.
    pub(in crate::backend) fn longest_pause(&self) -> Duration {
        self.longest_pause
    }

    /// Reports a success, which adds to the retry budget.
    pub(in crate::backend) fn succeeded(&self) {
        self.spend(|budget| *budget = (*budget + SHARE).min(BUDGET));
    }

    fn may_try_again(&self) -> bool {
        let take = |budget: &mut f64| {
            let may = *budget >= 1.0;
            if may {
                *budget -= 1.0;
            }
            may
        };
        self.spend(take).unwrap_or(true)
    }

    fn spend<T>(&self, spend: impl FnOnce(&mut f64) -> T) -> Option<T> {
        let budget = self.budget.as_ref()?;
        Some(spend(&mut budget.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Runs `once` until it succeeds, at most `TRIES` times. `once` itself takes a turn of the rate limit;
    /// `limit` tells here how long the service asked to wait.
    pub(in crate::backend) async fn run<T, F: Future<Output = Result<T>>>(
        &self,
        limit: &RateLimit,
        once: impl Fn() -> F,
    ) -> Result<T> {
        let mut backoff = Backoff::default();
        loop {
            let error = match once().await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            let pause = backoff.next(&BootClock);
            let is_over = backoff.failures() >= TRIES || pause.max(limit.pause()) > self.longest_pause;
            if error.class() != Class::Retryable || is_over || !self.may_try_again() {
                return Err(error);
            }
            // After a 429, the next turn of the rate limit contains the pause.
            if error.kind() != FailureKind::RateLimited {
                tokio::time::sleep(pause).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::failure::Error;

    #[test]
    fn tries_again_are_a_share_of_the_successes() {
        let retry = Retry::within(Duration::MAX).with_budget();
        let tries = || (0..100).filter(|_| retry.may_try_again()).count();
        assert_eq!(tries(), BUDGET as usize);
        (0..50).for_each(|_| retry.succeeded());
        assert!((4..=5).contains(&tries()));
        let free = Retry::within(Duration::MAX);
        assert!((0..100).all(|_| free.may_try_again()));
    }

    #[tokio::test]
    async fn what_passes_is_tried_a_few_times_and_what_does_not_once() {
        let limit = RateLimit::adaptive();
        let tries = async |kind: FailureKind, longest_pause: Duration| {
            let done = std::cell::Cell::new(0);
            let once = || {
                done.set(done.get() + 1);
                std::future::ready(Err::<(), _>(Error::new(kind, "ask", "no")))
            };
            Retry::within(longest_pause).run(&limit, once).await.unwrap_err();
            done.get()
        };
        assert_eq!(tries(FailureKind::Overloaded, Duration::MAX).await, TRIES);
        assert_eq!(tries(FailureKind::RateLimited, Duration::MAX).await, TRIES);
        assert_eq!(tries(FailureKind::RefusedData, Duration::MAX).await, 1);
        assert_eq!(tries(FailureKind::Overloaded, Duration::ZERO).await, 1, "a pause is too long");
        let asked = Some(Duration::from_mins(1));
        limit.answered(reqwest::StatusCode::SERVICE_UNAVAILABLE, asked);
        assert_eq!(tries(FailureKind::RateLimited, Duration::from_secs(20)).await, 1, "so is this one");
    }
}
