//! Freshness: the time from a change's statement to the moment at which a query finds the change.
//!
//! Writers report to the tracker which changes they wrote, and when. The tracker decides when a query finds
//! them: at once, or, for an index whose queries are behind its writes, once queries have reached the write.
//! No work waits for this: changes are acknowledged once they are written.
//!
//! An index whose queries are behind is a service, and each question how far they are is paid for. So only
//! samples are followed: what was written since the last look, whenever it is this worker's turn
//! ([`FreshnessTurns`]). Nothing that was written longer ago is asked about, because nobody would know how
//! long ago queries found it. The questions about a write come less often as it grows older.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use super::batch::Hints;
use crate::pipeline::change::Lane;
use crate::pipeline::clock::Clock;
use crate::pipeline::index::{FreshnessTurns, IndexFreshness, VectorIndex};
use crate::pipeline::metrics::Metrics;
use crate::pipeline::trace::GroupTrace;

/// Changes that are followed at most: more are not counted.
const MAX_PENDING: usize = 100_000;

/// A write that is not found for this long is not counted: the index does not report it, or has lost it.
const GIVE_UP_AFTER: Duration = Duration::from_mins(10);

/// A write is asked about again after this part of its age, so that a slow index is not asked more often than
/// a fast one, and the time is right to this part.
const PAUSE: u32 = 4;

/// Changes that were written together.
struct Write {
    lane: Lane,
    /// The database's clock when the write was committed or closed, in microseconds since the epoch.
    committed_us: i64,
    /// This process's clock at that moment.
    at: Duration,
    /// When their statements ran, by the database's clock.
    changed_at_us: Vec<i64>,
    /// The traces that it belongs to.
    trace: GroupTrace,
}

impl Write {
    /// How old the changes are now, in milliseconds.
    fn ages(&self, now: Duration) -> impl Iterator<Item = u64> + '_ {
        // Both times are the database's, so that no clock has to agree with another.
        let now_us = self.committed_us + now.saturating_sub(self.at).as_micros() as i64;
        self.changed_at_us.iter().map(move |changed_at_us| ((now_us - changed_at_us) / 1000).max(0) as u64)
    }
}

/// Writes that queries do not find yet, in the order of their positions.
#[derive(Default)]
struct PendingWrites {
    /// A query that has reached the position finds the write.
    queue: VecDeque<(u64, Write)>,
    changes: usize,
}

/// What a tracker knows of its writes.
#[derive(Default)]
struct Tracked {
    /// Written since the last look.
    recent: PendingWrites,
    /// Samples that are followed.
    followed: PendingWrites,
    /// When the index is asked again, by this process's clock.
    next_question: Duration,
}

impl Tracked {
    /// Follows writes from now on.
    fn follow(&mut self, writes: PendingWrites) {
        for (position, write) in writes.queue {
            self.followed.push(position, write);
        }
        self.next_question = Duration::ZERO;
    }

    /// Takes the samples that queries up to this position find, and notes when to ask about the others.
    fn asked(&mut self, searchable_up_to: u64, now: Duration, every: Duration) -> Vec<Write> {
        let found = self.followed.take(searchable_up_to, now);
        self.next_question = now + self.followed.pause(now, every);
        found
    }
}

impl PendingWrites {
    fn push(&mut self, position: u64, write: Write) {
        if self.changes + write.changed_at_us.len() > MAX_PENDING {
            return;
        }
        self.changes += write.changed_at_us.len();
        self.queue.push_back((position, write));
    }

    /// Whether there are changes of a lane.
    fn has(&self, lane: Lane) -> bool {
        self.queue.iter().any(|(_, write)| write.lane == lane && !write.changed_at_us.is_empty())
    }

    /// How long to wait until the next question: by the age of the newest write.
    fn pause(&self, now: Duration, every: Duration) -> Duration {
        self.queue.back().map_or(every, |(_, write)| every.max(now.saturating_sub(write.at) / PAUSE))
    }

    /// Takes the writes that a query up to this position finds.
    fn take(&mut self, searchable_up_to: u64, now: Duration) -> Vec<Write> {
        let found = self.queue.iter().take_while(|(position, _)| *position <= searchable_up_to).count();
        let taken = self.queue.drain(..found).map(|(_, write)| write).collect();
        let old = |(_, write): &&(u64, Write)| now.saturating_sub(write.at) > GIVE_UP_AFTER;
        let given_up = self.queue.iter().take_while(old).count();
        self.queue.drain(..given_up);
        self.changes = self.queue.iter().map(|(_, write)| write.changed_at_us.len()).sum();
        taken
    }
}

/// Measures the freshness of what one process writes.
pub(super) struct FreshnessTracker {
    index: Arc<dyn VectorIndex>,
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
    /// How often an index whose queries are behind its writes is asked at most.
    every: Duration,
    /// Decides what is followed; without it, everything is.
    turns: OnceLock<Arc<dyn FreshnessTurns>>,
    tracked: Mutex<Tracked>,
}

impl FreshnessTracker {
    pub(super) fn new(
        index: Arc<dyn VectorIndex>,
        metrics: Arc<Metrics>,
        clock: Arc<dyn Clock>,
        every: Duration,
    ) -> Self {
        Self { index, metrics, clock, every, turns: OnceLock::new(), tracked: Mutex::default() }
    }

    /// Follows only what it is this worker's turn to follow. Call it before any write.
    pub(super) fn take_turns(&self, turns: Arc<dyn FreshnessTurns>) {
        let given = self.turns.set(turns);
        debug_assert!(given.is_ok(), "turns were given before");
    }

    fn tracked(&self) -> MutexGuard<'_, Tracked> {
        self.tracked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records ids that were written just now. `committed_us` is the database's clock when the write
    /// was committed.
    pub(super) fn record<'a>(
        &self,
        lane: Lane,
        ids: impl Iterator<Item = &'a str>,
        hints: &Hints,
        committed_us: i64,
        trace: GroupTrace,
    ) {
        let at = self.clock.now();
        let changed_at_us = ids.filter_map(|id| hints.get(id)).map(|hint| hint.changed_at_us).collect();
        let write = Write { lane, committed_us, at, changed_at_us, trace };
        match self.index.freshness().map_or(0, IndexFreshness::last_written) {
            0 => self.count(&write, at),
            position => self.tracked().recent.push(position, write),
        }
    }

    /// Counts a write that queries find now.
    fn count(&self, write: &Write, now: Duration) {
        self.metrics.record_freshness(write.lane, write.ages(now));
        write.trace.took("searchable", now.saturating_sub(write.at));
    }

    /// Follows samples for as long as it is polled.
    pub(super) async fn poll(&self) {
        if self.index.freshness().is_none() {
            return;
        }
        loop {
            self.clock.sleep(self.every).await;
            self.look(false).await;
        }
    }

    /// Decides whether what was written since the last look is followed, and counts the samples that queries
    /// find now. Asks the index if that is due, or at the last look.
    pub(super) async fn look(&self, is_last: bool) {
        let Some(freshness) = self.index.freshness() else { return };
        let recent = std::mem::take(&mut self.tracked().recent);
        if self.is_sampled(&recent).await {
            self.tracked().follow(recent);
        }
        {
            let tracked = self.tracked();
            let is_due = is_last || self.clock.now() >= tracked.next_question;
            if tracked.followed.queue.is_empty() || !is_due {
                return;
            }
        }
        let searchable_up_to = freshness.searchable_up_to().await.unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot ask the index how far its queries are");
            0
        });
        let now = self.clock.now();
        let found = self.tracked().asked(searchable_up_to, now, self.every);
        for write in &found {
            self.count(write, now);
        }
    }

    /// Whether it is this worker's turn in a lane of these writes.
    async fn is_sampled(&self, writes: &PendingWrites) -> bool {
        let mut is_sampled = false;
        for lane in Lane::ALL.into_iter().filter(|lane| writes.has(*lane)) {
            is_sampled |= match self.turns.get() {
                None => true,
                Some(turns) => turns.take(lane).await.unwrap_or_else(|error| {
                    tracing::debug!(%error, "cannot learn whether to measure freshness");
                    false
                }),
            };
        }
        is_sampled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(at_s: u64, changes: usize) -> Write {
        Write {
            lane: Lane::Live,
            committed_us: 0,
            at: Duration::from_secs(at_s),
            changed_at_us: vec![0; changes],
            trace: GroupTrace::default(),
        }
    }

    #[test]
    fn only_what_queries_find_is_taken_and_the_rest_is_bounded() {
        let mut pending = PendingWrites::default();
        (1..=3).for_each(|position| pending.push(position, write(position, 10)));
        pending.push(4, write(0, MAX_PENDING));
        assert_eq!(pending.changes, 30, "more than may be pending");
        assert_eq!(pending.take(0, Duration::ZERO).len(), 0);
        let taken: Vec<Duration> = pending.take(2, Duration::ZERO).iter().map(|write| write.at).collect();
        assert_eq!((taken, pending.changes), (vec![Duration::from_secs(1), Duration::from_secs(2)], 10));
        assert_eq!(pending.take(2, GIVE_UP_AFTER + Duration::from_secs(4)).len(), 0);
        assert_eq!((pending.queue.len(), pending.changes), (0, 0), "given up");
    }

    #[test]
    fn questions_about_a_write_come_less_often_as_it_grows_older() {
        let every = Duration::from_secs(1);
        let mut tracked = Tracked::default();
        let mut recent = PendingWrites::default();
        recent.push(7, write(0, 1));
        assert!(recent.has(Lane::Live) && !recent.has(Lane::Bulk));
        tracked.follow(recent);
        let (mut now, mut questions) = (Duration::ZERO, 0);
        while !tracked.followed.queue.is_empty() {
            assert!(tracked.next_question <= now + every.max(now / PAUSE));
            now = now.max(tracked.next_question);
            tracked.asked(6, now, every);
            questions += 1;
        }
        assert!((20..40).contains(&questions), "{questions} until it is given up");
        assert!(now > GIVE_UP_AFTER, "{now:?}");
        // What is new is asked about at once.
        let mut recent = PendingWrites::default();
        recent.push(8, write(now.as_secs(), 1));
        tracked.follow(recent);
        assert_eq!(tracked.next_question, Duration::ZERO);
        assert_eq!(tracked.asked(8, now, every).len(), 1);
    }

    #[test]
    fn ages_are_by_the_databases_clock() {
        let write =
            Write { committed_us: 5_000_000, changed_at_us: vec![4_000_000, 9_000_000], ..write(2, 0) };
        assert_eq!(write.ages(Duration::from_secs(2)).collect::<Vec<_>>(), [1_000, 0]);
        assert_eq!(write.ages(Duration::from_secs(5)).collect::<Vec<_>>(), [4_000, 0]);
    }
}
