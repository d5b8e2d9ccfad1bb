//! The ledger in PostgreSQL: the contract, and cases that need a real database.

#[path = "../contract/ledger.rs"]
mod contract;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use contract::Fixture;
use futures::future::join_all;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use refarch::backend::postgres::Postgres;
use refarch::backend::postgres::ledger::PgLedger;
use refarch::backend::postgres::outbox::PgOutbox;
use refarch::backend::postgres::worker_lock;
use refarch::pipeline::clock::{BootClock, Clock};
use refarch::pipeline::failure::Class;
use refarch::pipeline::lease::Lease;
use refarch::pipeline::ledger::{Ledger, Opened, Outcome};
use refarch::pipeline::outbox::{ClaimRequest, Outbox, OutboxRow};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use crate::common::source::{ITEM, Migrated, settings};
use crate::common::{Database, eventually};

const TIMEOUT: Duration = Duration::from_secs(30);

/// The settling time. It is far longer than any test, so it passes only by [`Fixture::pass`].
const SETTLE: Duration = Duration::from_hours(1);

/// A table with its ledger, and the sessions of pretended workers.
struct PostgresFixture {
    postgres: Postgres,
    ledger: Arc<PgLedger>,
    generation: i32,
    client: Client,
    sessions: Mutex<BTreeMap<String, (CancellationToken, JoinHandle<()>)>>,
    database: Database,
    passed: Arc<FixedClock>,
}

/// This process's clock. It moves only by [`Fixture::pass`].
#[derive(Default)]
struct FixedClock(Mutex<Duration>);

#[async_trait]
impl Clock for FixedClock {
    fn now(&self) -> Duration {
        *self.0.lock().unwrap()
    }

    fn chance(&self) -> f64 {
        0.5
    }

    async fn sleep(&self, _: Duration) {}
}

impl PostgresFixture {
    async fn new() -> Self {
        Self::with_ids("bigint").await
    }

    async fn with_ids(id_type: &str) -> Self {
        let table = format!("CREATE TABLE item (id {id_type} PRIMARY KEY, body text)");
        let migrated = Migrated::new(&table, settings(&ITEM), "test").await;
        let generation = migrated.generation().await;
        let passed: Arc<FixedClock> = Arc::default();
        let ledger = Arc::new(migrated.ledger(&generation).with_clock(Arc::clone(&passed) as _));
        let Migrated { postgres, client, database, .. } = migrated;
        Self {
            postgres,
            ledger,
            generation: generation.id,
            client,
            sessions: Mutex::default(),
            database,
            passed,
        }
    }

    async fn run(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// Waits until a backend waits for a lock, and returns the backend's process id.
    async fn blocked(&self) -> i32 {
        let sql = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        let mut pid = 0;
        eventually("somebody to wait for a lock", TIMEOUT, async || {
            let row = self.client.query_opt(sql, &[]).await.unwrap();
            pid = row.as_ref().map_or(0, |row| row.get(0));
            row.is_some()
        })
        .await;
        pid
    }
}

impl Drop for PostgresFixture {
    fn drop(&mut self) {
        // Without this, each session would be opened again until the runtime of the test ends.
        for (stop, _) in self.sessions.lock().unwrap().values() {
            stop.cancel();
        }
    }
}

#[async_trait(?Send)]
impl Fixture for PostgresFixture {
    async fn write(&self, id: u32, text: Option<&str>) {
        let id = i64::from(id);
        let upsert = "INSERT INTO item VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET body = excluded.body";
        let written = match text {
            Some(text) => self.client.execute(upsert, &[&id, &text]).await,
            None => self.client.execute("DELETE FROM item WHERE id = $1", &[&id]).await,
        };
        written.unwrap();
    }

    async fn take(&self) -> Vec<String> {
        let rows = self.client.query("DELETE FROM refarch.outbox RETURNING ids", &[]).await.unwrap();
        let mut ids: Vec<String> = rows.iter().flat_map(|row| row.get::<_, Vec<String>>(0)).collect();
        ids.sort();
        ids
    }

    async fn set_alive(&self, worker: &str, alive: bool) {
        if alive {
            let (postgres, name) = (self.postgres.clone(), worker.to_owned());
            let lease = Arc::new(Lease::new(Arc::new(BootClock), Duration::from_secs(10)));
            let stop = CancellationToken::new();
            let (kept, stopped) = (Arc::clone(&lease), stop.clone());
            let session = tokio::spawn(async move {
                worker_lock::keep(&postgres, &name, &kept, &stopped).await.unwrap();
            });
            eventually("a session", TIMEOUT, async || lease.term() > 0).await;
            self.sessions.lock().unwrap().insert(worker.to_owned(), (stop, session));
            return;
        }
        let (stop, session) = self.sessions.lock().unwrap().remove(worker).expect("a session");
        stop.cancel();
        session.await.unwrap();
        let free = "SELECT pg_try_advisory_xact_lock(hashtext('refarch.worker'), hashtext($1))";
        eventually("the session to end", TIMEOUT, async || {
            self.client.query_one(free, &[&worker]).await.unwrap().get(0)
        })
        .await;
    }

    fn settle(&self) -> Duration {
        SETTLE
    }

    async fn pass(&self, time: Duration) {
        *self.passed.0.lock().unwrap() += time;
        // The database's clock measures only the age of abandoned attempts, so their times are moved back.
        let sql = "UPDATE refarch.attempt SET abandoned_at = abandoned_at - make_interval(secs => $1)";
        self.client.execute(sql, &[&time.as_secs_f64()]).await.unwrap();
    }

    fn impossible(&self) -> &'static str {
        "no number"
    }
}

macro_rules! on_postgresql {
    ($($clause:ident),* $(,)?) => {$(
        #[tokio::test]
        async fn $clause() {
            let real = PostgresFixture::new().await;
            contract::$clause(&*real.ledger, &real).await;
        }
    )*};
}

contract::for_each_clause!(on_postgresql);

fn ids(ids: &[&str]) -> Vec<String> {
    ids.iter().map(|id| (*id).to_owned()).collect()
}

fn all(opened: Vec<Opened>, outcome: &Outcome) -> Vec<(Opened, Outcome)> {
    opened.into_iter().map(|opened| (opened, outcome.clone())).collect()
}

const GONE: Outcome = Outcome::Settled { content_hash: None, metadata_hash: None, deleted: true, version: 7 };

/// Reads the table page by page, and compares the ids with the database's own order.
async fn assert_paged(real: &PostgresFixture) {
    let sql = "SELECT id::text FROM item ORDER BY item.id";
    let expected: Vec<String> =
        real.client.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    for limit in [1_usize, 7, expected.len() / 3, expected.len() - 1, expected.len(), 100_000] {
        let mut seen = Vec::new();
        loop {
            let after: Option<&str> = seen.last().map(String::as_str);
            let page = real.ledger.rows_after(after, limit).await.unwrap();
            for peeked in &page {
                let row = peeked.row.as_ref().expect("a row");
                assert_eq!((&*row.id, &*row.text), (&*peeked.id, "text"));
            }
            let full = page.len() == limit;
            seen.extend(page.into_iter().map(|peeked| peeked.id));
            if !full {
                break;
            }
        }
        assert_eq!(seen.len(), expected.len(), "{limit} a page");
        assert!(seen == expected, "{limit} a page: not in the order of the key");
    }
}

#[tokio::test]
async fn pages_by_numeric_id_hold_each_row_once_in_order() {
    let real = PostgresFixture::with_ids("bigint").await;
    real.run("INSERT INTO item SELECT (n * 7919) % 100003 - 50000, 'text' FROM generate_series(1, 600) n")
        .await;
    assert_paged(&real).await;
    assert!(real.ledger.rows_after(Some("100003"), 10).await.unwrap().is_empty());
    assert_eq!(real.ledger.rows_after(None, 10).await.unwrap()[9].entry, None);
}

#[tokio::test]
async fn pages_by_text_id_hold_each_row_once_in_order() {
    let real = PostgresFixture::with_ids("text").await;
    real.run("INSERT INTO item SELECT md5(n::text), 'text' FROM generate_series(1, 600) n").await;
    real.run(
        "INSERT INTO item VALUES (' ', 'text'), ('é', 'text'), ('E', 'text'), ('10', 'text'), ('9', 'text')",
    )
    .await;
    assert_paged(&real).await;
}

#[tokio::test]
async fn pages_are_in_order_for_every_join_plan_of_the_ledger() {
    let real = PostgresFixture::with_ids("text").await;
    // With this many entries, the planner reads the whole ledger instead of looking up each row.
    real.run("INSERT INTO item SELECT md5(n::text), 'text' FROM generate_series(1, 600) n").await;
    let entries = "INSERT INTO refarch.ledger (target, id, epoch) \
                   SELECT $1, md5(n::text), n FROM generate_series(900, 1, -1) n";
    real.client.execute(entries, &[&real.generation]).await.unwrap();
    real.run("ANALYZE item, refarch.ledger").await;
    assert_paged(&real).await;
    let page = real.ledger.rows_after(None, 600).await.unwrap();
    assert!(page.iter().all(|peeked| peeked.entry.is_some()));
}

#[tokio::test]
async fn an_id_that_is_no_valid_text_is_absent() {
    let real = PostgresFixture::with_ids("text").await;
    real.run("INSERT INTO item VALUES ('a', 'text')").await;
    let peeked = real.ledger.peek(&ids(&["nul\0", "a", ""])).await.unwrap();
    let seen: Vec<_> = peeked.iter().map(|one| (&*one.id, one.row.is_some(), one.entry.is_some())).collect();
    assert_eq!(seen, [("nul\0", false, false), ("a", true, false), ("", false, false)]);
}

#[tokio::test]
async fn the_oldest_change_is_the_one_not_yet_in_the_queue() {
    let real = PostgresFixture::new().await;
    assert_eq!(real.ledger.pending().await.unwrap().oldest, None);
    real.write(1, Some("text")).await;
    let first = real.ledger.pending().await.unwrap();
    real.write(2, Some("text")).await;
    let second = real.ledger.pending().await.unwrap();
    assert!(first.oldest.is_some_and(|oldest| oldest < first.now));
    assert_eq!(second.oldest, first.oldest);
    assert!(second.now > first.now);
    // The oldest change counts, whatever its transaction and sequence number.
    real.run("UPDATE refarch.outbox SET changed_at = changed_at - interval '1 day' WHERE ids = '{2}'").await;
    assert!(real.ledger.pending().await.unwrap().oldest < first.oldest);
    real.run(
        "INSERT INTO refarch.outbox (source, op, ids, changed_at) VALUES ('other', 'u', '{1}', 'epoch')",
    )
    .await;
    real.run("DELETE FROM refarch.outbox WHERE ids = '{2}'").await;
    assert_eq!(real.ledger.pending().await.unwrap().oldest, first.oldest);
    real.run("DELETE FROM refarch.outbox WHERE source = 'products'").await;
    assert_eq!(real.ledger.pending().await.unwrap().oldest, None);
}

#[tokio::test]
async fn a_worker_without_a_heartbeat_is_dead_even_if_its_lock_is_held() {
    let real = PostgresFixture::new().await;
    real.set_alive("w", true).await;
    real.ledger.open("a", "w", &ids(&["1"])).await.unwrap();
    real.run("INSERT INTO refarch.worker (worker_id, role, host, pid) VALUES ('w', 'indexer', 'h', 1)").await;
    assert_eq!(real.ledger.sweep(SETTLE, 10).await.unwrap().abandoned, 0);
    real.run("UPDATE refarch.worker SET heartbeat_at = now() - interval '11 minutes'").await;
    assert_eq!(real.ledger.sweep(SETTLE, 10).await.unwrap().abandoned, 1);
}

#[tokio::test]
async fn entries_of_other_generations_are_not_changed() {
    let real = PostgresFixture::new().await;
    let other: i32 = real
        .client
        .query_one(
            "INSERT INTO refarch.target (source, kind, name, model, dimensions, salt, state) \
             VALUES ('products', 'other', '', '', 3, '', 'building') RETURNING id",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    let sql =
        "INSERT INTO refarch.attempt (attempt_id, target, worker_id, ids) VALUES ('other', $1, 'w', '{1}')";
    real.client.execute(sql, &[&other]).await.unwrap();
    let sql = "INSERT INTO refarch.ledger (target, id, open, tries) VALUES ($1, '1', 1, 3)";
    real.client.execute(sql, &[&other]).await.unwrap();
    real.ledger.park("1").await.unwrap();
    assert_eq!(real.ledger.count_try("1", 0).await.unwrap(), 0);
    assert_eq!(real.ledger.abandon_orphans("w", &[]).await.unwrap(), 0);
    assert!(!real.ledger.open("a", "w", &ids(&["1"])).await.unwrap()[0].shared);
    real.ledger.sweep(SETTLE, 10).await.unwrap();
    real.pass(SETTLE).await;
    assert_eq!(real.ledger.sweep(SETTLE, 10).await.unwrap().writes, 1);
    real.ledger.requeue(&ids(&["1"])).await.unwrap();
    let sql = "SELECT open, epoch, parked, tries FROM refarch.ledger WHERE target = $1";
    let row = real.client.query_one(sql, &[&other]).await.unwrap();
    assert_eq!((row.get(0), row.get(1), row.get(2), row.get(3)), (1, 0_i64, false, 3));
}

#[tokio::test]
async fn concurrent_work_on_the_same_ids_does_not_deadlock() {
    let real = PostgresFixture::new().await;
    let mut rng = StdRng::seed_from_u64(7);
    for round in 0..50 {
        // Some ids have entries, some are new. Their order is neither numeric nor the database's order.
        let mut known: Vec<String> = (0..12).map(|id| (round * 4 + id).to_string()).collect();
        let tasks = (0..4).map(|task| {
            known.shuffle(&mut rng);
            let (ledger, ids) = (Arc::clone(&real.ledger), known[..8].to_vec());
            let outcome = [GONE, Outcome::Unwritten, Outcome::Doubtful][rng.random_range(0..3)].clone();
            tokio::spawn(async move {
                let attempt = format!("{round}/{task}");
                let opened = ledger.open(&attempt, "dead", &ids).await.unwrap();
                if task == 0 {
                    ledger.requeue(&ids).await.unwrap();
                }
                // The write is swept before it is closed, or after, or by another task meanwhile.
                let mut closing = all(opened, &outcome);
                closing.reverse();
                if task < 2 {
                    ledger.sweep(Duration::ZERO, 2).await.unwrap();
                }
                ledger.close(&attempt, "dead", &closing).await.unwrap();
                ledger.sweep(Duration::ZERO, 2).await.unwrap();
            })
        });
        for done in join_all(tasks).await {
            done.unwrap();
        }
    }
    while real.ledger.sweep(Duration::ZERO, 100).await.unwrap().writes > 0 {}
    // The invariants hold after all tasks have ended.
    let attempts: i64 =
        real.client.query_one("SELECT count(*) FROM refarch.attempt", &[]).await.unwrap().get(0);
    let open: i64 = real.client.query_one("SELECT sum(open) FROM refarch.ledger", &[]).await.unwrap().get(0);
    assert_eq!((attempts, open), (0, 0));
}

#[tokio::test]
async fn requeue_locks_entries_in_id_order_even_new_ones() {
    let real = PostgresFixture::new().await;
    real.ledger.requeue(&ids(&["1"])).await.unwrap();
    let other = real.database.client().await;
    other.batch_execute("BEGIN; SELECT FROM refarch.ledger WHERE id = '1' FOR UPDATE").await.unwrap();
    let ledger = Arc::clone(&real.ledger);
    let queued = tokio::spawn(async move { ledger.requeue(&ids(&["2", "1", "2"])).await });
    real.blocked().await;
    // This is the next statement of a transaction that opens both ids.
    let sql = "INSERT INTO refarch.ledger (target, id) VALUES ($1, '2')";
    other.execute(sql, &[&real.generation]).await.unwrap();
    other.batch_execute("COMMIT").await.unwrap();
    queued.await.unwrap().unwrap();
    let entries = real.ledger.peek(&ids(&["1", "2"])).await.unwrap();
    assert_eq!(entries.iter().map(|one| one.entry.as_ref().unwrap().revision).collect::<Vec<_>>(), [2, 1]);
}

#[tokio::test]
async fn an_interrupted_close_leaves_the_tracked_write_open() {
    let real = PostgresFixture::new().await;
    let opened = real.ledger.open("a", "w", &ids(&["1", "2"])).await.unwrap();
    let closing = all(opened, &GONE);
    let blocker = real.database.client().await;
    // The close locks this entry last.
    blocker.batch_execute("BEGIN; SELECT FROM refarch.ledger WHERE id = '2' FOR UPDATE").await.unwrap();
    let (ledger, sent) = (Arc::clone(&real.ledger), closing.clone());
    let cut = tokio::spawn(async move { ledger.close("a", "w", &sent).await });
    let pid = real.blocked().await;
    real.client.execute("SELECT pg_terminate_backend($1)", &[&pid]).await.unwrap();
    assert_eq!(cut.await.unwrap().unwrap_err().class(), Class::Retryable);
    blocker.batch_execute("COMMIT").await.unwrap();
    // The pool may give out the broken connection once more.
    eventually("a connection", TIMEOUT, async || real.ledger.peek(&[]).await.is_ok()).await;
    for peeked in real.ledger.peek(&ids(&["1", "2"])).await.unwrap() {
        let entry = peeked.entry.unwrap();
        assert_eq!((entry.open, entry.dirty), (1, true), "{}", peeked.id);
    }
    let mut closed = real.ledger.close("a", "w", &closing).await.unwrap();
    closed.settled.sort();
    assert_eq!((closed.settled, closed.abandoned), (ids(&["1", "2"]), 0));
    assert_eq!(real.take().await, ids(&[]));
}

#[tokio::test]
async fn a_truncation_covers_every_id_that_is_not_known_to_be_deleted() {
    let real = PostgresFixture::new().await;
    let settle = async |id: &str, outcome: &Outcome| {
        let opened = real.ledger.open("settle", "w", &ids(&[id])).await.unwrap();
        assert_eq!(
            real.ledger.close("settle", "w", &all(opened, outcome)).await.unwrap().settled,
            ids(&[id])
        );
    };
    for id in ["gone", "gone and open", "gone and dirty"] {
        settle(id, &GONE).await;
    }
    let there = Outcome::Settled { content_hash: None, metadata_hash: None, deleted: false, version: 7 };
    settle("there", &there).await;
    real.ledger.open("open", "w", &ids(&["gone and open", "new and open"])).await.unwrap();
    real.run("UPDATE refarch.ledger SET dirty = true WHERE id = 'gone and dirty'").await;
    real.ledger.requeue(&ids(&["not trusted"])).await.unwrap();
    real.take().await;
    real.run("TRUNCATE item").await;

    let mut outbox = PgOutbox::new(real.postgres.clone(), "products", "refarch");
    let packed = Mutex::new(BTreeSet::new());
    let pack = |rows: Vec<OutboxRow>| {
        packed.lock().unwrap().extend(rows.into_iter().flat_map(|row| row.ids));
        Vec::new()
    };
    let request = ClaimRequest { small_rows: 10, large_rows: 10, large_transaction: 100 };
    let done = outbox.transfer(request, &pack).await.unwrap();
    assert_eq!((done.rows, done.changes), (1, 5));
    let expected = ["gone and dirty", "gone and open", "new and open", "not trusted", "there"];
    assert_eq!(packed.into_inner().unwrap().into_iter().collect::<Vec<_>>(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_read_together_up_to_the_byte_limit() {
    let real = PostgresFixture::new().await;
    real.run("INSERT INTO item SELECT n, repeat('x', 1000) FROM generate_series(1, 10) n").await;
    let asked = ids(&["1", "none", "77", "2", "3", "4"]);
    for (bytes, fitting) in [(0, 1), (1_100, 3), (2_100, 4), (3_500, 5), (1 << 30, 6)] {
        assert_eq!(real.ledger.fits(&asked, bytes).await.unwrap(), fitting, "{bytes}");
    }
    // This query hides its failure, because the read reports the same error.
    real.run("ALTER TABLE item RENAME body TO other").await;
    assert_eq!(real.ledger.fits(&asked, 0).await.unwrap(), 6);
}
