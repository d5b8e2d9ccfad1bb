//! Facts that a process keeps between two checks of the index: failed builds, the time of an exact search.

use std::time::Duration;

/// The pause after a failed build. Each further failure doubles the pause.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_hours(1);

/// Failures of past builds.
#[derive(Debug, Default)]
pub(super) struct BuildHistory {
    failures: u32,
    /// No build starts before this time.
    pub(super) not_before: Duration,
    /// The reason that was logged last.
    logged: Option<String>,
}

impl BuildHistory {
    /// Records a failed build. Returns the pause before the next build, and whether the reason is new.
    pub(super) fn failed(&mut self, reason: &str, now: Duration) -> (Duration, bool) {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(16)).min(LONGEST_PAUSE);
        self.failures += 1;
        self.not_before = now + pause;
        let is_news = self.logged.as_deref() != Some(reason);
        self.logged = Some(reason.to_owned());
        (pause, is_news)
    }
}

/// Observations of the table of vectors.
#[derive(Debug, Default)]
pub(super) struct Observations {
    /// Rows when an exact search was timed, and the time.
    pub(super) exact: Option<(u64, Duration)>,
}

impl Observations {
    /// The time of an exact search among this many rows, if one was timed.
    pub(super) fn exact_at(&self, rows: u64) -> Option<Duration> {
        let (timed, took) = self.exact?;
        Some(took.mul_f64(rows as f64 / timed.max(1) as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_a_reason_is_news_once() {
        let mut builds = BuildHistory::default();
        let seconds: Vec<(u64, bool)> = (0..4)
            .map(|_| builds.failed("timeout", Duration::ZERO))
            .map(|(pause, is_news)| (pause.as_secs(), is_news))
            .collect();
        assert_eq!(seconds, [(10, true), (20, false), (40, false), (80, false)]);
        (0..40).for_each(|_| assert!(builds.failed("other", Duration::ZERO).0 <= LONGEST_PAUSE));
        assert_eq!(builds.not_before, LONGEST_PAUSE);
    }
}
