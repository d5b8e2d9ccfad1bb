//! Packs outbox rows into messages.

use std::collections::HashMap;

use jiff::Timestamp;

use super::lane::choose_lane;
use super::options::RelayOptions;
use crate::pipeline::change::{Group, JOB_VERSION, Job, Lane};
use crate::pipeline::outbox::OutboxRow;

/// Packs rows into messages of at most `options.changes_per_message` changes. [`choose_lane`] chooses the lane of
/// each row. `live_room` is the number of changes that the live lane still takes. Each id is in exactly one
/// message, once.
pub(super) fn build_jobs(mut rows: Vec<OutboxRow>, options: &RelayOptions, mut live_room: u64) -> Vec<Job> {
    rows.sort_by_key(|row| row.seq);
    let lanes: Vec<Lane> =
        rows.iter().map(|row| choose_lane(row, options.bulk_threshold, &mut live_room)).collect();
    let kept = kept_rows(&rows, &lanes);
    let mut jobs = Vec::new();
    for lane in Lane::ALL {
        let mut open = JobBuilder::default();
        for (at, row) in rows.iter().enumerate().filter(|(at, _)| lanes[*at] == lane) {
            let mut once: Vec<&String> =
                row.ids.iter().filter(|id| kept.get(id.as_str()) == Some(&at)).collect();
            if row.ids.len() > 1 {
                once.sort_unstable();
                once.dedup();
            }
            let mut ids = once.as_slice();
            while !ids.is_empty() {
                let (now, later) = ids.split_at(ids.len().min(options.changes_per_message - open.changes));
                open.push(row, now);
                ids = later;
                if open.changes == options.changes_per_message {
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

/// For each id, the place in `rows` of the row that is kept: the newest row in the live lane, or the newest row
/// if no row is in the live lane. `rows` must be sorted by sequence number, so that a later row is newer.
fn kept_rows<'a>(rows: &'a [OutboxRow], lanes: &[Lane]) -> HashMap<&'a str, usize> {
    let mut kept: HashMap<&str, usize> = HashMap::new();
    for (at, row) in rows.iter().enumerate() {
        for id in &row.ids {
            let place = kept.entry(id).or_insert(at);
            if lanes[at] <= lanes[*place] {
                *place = at;
            }
        }
    }
    kept
}

/// A message that is not full yet.
#[derive(Default)]
struct JobBuilder {
    groups: Vec<(i64, Group)>,
    changes: usize,
}

impl JobBuilder {
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
            trace: None,
            groups,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::super::test_rows::{options, row};
    use super::*;

    #[test]
    fn the_newest_entry_of_an_id_stays_and_a_live_one_wins() {
        let jobs = build_jobs(
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
        let jobs = build_jobs(rows, &options(500), 15);
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
            let jobs = build_jobs(rows, &options(pack_size), room);
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
