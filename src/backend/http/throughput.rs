//! Limits on requests and tokens in a minute. Written by hand, because governor refuses a request that is
//! larger than its burst; here such a request is sent, and later requests wait for it.

use std::time::{Duration, Instant};

const MINUTE_S: f64 = 60.0;

/// One limit. The amount left may be negative.
#[derive(Debug)]
struct Bucket {
    per_second: f64,
    /// The burst: what is allowed in a second, and at least 1.
    most: f64,
    left: f64,
}

impl Bucket {
    fn new(per_minute: f64) -> Option<Self> {
        let per_second = per_minute / MINUTE_S;
        (per_minute > 0.0).then_some(Self {
            per_second,
            most: per_second.max(1.0),
            left: per_second.max(1.0),
        })
    }

    /// Takes `amount`, and returns how long to wait until `left` is no longer negative.
    fn take(&mut self, amount: f64, passed: Duration) -> Duration {
        self.left = (self.left + passed.as_secs_f64() * self.per_second).min(self.most) - amount;
        Duration::from_secs_f64((-self.left / self.per_second).max(0.0))
    }
}

/// Limits on requests and tokens (Turner's leaky bucket as a meter, 1986). Each request is counted before it
/// is sent, and waits as long as the amount left is negative.
#[derive(Debug)]
pub(super) struct Throughput {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    at: Instant,
}

impl Throughput {
    /// Limits for a minute; 0 means no limit.
    pub(super) fn new(requests: u32, tokens: u64) -> Self {
        Self {
            requests: Bucket::new(f64::from(requests)),
            tokens: Bucket::new(tokens as f64),
            at: Instant::now(),
        }
    }

    /// Counts a request with this many tokens, and returns how long it must wait.
    pub(super) fn reserve(&mut self, tokens: u64, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.at);
        self.at = now;
        let requests = self.requests.as_mut().map(|bucket| bucket.take(1.0, passed));
        let tokens = self.tokens.as_mut().map(|bucket| bucket.take(tokens as f64, passed));
        requests.max(tokens).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minute_holds_no_more_than_is_allowed() {
        let (mut throughput, start) = (Throughput::new(600, 0), Instant::now());
        let waits: Vec<Duration> = (0..100).map(|_| throughput.reserve(7, start)).collect();
        // Ten at once, and then ten a second.
        assert!(waits[..10].iter().all(Duration::is_zero));
        assert!((waits[99].as_secs_f64() - 9.0).abs() < 0.01, "{:?}", waits[99]);
        let later = throughput.reserve(7, start + Duration::from_mins(1));
        assert!(later.is_zero(), "time pays");
    }

    #[test]
    fn the_tighter_of_both_bounds_holds_and_none_is_none() {
        let (mut throughput, start) = (Throughput::new(60_000, 6_000), Instant::now());
        assert!(throughput.reserve(100, start).is_zero());
        assert!((throughput.reserve(600, start).as_secs_f64() - 6.0).abs() < 0.01);
        let mut free = Throughput::new(0, 0);
        assert!((0..1_000).all(|_| free.reserve(1_000_000, start).is_zero()));
    }
}
