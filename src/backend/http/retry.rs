//! How often a request is tried.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::rate_limit::RateLimit;
use crate::pipeline::clock::BootClock;
use crate::pipeline::failure::{Class, FailureKind, Result};
use crate::pipeline::retry::Backoff;

/// Tries of a request at most; whoever asks for the work sits out what lasts longer.
const TRIES: u32 = 4;

/// Tries again that a process may make out of turn, and what share of its successes lets it make another.
const BUDGET: f64 = 10.0;
const SHARE: f64 = 0.1;

/// When a request that failed is tried again.
#[derive(Debug)]
pub(in crate::backend) struct Retry {
    /// A pause that is longer is left to the caller.
    longest_pause: Duration,
    /// Tries that may be made yet; none if they are not counted.
    budget: Option<Mutex<f64>>,
}

impl Retry {
    /// Tries again unless that takes a pause of more than `longest_pause`.
    pub(in crate::backend) fn within(longest_pause: Duration) -> Self {
        Self { longest_pause, budget: None }
    }

    /// The same, for as long as most requests succeed: when most fail, tries make it worse.
    pub(in crate::backend) fn with_budget(self) -> Self {
        Self { budget: Some(Mutex::new(BUDGET)), ..self }
    }

    /// The longest pause that a request waits for.
    pub(in crate::backend) fn longest_pause(&self) -> Duration {
        self.longest_pause
    }

    /// Tells that a request succeeded.
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

    /// Does `once` until it succeeds, a few times if need be. It takes its turn at `limit` each time.
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
            // The next turn comes when the service allows it.
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
