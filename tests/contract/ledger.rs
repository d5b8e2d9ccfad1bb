//! The ledger's contract, clause by clause, for every ledger there is: the database's and the
//! simulation's.

use std::time::Duration;

use async_trait::async_trait;
use refarch::pipeline::ledger::{Closed, Entry, Ledger, Opened, Outcome, Peeked, Swept};

/// More attempts than any clause has.
const ALL: usize = 100;

/// The surroundings of a ledger, as a clause changes them.
#[async_trait(?Send)]
pub trait Fixture {
    /// Inserts or updates a row of the source, or deletes it when there is no text. Ids are numbers.
    async fn write(&self, id: u32, text: Option<&str>);

    /// Takes every id that the outbox holds, sorted, each as often as the outbox holds it.
    async fn take(&self) -> Vec<String>;

    /// Gives a worker the session that shows that it lives, or ends it.
    async fn set_alive(&self, worker: &str, alive: bool);

    /// A settling time that does not pass by itself while a clause runs.
    fn settle(&self) -> Duration;

    /// Lets that time pass.
    async fn pass(&self, time: Duration);

    /// An id that no row can have.
    fn impossible(&self) -> &'static str;
}

/// Calls a macro with the name of every clause.
macro_rules! for_each_clause {
    ($make:ident) => {
        $make! {
            peek_returns_rows_and_entries_in_the_order_asked,
            a_second_open_of_an_id_is_shared,
            a_tracked_write_without_overlap_settles,
            a_missing_row_settles_as_deleted,
            overlapping_writes_do_not_settle_and_the_last_close_queues_the_id,
            nested_tracked_writes_both_stay_unsettled,
            a_doubtful_write_is_swept_once_it_has_settled,
            an_unwritten_id_keeps_its_entry_unless_writes_overlapped,
            only_tracked_writes_of_dead_workers_are_swept_after_the_settling_time,
            a_sweep_takes_no_more_than_its_limit,
            closing_a_swept_write_puts_it_back_as_abandoned,
            a_close_that_was_reported_as_failed_can_be_repeated,
            a_repeated_close_does_not_close_writes_of_others,
            abandoning_orphans_keeps_the_writes_still_in_hand,
            a_parked_id_is_not_queued_until_it_is_opened,
            tries_are_counted_until_the_entry_settles,
            a_requeued_entry_is_not_trusted,
        }
    };
}
pub(crate) use for_each_clause;

fn ids(ids: &[&str]) -> Vec<String> {
    ids.iter().map(|id| (*id).to_owned()).collect()
}

async fn peek(ledger: &dyn Ledger, id: &str) -> Peeked {
    let mut peeked = ledger.peek(&ids(&[id])).await.unwrap();
    assert_eq!(peeked.len(), 1);
    peeked.remove(0)
}

async fn entry(ledger: &dyn Ledger, id: &str) -> Entry {
    peek(ledger, id).await.entry.expect("an entry")
}

async fn matches(ledger: &dyn Ledger, id: &str) -> bool {
    let peeked = peek(ledger, id).await;
    peeked.entry.is_some_and(|entry| entry.matches(peeked.row.as_ref()))
}

/// Asserts that the ledger knows nothing of an id and has this many attempts open.
async fn assert_unknown(ledger: &dyn Ledger, id: &str, open: i32) {
    let entry = entry(ledger, id).await;
    assert_eq!((entry.open, entry.dirty, entry.deleted), (open, true, false), "{id}: {entry:?}");
    assert_eq!((entry.content_hash, entry.metadata_hash), (None, None), "{id}");
}

async fn open_one(ledger: &dyn Ledger, attempt: &str, worker: &str, id: &str) -> Opened {
    let mut opened = ledger.open(attempt, worker, &ids(&[id])).await.unwrap();
    assert_eq!(opened.len(), 1);
    opened.remove(0)
}

/// The outcome of having written the row as it is now.
async fn written(ledger: &dyn Ledger, id: &str) -> Outcome {
    let row = peek(ledger, id).await.row;
    Outcome::Settled {
        content_hash: row.as_ref().map(|row| row.content_hash),
        metadata_hash: row.as_ref().map(|row| row.metadata_hash),
        deleted: row.is_none(),
        version: 7,
    }
}

async fn close(ledger: &dyn Ledger, attempt: &str, worker: &str, closing: &[(&Opened, &Outcome)]) -> Closed {
    let closing: Vec<(Opened, Outcome)> =
        closing.iter().map(|(opened, outcome)| ((*opened).clone(), (*outcome).clone())).collect();
    ledger.close(attempt, worker, &closing).await.unwrap()
}

/// Writes an id's row to the index, as far as the ledger can tell.
async fn bring_in_sync(ledger: &dyn Ledger, id: &str) {
    let opened = open_one(ledger, "first", "first", id).await;
    let outcome = written(ledger, id).await;
    assert_eq!(close(ledger, "first", "first", &[(&opened, &outcome)]).await.settled, ids(&[id]));
}

/// Sweeps now: what it found abandoned, took away and queued.
async fn sweep(ledger: &dyn Ledger, fixture: &dyn Fixture) -> (u64, u64, u64) {
    let Swept { abandoned, writes: attempts, requeued } = ledger.sweep(fixture.settle(), ALL).await.unwrap();
    (abandoned, attempts, requeued)
}

/// Sweeps after the settling time.
async fn sweep_later(ledger: &dyn Ledger, fixture: &dyn Fixture) -> (u64, u64, u64) {
    fixture.pass(fixture.settle()).await;
    sweep(ledger, fixture).await
}

/// Asserts that no attempt is left, except those of living workers.
async fn assert_no_tracked_write(ledger: &dyn Ledger, fixture: &dyn Fixture) {
    for _ in 0..2 {
        assert_eq!(sweep_later(ledger, fixture).await, (0, 0, 0));
    }
}

const NOTHING: [String; 0] = [];

pub async fn peek_returns_rows_and_entries_in_the_order_asked(ledger: &dyn Ledger, fixture: &dyn Fixture) {
    for id in [1, 2, 10] {
        fixture.write(id, Some("text")).await;
    }
    open_one(ledger, "a", "w", "2").await;
    open_one(ledger, "b", "w", "10").await;
    fixture.write(10, None).await;
    let asked = ids(&["3", "2", fixture.impossible(), "10", "1"]);
    let peeked = ledger.peek(&asked).await.unwrap();
    let seen: Vec<_> = peeked
        .iter()
        .map(|one| {
            let row = one.row.as_ref().map(|row| (&*row.id, &*row.text));
            (&*one.id, row, one.entry.as_ref().map(|entry| entry.open))
        })
        .collect();
    let expected = [
        ("3", None, None),
        ("2", Some(("2", "text")), Some(1)),
        (fixture.impossible(), None, None),
        ("10", None, Some(1)),
        ("1", Some(("1", "text")), None),
    ];
    assert_eq!(seen, expected);
    assert!(ledger.peek(&[]).await.unwrap().is_empty());
    let impossible = peek(ledger, fixture.impossible()).await;
    assert!(impossible.row.is_none() && impossible.entry.is_none());
}

pub async fn a_second_open_of_an_id_is_shared(ledger: &dyn Ledger, fixture: &dyn Fixture) {
    fixture.write(1, Some("text")).await;
    bring_in_sync(ledger, "1").await;
    // This id never had a row.
    bring_in_sync(ledger, "2").await;
    let known = peek(ledger, "1").await.row.unwrap().content_hash;
    let before = [entry(ledger, "1").await, entry(ledger, "2").await];
    let mut last = before.map(|entry| entry.revision);
    for (attempt, shared) in [("a", false), ("b", true), ("c", true)] {
        let opened = ledger.open(attempt, attempt, &ids(&["2", "3", "1"])).await.unwrap();
        let [two, new, one] = opened.try_into().unwrap();
        assert_eq!((&*two.id, &*new.id, &*one.id), ("2", "3", "1"));
        assert_eq!([&two, &new, &one].map(|opened| opened.shared), [shared; 3], "{attempt}");
        // Unchanged: no write has happened yet.
        assert_eq!([&two, &new, &one].map(|opened| opened.dirty), [false, true, false], "{attempt}");
        let hashes = [&two, &new, &one].map(|opened| opened.content_hash);
        assert_eq!(hashes, [None, None, Some(known)], "{attempt}");
        assert!(one.revision > last[0] && two.revision > last[1] && new.revision > 0, "{attempt}");
        last = [one.revision, two.revision];
        assert_eq!(entry(ledger, "1").await.revision, one.revision);
    }
    assert_eq!(entry(ledger, "1").await.open, 3);
    assert_eq!(entry(ledger, "3").await.open, 3);
}

pub async fn a_tracked_write_without_overlap_settles(ledger: &dyn Ledger, fixture: &dyn Fixture) {
    for id in [1, 2] {
        fixture.write(id, Some("text")).await;
    }
    fixture.take().await;
    assert!(!matches(ledger, "1").await);
    let opened = ledger.open("a", "w", &ids(&["2", "1"])).await.unwrap();
    assert!(!matches(ledger, "1").await);
    let (two, one) = (written(ledger, "2").await, written(ledger, "1").await);
    let mut closed = close(ledger, "a", "w", &[(&opened[0], &two), (&opened[1], &one)]).await;
    closed.settled.sort();
    assert!(closed.clock_us > 0);
    let expected = Closed { settled: ids(&["1", "2"]), clock_us: closed.clock_us, ..Closed::default() };
    assert_eq!(closed, expected);
    for id in ["1", "2"] {
        assert!(matches(ledger, id).await);
        assert_eq!(entry(ledger, id).await.open, 0);
    }
    // What changes now is another matter.
    fixture.write(1, Some("other")).await;
    assert!(!matches(ledger, "1").await);
    assert_eq!(fixture.take().await, ["1"]);
    assert_no_tracked_write(ledger, fixture).await;
    assert_eq!(fixture.take().await, NOTHING);
}

pub async fn a_missing_row_settles_as_deleted(ledger: &dyn Ledger, fixture: &dyn Fixture) {
    fixture.write(1, Some("text")).await;
    bring_in_sync(ledger, "1").await;
    fixture.write(1, None).await;
    assert!(!matches(ledger, "1").await);
    bring_in_sync(ledger, "1").await;
    assert!(matches(ledger, "1").await);
    assert!(entry(ledger, "1").await.deleted);
    fixture.write(1, Some("text")).await;
    assert!(!matches(ledger, "1").await);
}

pub async fn overlapping_writes_do_not_settle_and_the_last_close_queues_the_id(
    ledger: &dyn Ledger,
    fixture: &dyn Fixture,
) {
    for (first, last) in [("a", "b"), ("b", "a")] {
        fixture.write(1, Some("text")).await;
        fixture.take().await;
        let a = open_one(ledger, "a", "wa", "1").await;
        let b = open_one(ledger, "b", "wb", "1").await;
        let of = |attempt: &str| if attempt == "a" { &a } else { &b };
        let outcome = written(ledger, "1").await;

        let closed = close(ledger, first, &format!("w{first}"), &[(of(first), &outcome)]).await;
        assert_eq!((closed.settled, closed.overlapped, closed.abandoned), (vec![], 1, 0), "{first} first");
        assert_unknown(ledger, "1", 1).await;
        assert_eq!(fixture.take().await, NOTHING, "{first} first");

        let closed = close(ledger, last, &format!("w{last}"), &[(of(last), &outcome)]).await;
        assert_eq!((closed.settled, closed.overlapped, closed.abandoned), (vec![], 1, 0), "{last} last");
        assert_unknown(ledger, "1", 0).await;
        assert_eq!(fixture.take().await, ["1"], "{last} last");
        assert_no_tracked_write(ledger, fixture).await;
        assert_eq!(fixture.take().await, NOTHING, "{last} last");
        // This write overlaps with no other.
        bring_in_sync(ledger, "1").await;
    }
}

pub async fn nested_tracked_writes_both_stay_unsettled(ledger: &dyn Ledger, fixture: &dyn Fixture) {
    for id in [1, 2] {
        fixture.write(id, Some("text")).await;
    }
    fixture.take().await;
    let outer = ledger.open("outer", "w", &ids(&["1", "2"])).await.unwrap();
    let inner = open_one(ledger, "inner", "w", "1").await;
    let (one, two) = (written(ledger, "1").await, written(ledger, "2").await);
    // The inner write sent nothing, but the outer write cannot know that.
    close(ledger, "inner", "w", &[(&inner, &Outcome::Unwritten)]).await;
    assert_eq!(fixture.take().await, NOTHING);
    let closed = close(ledger, "outer", "w", &[(&outer[0], &one), (&outer[1], &two)]).await;
    assert_eq!((closed.settled, closed.overlapped), (ids(&["2"]), 1));
    assert_unknown(ledger, "1", 0).await;
    assert_eq!(fixture.take().await, ["1"]);
}

pub async fn a_doubtful_write_is_swept_once_it_has_settled(ledger: &dyn Ledger, fixture: &dyn Fixture) {
    for id in [1, 2, 3] {
        fixture.write(id, Some("text")).await;
    }
    fixture.take().await;
    // A living worker makes no difference.
    fixture.set_alive("w", true).await;
    let opened = ledger.open("a", "w", &ids(&["1", "2", "3"])).await.unwrap();
    let (one, three) = (written(ledger, "1").await, written(ledger, "3").await);
    let closing = [(&opened[0], &one), (&opened[1], &Outcome::Doubtful), (&opened[2], &three)];
    let mut closed = close(ledger, "a", "w", &closing).await;
    closed.settled.sort();
    assert_eq!((closed.settled, closed.overlapped, closed.abandoned), (ids(&["1", "3"]), 0, 1));
    assert_eq!(entry(ledger, "2").await.open, 1);
    fixture.pass(fixture.settle() / 2).await;
    assert_eq!(sweep(ledger, fixture).await, (0, 0, 0));
    assert_eq!(fixture.take().await, NOTHING);
    assert_eq!(sweep_later(ledger, fixture).await, (0, 1, 1));
    assert_eq!(fixture.take().await, ["2"]);
    assert_unknown(ledger, "2", 0).await;
    assert!(matches(ledger, "1").await && matches(ledger, "3").await);
    assert_no_tracked_write(ledger, fixture).await;
    assert_eq!(fixture.take().await, NOTHING);
}

pub async fn an_unwritten_id_keeps_its_entry_unless_writes_overlapped(
    ledger: &dyn Ledger,
    fixture: &dyn Fixture,
) {
    fixture.write(1, Some("text")).await;
    bring_in_sync(ledger, "1").await;
    fixture.take().await;
    let opened = open_one(ledger, "a", "w", "1").await;
    let closed = close(ledger, "a", "w", &[(&opened, &Outcome::Unwritten)]).await;
    assert_eq!((closed.settled, closed.overlapped, closed.abandoned), (vec![], 0, 0));
    assert!(matches(ledger, "1").await, "nothing was written, so nothing changed");
    assert_no_tracked_write(ledger, fixture).await;
    assert_eq!(fixture.take().await, NOTHING);
    // If another write was open meanwhile, the last write to close queues the id.
    let first = open_one(ledger, "first", "w", "1").await;
    let last = open_one(ledger, "last", "w", "1").await;
    let one = written(ledger, "1").await;
    close(ledger, "first", "w", &[(&first, &one)]).await;
    assert_eq!(fixture.take().await, NOTHING);
    close(ledger, "last", "w", &[(&last, &Outcome::Unwritten)]).await;
    assert_unknown(ledger, "1", 0).await;
    assert_eq!(fixture.take().await, ["1"]);
}

pub async fn only_tracked_writes_of_dead_workers_are_swept_after_the_settling_time(
    ledger: &dyn Ledger,
    fixture: &dyn Fixture,
) {
    for id in [1, 2, 3] {
        fixture.write(id, Some("text")).await;
    }
    fixture.take().await;
    fixture.set_alive("dies", true).await;
    fixture.set_alive("lives", true).await;
    ledger.open("a", "dies", &ids(&["1", "2"])).await.unwrap();
    let lives = ledger.open("b", "lives", &ids(&["2", "3"])).await.unwrap();
    assert_no_tracked_write(ledger, fixture).await;
    fixture.set_alive("dies", false).await;
    // The time begins when the worker is found dead.
    assert_eq!(sweep(ledger, fixture).await, (1, 0, 0));
    fixture.pass(fixture.settle() / 2).await;
    assert_eq!(sweep(ledger, fixture).await, (0, 0, 0));
    assert_eq!(entry(ledger, "1").await.open, 1);
    assert_eq!(fixture.take().await, NOTHING);
    assert_eq!(sweep_later(ledger, fixture).await, (0, 1, 1));
    assert_eq!(fixture.take().await, ["1"]);
    assert_unknown(ledger, "1", 0).await;
    assert_unknown(ledger, "2", 1).await;
    assert_eq!(entry(ledger, "3").await.open, 1);
    assert_no_tracked_write(ledger, fixture).await;

    let (two, three) = (written(ledger, "2").await, written(ledger, "3").await);
    let closed = close(ledger, "b", "lives", &[(&lives[0], &two), (&lives[1], &three)]).await;
    assert_eq!((closed.settled, closed.overlapped), (ids(&["3"]), 1));
    assert_eq!(fixture.take().await, ["2"]);
}

pub async fn a_sweep_takes_no_more_than_its_limit(ledger: &dyn Ledger, fixture: &dyn Fixture) {
    for attempt in ["1", "2", "3"] {
        open_one(ledger, attempt, "dead", attempt).await;
    }
    let swept = ledger.sweep(fixture.settle(), 2).await.unwrap();
    assert_eq!((swept.abandoned, swept.writes), (3, 0));
    fixture.pass(fixture.settle()).await;
    for attempts in [2, 1, 0] {
        assert_eq!(ledger.sweep(fixture.settle(), 2).await.unwrap().writes, attempts);
        assert_eq!(fixture.take().await.len() as u64, attempts);
    }
}

pub async fn closing_a_swept_write_puts_it_back_as_abandoned(ledger: &dyn Ledger, fixture: &dyn Fixture) {
    for id in [1, 2, 3] {
        fixture.write(id, Some("text")).await;
    }
    fixture.take().await;
    let opened = ledger.open("a", "cut off", &ids(&["1", "2", "3"])).await.unwrap();
    assert_eq!(sweep(ledger, fixture).await, (1, 0, 0));
    assert_eq!(sweep_later(ledger, fixture).await, (0, 1, 3));
    assert_eq!(fixture.take().await, ["1", "2", "3"]);
    let other = open_one(ledger, "b", "w", "1").await;
    bring_in_sync(ledger, "3").await;

    fixture.set_alive("cut off", true).await;
    let outcome = written(ledger, "1").await;
    let closing =
        [(&opened[0], &outcome), (&opened[1], &Outcome::Doubtful), (&opened[2], &Outcome::Unwritten)];
    let closed = close(ledger, "a", "cut off", &closing).await;
    assert_eq!((closed.settled, closed.abandoned), (vec![], 2));
    assert_unknown(ledger, "1", 2).await;
    assert_unknown(ledger, "2", 1).await;
    assert!(matches(ledger, "3").await);
    // A write that was made meanwhile may have been overwritten.
    let closed = close(ledger, "b", "w", &[(&other, &outcome)]).await;
    assert_eq!((closed.settled, closed.overlapped), (vec![], 1));

    fixture.pass(fixture.settle() / 2).await;
    assert_eq!(sweep(ledger, fixture).await, (0, 0, 0));
    assert_eq!(fixture.take().await, NOTHING);
    assert_eq!(sweep_later(ledger, fixture).await, (0, 1, 2));
    assert_eq!(fixture.take().await, ["1", "2"]);
    assert_unknown(ledger, "1", 0).await;
    assert_no_tracked_write(ledger, fixture).await;
}

pub async fn a_close_that_was_reported_as_failed_can_be_repeated(ledger: &dyn Ledger, fixture: &dyn Fixture) {
    for id in [1, 2, 3] {
        fixture.write(id, Some("text")).await;
    }
    fixture.take().await;
    // Nothing in doubt: the attempt is gone, and looks as if it had been swept.
    let opened = open_one(ledger, "a", "w", "1").await;
    let outcome = written(ledger, "1").await;
    close(ledger, "a", "w", &[(&opened, &outcome)]).await;
    let closed = close(ledger, "a", "w", &[(&opened, &outcome)]).await;
    assert_eq!((closed.settled, closed.abandoned), (vec![], 1));
    assert_eq!(sweep_later(ledger, fixture).await, (0, 1, 1));
    assert_eq!(fixture.take().await, ["1"]);

    // One id in doubt: the attempt stays open for that id only.
    let opened = ledger.open("b", "w", &ids(&["1", "2", "3"])).await.unwrap();
    let closing =
        [(&opened[0], &outcome), (&opened[1], &Outcome::Doubtful), (&opened[2], &Outcome::Unwritten)];
    for _ in 0..3 {
        assert_eq!(close(ledger, "b", "w", &closing).await.abandoned, 1);
        assert!(matches(ledger, "1").await);
        assert_eq!(entry(ledger, "2").await.open, 1);
        assert_unknown(ledger, "3", 0).await;
    }
    assert_eq!(sweep_later(ledger, fixture).await, (0, 1, 1));
    assert_eq!(fixture.take().await, ["2"]);
    assert_no_tracked_write(ledger, fixture).await;
}

pub async fn a_repeated_close_does_not_close_writes_of_others(ledger: &dyn Ledger, fixture: &dyn Fixture) {
    let opened = ledger.open("a", "w", &ids(&["1", "2", "3"])).await.unwrap();
    let outcome = written(ledger, "1").await;
    let closing =
        [(&opened[0], &outcome), (&opened[1], &Outcome::Unwritten), (&opened[2], &Outcome::Doubtful)];
    close(ledger, "a", "w", &closing).await;
    let other = ledger.open("b", "w", &ids(&["1", "2"])).await.unwrap();
    let closed = close(ledger, "a", "w", &closing).await;
    assert_eq!((closed.settled, closed.overlapped, closed.abandoned), (vec![], 0, 1));
    assert_eq!(fixture.take().await, NOTHING);
    for id in ["1", "2"] {
        assert_eq!(entry(ledger, id).await.open, 1);
    }
    let mut closed = close(ledger, "b", "w", &[(&other[0], &outcome), (&other[1], &outcome)]).await;
    closed.settled.sort();
    assert_eq!(closed.settled, ids(&["1", "2"]));
}

pub async fn abandoning_orphans_keeps_the_writes_still_in_hand(ledger: &dyn Ledger, fixture: &dyn Fixture) {
    for worker in ["w", "other"] {
        fixture.set_alive(worker, true).await;
    }
    open_one(ledger, "lost", "w", "1").await;
    open_one(ledger, "in hand", "w", "2").await;
    open_one(ledger, "of another", "other", "3").await;
    let in_hand = ids(&["in hand", "not opened yet"]);
    assert_eq!(ledger.abandon_orphans("w", &in_hand).await.unwrap(), 1);
    assert_eq!(ledger.abandon_orphans("w", &in_hand).await.unwrap(), 0);
    assert_eq!(sweep(ledger, fixture).await, (0, 0, 0));
    assert_eq!(sweep_later(ledger, fixture).await, (0, 1, 1));
    assert_eq!(fixture.take().await, ["1"]);
    assert_no_tracked_write(ledger, fixture).await;
    assert_eq!(entry(ledger, "2").await.open, 1);
    assert_eq!(entry(ledger, "3").await.open, 1);
    assert_eq!(ledger.abandon_orphans("w", &[]).await.unwrap(), 1);
}

pub async fn a_parked_id_is_not_queued_until_it_is_opened(ledger: &dyn Ledger, fixture: &dyn Fixture) {
    open_one(ledger, "a", "w", "1").await;
    ledger.park("1").await.unwrap();
    // The ledger knows nothing of this id yet.
    ledger.park("2").await.unwrap();
    assert!(entry(ledger, "1").await.parked && entry(ledger, "2").await.parked);
    assert_unknown(ledger, "2", 0).await;
    sweep(ledger, fixture).await;
    assert_eq!(sweep_later(ledger, fixture).await, (0, 1, 0));
    assert_eq!(fixture.take().await, NOTHING);
    assert_unknown(ledger, "1", 0).await;

    ledger.open("b", "w", &ids(&["1", "2"])).await.unwrap();
    assert!(!entry(ledger, "1").await.parked && !entry(ledger, "2").await.parked);
    sweep(ledger, fixture).await;
    assert_eq!(sweep_later(ledger, fixture).await, (0, 1, 2));
    assert_eq!(fixture.take().await, ["1", "2"]);

    // A write that reached the index all the same ends the parking.
    let first = open_one(ledger, "c", "w", "1").await;
    let second = open_one(ledger, "d", "w", "1").await;
    ledger.park("1").await.unwrap();
    let outcome = written(ledger, "1").await;
    close(ledger, "c", "w", &[(&first, &Outcome::Unwritten)]).await;
    close(ledger, "d", "w", &[(&second, &outcome)]).await;
    assert_eq!(fixture.take().await, ["1"]);
}

pub async fn tries_are_counted_until_the_entry_settles(ledger: &dyn Ledger, fixture: &dyn Fixture) {
    fixture.write(1, Some("text")).await;
    fixture.take().await;
    for (by, tries) in
        [(0, 0), (1, 1), (2, 3), (-1, 2), (-9, 0), (1, 1), (i32::MIN, 0), (i32::MIN, 0), (2, 2)]
    {
        assert_eq!(ledger.count_try("1", by).await.unwrap(), tries, "{by}");
    }
    assert_eq!(ledger.count_try("2", -1).await.unwrap(), 0);
    assert_eq!(ledger.count_try("3", 1).await.unwrap(), 1);

    let opened = ledger.open("a", "w", &ids(&["1", "3"])).await.unwrap();
    let outcome = written(ledger, "1").await;
    close(ledger, "a", "w", &[(&opened[0], &Outcome::Unwritten), (&opened[1], &Outcome::Doubtful)]).await;
    assert_eq!(ledger.count_try("1", 0).await.unwrap(), 2);
    assert_eq!(ledger.count_try("3", 0).await.unwrap(), 1);
    let opened = open_one(ledger, "b", "w", "1").await;
    assert_eq!(close(ledger, "b", "w", &[(&opened, &outcome)]).await.settled, ["1"]);
    assert_eq!(ledger.count_try("1", 0).await.unwrap(), 0);
    // Counting a try changes nothing about the index.
    assert!(matches(ledger, "1").await);

    ledger.park("3").await.unwrap();
    assert_eq!(ledger.count_try("3", 0).await.unwrap(), 0);
}

pub async fn a_requeued_entry_is_not_trusted(ledger: &dyn Ledger, fixture: &dyn Fixture) {
    for id in [1, 2] {
        fixture.write(id, Some("text")).await;
        bring_in_sync(ledger, &id.to_string()).await;
    }
    fixture.take().await;
    let before = entry(ledger, "1").await.revision;
    let meanwhile = open_one(ledger, "a", "w", "2").await;
    ledger.park("1").await.unwrap();
    ledger.requeue(&ids(&["2", "3", "1"])).await.unwrap();
    assert_eq!(fixture.take().await, ["1", "2", "3"]);
    assert_unknown(ledger, "1", 0).await;
    assert_unknown(ledger, "2", 1).await;
    assert_unknown(ledger, "3", 0).await;
    let after = entry(ledger, "1").await;
    assert!(after.revision > before && !after.parked);

    let outcome = written(ledger, "2").await;
    let closed = close(ledger, "a", "w", &[(&meanwhile, &outcome)]).await;
    assert_eq!((closed.settled, closed.overlapped), (vec![], 1));
    assert_eq!(fixture.take().await, ["2"]);
    bring_in_sync(ledger, "1").await;
    assert!(matches(ledger, "1").await);
}
