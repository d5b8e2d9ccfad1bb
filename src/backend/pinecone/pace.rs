//! How many requests are under way at once, and how often one is tried again.
//!
//! Additive increase, multiplicative decrease (Chiu and Jain, 1989): every answer lets a little more
//! through, a refusal for being too fast halves it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Requests at once at the start, and at most.
const FIRST: f64 = 8.0;
const MOST: f64 = 32.0;

/// Refusals this close together are one: they answer requests that were sent together.
const TOGETHER: Duration = Duration::from_millis(500);

/// The longest that an index may ask to be left alone: a wrong header must not stop the work for a day.
const MAX_PAUSE: Duration = Duration::from_mins(5);

/// Tries again that a process may make out of turn, and what share of its successes lets it make another.
const BUDGET: f64 = 10.0;
const SHARE: f64 = 0.1;

#[derive(Debug)]
struct State {
    limit: f64,
    under_way: usize,
    halved: Option<Instant>,
    not_before: Option<Instant>,
    budget: f64,
}

impl State {
    fn succeeded(&mut self) {
        self.limit = (self.limit + 1.0 / self.limit).min(MOST);
        self.budget = (self.budget + SHARE).min(BUDGET);
    }

    fn too_fast(&mut self, retry_after: Option<Duration>, now: Instant) {
        if self.halved.is_none_or(|at| now.duration_since(at) >= TOGETHER) {
            self.limit = (self.limit / 2.0).max(1.0);
            self.halved = Some(now);
        }
        if let Some(pause) = retry_after {
            let until = now + pause.min(MAX_PAUSE);
            self.not_before = Some(self.not_before.map_or(until, |old| old.max(until)));
        }
    }

    /// How long a request must wait at least; none if it may go now.
    fn wait(&self, now: Instant) -> Option<Duration> {
        let pause =
            self.not_before.map(|until| until.saturating_duration_since(now)).filter(|left| !left.is_zero());
        if pause.is_none() && (self.under_way as f64) < self.limit.floor() {
            return None;
        }
        Some(pause.unwrap_or(Duration::MAX))
    }
}

/// What all requests of a process to one index go by.
#[derive(Debug)]
pub(super) struct Pace {
    state: Mutex<State>,
    freed: Notify,
}

/// A request under way.
pub(super) struct Permit<'a>(&'a Pace);

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.0.state().under_way -= 1;
        self.0.freed.notify_waiters();
    }
}

impl Pace {
    pub(super) fn new() -> Self {
        let state = State { limit: FIRST, under_way: 0, halved: None, not_before: None, budget: BUDGET };
        Self { state: Mutex::new(state), freed: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when a request may be sent.
    pub(super) async fn permit(&self) -> Permit<'_> {
        loop {
            let freed = self.freed.notified();
            let mut freed = std::pin::pin!(freed);
            freed.as_mut().enable();
            let wait = {
                let mut state = self.state();
                let wait = state.wait(Instant::now());
                if wait.is_none() {
                    state.under_way += 1;
                }
                wait
            };
            let Some(wait) = wait else { return Permit(self) };
            // A year is as good as for ever.
            let wait = wait.min(Duration::from_hours(24 * 365));
            let _ = tokio::time::timeout(wait, freed).await;
        }
    }

    /// Tells that an answer came.
    pub(super) fn succeeded(&self) {
        self.state().succeeded();
        self.freed.notify_waiters();
    }

    /// Tells that the index was asked too fast.
    pub(super) fn too_fast(&self, retry_after: Option<Duration>) {
        self.state().too_fast(retry_after, Instant::now());
    }

    /// Whether a failed request may be tried again at once: when most fail, tries make it worse.
    pub(super) fn may_try_again(&self) -> bool {
        let mut state = self.state();
        let may = state.budget >= 1.0;
        if may {
            state.budget -= 1.0;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        State { limit: FIRST, under_way: 0, halved: None, not_before: None, budget: BUDGET }
    }

    #[test]
    fn refusals_halve_it_once_for_all_that_were_sent_together_and_answers_raise_it_slowly() {
        let (mut state, start) = (state(), Instant::now());
        (0..5).for_each(|_| state.too_fast(None, start));
        assert!((state.limit - FIRST / 2.0).abs() < 1e-9);
        (1..9).for_each(|n| state.too_fast(None, start + TOGETHER * n));
        assert!((state.limit - 1.0).abs() < 1e-9, "never below one");
        (0..10).for_each(|_| state.succeeded());
        assert!((2.0..8.0).contains(&state.limit), "{}", state.limit);
        (0..10_000).for_each(|_| state.succeeded());
        assert!((state.limit - MOST).abs() < 1e-9);
    }

    #[test]
    fn nothing_is_sent_before_the_time_that_was_asked_for() {
        let (mut state, start) = (state(), Instant::now());
        assert_eq!(state.wait(start), None);
        state.too_fast(Some(Duration::from_secs(2)), start);
        state.too_fast(Some(Duration::from_secs(1)), start);
        assert_eq!(state.wait(start), Some(Duration::from_secs(2)));
        assert_eq!(state.wait(start + Duration::from_secs(2)), None);
        state.too_fast(Some(Duration::MAX), start);
        assert_eq!(state.wait(start), Some(MAX_PAUSE));
    }

    #[test]
    fn tries_again_are_a_share_of_the_successes() {
        let pace = Pace::new();
        let tries = |pace: &Pace| (0..100).filter(|_| pace.may_try_again()).count();
        assert_eq!(tries(&pace), BUDGET as usize);
        (0..50).for_each(|_| pace.succeeded());
        assert!((4..=5).contains(&tries(&pace)));
    }

    #[tokio::test]
    async fn as_many_go_at_once_as_may_and_the_next_when_one_is_done() {
        let pace = Pace::new();
        let mut permits = Vec::new();
        for _ in 0..FIRST as usize {
            permits.push(pace.permit().await);
        }
        let next = pace.permit();
        tokio::pin!(next);
        assert!(futures::poll!(&mut next).is_pending());
        permits.pop();
        next.await;
    }
}
