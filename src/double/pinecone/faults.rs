//! Faults of requests, drawn at random.

use std::time::Duration;

use axum::http::StatusCode;
use rand::RngExt as _;
use rand::rngs::StdRng;
use serde::Serialize;

/// The probability of each fault for a write, from 0 to 1. The sum is at most 1. Reads have only the first
/// three faults.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PineconeFaults {
    /// The answer is 500 or 503, and the request is not applied.
    pub unavailable: f64,
    /// The answer is 429, half of the time with `Retry-After: 1`, and the request is not applied.
    pub rate_limited: f64,
    /// No answer for `hang_for`. A write is applied at some moment of that time, or half of the time never.
    pub hang: f64,
    /// The write is applied, and the answer is 500.
    pub false_error: f64,
    /// The answer is 504 at once, and the write is applied later, within `max_late`.
    pub late: f64,
    /// The write is applied, and the connection breaks without an answer.
    pub drop_connection: f64,
    /// The longest delay of a late write.
    pub max_late: Duration,
    /// How long a request without an answer hangs.
    pub hang_for: Duration,
}

/// The number of requests, and of each fault among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PineconeCounts {
    /// Requests of all kinds, refused ones included.
    pub requests: u64,
    /// Queries for the nearest records.
    pub queries: u64,
    /// Answered with 500 or 503, not applied.
    pub unavailable: u64,
    /// Answered with 429.
    pub rate_limited: u64,
    /// Not answered for `hang_for`.
    pub hung: u64,
    /// Applied, and answered with 500.
    pub lied: u64,
    /// Applied after the answer.
    pub late: u64,
    /// Applied, and the connection broken.
    pub dropped: u64,
}

/// The drawn outcome of one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum FaultDecision {
    /// No fault.
    Served,
    Unavailable(StatusCode),
    RateLimited {
        says_when: bool,
    },
    /// A write is applied after this time, or never.
    Hung {
        hold: Duration,
        applied: Option<Duration>,
    },
    FalseError,
    Late(Duration),
    Dropped,
}

impl PineconeFaults {
    /// Draws the outcome of a request.
    pub(super) fn draw(&self, rng: &mut StdRng, is_write: bool) -> FaultDecision {
        // One draw decides among all faults, so that with probabilities of sum 1 every request has a fault.
        let mut left = rng.random::<f64>();
        let mut is = |chance: f64| {
            let hit = (0.0..chance).contains(&left);
            left -= chance;
            hit
        };
        if is(self.unavailable) {
            let states = [StatusCode::INTERNAL_SERVER_ERROR, StatusCode::SERVICE_UNAVAILABLE];
            FaultDecision::Unavailable(states[usize::from(rng.random::<bool>())])
        } else if is(self.rate_limited) {
            FaultDecision::RateLimited { says_when: rng.random() }
        } else if is(self.hang) {
            let after = self.hang_for.mul_f64(rng.random());
            FaultDecision::Hung { hold: self.hang_for, applied: rng.random::<bool>().then_some(after) }
        } else if !is_write {
            FaultDecision::Served
        } else if is(self.false_error) {
            FaultDecision::FalseError
        } else if is(self.late) {
            FaultDecision::Late(self.max_late.mul_f64(rng.random()))
        } else if is(self.drop_connection) {
            FaultDecision::Dropped
        } else {
            FaultDecision::Served
        }
    }
}

impl PineconeCounts {
    pub(super) fn add(&mut self, decision: FaultDecision) {
        let count = match decision {
            FaultDecision::Served => return,
            FaultDecision::Unavailable(_) => &mut self.unavailable,
            FaultDecision::RateLimited { .. } => &mut self.rate_limited,
            FaultDecision::Hung { .. } => &mut self.hung,
            FaultDecision::FalseError => &mut self.lied,
            FaultDecision::Late(_) => &mut self.late,
            FaultDecision::Dropped => &mut self.dropped,
        };
        *count += 1;
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;

    #[test]
    fn one_seed_gives_one_sequence_and_chances_of_one_spare_none() {
        let faults = PineconeFaults { unavailable: 0.5, rate_limited: 0.5, ..PineconeFaults::default() };
        let draw = |seed| {
            let mut rng = StdRng::seed_from_u64(seed);
            (0..1_000).map(|n| faults.draw(&mut rng, n % 2 == 0)).collect::<Vec<_>>()
        };
        let fates = draw(7);
        assert_eq!(fates, draw(7));
        assert_ne!(fates, draw(8));
        assert!(!fates.contains(&FaultDecision::Served));
    }

    #[test]
    fn reads_are_never_lied_to() {
        let faults =
            PineconeFaults { false_error: 0.4, late: 0.3, drop_connection: 0.3, ..PineconeFaults::default() };
        let mut rng = StdRng::seed_from_u64(1);
        assert!((0..100).all(|_| faults.draw(&mut rng, false) == FaultDecision::Served));
        assert!((0..100).all(|_| faults.draw(&mut rng, true) != FaultDecision::Served));
    }
}
