//! The contract of an index that writes only if nothing changed, clause by clause, for every such index there is:
//! pgvector and the simulation's.

use async_trait::async_trait;
use refarch::pipeline::embedder::Embedding;
use refarch::pipeline::index::{Desired, FencedWrite, Planned, Stored, VectorIndex, Writes};
use refarch::pipeline::ledger::{Entry, Ledger, Peeked};

/// What is around an index, and what a clause does to it.
#[async_trait(?Send)]
pub trait Bench {
    /// The index.
    fn index(&self) -> &dyn VectorIndex;

    /// The ledger that its writes are fenced by.
    fn ledger(&self) -> &dyn Ledger;

    /// Inserts or updates a row of the source. Ids are numbers.
    async fn write(&self, id: u32, text: &str, metadata: &str);

    /// Deletes a row of the source.
    async fn delete(&self, id: u32);

    /// Some vector that is this number's own.
    fn vector(&self, of: u8) -> Embedding;

    /// Whether the index keeps metadata beside the vector.
    fn keeps_metadata(&self) -> bool;
}

/// Calls a macro with the name of every clause.
macro_rules! for_each_clause {
    ($make:ident) => {
        $make! {
            a_write_that_rests_on_what_is_there_settles,
            a_write_whose_row_changed_writes_nothing,
            a_write_whose_entry_was_touched_writes_nothing,
            a_first_write_makes_the_entry_and_a_second_one_conflicts,
            one_conflict_keeps_no_other_write_back,
            a_write_told_as_failed_and_repeated_does_nothing_twice,
            only_metadata_leaves_the_vector,
            a_row_without_text_has_no_record_and_one_that_is_gone_neither,
            settling_ends_doubt_parking_and_tries,
        }
    };
}
pub(crate) use for_each_clause;

fn fence(bench: &dyn Bench) -> &dyn FencedWrite {
    match bench.index().writes() {
        Writes::Fenced(fence) => fence,
        Writes::Plain(_) => panic!("this index does not fence its writes"),
    }
}

async fn peek(bench: &dyn Bench, id: &str) -> Peeked {
    let mut peeked = bench.ledger().peek(&[id.to_owned()]).await.unwrap();
    assert_eq!(peeked.len(), 1);
    peeked.remove(0)
}

async fn entry(bench: &dyn Bench, id: &str) -> Entry {
    peek(bench, id).await.entry.expect("an entry")
}

async fn is_in_sync(bench: &dyn Bench, id: &str) -> bool {
    let peeked = peek(bench, id).await;
    peeked.entry.is_some_and(|entry| entry.matches(peeked.row.as_ref()))
}

async fn stored(bench: &dyn Bench, id: &str) -> Option<Stored> {
    let mut stored = bench.index().fetch(&[id.to_owned()]).await.unwrap();
    assert!(stored.len() <= 1);
    stored.pop()
}

/// What an indexer plans for an id as it is now; `vector` is left out where only metadata is to change.
async fn plan(bench: &dyn Bench, id: &str, vector: Option<u8>) -> Planned {
    let Peeked { id, row, entry } = peek(bench, id).await;
    let desired = match row {
        None => Desired::Absent,
        Some(row) if !row.has_text() => Desired::Textless { row },
        Some(row) => Desired::Present { row, embedding: vector.map(|of| bench.vector(of)) },
    };
    Planned { id, epoch: entry.map(|entry| entry.epoch), version: 7, desired }
}

/// Applies writes; returns the ids that conflicted.
async fn apply(bench: &dyn Bench, planned: &[&Planned]) -> Vec<String> {
    let planned: Vec<Planned> = planned.iter().map(|plan| (*plan).clone()).collect();
    let mut conflicted = fence(bench).apply(&planned).await.unwrap().conflicted;
    conflicted.sort();
    conflicted
}

/// A row that the index holds with this vector.
async fn bring_in_sync(bench: &dyn Bench, id: u32, vector: u8) {
    bench.write(id, "text", "m").await;
    let id = id.to_string();
    let plan = plan(bench, &id, Some(vector)).await;
    assert_eq!(apply(bench, &[&plan]).await, [""; 0]);
    assert!(is_in_sync(bench, &id).await);
}

pub async fn a_write_that_rests_on_what_is_there_settles(bench: &dyn Bench) {
    bring_in_sync(bench, 1, 1).await;
    let before = entry(bench, "1").await;
    bench.write(1, "another text", "m").await;
    assert!(!is_in_sync(bench, "1").await);
    let plan = plan(bench, "1", Some(2)).await;
    assert_eq!(apply(bench, &[&plan]).await, [""; 0]);
    let (after, row) = (entry(bench, "1").await, peek(bench, "1").await.row.unwrap());
    assert!(is_in_sync(bench, "1").await && after.epoch > before.epoch, "{after:?}");
    let stored = stored(bench, "1").await.unwrap();
    assert_eq!((stored.content_hash, &stored.embedding), (Some(row.content_hash), &bench.vector(2)));
}

pub async fn a_write_whose_row_changed_writes_nothing(bench: &dyn Bench) {
    for (id, text, metadata) in
        [(1, Some("another text"), "m"), (2, Some("text"), "n"), (3, Some(""), "m"), (4, None, "")]
    {
        bring_in_sync(bench, id, 1).await;
        bench.write(id, "a newer text", "m").await;
        let name = id.to_string();
        let plan = plan(bench, &name, Some(2)).await;
        // Between the peek and the write.
        match text {
            Some(text) => bench.write(id, text, metadata).await,
            None => bench.delete(id).await,
        }
        let before = (entry(bench, &name).await, stored(bench, &name).await);
        assert_eq!(apply(bench, &[&plan]).await, [name.as_str()], "{text:?} {metadata}");
        assert_eq!((entry(bench, &name).await, stored(bench, &name).await), before, "{text:?} {metadata}");
    }
    // One that was gone has come.
    bring_in_sync(bench, 5, 1).await;
    bench.delete(5).await;
    let absent = plan(bench, "5", None).await;
    bench.write(5, "text", "m").await;
    assert_eq!(apply(bench, &[&absent]).await, ["5"]);
    assert_eq!(stored(bench, "5").await.unwrap().embedding, bench.vector(1));
}

pub async fn a_write_whose_entry_was_touched_writes_nothing(bench: &dyn Bench) {
    bring_in_sync(bench, 1, 1).await;
    bench.write(1, "another text", "m").await;
    let (first, late) = (plan(bench, "1", Some(2)).await, plan(bench, "1", Some(3)).await);
    assert_eq!(apply(bench, &[&first]).await, [""; 0]);
    assert_eq!(apply(bench, &[&late]).await, ["1"], "another has written meanwhile");
    assert_eq!(stored(bench, "1").await.unwrap().embedding, bench.vector(2));
    bench.write(1, "a third text", "m").await;
    let late = plan(bench, "1", Some(4)).await;
    bench.ledger().requeue(&["1".to_owned()]).await.unwrap();
    assert_eq!(apply(bench, &[&late]).await, ["1"], "the entry was distrusted meanwhile");
    assert!(entry(bench, "1").await.dirty);
}

pub async fn a_first_write_makes_the_entry_and_a_second_one_conflicts(bench: &dyn Bench) {
    bench.write(1, "text", "m").await;
    let (first, second) = (plan(bench, "1", Some(1)).await, plan(bench, "1", Some(2)).await);
    assert_eq!((first.epoch, second.epoch), (None, None));
    assert_eq!(apply(bench, &[&first]).await, [""; 0]);
    assert_eq!(apply(bench, &[&second]).await, ["1"]);
    assert!(is_in_sync(bench, "1").await);
    assert_eq!(stored(bench, "1").await.unwrap().embedding, bench.vector(1));
    // An id that neither source nor index ever had is settled too, as gone.
    let nothing = plan(bench, "9", None).await;
    assert_eq!(apply(bench, &[&nothing]).await, [""; 0]);
    assert!(is_in_sync(bench, "9").await && entry(bench, "9").await.deleted);
}

pub async fn one_conflict_keeps_no_other_write_back(bench: &dyn Bench) {
    for id in 1..=4 {
        bring_in_sync(bench, id, 1).await;
        bench.write(id, "another text", "m").await;
    }
    bench.delete(4).await;
    let mut plans = Vec::new();
    // In no order.
    for id in ["3", "1", "4", "2"] {
        plans.push(plan(bench, id, Some(2)).await);
    }
    bench.write(1, "changed meanwhile", "m").await;
    bench.delete(3).await;
    let conflicted = apply(bench, &plans.iter().collect::<Vec<_>>()).await;
    assert_eq!(conflicted, ["1", "3"]);
    assert!(is_in_sync(bench, "2").await && is_in_sync(bench, "4").await);
    assert_eq!(stored(bench, "2").await.unwrap().embedding, bench.vector(2));
    assert_eq!(stored(bench, "4").await, None);
    for id in ["1", "3"] {
        assert!(!is_in_sync(bench, id).await, "{id}");
        assert_eq!(stored(bench, id).await.unwrap().embedding, bench.vector(1), "{id}");
    }
}

pub async fn a_write_told_as_failed_and_repeated_does_nothing_twice(bench: &dyn Bench) {
    bring_in_sync(bench, 1, 1).await;
    bench.delete(1).await;
    let plan = plan(bench, "1", None).await;
    assert_eq!(apply(bench, &[&plan]).await, [""; 0]);
    let after = entry(bench, "1").await;
    assert_eq!(apply(bench, &[&plan]).await, ["1"]);
    assert_eq!(entry(bench, "1").await, after);
    assert!(is_in_sync(bench, "1").await);
}

pub async fn only_metadata_leaves_the_vector(bench: &dyn Bench) {
    bring_in_sync(bench, 1, 1).await;
    bench.write(1, "text", "other").await;
    assert!(!is_in_sync(bench, "1").await);
    let plan = plan(bench, "1", None).await;
    assert_eq!(apply(bench, &[&plan]).await, [""; 0]);
    assert!(is_in_sync(bench, "1").await);
    let (stored, row) = (stored(bench, "1").await.unwrap(), peek(bench, "1").await.row.unwrap());
    assert_eq!((stored.embedding, stored.content_hash), (bench.vector(1), Some(row.content_hash)));
    assert_eq!(stored.metadata_hash, bench.keeps_metadata().then_some(row.metadata_hash));
}

pub async fn a_row_without_text_has_no_record_and_one_that_is_gone_neither(bench: &dyn Bench) {
    for id in [1, 2] {
        bring_in_sync(bench, id, 1).await;
    }
    bench.write(1, " ", "m").await;
    bench.delete(2).await;
    let (textless, gone) = (plan(bench, "1", None).await, plan(bench, "2", None).await);
    assert_eq!(apply(bench, &[&textless, &gone]).await, [""; 0]);
    for (id, deleted) in [("1", false), ("2", true)] {
        assert_eq!(stored(bench, id).await, None, "{id}");
        assert!(is_in_sync(bench, id).await, "{id}");
        assert_eq!(entry(bench, id).await.deleted, deleted, "{id}");
    }
}

pub async fn settling_ends_doubt_parking_and_tries(bench: &dyn Bench) {
    bring_in_sync(bench, 1, 1).await;
    let id = "1".to_owned();
    bench.ledger().requeue(std::slice::from_ref(&id)).await.unwrap();
    bench.ledger().park(&id).await.unwrap();
    assert_eq!(bench.ledger().count_try(&id, 3).await.unwrap(), 3);
    let before = entry(bench, "1").await;
    assert!(before.dirty && before.parked);
    let plan = plan(bench, "1", Some(2)).await;
    assert_eq!(apply(bench, &[&plan]).await, [""; 0]);
    let after = entry(bench, "1").await;
    assert!(!after.dirty && !after.parked && after.open == 0, "{after:?}");
    assert_eq!(bench.ledger().count_try(&id, 0).await.unwrap(), 0);
    assert!(is_in_sync(bench, "1").await);
}
