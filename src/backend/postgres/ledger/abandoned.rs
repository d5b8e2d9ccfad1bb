//! Measures, by this process's own clock, for how long attempts have been abandoned.

use std::collections::HashMap;
use std::time::Duration;

/// For each attempt: when it was abandoned by the database's clock, if that is known, and since when this
/// process has seen it as abandoned, by its own clock.
#[derive(Debug, Default)]
pub(super) struct Abandoned(HashMap<String, (Option<i64>, Duration)>);

impl Abandoned {
    /// Records that this process abandoned an attempt just now.
    pub(super) fn record(&mut self, write_id: &str, now: Duration) {
        self.0.insert(write_id.to_owned(), (None, now));
    }

    /// Keeps only these attempts. The time of one that is new, or was abandoned again, starts now.
    pub(super) fn keep(&mut self, there: &HashMap<String, i64>, now: Duration) {
        self.0.retain(|write_id, _| there.contains_key(write_id));
        for (write_id, at) in there {
            let (known, seen) = self.0.entry(write_id.clone()).or_insert((Some(*at), now));
            if known.is_some_and(|known| known < *at) {
                *seen = now;
            }
            *known = Some(*at);
        }
    }

    /// How long an attempt has been seen as abandoned.
    pub(super) fn seen_for(&self, write_id: &str, now: Duration) -> Duration {
        self.0.get(write_id).map_or(Duration::ZERO, |(_, seen)| now.saturating_sub(*seen))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(second: u64) -> Duration {
        Duration::from_secs(second)
    }

    #[test]
    fn time_is_counted_from_the_first_sight_and_anew_when_it_is_abandoned_again() {
        let mut all = Abandoned::default();
        let there = |pairs: &[(&str, i64)]| pairs.iter().map(|(id, at)| ((*id).to_owned(), *at)).collect();
        all.record("own", at(1));
        all.keep(&there(&[("own", 10), ("other", 7)]), at(5));
        assert_eq!((all.seen_for("own", at(8)), all.seen_for("other", at(8))), (at(7), at(3)));
        // The database's clock went back: the attempt was not abandoned again.
        all.keep(&there(&[("own", 9), ("other", 70)]), at(10));
        assert_eq!((all.seen_for("own", at(12)), all.seen_for("other", at(12))), (at(11), at(2)));
        all.keep(&there(&[("other", 70)]), at(20));
        assert_eq!((all.seen_for("own", at(30)), all.seen_for("other", at(30))), (at(0), at(20)));
    }
}
