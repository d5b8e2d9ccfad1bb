//! The contract of an index that writes only if nothing changed, clause by clause, for every such index there is:
//! pgvector and the simulation's.

use async_trait::async_trait;
use refarch::pipeline::embedder::Embedding;
use refarch::pipeline::index::{Desired, Planned, Stored, TransactionalWrite, VectorIndex, Writes};
use refarch::pipeline::ledger::{Entry, Ledger, Peeked};

/// The surroundings of an index, as a clause changes them.
#[async_trait(?Send)]
pub trait Fixture {
    /// The index.
    fn index(&self) -> &dyn VectorIndex;

    /// The ledger that its writes are compared with.
    fn ledger(&self) -> &dyn Ledger;

    /// Inserts or updates a row of the source. Ids are numbers.
    async fn write(&self, id: u32, text: &str, metadata: &str);

    /// Deletes a row of the source.
    async fn delete(&self, id: u32);

    /// A vector that differs for each number.
    fn vector(&self, of: u8) -> Embedding;

    /// Whether the index keeps metadata beside the vector.
    fn keeps_metadata(&self) -> bool;
}

/// Calls a macro with the name of every clause.
macro_rules! for_each_clause {
    ($make:ident) => {
        $make! {
            a_write_based_on_the_current_row_and_entry_settles,
            a_write_whose_row_changed_writes_nothing,
            a_write_whose_entry_changed_writes_nothing,
            a_first_write_creates_the_entry_and_a_second_one_conflicts,
            one_conflict_does_not_stop_other_writes,
            a_write_repeated_after_a_reported_failure_changes_nothing,
            a_metadata_change_keeps_the_vector,
            rows_without_text_and_deleted_rows_have_no_record,
            settling_clears_dirty_parked_and_the_tries,
        }
    };
}
pub(crate) use for_each_clause;

fn transactional(fixture: &dyn Fixture) -> &dyn TransactionalWrite {
    match fixture.index().writes() {
        Writes::Transactional(transactional) => transactional,
        Writes::External(_) => panic!("this index does not fence its writes"),
    }
}

async fn peek(fixture: &dyn Fixture, id: &str) -> Peeked {
    let mut peeked = fixture.ledger().peek(&[id.to_owned()]).await.unwrap();
    assert_eq!(peeked.len(), 1);
    peeked.remove(0)
}

async fn entry(fixture: &dyn Fixture, id: &str) -> Entry {
    peek(fixture, id).await.entry.expect("an entry")
}

async fn is_in_sync(fixture: &dyn Fixture, id: &str) -> bool {
    let peeked = peek(fixture, id).await;
    peeked.entry.is_some_and(|entry| entry.matches(peeked.row.as_ref()))
}

async fn stored(fixture: &dyn Fixture, id: &str) -> Option<Stored> {
    let mut stored = fixture.index().fetch(&[id.to_owned()]).await.unwrap();
    assert!(stored.len() <= 1);
    stored.pop()
}

/// What an indexer plans for an id as it is now; `vector` is left out where only metadata is to change.
async fn plan(fixture: &dyn Fixture, id: &str, vector: Option<u8>) -> Planned {
    let Peeked { id, row, entry } = peek(fixture, id).await;
    let desired = match row {
        None => Desired::Absent,
        Some(row) if !row.has_text() => Desired::Textless { row },
        Some(row) => Desired::Present { row, embedding: vector.map(|of| fixture.vector(of)) },
    };
    Planned { id, revision: entry.map(|entry| entry.revision), version: 7, desired }
}

/// Applies writes; returns the ids that conflicted.
async fn apply(fixture: &dyn Fixture, planned: &[&Planned]) -> Vec<String> {
    let planned: Vec<Planned> = planned.iter().map(|plan| (*plan).clone()).collect();
    let mut conflicted = transactional(fixture).apply(&planned).await.unwrap().conflicted;
    conflicted.sort();
    conflicted
}

/// A row that the index holds with this vector.
async fn bring_in_sync(fixture: &dyn Fixture, id: u32, vector: u8) {
    fixture.write(id, "text", "m").await;
    let id = id.to_string();
    let plan = plan(fixture, &id, Some(vector)).await;
    assert_eq!(apply(fixture, &[&plan]).await, [""; 0]);
    assert!(is_in_sync(fixture, &id).await);
}

pub async fn a_write_based_on_the_current_row_and_entry_settles(fixture: &dyn Fixture) {
    bring_in_sync(fixture, 1, 1).await;
    let before = entry(fixture, "1").await;
    fixture.write(1, "another text", "m").await;
    assert!(!is_in_sync(fixture, "1").await);
    let plan = plan(fixture, "1", Some(2)).await;
    assert_eq!(apply(fixture, &[&plan]).await, [""; 0]);
    let (after, row) = (entry(fixture, "1").await, peek(fixture, "1").await.row.unwrap());
    assert!(is_in_sync(fixture, "1").await && after.revision > before.revision, "{after:?}");
    let stored = stored(fixture, "1").await.unwrap();
    assert_eq!((stored.content_hash, &stored.embedding), (Some(row.content_hash), &fixture.vector(2)));
}

pub async fn a_write_whose_row_changed_writes_nothing(fixture: &dyn Fixture) {
    for (id, text, metadata) in
        [(1, Some("another text"), "m"), (2, Some("text"), "n"), (3, Some(""), "m"), (4, None, "")]
    {
        bring_in_sync(fixture, id, 1).await;
        fixture.write(id, "a newer text", "m").await;
        let name = id.to_string();
        let plan = plan(fixture, &name, Some(2)).await;
        // Between the peek and the write.
        match text {
            Some(text) => fixture.write(id, text, metadata).await,
            None => fixture.delete(id).await,
        }
        let before = (entry(fixture, &name).await, stored(fixture, &name).await);
        assert_eq!(apply(fixture, &[&plan]).await, [name.as_str()], "{text:?} {metadata}");
        assert_eq!(
            (entry(fixture, &name).await, stored(fixture, &name).await),
            before,
            "{text:?} {metadata}"
        );
    }
    // A deleted row is inserted again.
    bring_in_sync(fixture, 5, 1).await;
    fixture.delete(5).await;
    let absent = plan(fixture, "5", None).await;
    fixture.write(5, "text", "m").await;
    assert_eq!(apply(fixture, &[&absent]).await, ["5"]);
    assert_eq!(stored(fixture, "5").await.unwrap().embedding, fixture.vector(1));
}

pub async fn a_write_whose_entry_changed_writes_nothing(fixture: &dyn Fixture) {
    bring_in_sync(fixture, 1, 1).await;
    fixture.write(1, "another text", "m").await;
    let (first, late) = (plan(fixture, "1", Some(2)).await, plan(fixture, "1", Some(3)).await);
    assert_eq!(apply(fixture, &[&first]).await, [""; 0]);
    assert_eq!(apply(fixture, &[&late]).await, ["1"], "another has written meanwhile");
    assert_eq!(stored(fixture, "1").await.unwrap().embedding, fixture.vector(2));
    fixture.write(1, "a third text", "m").await;
    let late = plan(fixture, "1", Some(4)).await;
    fixture.ledger().requeue(&["1".to_owned()]).await.unwrap();
    assert_eq!(apply(fixture, &[&late]).await, ["1"], "the entry was distrusted meanwhile");
    assert!(entry(fixture, "1").await.dirty);
}

pub async fn a_first_write_creates_the_entry_and_a_second_one_conflicts(fixture: &dyn Fixture) {
    fixture.write(1, "text", "m").await;
    let (first, second) = (plan(fixture, "1", Some(1)).await, plan(fixture, "1", Some(2)).await);
    assert_eq!((first.revision, second.revision), (None, None));
    assert_eq!(apply(fixture, &[&first]).await, [""; 0]);
    assert_eq!(apply(fixture, &[&second]).await, ["1"]);
    assert!(is_in_sync(fixture, "1").await);
    assert_eq!(stored(fixture, "1").await.unwrap().embedding, fixture.vector(1));
    // An id that neither source nor index ever had is settled too, as gone.
    let nothing = plan(fixture, "9", None).await;
    assert_eq!(apply(fixture, &[&nothing]).await, [""; 0]);
    assert!(is_in_sync(fixture, "9").await && entry(fixture, "9").await.deleted);
}

pub async fn one_conflict_does_not_stop_other_writes(fixture: &dyn Fixture) {
    for id in 1..=4 {
        bring_in_sync(fixture, id, 1).await;
        fixture.write(id, "another text", "m").await;
    }
    fixture.delete(4).await;
    let mut plans = Vec::new();
    // In arbitrary order.
    for id in ["3", "1", "4", "2"] {
        plans.push(plan(fixture, id, Some(2)).await);
    }
    fixture.write(1, "changed meanwhile", "m").await;
    fixture.delete(3).await;
    let conflicted = apply(fixture, &plans.iter().collect::<Vec<_>>()).await;
    assert_eq!(conflicted, ["1", "3"]);
    assert!(is_in_sync(fixture, "2").await && is_in_sync(fixture, "4").await);
    assert_eq!(stored(fixture, "2").await.unwrap().embedding, fixture.vector(2));
    assert_eq!(stored(fixture, "4").await, None);
    for id in ["1", "3"] {
        assert!(!is_in_sync(fixture, id).await, "{id}");
        assert_eq!(stored(fixture, id).await.unwrap().embedding, fixture.vector(1), "{id}");
    }
}

pub async fn a_write_repeated_after_a_reported_failure_changes_nothing(fixture: &dyn Fixture) {
    bring_in_sync(fixture, 1, 1).await;
    fixture.delete(1).await;
    let plan = plan(fixture, "1", None).await;
    assert_eq!(apply(fixture, &[&plan]).await, [""; 0]);
    let after = entry(fixture, "1").await;
    assert_eq!(apply(fixture, &[&plan]).await, ["1"]);
    assert_eq!(entry(fixture, "1").await, after);
    assert!(is_in_sync(fixture, "1").await);
}

pub async fn a_metadata_change_keeps_the_vector(fixture: &dyn Fixture) {
    bring_in_sync(fixture, 1, 1).await;
    fixture.write(1, "text", "other").await;
    assert!(!is_in_sync(fixture, "1").await);
    let plan = plan(fixture, "1", None).await;
    assert_eq!(apply(fixture, &[&plan]).await, [""; 0]);
    assert!(is_in_sync(fixture, "1").await);
    let (stored, row) = (stored(fixture, "1").await.unwrap(), peek(fixture, "1").await.row.unwrap());
    assert_eq!((stored.embedding, stored.content_hash), (fixture.vector(1), Some(row.content_hash)));
    assert_eq!(stored.metadata_hash, fixture.keeps_metadata().then_some(row.metadata_hash));
}

pub async fn rows_without_text_and_deleted_rows_have_no_record(fixture: &dyn Fixture) {
    for id in [1, 2] {
        bring_in_sync(fixture, id, 1).await;
    }
    fixture.write(1, " ", "m").await;
    fixture.delete(2).await;
    let (textless, gone) = (plan(fixture, "1", None).await, plan(fixture, "2", None).await);
    assert_eq!(apply(fixture, &[&textless, &gone]).await, [""; 0]);
    for (id, deleted) in [("1", false), ("2", true)] {
        assert_eq!(stored(fixture, id).await, None, "{id}");
        assert!(is_in_sync(fixture, id).await, "{id}");
        assert_eq!(entry(fixture, id).await.deleted, deleted, "{id}");
    }
}

pub async fn settling_clears_dirty_parked_and_the_tries(fixture: &dyn Fixture) {
    bring_in_sync(fixture, 1, 1).await;
    let id = "1".to_owned();
    fixture.ledger().requeue(std::slice::from_ref(&id)).await.unwrap();
    fixture.ledger().park(&id).await.unwrap();
    assert_eq!(fixture.ledger().count_try(&id, 3).await.unwrap(), 3);
    let before = entry(fixture, "1").await;
    assert!(before.dirty && before.parked);
    let plan = plan(fixture, "1", Some(2)).await;
    assert_eq!(apply(fixture, &[&plan]).await, [""; 0]);
    let after = entry(fixture, "1").await;
    assert!(!after.dirty && !after.parked && after.open == 0, "{after:?}");
    assert_eq!(fixture.ledger().count_try(&id, 0).await.unwrap(), 0);
    assert!(is_in_sync(fixture, "1").await);
}
