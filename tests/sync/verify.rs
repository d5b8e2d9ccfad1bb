//! `refarch verify`: what it finds, what it repairs, and when it says that it can't tell.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use refarch::backend::Backends;
use refarch::backend::postgres::Postgres;
use refarch::backend::postgres::ledger::PgLedger;
use refarch::backend::postgres::ownership::{self, Ownership};
use refarch::pipeline::failure::Result;
use refarch::pipeline::index::{Listing, Match, OwnershipStore, Stored, VectorIndex, Writes};
use refarch::pipeline::ledger::{Ledger as _, Peeked};
use serde_json::json;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use crate::common;
use crate::shop::{ROWS, Shop, on_pgvector, on_pinecone, rewrite};
use crate::twisted::{Twist, Twisted};

/// A table `note`.
const NOTE: [(&str, &str); 3] = [
    ("REFARCH_SOURCE_TABLE", "public.note"),
    ("REFARCH_SOURCE_TEXT", "body"),
    ("REFARCH_SOURCE_METADATA", "id"),
];

impl Shop {
    /// The last line for people.
    async fn verdict(&self, args: &[&str]) -> String {
        let output = self.command(&["verify"]).args(args).output().await.unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.starts_with("rows "), "{text} {}", String::from_utf8_lossy(&output.stderr));
        text.lines().last().unwrap().to_owned()
    }
}

/// Runs each test for each index.
macro_rules! on_each_index {
    ($($name:ident),* $(,)?) => {
        mod pgvector {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() { super::$name(super::on_pgvector().await.filled().await).await; })*
        }
        mod pinecone {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() { super::$name(super::on_pinecone().await.filled().await).await; })*
        }
    };
}

on_each_index!(
    an_equal_index_is_reported_as_equal,
    a_deleted_record_is_reported_as_missing,
    each_kind_of_difference_is_reported_and_repaired,
    a_queued_change_is_undecided,
    a_disabled_trigger_is_named_and_enabled,
    concurrent_writes_are_no_differences,
);

async fn an_equal_index_is_reported_as_equal(shop: Shop) {
    let verified = shop.verify(&[]).await;
    verified.assert(0, &[]);
    let compared = ["rows", "indexed", "sampled"].map(|key| verified.count(key));
    // The row without text has no record, which is no difference.
    assert_eq!(compared, [ROWS, ROWS - 1, ROWS - 1]);
    let zeros = ["missing", "stale", "orphaned", "undecided", "vector_mismatch", "repaired", "dead_letters"];
    assert!(zeros.iter().all(|key| verified.count(key) == 0), "{verified:?}");
    let lists =
        (&verified.report["capture_faults"], &verified.report["examples"], &verified.report["foreign"]);
    assert_eq!(lists, (&json!([]), &json!([]), &json!(false)));
    assert_eq!(shop.verify(&["--sample", "7"]).await.count("sampled"), 7);
    assert_eq!(shop.verdict(&["--sample", "0"]).await, "index and table agree");
}

async fn a_deleted_record_is_reported_as_missing(shop: Shop) {
    shop.remove("1").await;
    let verified = shop.verify(&["--sample", "0"]).await;
    verified.assert(1, &[("missing", 1)]);
    assert_eq!(verified.examples(), [("1", "missing")].into());
    let verdict = shop.verdict(&["--sample", "0"]).await;
    assert_eq!(verdict, "index and table differ: run verify --repair to queue the differing rows");
}

async fn each_kind_of_difference_is_reported_and_repaired(shop: Shop) {
    shop.remove("1").await;
    shop.spoil_hash("2").await;
    shop.spoil_vector("3").await;
    // Of no row, of an id that no row can have, and of the row without text.
    shop.copy("4", "777").await;
    shop.copy("4", "no number").await;
    shop.copy("4", "30").await;
    let mut stale = 1;
    let mut examples: BTreeSet<_> = [
        ("1", "missing"),
        ("2", "stale"),
        ("3", "stale"),
        ("777", "orphaned"),
        ("no number", "orphaned"),
        ("30", "orphaned"),
    ]
    .into();
    if let Some(double) = &shop.double {
        // pgvector keeps no metadata: it is in the table beside it.
        rewrite(double, "5", "5", |record| {
            record.metadata["_refarch_metadata_hash"] = json!("00".repeat(32));
        })
        .await;
        stale += 1;
        examples.insert(("5", "stale"));
    }
    let different = [("missing", 1), ("stale", stale), ("orphaned", 3), ("vector_mismatch", 1)];
    let verified = shop.verify(&[]).await;
    verified.assert(1, &different);
    assert_eq!(verified.examples(), examples);
    assert_eq!(verified.count("sampled"), ROWS - 2 - stale, "all whose hashes agree");

    let repaired = shop.verify(&["--repair"]).await;
    let differences = examples.len() as u64;
    repaired.assert(1, &[&different[..], &[("repaired", differences)]].concat());
    shop.apply().await;
    let verified = shop.verify(&["--repair"]).await;
    verified.assert(0, &[]);
    assert_eq!((verified.count("indexed"), verified.count("sampled")), (ROWS - 1, ROWS - 1));
}

async fn a_queued_change_is_undecided(shop: Shop) {
    shop.sql(
        "UPDATE products_with_increment SET description = 'A red bottle' WHERE id = 1; \
         DELETE FROM products_with_increment WHERE id = 2; \
         INSERT INTO products_with_increment (id, description) VALUES (31, 'A bottle opener')",
    )
    .await;
    shop.verify(&["--wait", "1"]).await.assert(2, &[("undecided", 3)]);
    let verdict = shop.verdict(&["--wait", "0", "--sample", "0"]).await;
    assert!(verdict.starts_with("could not tell: changes are under way"), "{verdict}");
    shop.role(&["listen", "--until-idle"]).await;
    shop.verify(&["--wait", "1"]).await.assert(2, &[("undecided", 3)]);
    shop.apply().await;
    shop.verify(&[]).await.assert(0, &[]);
}

async fn a_disabled_trigger_is_named_and_enabled(shop: Shop) {
    let table = "products_with_increment";
    shop.sql(&format!("ALTER TABLE {table} DISABLE TRIGGER refarch_products_update")).await;
    let verified = shop.verify(&["--sample", "0"]).await;
    verified.assert(1, &[]);
    let fault = format!("changes of public.{table} are not captured, since a trigger is missing or disabled");
    assert!(verified.fault().starts_with(&fault), "{verified:?}");

    shop.sql(&format!("UPDATE {table} SET description = 'Unseen' WHERE id = 4")).await;
    let verified = shop.verify(&["--sample", "0"]).await;
    verified.assert(1, &[("stale", 1)]);
    assert_eq!(verified.examples(), [("4", "stale")].into());

    // Arming queues every row, and so what was not seen is under way.
    let repaired = shop.verify(&["--sample", "0", "--repair", "--wait", "1"]).await;
    assert!(repaired.err.contains("repaired: change capture is armed"), "{repaired:?}");
    repaired.assert(1, &[("undecided", 1)]);
    assert!(repaired.fault().starts_with(&fault), "what was found, as for rows: {repaired:?}");
    shop.apply().await;
    let verified = shop.verify(&[]).await;
    verified.assert(0, &[]);
    assert_eq!(verified.report["capture_faults"], json!([]));
}

async fn concurrent_writes_are_no_differences(shop: Shop) {
    let _roles = shop.start_roles();
    let over = CancellationToken::new();
    let writer = tokio::spawn(over.clone().run_until_cancelled_owned(write(shop.database.client().await)));
    for _ in 0..3 {
        let verified = shop.verify(&[]).await;
        let different = ["missing", "stale", "orphaned", "vector_mismatch"].map(|key| verified.count(key));
        assert_eq!(different, [0; 4], "{verified:?}");
        assert!(matches!(verified.code, Some(0 | 2)), "{verified:?}");
    }
    assert!(!writer.is_finished(), "all this while rows were written");
    over.cancel();
    writer.await.unwrap();
    shop.verify(&[]).await.assert(0, &[]);
}

/// Changes rows, some fifty a second, for as long as it is polled.
async fn write(client: Client) {
    let mut rng = StdRng::seed_from_u64(11);
    let mut tick = tokio::time::interval(Duration::from_millis(20));
    loop {
        tick.tick().await;
        let id = rng.random_range(1..=40_i64);
        let text = format!("A crate of {} apples", rng.random_range(0..1_000));
        let done = match rng.random_range(0..10) {
            0 | 1 => client.execute("DELETE FROM products_with_increment WHERE id = $1", &[&id]).await,
            2 => {
                let sql = "UPDATE products_with_increment SET description = NULL WHERE id = $1";
                client.execute(sql, &[&id]).await
            }
            _ => {
                let sql = "INSERT INTO products_with_increment (id, description) VALUES ($1, $2) \
                           ON CONFLICT (id) DO UPDATE SET description = excluded.description";
                client.execute(sql, &[&id, &text]).await
            }
        };
        done.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_without_capture_is_named_and_captured() {
    let shop = on_pgvector().await.with(&NOTE);
    shop.sql(
        "CREATE TABLE note (id bigint PRIMARY KEY, body text) PARTITION BY RANGE (id); \
         CREATE TABLE note_old PARTITION OF note FOR VALUES FROM (0) TO (100); \
         INSERT INTO note SELECT i, 'Note number ' || i FROM generate_series(1, 20) i",
    )
    .await;
    shop.role(&["migrate"]).await;
    shop.apply().await;
    shop.verify(&[]).await.assert(0, &[]);
    shop.sql(
        "CREATE TABLE note_new (LIKE note INCLUDING ALL); \
         INSERT INTO note_new VALUES (101, 'Attached with this row'), (102, 'and that'); \
         ALTER TABLE note ATTACH PARTITION note_new FOR VALUES FROM (100) TO (200)",
    )
    .await;
    let verified = shop.verify(&["--sample", "0"]).await;
    verified.assert(1, &[("missing", 2)]);
    assert!(verified.fault().starts_with("changes of refarch.note_new are not captured yet"), "{verified:?}");
    let repaired = shop.verify(&["--sample", "0", "--repair", "--wait", "1"]).await;
    repaired.assert(1, &[("undecided", 2)]);
    assert!(repaired.err.contains("repaired: change capture is armed"), "{repaired:?}");
    shop.apply().await;
    let verified = shop.verify(&[]).await;
    verified.assert(0, &[]);
    assert_eq!(verified.count("indexed"), 22);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_obstacle_to_capture_is_reported() {
    let shop = on_pgvector().await.with(&NOTE);
    let note = "(id bigint PRIMARY KEY, raw text, body text GENERATED ALWAYS AS ('A ' || raw) VIRTUAL)";
    shop.sql(&format!(
        "CREATE TABLE public.note {note}; INSERT INTO public.note SELECT i, 'note number ' || i FROM generate_series(1, 20) i"
    ))
    .await;
    shop.role(&["migrate"]).await;
    shop.apply().await;
    let repaired_to = async |differences: &[(&str, u64)]| {
        let repaired = shop.verify(&["--sample", "0", "--repair", "--wait", "1"]).await;
        repaired.assert(1, differences);
        assert!(repaired.err.contains("repaired: change capture is armed"), "{repaired:?}");
        shop.apply().await;
        let verified = shop.verify(&["--sample", "0"]).await;
        verified.assert(0, &[]);
        assert_eq!(verified.report["capture_faults"], json!([]));
    };

    shop.sql("ALTER TABLE public.note RENAME raw TO rough").await;
    let verified = shop.verify(&["--sample", "0"]).await;
    verified.assert(1, &[]);
    assert!(verified.fault().contains("column raw is now named rough"), "{verified:?}");
    let verdict = shop.verdict(&["--sample", "0"]).await;
    assert!(verdict.contains("changes are not all captured"), "{verdict}");
    repaired_to(&[]).await;

    shop.sql("ALTER TABLE public.note DISABLE TRIGGER ALL; INSERT INTO refarch.backfill (source, held) VALUES ('products', 'of a test')")
        .await;
    let verified = shop.verify(&["--sample", "0"]).await;
    assert!(
        verified.report["capture_faults"].to_string().contains("cannot be read: of a test"),
        "{verified:?}"
    );
    repaired_to(&[]).await;

    shop.sql(&format!(
        "ALTER TABLE public.note RENAME TO note_before; CREATE TABLE public.note {note}; INSERT INTO public.note VALUES (21, 'another')"
    ))
    .await;
    let verified = shop.verify(&["--sample", "0"]).await;
    assert_eq!(verified.code, Some(2), "{verified:?}");
    assert!(verified.err.contains("not captured: public.note is another table"), "{verified:?}");
    repaired_to(&[("undecided", 21)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_may_still_arrive_is_undecided_until_it_is_swept() {
    let shop = on_pinecone().await.filled().await;
    shop.remove("1").await;
    // The state after a worker died during a write.
    shop.sql(
        "INSERT INTO refarch.attempt (attempt_id, target, worker_id, ids) \
         SELECT 'gone/1', id, 'gone', '{1}' FROM refarch.target; \
         UPDATE refarch.ledger SET open = 1, epoch = epoch + 1, dirty = true WHERE id = '1'",
    )
    .await;
    // Longer than a difference to a clean entry must last.
    shop.verify(&["--sample", "0", "--wait", "7"]).await.assert(2, &[("undecided", 1)]);
    let _roles = shop.start_roles();
    shop.verify(&[]).await.assert(0, &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_ahead_of_the_database_is_foreign_until_every_row_is_written_again() {
    let shop = on_pinecone().await.filled().await;
    let set_back = "UPDATE refarch.lineage SET mark = mark - 1";
    shop.sql(set_back).await;
    // What the lost time brought, and what it took.
    shop.copy("1", "55").await;
    shop.remove("2").await;
    let verified = shop.verify(&["--sample", "0"]).await;
    verified.assert(1, &[("missing", 1), ("orphaned", 1)]);
    assert_eq!(verified.report["foreign"], json!(true));

    let logged = shop.logged(&["embed", "--until-idle", "--workers", "1"]).await;
    assert!(logged.contains("WARN") && logged.contains("every row is written anew"), "{logged}");
    let asked =
        "SELECT (SELECT count(*) FROM refarch.backfill), (SELECT count(*) FROM refarch.ledger WHERE dirty)";
    let asked = shop.client.query_one(asked, &[]).await.unwrap();
    assert_eq!((asked.get::<_, i64>(0), asked.get::<_, i64>(1)), (1, ROWS as i64));
    shop.apply().await;
    // The ledger has no entry for the record 55.
    let repaired = shop.verify(&["--repair"]).await;
    repaired.assert(1, &[("orphaned", 1), ("repaired", 1)]);
    assert_eq!(repaired.report["foreign"], json!(false));
    shop.apply().await;
    shop.verify(&[]).await.assert(0, &[]);

    // The repair can do what the worker does.
    shop.sql(set_back).await;
    let repaired = shop.verify(&["--sample", "0", "--repair"]).await;
    assert!(repaired.err.contains("repaired: every row is queued"), "{repaired:?}");
    assert_eq!((repaired.code, &repaired.report["foreign"]), (Some(1), &json!(true)));
    shop.apply().await;
    shop.verify(&[]).await.assert(0, &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_of_another_database_is_taken_over() {
    let first = on_pinecone().await.filled().await;
    let double = first.double.clone().unwrap();
    let second = Shop::new(Some(double.clone())).await;
    second.role(&["migrate"]).await;
    second
        .sql("INSERT INTO products_with_increment (id, description) SELECT i, 'Shelf ' || i FROM generate_series(1, 20) i")
        .await;
    let verified = second.verify(&["--sample", "0", "--wait", "1"]).await;
    assert_eq!((verified.code, &verified.report["foreign"]), (Some(1), &json!(true)), "{verified:?}");
    let logged = second.logged(&["embed", "--until-idle", "--workers", "1"]).await;
    assert!(logged.contains("every row is written anew"), "{logged}");
    second.apply().await;
    // Records of rows that only the first database had.
    let verified = second.verify(&[]).await;
    verified.assert(1, &[("orphaned", 9)]);
    assert_eq!(verified.report["foreign"], json!(false));
    second.verify(&["--repair"]).await.assert(1, &[("orphaned", 9), ("repaired", 9)]);
    second.apply().await;
    second.verify(&[]).await.assert(0, &[]);
    assert_eq!(double.snapshot("").len(), 20);
    assert_eq!(first.verify(&["--sample", "0"]).await.report["foreign"], json!(true));
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_exits_with_2_if_a_backend_cannot_be_reached() {
    let shop = on_pinecone().await;
    shop.role(&["migrate"]).await;
    let nowhere = format!("127.0.0.1:{}", common::free_port());
    // An index at another place than it was made at is refused before it is asked anything.
    shop.sql("UPDATE refarch.target SET host = NULL").await;
    for (setting, value, says) in [
        ("DATABASE_URL", format!("postgres://me:hunter2@{nowhere}/shop"), nowhere.clone()),
        ("REFARCH_INDEX_HOST", format!("http://{nowhere}"), "Connection refused".to_owned()),
    ] {
        let mut command = shop.command(&["verify", "--json", "--sample", "0", "--wait", "1"]);
        command.env(setting, value).env("REFARCH_DATABASE_CONNECT_TIMEOUT_S", "1");
        let output = command.output().await.unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{err}");
        assert!(err.contains("could not tell whether index and table agree"), "{err}");
        assert!(err.contains(&says) && !err.contains("hunter2"), "{err}");
    }
}

/// When a row changes: just before a page of rows is read, or the first suspect is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    Page,
    Look,
}

/// A ledger of which a row changes amid the audit, at the worst moment.
struct RacingLedger {
    ledger: Arc<PgLedger>,
    client: Client,
    moment: Moment,
    calls: AtomicU32,
}

impl RacingLedger {
    async fn change_at(&self, moment: Moment, call: u32) {
        if moment == self.moment && self.calls.fetch_add(1, Ordering::Relaxed) == call {
            let sql = "UPDATE products_with_increment SET description = 'Changed' WHERE id = 1";
            self.client.batch_execute(sql).await.unwrap();
        }
    }
}

#[async_trait]
impl Twist for RacingLedger {
    fn ledger(&self) -> &PgLedger {
        &self.ledger
    }

    async fn peek(&self, ids: &[String]) -> Result<Vec<Peeked>> {
        // The first time is for the ids that the index holds.
        self.change_at(Moment::Look, 1).await;
        self.ledger.peek(ids).await
    }

    async fn rows_after(&self, id: Option<&str>, limit: usize) -> Result<Vec<Peeked>> {
        self.change_at(Moment::Page, 0).await;
        self.ledger.rows_after(id, limit).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_waits_for_a_change_that_happens_meanwhile() {
    for moment in [Moment::Page, Moment::Look] {
        let shop = on_pgvector().await.filled().await;
        if moment == Moment::Look {
            shop.remove("1").await;
        }
        let backends = shop.backends().await;
        let ledger = Twisted(RacingLedger {
            ledger: Arc::clone(&backends.ledger),
            client: shop.database.client().await,
            moment,
            calls: AtomicU32::new(0),
        });
        let report = ledger.audit(&backends).await;
        assert_eq!((report.differences(), report.undecided), (0, 1), "{moment:?}: {report:?}");
    }
}

/// An index whose note is read while workers make marks.
struct Marked {
    index: Arc<dyn VectorIndex>,
    postgres: Postgres,
    generation: i32,
}

#[async_trait]
impl VectorIndex for Marked {
    async fn query(&self, embedding: &[f32], top: usize) -> Result<Vec<Match>> {
        self.index.query(embedding, top).await
    }

    async fn count(&self) -> Result<u64> {
        self.index.count().await
    }

    async fn list(&self, cursor: Option<&str>, limit: usize) -> Result<Listing> {
        self.index.list(cursor, limit).await
    }

    async fn fetch(&self, ids: &[String]) -> Result<Vec<Stored>> {
        self.index.fetch(ids).await
    }

    fn writes(&self) -> Writes<'_> {
        self.index.writes()
    }

    async fn maintain(&self, backlog: u64) -> Result<bool> {
        self.index.maintain(backlog).await
    }

    async fn check_writable(&self) -> Result<()> {
        self.index.check_writable().await
    }

    fn ownership_store(&self) -> Option<&dyn OwnershipStore> {
        Some(self)
    }
}

#[async_trait]
impl OwnershipStore for Marked {
    async fn record(&self) -> Result<Option<String>> {
        let notes = self.index.ownership_store().unwrap();
        ownership::renew(&self.postgres, self.generation, notes, Duration::ZERO).await?;
        let note = notes.record().await;
        ownership::renew(&self.postgres, self.generation, notes, Duration::ZERO).await?;
        note
    }

    async fn set_record(&self, record: &str) -> Result<()> {
        self.index.ownership_store().unwrap().set_record(record).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ownership_record_written_during_the_audit_makes_no_index_foreign() {
    let shop = on_pinecone().await;
    shop.role(&["migrate"]).await;
    let Backends { postgres, generation, index, .. } = shop.backends().await;
    let index = Marked { index, postgres: postgres.clone(), generation: generation.id };
    for _ in 0..2 {
        assert_eq!(ownership::compare(&postgres, generation.id, &index).await.unwrap(), Ownership::Owned);
    }
}
