//! The rate limit: the only place that obeys `429 Too Many Requests` and `Retry-After`.
//!
//! Each request takes a turn before it is sent, and reports its answer here. After an answer that asks for a
//! pause, the process sends no request to the service before the pause is over. A caller that must not wait
//! while it holds work (because its lease runs, for example) waits for [`RateLimit::ready`] before it takes
//! work.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use tokio::sync::Notify;

use super::throughput::Throughput;
use crate::pipeline::clock::{BootClock, Clock as _};

/// The adaptive limit on requests in flight: its first value and its maximum.
const FIRST: f64 = 8.0;
const MOST: f64 = 32.0;

/// Refusals within this time count as one, because they answer requests that were sent together.
const TOGETHER: Duration = Duration::from_millis(500);

/// The longest pause that is obeyed: a wrong `Retry-After` must not stop the work for a day.
const MAX_PAUSE: Duration = Duration::from_mins(5);

/// The pause after a 429 without `Retry-After`. Half of it is fixed and half is random. The caller waits out
/// longer overloads.
const UNSAID_PAUSE: Duration = Duration::from_millis(200);

#[derive(Debug)]
struct State {
    /// The most requests in flight; `None` for no limit. Additive increase, multiplicative decrease (Chiu and
    /// Jain, 1989): each success raises the limit a little, a 429 halves it.
    at_once: Option<f64>,
    under_way: usize,
    halved: Option<Instant>,
    not_before: Option<Instant>,
    throughput: Throughput,
}

impl State {
    fn succeeded(&mut self) {
        self.at_once = self.at_once.map(|limit| (limit + 1.0 / limit).min(MOST));
    }

    fn too_fast(&mut self, now: Instant) {
        if self.halved.is_none_or(|at| now.duration_since(at) >= TOGETHER) {
            self.at_once = self.at_once.map(|limit| (limit / 2.0).max(1.0));
            self.halved = Some(now);
        }
    }

    fn leave_alone(&mut self, pause: Duration, now: Instant) {
        let until = now + pause.min(MAX_PAUSE);
        self.not_before = Some(self.not_before.map_or(until, |old| old.max(until)));
    }

    /// The rest of the pause; `None` if the service may be asked.
    fn pause(&self, now: Instant) -> Option<Duration> {
        self.not_before.map(|until| until.saturating_duration_since(now)).filter(|left| !left.is_zero())
    }

    /// The least time that a request must wait; `None` if it may be sent now.
    fn wait(&self, now: Instant) -> Option<Duration> {
        let is_full = self.at_once.is_some_and(|limit| self.under_way as f64 >= limit.floor());
        self.pause(now).or_else(|| is_full.then_some(Duration::MAX))
    }
}

/// The rate limit that all requests of this process to one service share.
#[derive(Debug)]
pub(in crate::backend) struct RateLimit {
    state: Mutex<State>,
    freed: Notify,
}

/// Permission to send one request. Dropped when the request is over.
pub(in crate::backend) struct Turn<'a>(&'a RateLimit);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.state().under_way -= 1;
        self.0.freed.notify_waiters();
    }
}

impl RateLimit {
    /// Adapts the number of requests in flight to what the service accepts.
    pub(in crate::backend) fn adaptive() -> Self {
        Self::new(Some(FIRST), Throughput::new(0, 0))
    }

    /// At most this many requests and tokens in a minute; 0 means no limit.
    pub(in crate::backend) fn by_the_minute(requests: u32, tokens: u64) -> Self {
        Self::new(None, Throughput::new(requests, tokens))
    }

    fn new(at_once: Option<f64>, throughput: Throughput) -> Self {
        let state = State { at_once, under_way: 0, halved: None, not_before: None, throughput };
        Self { state: Mutex::new(state), freed: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a request with this many tokens may be sent.
    pub(in crate::backend) async fn turn(&self, tokens: usize) -> Turn<'_> {
        let in_debt = self.state().throughput.reserve(tokens as u64, Instant::now());
        if !in_debt.is_zero() {
            tokio::time::sleep(in_debt).await;
        }
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
            let Some(wait) = wait else { return Turn(self) };
            // A year stands for "until notified".
            let wait = wait.min(Duration::from_hours(24 * 365));
            let _ = tokio::time::timeout(wait, freed).await;
        }
    }

    /// Reports the status of an answer, and the pause that its `Retry-After` asks for.
    pub(in crate::backend) fn answered(&self, status: StatusCode, retry_after: Option<Duration>) {
        let now = Instant::now();
        let mut state = self.state();
        if status.is_success() {
            state.succeeded();
        }
        let mut pause = retry_after;
        if status == StatusCode::TOO_MANY_REQUESTS {
            state.too_fast(now);
            pause = pause.or_else(|| Some(UNSAID_PAUSE.mul_f64(0.5 + BootClock.chance() / 2.0)));
        }
        if let Some(pause) = pause {
            state.leave_alone(pause, now);
        }
        drop(state);
        self.freed.notify_waiters();
    }

    /// The rest of the pause that the service asked for; zero if there is none.
    pub(in crate::backend) fn pause(&self) -> Duration {
        self.state().pause(Instant::now()).unwrap_or_default()
    }

    /// Waits until the pause that the service asked for is over. Returns at once if there is none.
    pub(in crate::backend) async fn ready(&self) {
        loop {
            let pause = self.pause();
            if pause.is_zero() {
                return;
            }
            tokio::time::sleep(pause).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        let throughput = Throughput::new(0, 0);
        State { at_once: Some(FIRST), under_way: 0, halved: None, not_before: None, throughput }
    }

    #[test]
    fn refusals_halve_it_once_for_all_that_were_sent_together_and_answers_raise_it_slowly() {
        let (mut state, start) = (state(), Instant::now());
        let limit = |state: &State| state.at_once.unwrap();
        (0..5).for_each(|_| state.too_fast(start));
        assert!((limit(&state) - FIRST / 2.0).abs() < 1e-9);
        (1..9).for_each(|n| state.too_fast(start + TOGETHER * n));
        assert!((limit(&state) - 1.0).abs() < 1e-9, "never below one");
        (0..10).for_each(|_| state.succeeded());
        assert!((2.0..8.0).contains(&limit(&state)), "{}", limit(&state));
        (0..10_000).for_each(|_| state.succeeded());
        assert!((limit(&state) - MOST).abs() < 1e-9);
    }

    #[test]
    fn nothing_is_sent_before_the_time_that_was_asked_for() {
        let (mut state, start) = (state(), Instant::now());
        assert_eq!(state.wait(start), None);
        state.leave_alone(Duration::from_secs(2), start);
        state.leave_alone(Duration::from_secs(1), start);
        assert_eq!(state.wait(start), Some(Duration::from_secs(2)));
        assert_eq!(state.wait(start + Duration::from_secs(2)), None);
        state.leave_alone(Duration::MAX, start);
        assert_eq!(state.wait(start), Some(MAX_PAUSE));
    }

    #[test]
    fn whatever_answer_asks_to_be_left_alone_is_obeyed_and_a_429_always_does() {
        let asked = Some(Duration::from_mins(1));
        for (status, retry_after, least, most) in [
            (200, None, 0, 0),
            (503, None, 0, 0),
            (503, asked, 59, 60),
            (429, asked, 59, 60),
            (429, None, 0, 1),
        ] {
            let limit = RateLimit::by_the_minute(0, 0);
            limit.answered(StatusCode::from_u16(status).unwrap(), retry_after);
            let pause = limit.pause();
            let bounds = Duration::from_secs(least)..=Duration::from_secs(most);
            assert!(bounds.contains(&pause), "{status} {retry_after:?}: {pause:?}");
        }
    }

    #[tokio::test]
    async fn who_asks_to_be_left_alone_is_not_ready_and_gives_no_turn() {
        let limit = RateLimit::by_the_minute(0, 0);
        assert!(futures::poll!(std::pin::pin!(limit.ready())).is_ready());
        limit.answered(StatusCode::SERVICE_UNAVAILABLE, Some(Duration::from_mins(1)));
        assert!(futures::poll!(std::pin::pin!(limit.ready())).is_pending());
        assert!(futures::poll!(std::pin::pin!(limit.turn(1))).is_pending());
    }

    #[tokio::test]
    async fn as_many_go_at_once_as_may_and_the_next_when_one_is_done() {
        let limit = RateLimit::adaptive();
        let mut turns = Vec::new();
        for _ in 0..FIRST as usize {
            turns.push(limit.turn(0).await);
        }
        let next = limit.turn(0);
        tokio::pin!(next);
        assert!(futures::poll!(&mut next).is_pending());
        turns.pop();
        next.await;
    }
}
