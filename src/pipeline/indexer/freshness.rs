//! When what was written is found by queries, for an index where that comes later.
//!
//! Nothing waits for it: changes are acknowledged once they are written. Only their freshness is counted
//! when a query would find them, and not before.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use super::{Hint, Indexer};
use crate::pipeline::change::Lane;
use crate::pipeline::index::Visibility;

/// Changes whose freshness is awaited at most: more are not counted.
const MAX_AWAITED: usize = 100_000;

/// What is not found for this long is not counted: the index does not tell, or has lost it.
const GIVEN_UP: Duration = Duration::from_mins(10);

/// Changes that were written together.
pub(super) struct Awaited {
    /// A query that has seen this far finds them.
    mark: u64,
    lane: Lane,
    /// The database's clock, and ours, when they were closed.
    closed: (i64, Duration),
    /// When their statements ran, by the database's clock.
    stated_us: Vec<i64>,
}

/// Changes that are awaited, in the order of their marks.
#[derive(Default)]
pub(super) struct AllAwaited {
    queue: VecDeque<Awaited>,
    changes: usize,
}

impl AllAwaited {
    fn push(&mut self, awaited: Awaited) {
        if self.changes + awaited.stated_us.len() > MAX_AWAITED {
            return;
        }
        self.changes += awaited.stated_us.len();
        self.queue.push_back(awaited);
    }

    /// Takes those that a query finds that has seen so far.
    fn take(&mut self, seen: u64, now: Duration) -> Vec<Awaited> {
        let found = self.queue.iter().take_while(|awaited| awaited.mark <= seen).count();
        let taken: Vec<Awaited> = self.queue.drain(..found).collect();
        let old = |awaited: &&Awaited| now.saturating_sub(awaited.closed.1) > GIVEN_UP;
        let given_up = self.queue.iter().take_while(old).count();
        self.queue.drain(..given_up);
        self.changes = self.queue.iter().map(|awaited| awaited.stated_us.len()).sum();
        taken
    }
}

impl Indexer {
    fn awaited(&self) -> MutexGuard<'_, AllAwaited> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the freshness of ids that were written: now, or once queries find them.
    pub(super) fn written<'a>(
        &self,
        lane: Lane,
        ids: impl Iterator<Item = &'a str>,
        hints: &BTreeMap<String, Hint>,
        closed: (i64, Duration),
    ) {
        let mark = self.index.visibility().map_or(0, Visibility::written);
        if mark == 0 {
            self.fresh(lane, ids, hints, closed);
            return;
        }
        let stated_us = ids.filter_map(|id| hints.get(id)).map(|hint| hint.stated_us).collect();
        self.awaited().push(Awaited { mark, lane, closed, stated_us });
    }

    /// Asks the index how far its queries are while anything is awaited.
    pub(super) async fn watch(&self) {
        let Some(visibility) = self.index.visibility() else { return };
        loop {
            self.clock().sleep(self.options.look).await;
            self.look(visibility).await;
        }
    }

    pub(super) async fn look(&self, visibility: &dyn Visibility) {
        if self.awaited().queue.is_empty() {
            return;
        }
        let seen = match visibility.seen().await {
            Ok(seen) => seen,
            Err(error) => {
                tracing::debug!(%error, "cannot ask the index how far its queries are");
                return;
            }
        };
        let now = self.clock().now();
        for awaited in self.awaited().take(seen, now) {
            let (clock_us, at) = awaited.closed;
            let since_us = now.saturating_sub(at).as_micros() as i64;
            let ages =
                awaited.stated_us.iter().map(|stated| ((clock_us + since_us - stated) / 1000).max(0) as u64);
            self.meter.fresh(awaited.lane, ages);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn awaited(mark: u64, at_s: u64, changes: usize) -> Awaited {
        Awaited {
            mark,
            lane: Lane::Live,
            closed: (0, Duration::from_secs(at_s)),
            stated_us: vec![0; changes],
        }
    }

    #[test]
    fn only_what_queries_have_seen_is_taken_and_the_rest_is_bounded() {
        let mut all = AllAwaited::default();
        (1..=3).for_each(|mark| all.push(awaited(mark, 0, 10)));
        all.push(awaited(4, 0, MAX_AWAITED));
        assert_eq!(all.changes, 30, "more than may be awaited");
        assert_eq!(all.take(0, Duration::ZERO).len(), 0);
        let taken: Vec<u64> = all.take(2, Duration::ZERO).iter().map(|awaited| awaited.mark).collect();
        assert_eq!((taken, all.changes), (vec![1, 2], 10));
        assert_eq!(all.take(2, GIVEN_UP + Duration::from_secs(1)).len(), 0);
        assert_eq!((all.queue.len(), all.changes), (0, 0), "given up");
    }
}
