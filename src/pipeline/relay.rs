//! The relay: committed changes from the outbox to the queue.
//!
//! The step claims packed outbox rows, chooses a lane for each, keeps one entry an id, packs them
//! into messages and hands these to the queue. A crash anywhere repeats changes and loses none,
//! since a row leaves the outbox only with or after its message.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::change::{Group, JOB_VERSION, Job, Lane};
use super::clock::Clock;
use super::failure::{Class, Result};
use super::fault::{self, Board};
use super::outbox::{ClaimRequest, Outbox, OutboxRow, Transferred};
use super::queue::QueueStats;
use super::retry::Backoff;

/// Small outbox rows in one claim: an outbox calls rows of at most 100 ids small, so some 10 MB at worst.
const SMALL_ROWS: usize = 2_000;

/// Rows of large statements in one claim: with 500 ids each 100,000 changes, some 5 MB.
const LARGE_ROWS: usize = 200;

/// How long a count of the backlog is believed while changes come.
const BACKLOG_AGE: Duration = Duration::from_secs(1);

/// The same while none come: what was counted can only have become less, and a count may cost a call.
const IDLE_BACKLOG_AGE: Duration = Duration::from_mins(1);

/// What the relay needs of the settings.
#[derive(Clone, Debug)]
pub struct Options {
    /// The source's name, for messages.
    pub source: String,
    /// Changes in one message at most.
    pub pack: usize,
    /// A transaction with more changes is bulk.
    pub bulk_threshold: u64,
    /// While more changes wait in the live lane, further ones are bulk.
    pub live_bound: u64,
    /// How often the outbox is looked at when no wake-up comes.
    pub poll: Duration,
}

/// Moves changes of one source from its outbox to the queue.
pub struct Relay {
    outbox: Arc<dyn Outbox>,
    queue: Arc<dyn QueueStats>,
    clock: Arc<dyn Clock>,
    options: Options,
    live_backlog: AtomicU64,
    bulk_backlog: AtomicU64,
    counted: Mutex<Option<Duration>>,
    idle: AtomicBool,
    faults: Arc<Board>,
}

impl Relay {
    /// A relay of an outbox, which sends to a queue that is this full.
    #[must_use]
    pub fn new(
        outbox: Arc<dyn Outbox>,
        queue: Arc<dyn QueueStats>,
        clock: Arc<dyn Clock>,
        options: Options,
    ) -> Self {
        Self {
            outbox,
            queue,
            clock,
            options,
            live_backlog: AtomicU64::new(0),
            bulk_backlog: AtomicU64::new(0),
            counted: Mutex::default(),
            idle: AtomicBool::new(false),
            faults: Arc::default(),
        }
    }

    /// The same, telling a board when nothing can be queued.
    #[must_use]
    pub fn reporting(self, faults: Arc<Board>) -> Self {
        Self { faults, ..self }
    }

    /// Moves one claim; nothing moved means that the outbox was empty.
    pub async fn step(&self) -> Result<Transferred> {
        self.count_backlog().await?;
        let live = self.live_backlog.load(Ordering::Relaxed);
        let room = self.options.live_bound.saturating_sub(live);
        let pack = |rows| pack(rows, &self.options, room);
        // In the outbox a load is stepped over; in a queue that the lanes share it stands in the way.
        let bulk = self.bulk_backlog.load(Ordering::Relaxed);
        let is_full = self.queue.shared_bound().is_some_and(|bound| live + bulk >= bound);
        let large_rows = if is_full { 0 } else { LARGE_ROWS };
        let request = ClaimRequest {
            small_rows: SMALL_ROWS,
            large_rows,
            large_transaction: self.options.bulk_threshold,
        };
        let done = self.outbox.transfer(request, &pack).await?;
        self.live_backlog.fetch_add(done.live, Ordering::Relaxed);
        self.bulk_backlog.fetch_add(done.bulk, Ordering::Relaxed);
        self.idle.store(done.rows == 0 && !is_full, Ordering::Relaxed);
        Ok(done)
    }

    /// Steps until `stop`, or with `until_idle` until the outbox is empty.
    pub async fn run(&self, stop: &CancellationToken, until_idle: bool) -> Result<()> {
        let mut backoff = Backoff::default();
        let mut has_worked = false;
        while !stop.is_cancelled() {
            let stepped = self.step().await;
            has_worked |= stepped.is_ok();
            if stepped.is_ok() && backoff.failures() > 0 {
                tracing::info!(failures = backoff.failures(), "changes are queued again");
                self.faults.clear(fault::RELAY);
            }
            match stepped {
                Ok(done) if done.rows == 0 => {
                    backoff.reset();
                    if until_idle && self.idle.load(Ordering::Relaxed) {
                        break;
                    }
                    stop.run_until_cancelled(self.outbox.wait(self.options.poll)).await;
                }
                Ok(done) => {
                    backoff.reset();
                    tracing::debug!(
                        changes = done.changes,
                        live = done.live,
                        bulk = done.bulk,
                        capture_lag_ms = done.oldest_ms,
                        "changes queued"
                    );
                }
                // What was there comes back: a database that is restored, a right that is granted.
                Err(error)
                    if error.class == Class::Fatal && (error.of_process || until_idle || !has_worked) =>
                {
                    return Err(error);
                }
                Err(error) => {
                    let pause = backoff.next(&error, &*self.clock);
                    let retry_in_ms = pause.as_millis() as u64;
                    // Told once, and shown for as long as it lasts.
                    if backoff.failures() == 1 {
                        tracing::warn!(%error, class = %error.class, retry_in_ms, "cannot queue changes: trying again until it works");
                    } else {
                        tracing::debug!(%error, class = %error.class, retry_in_ms, "cannot queue changes");
                    }
                    if error.class == Class::Fatal || backoff.failures() >= fault::IN_A_ROW {
                        self.faults.report(fault::RELAY, format_args!("changes cannot be queued: {error}"));
                    }
                    stop.run_until_cancelled(self.clock.sleep(pause)).await;
                }
            }
        }
        Ok(())
    }

    async fn count_backlog(&self) -> Result<()> {
        let mut counted = self.counted.lock().await;
        let age = if self.idle.load(Ordering::Relaxed) { IDLE_BACKLOG_AGE } else { BACKLOG_AGE };
        if counted.is_none_or(|at| self.clock.now().saturating_sub(at) > age) {
            self.live_backlog.store(self.queue.backlog(Lane::Live).await?.total(), Ordering::Relaxed);
            if self.queue.shared_bound().is_some() {
                self.bulk_backlog.store(self.queue.backlog(Lane::Bulk).await?.total(), Ordering::Relaxed);
            }
            *counted = Some(self.clock.now());
        }
        Ok(())
    }
}

/// Chooses lanes, keeps one entry an id, and packs messages of at most `options.pack` changes.
///
/// A transaction with more changes than the threshold is bulk, and so is what exceeds the live
/// lane's `room`. Of an id with several entries the live one stays, else the newest.
#[must_use]
pub fn pack(rows: Vec<OutboxRow>, options: &Options, room: u64) -> Vec<Job> {
    let mut rows = rows;
    rows.sort_by_key(|row| row.seq);
    let mut live_changes = 0;
    let lanes: Vec<Lane> = rows
        .iter()
        .map(|row| {
            let changes = row.ids.len() as u64;
            if row.xid_changes.max(changes) > options.bulk_threshold || live_changes + changes > room {
                return Lane::Bulk;
            }
            live_changes += changes;
            Lane::Live
        })
        .collect();
    // Rows are in order, so a later entry of the same lane is newer.
    let mut keep: HashMap<&str, usize> = HashMap::new();
    for (at, row) in rows.iter().enumerate() {
        for id in &row.ids {
            let kept = keep.entry(id).or_insert(at);
            if lanes[at] <= lanes[*kept] {
                *kept = at;
            }
        }
    }
    let mut jobs = Vec::new();
    for lane in Lane::ALL {
        let mut open = Packing::default();
        for (at, row) in rows.iter().enumerate().filter(|(at, _)| lanes[*at] == lane) {
            let mut once: Vec<&String> =
                row.ids.iter().filter(|id| keep.get(id.as_str()) == Some(&at)).collect();
            if row.ids.len() > 1 {
                once.sort_unstable();
                once.dedup();
            }
            let mut ids = once.as_slice();
            while !ids.is_empty() {
                let (now, later) = ids.split_at(ids.len().min(options.pack - open.changes));
                open.push(row, now);
                ids = later;
                if open.changes == options.pack {
                    jobs.push(std::mem::take(&mut open).close(&options.source, lane));
                }
            }
        }
        if open.changes > 0 {
            jobs.push(open.close(&options.source, lane));
        }
    }
    jobs
}

/// A message being filled.
#[derive(Default)]
struct Packing {
    groups: Vec<(i64, Group)>,
    changes: usize,
}

impl Packing {
    fn push(&mut self, row: &OutboxRow, ids: &[&String]) {
        self.changes += ids.len();
        let ids = ids.iter().map(|id| (*id).clone()).collect();
        self.groups.push((row.changed_at_us, Group { version: row.seq, op: row.op, after_ms: 0, ids }));
    }

    fn close(self, source: &str, lane: Lane) -> Job {
        let oldest_us = self.groups.iter().map(|(at, _)| *at).min().unwrap_or_default();
        let groups = self
            .groups
            .into_iter()
            .map(|(at, group)| Group { after_ms: ((at - oldest_us) / 1000) as u64, ..group })
            .collect();
        Job {
            v: JOB_VERSION,
            source: source.into(),
            lane,
            oldest: Timestamp::from_microsecond(oldest_us).unwrap_or(Timestamp::UNIX_EPOCH),
            groups,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::pipeline::change::Op;

    fn options(pack: usize) -> Options {
        Options {
            source: "products".into(),
            pack,
            bulk_threshold: 10,
            live_bound: 1000,
            poll: Duration::from_millis(100),
        }
    }

    fn row(seq: i64, ids: &[&str], xid_changes: u64) -> OutboxRow {
        OutboxRow {
            seq,
            op: Op::Upsert,
            ids: ids.iter().map(|id| (*id).into()).collect(),
            xid: 7,
            changed_at_us: 1_700_000_000_000_000 + seq * 1_000,
            xid_changes,
        }
    }

    #[test]
    fn the_newest_entry_of_an_id_stays_and_a_live_one_wins() {
        let jobs = pack(
            vec![row(1, &["a", "b"], 2), row(3, &["b"], 1), row(2, &["b", "c"], 99)],
            &options(500),
            100,
        );
        assert_eq!(jobs.len(), 2);
        let of = |job: &Job| -> Vec<(i64, Vec<String>)> {
            job.groups.iter().map(|g| (g.version, g.ids.clone())).collect()
        };
        assert_eq!(
            (jobs[0].lane, of(&jobs[0])),
            (Lane::Live, vec![(1, vec!["a".into()]), (3, vec!["b".into()])])
        );
        assert_eq!(jobs[0].groups[1].after_ms, 2);
        assert_eq!((jobs[1].lane, of(&jobs[1])), (Lane::Bulk, vec![(2, vec!["c".into()])]));
    }

    #[test]
    fn what_exceeds_the_live_lane_is_bulk() {
        let rows = (0..20).map(|seq| row(seq, &[&format!("{seq}")], 1)).collect();
        let jobs = pack(rows, &options(500), 15);
        let changes = |lane| jobs.iter().filter(|j| j.lane == lane).map(Job::changes).sum::<usize>();
        assert_eq!((changes(Lane::Live), changes(Lane::Bulk)), (15, 5));
    }

    proptest! {
        #[test]
        fn every_id_travels_exactly_once_in_full_messages(
            rows in proptest::collection::vec((proptest::collection::vec(0_u32..60, 1..30), 1_u64..40), 0..25),
            pack_size in 1_usize..50,
            room in 0_u64..100,
        ) {
            let rows: Vec<OutboxRow> = rows.into_iter().enumerate().map(|(seq, (ids, xid_changes))| {
                let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
                row(seq as i64, &ids.iter().map(String::as_str).collect::<Vec<_>>(), xid_changes)
            }).collect();
            let expected: HashSet<String> = rows.iter().flat_map(|row| row.ids.clone()).collect();
            let jobs = pack(rows, &options(pack_size), room);
            let sent: Vec<String> = jobs.iter().flat_map(|j| &j.groups).flat_map(|g| g.ids.clone()).collect();
            prop_assert_eq!(sent.len(), expected.len());
            prop_assert_eq!(sent.into_iter().collect::<HashSet<_>>(), expected);
            let live: usize = jobs.iter().filter(|j| j.lane == Lane::Live).map(Job::changes).sum();
            prop_assert!(live as u64 <= room);
            for lane in Lane::ALL {
                let sizes: Vec<usize> = jobs.iter().filter(|j| j.lane == lane).map(Job::changes).collect();
                for (at, size) in sizes.iter().enumerate() {
                    prop_assert!(*size == pack_size || (at + 1 == sizes.len() && *size <= pack_size));
                }
            }
        }
    }
}
