//! The vector index's contract, which every backend must keep, and how Pinecone's failures are classed.

mod transactional;
#[path = "../contract/transactional_index.rs"]
mod transactional_contract;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use refarch::backend::pgvector;
use refarch::backend::pinecone::{self, Pinecone};
use refarch::double::pinecone::{PineconeDouble, PineconeFaults};
use refarch::pipeline::failure::{Class, Error};
use refarch::pipeline::index::{ExternalWrite, Match, Record, VectorIndex, Writes};
use refarch::pipeline::source_row::{Hash, SourceRow};
use refarch::secret::Secret;
use serde_json::{Value, json};

use crate::common::source::{Migrated, settings};
use crate::common::{self, Database, eventually};

const TIMEOUT: Duration = Duration::from_secs(30);

/// An index with three dimensions, and the means to fill it.
struct Fixture {
    index: Arc<dyn VectorIndex>,
    keeper: Backing,
}

enum Backing {
    Database { client: tokio_postgres::Client, table: String, _database: Database },
    PineconeDouble { _double: PineconeDouble },
}

async fn on_pgvector() -> Fixture {
    let migrated = Migrated::new("", settings(&[]), "pgvector").await;
    let generation = migrated.generation().await;
    let index = Arc::new(migrated.pgvector(&generation));
    let table = pgvector::table_name(generation.id);
    let Migrated { client, database, .. } = migrated;
    Fixture { index, keeper: Backing::Database { client, table, _database: database } }
}

async fn on_pinecone() -> Fixture {
    let double = PineconeDouble::start(3, 1).await.unwrap();
    Fixture { index: Arc::new(client(&double)), keeper: Backing::PineconeDouble { _double: double } }
}

fn options(url: &str) -> pinecone::PineconeOptions {
    pinecone::PineconeOptions {
        host: url.into(),
        api_key: Secret::new("key"),
        namespace: String::new(),
        timeout: TIMEOUT,
        dimensions: 3,
        text: vec!["description".into()],
        metadata: Vec::new(),
    }
}

fn client(double: &PineconeDouble) -> Pinecone {
    Pinecone::new(options(&double.url())).unwrap()
}

impl Fixture {
    async fn store(&self, records: &[Record]) {
        match &self.keeper {
            Backing::Database { client, table, .. } => {
                let sql = format!("INSERT INTO {table} VALUES ($1, $2::text::halfvec, $3)");
                for record in records {
                    let embedding = format!("{:?}", &record.embedding[..]);
                    let hash = &record.row.content_hash.0[..];
                    client.execute(&sql, &[&record.row.id, &embedding, &hash]).await.unwrap();
                }
            }
            Backing::PineconeDouble { .. } => external(&*self.index).upsert(records).await.unwrap(),
        }
    }

    async fn remove(&self, id: &str) {
        match &self.keeper {
            Backing::Database { client, table, .. } => {
                client.execute(&format!("DELETE FROM {table} WHERE id = $1"), &[&id]).await.unwrap();
            }
            Backing::PineconeDouble { .. } => external(&*self.index).delete(&[id.to_owned()]).await.unwrap(),
        }
    }
}

fn external(index: &dyn VectorIndex) -> &dyn ExternalWrite {
    match index.writes() {
        Writes::External(external) => external,
        Writes::Transactional(_) => panic!("this index fences its writes"),
    }
}

fn record(id: &str, values: &[f32]) -> Record {
    with_metadata(id, values, "{}")
}

fn with_metadata(id: &str, values: &[f32], metadata: &str) -> Record {
    // Hashes that differ from row to row are all that counts here.
    let mut content = [0xa7; 32];
    let mut other = [0x3c; 32];
    for (at, byte) in id.bytes().enumerate() {
        content[at % 32] ^= byte;
        other[at % 32] ^= byte;
    }
    let row = SourceRow {
        id: id.into(),
        text: "text".into(),
        content_hash: Hash(content),
        metadata: metadata.into(),
        metadata_hash: Hash(other),
    };
    Record { embedding: values.into(), row, version: 7 }
}

fn strings(ids: &[&str]) -> Vec<String> {
    ids.iter().map(|id| (*id).to_owned()).collect()
}

/// Ids that need care in a URL, in JSON, in SQL or in a sort.
const AWKWARD: &[&str] =
    &["a b", "a%20b", "x&ids=y", "q?#/\\", "\"'", "+", "é", "日本", "Z", "a", "__default__"];

/// Runs each test for each backend.
macro_rules! contract {
    ($($name:ident),* $(,)?) => {
        mod pgvector_keeps {
            $(#[tokio::test] async fn $name() { super::$name(super::on_pgvector().await).await; })*
        }
        mod pinecone_keeps {
            $(#[tokio::test] async fn $name() { super::$name(super::on_pinecone().await).await; })*
        }
    };
}

contract!(
    an_empty_index_holds_nothing,
    a_listing_has_every_id_once_in_order,
    a_fetch_returns_exactly_the_records_that_exist,
    one_fetch_takes_ids_of_all_lengths,
    a_query_ranks_by_cosine,
    the_count_is_the_number_of_records,
    ownership_records_are_not_listed_as_records,
);

async fn an_empty_index_holds_nothing(fixture: Fixture) {
    let index = fixture.index;
    assert_eq!(index.count().await.unwrap(), 0);
    assert_eq!(index.list(None, 10).await.unwrap(), refarch::pipeline::index::Listing::default());
    assert_eq!(index.fetch(&strings(&["a"])).await.unwrap(), []);
    assert_eq!(index.fetch(&[]).await.unwrap(), []);
    assert_eq!(index.query(&[1.0, 0.0, 0.0], 10).await.unwrap(), []);
}

async fn a_listing_has_every_id_once_in_order(fixture: Fixture) {
    let mut ids: Vec<String> = (0..240).map(|n| format!("SKU-{n}")).chain(strings(AWKWARD)).collect();
    let records: Vec<Record> = ids.iter().map(|id| record(id, &[1.0, 0.0, 0.0])).collect();
    fixture.store(&records).await;
    ids.sort();
    for limit in [1, 7, ids.len() - 1, ids.len(), 1_000] {
        let mut listed = Vec::new();
        let mut cursor = None;
        loop {
            let page = fixture.index.list(cursor.as_deref(), limit).await.unwrap();
            assert!(page.ids.len() <= limit);
            listed.extend(page.ids);
            cursor = page.next;
            if cursor.is_none() {
                break;
            }
        }
        assert_eq!(listed, ids, "{limit} a page");
    }
}

async fn a_fetch_returns_exactly_the_records_that_exist(fixture: Fixture) {
    let mut rng = StdRng::seed_from_u64(3);
    let ids: Vec<String> = (0..120).map(|n| n.to_string()).chain(strings(AWKWARD)).collect();
    let records: Vec<Record> =
        ids.iter().map(|id| record(id, &[(); 3].map(|()| rng.random_range(-1.0..1.0)))).collect();
    fixture.store(&records).await;
    let asked: Vec<String> = ids.iter().cloned().chain(strings(&["not there", "A"])).collect();
    let stored = fixture.index.fetch(&asked).await.unwrap();
    assert_eq!(stored.len(), records.len());
    let stored: BTreeMap<_, _> = stored.into_iter().map(|stored| (stored.id.clone(), stored)).collect();
    for record in &records {
        let stored = &stored[&record.row.id];
        assert_eq!(stored.content_hash, Some(record.row.content_hash));
        // Not every index keeps metadata.
        assert!(stored.metadata_hash.is_none_or(|hash| hash == record.row.metadata_hash));
        for (stored, sent) in stored.embedding.iter().zip(&record.embedding[..]) {
            // A half has eleven bits.
            assert!((stored - sent).abs() <= sent.abs() / 2048.0 + 1e-7, "{stored} {sent}");
        }
        assert_eq!(stored.embedding.len(), 3);
    }
    assert_eq!(fixture.index.fetch(&strings(&["é"])).await.unwrap().len(), 1);
}

async fn one_fetch_takes_ids_of_all_lengths(fixture: Fixture) {
    // A URL takes three characters for each of these.
    let ids: Vec<String> = (1..=120).map(|n| format!("{n}{}", "/".repeat((8 * n).min(509)))).collect();
    let records: Vec<Record> = ids.iter().map(|id| record(id, &[0.0, 1.0, 0.0])).collect();
    fixture.store(&records).await;
    assert_eq!(fixture.index.fetch(&ids).await.unwrap().len(), ids.len());
}

async fn a_query_ranks_by_cosine(fixture: Fixture) {
    // Neither the inner product nor the distance ranks these in the same way.
    let records = [
        record("far", &[0.0, 8.0, 0.0]),
        record("long", &[8.0, 6.0, 0.0]),
        record("near", &[0.1, 0.01, 0.0]),
        record("opposite", &[-1.0, 0.0, 0.0]),
    ];
    fixture.store(&records).await;
    let query = async |top| fixture.index.query(&[2.0, 0.0, 0.0], top).await.unwrap();
    let found = query(10).await;
    let expected = [("near", 0.995), ("long", 0.8), ("far", 0.0), ("opposite", -1.0)];
    assert_eq!(found.len(), expected.len());
    for (Match { id, score }, (expected, similarity)) in found.iter().zip(expected) {
        assert_eq!(id, expected);
        assert!((score - similarity).abs() < 1e-3, "{id}: {score}");
    }
    assert_eq!(query(2).await, found[..2]);
    assert_eq!(query(usize::MAX).await, found);
}

async fn the_count_is_the_number_of_records(fixture: Fixture) {
    fixture.store(&[record("a", &[1.0, 0.0, 0.0]), record("b", &[1.0, 0.0, 0.0])]).await;
    assert_eq!(fixture.index.count().await.unwrap(), 2);
    fixture.remove("a").await;
    fixture.remove("a").await;
    assert_eq!(fixture.index.count().await.unwrap(), 1);
}

async fn ownership_records_are_not_listed_as_records(fixture: Fixture) {
    let index = fixture.index;
    // Only an index outside of the database can be ahead of it.
    assert_eq!(index.ownership_store().is_some(), matches!(index.writes(), Writes::External(_)));
    if let Some(notes) = index.ownership_store() {
        assert_eq!(notes.record().await.unwrap(), None);
        for note in ["one", r#"{"two": "é"}"#] {
            notes.set_record(note).await.unwrap();
            assert_eq!(notes.record().await.unwrap(), Some(note.to_owned()));
        }
    }
    assert_eq!(index.count().await.unwrap(), 0);
    assert_eq!(index.list(None, 10).await.unwrap().ids, strings(&[]));
    assert_eq!(index.query(&[1.0, 0.0, 0.0], 10).await.unwrap(), []);
    assert_eq!(index.fetch(&strings(&["note"])).await.unwrap(), []);
}

#[tokio::test]
async fn namespaces_are_separate() {
    let double = PineconeDouble::start(3, 1).await.unwrap();
    let in_namespace = |namespace: &str| {
        Pinecone::new(pinecone::PineconeOptions { namespace: namespace.into(), ..options(&double.url()) })
            .unwrap()
    };
    let (default, products) = (in_namespace(""), in_namespace("products"));
    products.upsert(&[record("a", &[1.0, 0.0, 0.0])]).await.unwrap();
    // Nothing was ever written to the default one.
    default.delete(&strings(&["a"])).await.unwrap();
    assert_eq!((default.count().await.unwrap(), products.count().await.unwrap()), (0, 1));
    default.upsert(&[record("b", &[1.0, 0.0, 0.0])]).await.unwrap();
    default.delete(&strings(&["a", "c"])).await.unwrap();
    assert_eq!(default.list(None, 10).await.unwrap().ids, strings(&["b"]));
    assert_eq!(products.list(None, 10).await.unwrap().ids, strings(&["a"]));
    assert_eq!((double.snapshot("").len(), double.snapshot("products").len()), (1, 1));
}

#[tokio::test]
async fn an_upsert_replaces_metadata_whole() {
    let double = PineconeDouble::start(3, 1).await.unwrap();
    let index = client(&double);
    let mut record = with_metadata("a", &[1.0, 0.0, 0.0], r#"{"price": 1.5, "name": "drill"}"#);
    index.upsert(std::slice::from_ref(&record)).await.unwrap();
    let metadata = |double: &PineconeDouble| double.snapshot("")["a"].metadata.clone();
    assert_eq!((&metadata(&double)["price"], &metadata(&double)["name"]), (&json!(1.5), &json!("drill")));
    record.row.metadata = r#"{"name": "saw"}"#.into();
    index.upsert(&[record]).await.unwrap();
    let metadata = metadata(&double);
    assert_eq!((metadata.get("price"), &metadata["name"]), (None, &json!("saw")));
}

/// Upserts records in as many requests as the index asks for, and says how many those were.
async fn upsert_all(double: &PineconeDouble, mut records: &[Record]) -> usize {
    let index = Pinecone::new(pinecone::PineconeOptions { dimensions: DIMENSIONS, ..options(&double.url()) })
        .unwrap();
    let mut requests = 0;
    while !records.is_empty() {
        let (first, rest) = records.split_at(index.fits(records));
        assert!((1..=1_000).contains(&first.len()));
        index.upsert(first).await.unwrap();
        records = rest;
        requests += 1;
    }
    requests
}

/// As many as the usual model's vectors have.
const DIMENSIONS: usize = 384;

fn vectors(count: usize) -> Vec<Vec<f32>> {
    let mut rng = StdRng::seed_from_u64(5);
    let mut vector = || {
        let vector: Vec<f32> = (0..DIMENSIONS).map(|_| rng.random_range(-1.0..1.0)).collect();
        let length = vector.iter().map(|value| value * value).sum::<f32>().sqrt();
        vector.into_iter().map(|value| value / length).collect()
    };
    (0..count).map(|_| vector()).collect()
}

#[tokio::test]
async fn a_request_is_filled_up_to_the_size_limit() {
    let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let vectors = vectors(1_200);
    let bare: Vec<Record> =
        (0..).map(|n: u32| n.to_string()).zip(&vectors).map(|(n, v)| record(&n, v)).collect();
    let requests = upsert_all(&double, &bare).await;
    assert!(requests <= 5, "{requests} requests for some 5 MB");
    assert_eq!(double.snapshot("").len(), bare.len());

    // Up to Pinecone's 40 KB with what is added; JSON writes some of it longer than PostgreSQL does.
    let text = json!({ "text": "é\"\\".repeat(6_500), "list": ["a", "b"] });
    let numbers: Vec<String> = (1_000..2_400).map(|n| format!("\"k{n}\": 1e+15")).collect();
    for metadata in [text.to_string(), format!("{{{}}}", numbers.join(", "))] {
        let records: Vec<Record> = vectors
            .iter()
            .take(150)
            .enumerate()
            .map(|(n, v)| with_metadata(&n.to_string(), v, &metadata))
            .collect();
        upsert_all(&double, &records).await;
        let stored = double.snapshot("");
        let sent: Value = serde_json::from_str(&metadata).unwrap();
        let kept = |n: usize| &stored[&n.to_string()].metadata;
        assert!(
            (0..150).all(|n| sent.as_object().unwrap().iter().all(|(key, value)| &kept(n)[key] == value))
        );
    }

    let ids: Vec<String> = (1_000..2_000).map(|n| format!("{n}{}", "\u{1}".repeat(508))).collect();
    let records: Vec<Record> = ids.iter().zip(&vectors).map(|(id, v)| record(id, v)).collect();
    upsert_all(&double, &records).await;
    let tiny: Vec<Record> =
        (0..1_000).map(|n| record(&n.to_string(), &[-1.175_494_4e-38; DIMENSIONS])).collect();
    upsert_all(&double, &tiny).await;
}

/// Upserts one record and deletes another, which fail alike.
async fn failing_writes(index: &Pinecone) -> [Error; 2] {
    let upsert = index.upsert(&[record("new", &[1.0, 0.0, 0.0])]).await.unwrap_err();
    [upsert, index.delete(&strings(&["old"])).await.unwrap_err()]
}

/// A double that holds the record `old`, with these faults from now on.
async fn failing_index(faults: PineconeFaults) -> (PineconeDouble, Pinecone) {
    let double = PineconeDouble::start(3, 1).await.unwrap();
    let index = client(&double);
    index.upsert(&[record("old", &[1.0, 0.0, 0.0])]).await.unwrap();
    double.set_faults(faults);
    (double, index)
}

fn ids(double: &PineconeDouble) -> BTreeSet<String> {
    double.snapshot("").into_keys().collect()
}

#[track_caller]
fn assert_classed(error: &Error, class: Class, doubtful: bool) {
    assert_eq!((error.class(), error.is_doubtful()), (class, doubtful), "{error}");
}

#[tokio::test]
async fn a_rate_limited_write_changes_nothing_and_says_when_to_retry() {
    let (double, index) =
        failing_index(PineconeFaults { rate_limited: 1.0, ..PineconeFaults::default() }).await;
    let mut waits = BTreeSet::new();
    for _ in 0..6 {
        for error in failing_writes(&index).await {
            assert_classed(&error, Class::Retryable, false);
            waits.insert(error.retry_after());
        }
        assert_classed(&index.count().await.unwrap_err(), Class::Retryable, false);
    }
    assert_eq!(waits, [None, Some(Duration::from_secs(1))].into());
    assert_eq!(ids(&double), strings(&["old"]).into_iter().collect());
    // One write went before, and reads were tried again.
    let counts = double.counts();
    assert_eq!(counts.rate_limited + 1, counts.requests);
    assert!((18..=28).contains(&counts.rate_limited), "{counts:?}");
}

#[tokio::test]
async fn a_write_to_an_unavailable_index_is_doubtful() {
    let (double, index) =
        failing_index(PineconeFaults { unavailable: 1.0, ..PineconeFaults::default() }).await;
    let mut messages = String::new();
    for _ in 0..10 {
        for error in failing_writes(&index).await {
            assert_classed(&error, Class::Retryable, true);
            messages.push_str(&error.message());
        }
    }
    assert!(messages.contains("500") && messages.contains("503"), "{messages}");
    assert_classed(&index.list(None, 10).await.unwrap_err(), Class::Retryable, true);
    assert_eq!(ids(&double), strings(&["old"]).into_iter().collect());
    double.set_faults(PineconeFaults::default());
    assert_eq!(index.count().await.unwrap(), 1);
}

#[tokio::test]
async fn a_write_that_was_applied_but_reported_as_failed_is_doubtful() {
    let (double, index) =
        failing_index(PineconeFaults { false_error: 1.0, ..PineconeFaults::default() }).await;
    for error in failing_writes(&index).await {
        assert_classed(&error, Class::Retryable, true);
    }
    assert_eq!(ids(&double), strings(&["new"]).into_iter().collect());
    assert_eq!(index.count().await.unwrap(), 1, "reads are not lied to");
    assert_eq!(double.counts().lied, 2);
}

#[tokio::test]
async fn a_write_that_is_applied_late_is_doubtful() {
    let faults = PineconeFaults { late: 1.0, max_late: Duration::from_secs(2), ..PineconeFaults::default() };
    let (double, index) = failing_index(faults).await;
    let records: Vec<Record> = (0..16).map(|n| record(&n.to_string(), &[1.0, 0.0, 0.0])).collect();
    for record in &records {
        assert_classed(
            &index.upsert(std::slice::from_ref(record)).await.unwrap_err(),
            Class::Retryable,
            true,
        );
    }
    assert!(ids(&double).len() <= records.len(), "nothing was late");
    eventually("late writes to come", TIMEOUT, async || ids(&double).len() == records.len() + 1).await;
    assert_classed(&index.delete(&strings(&["old"])).await.unwrap_err(), Class::Retryable, true);
    eventually("a late delete to come", TIMEOUT, async || !ids(&double).contains("old")).await;
}

#[tokio::test]
async fn a_write_that_times_out_is_doubtful() {
    let faults = PineconeFaults { hang: 1.0, hang_for: Duration::from_secs(1), ..PineconeFaults::default() };
    let (double, _) = failing_index(faults).await;
    let timeout = Duration::from_millis(200);
    let index = Pinecone::new(pinecone::PineconeOptions { timeout, ..options(&double.url()) }).unwrap();
    assert_eq!(index.request_timeout(), timeout);
    let records: Vec<Record> = (0..8).map(|n| record(&n.to_string(), &[1.0, 0.0, 0.0])).collect();
    let writes = join_all(records.iter().map(|record| index.upsert(std::slice::from_ref(record)))).await;
    for error in writes.into_iter().map(Result::unwrap_err) {
        assert_classed(&error, Class::Retryable, true);
    }
    eventually("some of the writes to come", TIMEOUT, async || ids(&double).len() > 1).await;
    assert_classed(&index.count().await.unwrap_err(), Class::Retryable, true);
    assert!((9..=12).contains(&double.counts().hung));
}

#[tokio::test]
async fn a_write_whose_connection_breaks_is_doubtful() {
    let (double, index) =
        failing_index(PineconeFaults { drop_connection: 1.0, ..PineconeFaults::default() }).await;
    for error in failing_writes(&index).await {
        assert_classed(&error, Class::Retryable, true);
    }
    assert_eq!(ids(&double), strings(&["new"]).into_iter().collect());
    assert_eq!((double.counts().dropped, double.counts().requests), (2, 3));
}

#[tokio::test]
async fn a_refused_record_is_a_permanent_failure() {
    let (double, index) = failing_index(PineconeFaults::default()).await;
    let refused = [
        (with_metadata("a", &[1.0, 0.0, 0.0], r#"{"size": {"cm": 3}}"#), "for field 'size'"),
        (with_metadata("a", &[1.0, 0.0, 0.0], r#"{"size": 1e400}"#), "number out of range"),
        (
            with_metadata("a", &[1.0, 0.0, 0.0], &json!({ "list": ["x".repeat(41_000)] }).to_string()),
            "list fewer columns",
        ),
        (record("nan", &[1.0, f32::NAN, 0.0]), "the vector of \"nan\" contains NaN"),
        (record("a", &[0.0, 0.0, 0.0]), "non-zero"),
        (record("a", &[1.0, 0.0]), "dimension"),
        (record(&"x".repeat(513), &[1.0, 0.0, 0.0]), "513 characters"),
    ];
    for (record, reason) in refused {
        let error = index.upsert(&[record]).await.unwrap_err();
        assert_classed(&error, Class::Permanent, false);
        assert!(error.message().contains(reason), "{error}");
    }
    assert_eq!(ids(&double), strings(&["old"]).into_iter().collect());
}

#[tokio::test]
async fn a_refused_key_is_a_fatal_failure() {
    let double = PineconeDouble::start(3, 1).await.unwrap();
    let without = pinecone::PineconeOptions { api_key: Secret::default(), ..options(&double.url()) };
    let index = Pinecone::new(without).unwrap();
    for error in failing_writes(&index).await {
        assert_classed(&error, Class::Fatal, false);
    }
    assert_classed(&index.count().await.unwrap_err(), Class::Fatal, false);
}

#[tokio::test]
async fn a_write_that_reached_no_server_is_not_doubtful() {
    let index = Pinecone::new(options(&format!("http://127.0.0.1:{}", common::free_port()))).unwrap();
    for error in failing_writes(&index).await {
        assert_classed(&error, Class::Retryable, false);
    }
    let (double, index) = failing_index(PineconeFaults::default()).await;
    drop(double);
    eventually("the double to stop", TIMEOUT, async || {
        index.count().await.is_err_and(|error| !error.is_doubtful())
    })
    .await;
}
