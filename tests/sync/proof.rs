//! The continuous proof: what it finds and mends without anybody asking, and what status says of it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use refarch::backend::Backends;
use refarch::backend::postgres::ledger::PgLedger;
use refarch::backend::postgres::proof::PgRounds;
use refarch::pipeline::audit::{ProofOptions, Prover, RoundStore as _, Walk};
use refarch::pipeline::clock::Clock;
use refarch::pipeline::failure::{Class, Result};
use refarch::pipeline::ledger::{Ledger as _, Peeked};
use serde_json::{Value, json};

use crate::common::{self, eventually};
use crate::shop::{self, ROWS, Shop, TABLE, TIMEOUT, Verified};
use crate::twisted::{Twist, Twisted};

async fn on_pgvector() -> Shop {
    shop::on_pgvector().await.with(&VISIBILITY)
}

async fn on_pinecone() -> Shop {
    shop::on_pinecone().await.with(&VISIBILITY)
}

/// A table `note`.
const NOTE: [(&str, &str); 3] = [
    ("REFARCH_SOURCE_TABLE", "public.note"),
    ("REFARCH_SOURCE_TEXT", "title"),
    ("REFARCH_SOURCE_METADATA", "id,extra"),
];

/// What a killed worker held is soon there again.
const VISIBILITY: [(&str, &str); 1] = [("REFARCH_QUEUE_VISIBILITY_S", "2")];

impl Shop {
    /// With rounds of some seconds.
    fn proving(self, more: &[(&'static str, &str)]) -> Self {
        self.with(&[("REFARCH_AUDIT_PERIOD_H", "0.001")]).with(more)
    }

    /// Compares without vectors: exit code, and report or what was logged.
    async fn compare(&self, args: &[&str]) -> (Option<i32>, Value) {
        let verified = self.verify(&[&["--sample", "0"], args].concat()).await;
        let Verified { code, report, err } = verified;
        (code, if report.is_null() { json!(err) } else { report })
    }

    async fn status(&self) -> Value {
        serde_json::from_str(&self.role(&["status", "--json"]).await).unwrap()
    }

    /// The line of the status that begins like that.
    async fn line(&self, begin: &str) -> String {
        let text = self.role(&["status"]).await;
        text.lines()
            .find(|line| line.starts_with(begin))
            .unwrap_or_else(|| panic!("{begin}: {text}"))
            .to_owned()
    }

    async fn number(&self, sql: &str) -> i64 {
        common::number(&self.client, sql).await
    }

    /// Makes the queue lose an update of a row.
    async fn lose(&self, id: u64) {
        self.sql(&format!("UPDATE {TABLE} SET description = 'Lost in the post' WHERE id = {id}")).await;
        self.role(&["listen", "--until-idle"]).await;
        self.sql("DELETE FROM pgmq.q_refarch_live; DELETE FROM pgmq.q_refarch_bulk").await;
    }

    /// Sums over the rounds that ended.
    async fn rounds(&self) -> (i64, i64, i64) {
        let sql = "SELECT count(*), coalesce(sum(differences), 0)::bigint, coalesce(sum(mended), 0)::bigint \
                   FROM refarch.proof_round";
        let row = self.client.query_one(sql, &[]).await.unwrap();
        (row.get(0), row.get(1), row.get(2))
    }
}

/// A clock on which every pause is over at once; in milliseconds.
struct FastClock(std::sync::atomic::AtomicU64);

#[async_trait]
impl Clock for FastClock {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
    }

    fn chance(&self) -> f64 {
        0.5
    }

    async fn sleep(&self, pause: Duration) {
        self.0.fetch_add(pause.as_millis() as u64, std::sync::atomic::Ordering::Relaxed);
    }
}

/// A prover, and the clock that it goes by.
struct TimedProver(Prover, Arc<FastClock>);

impl TimedProver {
    async fn step(&mut self) {
        let wait = self.0.step().await.unwrap();
        self.1.sleep(wait).await;
    }
}

/// A prover of a worker of that name, with pages of five rows.
fn prover(backends: &Backends, worker: &str) -> TimedProver {
    let clock = Arc::new(FastClock(100.into()));
    let prover = Prover::new(
        Arc::clone(&backends.ledger) as _,
        Arc::clone(&backends.index),
        Arc::clone(&backends.queue.stats),
        Arc::clone(&backends.queue.dead_letters),
        Arc::clone(&clock) as _,
        Arc::new(PgRounds::new(backends.postgres.clone(), backends.generation.id, worker)),
        ProofOptions {
            period: Some(Duration::from_hours(1)),
            full: false,
            lost_after: Duration::from_mins(1),
            read_letters: true,
            page: 5,
        },
    );
    TimedProver(prover, clock)
}

#[tokio::test(flavor = "multi_thread")]
async fn up_ends_even_if_the_row_estimate_is_too_high() {
    let shop = on_pgvector().await.filled().await;
    shop.sql(&format!("UPDATE pg_class SET reltuples = 3000000 WHERE relname = '{TABLE}'")).await;
    let address = format!("127.0.0.1:{}", common::free_port());
    let up = shop.command(&["up", "--until-synced", "--workers", "1", "--bind", &address]).output();
    let output =
        tokio::time::timeout(Duration::from_secs(40), up).await.expect("up --until-synced never ends");
    assert!(output.unwrap().status.success());
    let status = shop.status().await;
    assert_eq!((&status["source_rows"], &status["in_sync"]), (&json!(ROWS), &json!(ROWS)));
    assert!(shop.line("in sync").await.contains("30, all of them by the ledger"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_index_is_never_in_sync_while_the_table_has_rows() {
    let shop = on_pgvector().await.filled().await;
    assert!(shop.line("in sync").await.contains("all of them"));
    shop.on_vectors("TRUNCATE {vectors}").await;
    let line = shop.line("in sync").await;
    assert!(!line.contains("all of them") && line.contains("0 records"), "{line}");
    assert_eq!(shop.status().await["synced"], json!(false));
    assert_eq!(shop.compare(&[]).await.0, Some(1));
}

/// A ledger whose reads by id see no row: of a type that cuts the id, or under a policy.
struct LedgerBlindToRows(Arc<PgLedger>);

#[async_trait]
impl Twist for LedgerBlindToRows {
    fn ledger(&self) -> &PgLedger {
        &self.0
    }

    async fn peek(&self, ids: &[String]) -> Result<Vec<Peeked>> {
        let seen = self.0.peek(ids).await?;
        Ok(seen.into_iter().map(|one| Peeked { row: None, entry: None, ..one }).collect())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_a_read_by_id_does_not_return_count_as_missing_and_not_as_deleted() {
    let shop = on_pgvector().await.filled().await;
    shop.on_vectors("TRUNCATE {vectors}").await;
    let backends = shop.backends().await;
    let report = Twisted(LedgerBlindToRows(Arc::clone(&backends.ledger))).audit(&backends).await;
    assert_eq!((report.missing, report.undecided), (ROWS - 1, 0), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_row_is_named_and_the_other_rows_are_compared() {
    let shop = on_pgvector().await.with(&NOTE);
    shop.sql(
        "CREATE TABLE note (id bigint PRIMARY KEY, title text, extra json); \
         INSERT INTO note SELECT i, 'Note number ' || i, '{}' FROM generate_series(1, 20) i",
    )
    .await;
    shop.role(&["migrate"]).await;
    shop.apply().await;
    shop.sql(
        "ALTER TABLE note DISABLE TRIGGER ALL; \
         UPDATE note SET extra = '{\"a\": \"\\u0000\"}' WHERE id IN (1, 7); ALTER TABLE note ENABLE TRIGGER ALL",
    )
    .await;
    let (code, report) = shop.compare(&["--wait", "1"]).await;
    assert_eq!((code, &report["unreadable"], &report["rows"]), (Some(2), &json!(2), &json!(20)), "{report}");
    let named = json!([{ "id": "1", "kind": "unreadable" }, { "id": "7", "kind": "unreadable" }]);
    assert_eq!(report["examples"], named);
    // What differs among the others is found all the same.
    shop.remove("8").await;
    let (code, report) = shop.compare(&["--wait", "1"]).await;
    assert_eq!(
        (code, &report["unreadable"], &report["missing"]),
        (Some(1), &json!(2), &json!(1)),
        "{report}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn freshness_is_reported_for_each_lane() {
    let shop = on_pgvector().await;
    shop.role(&["migrate"]).await;
    shop.sql(&format!(
        "INSERT INTO {TABLE} (id, description) SELECT i, 'Shelf ' || i FROM generate_series(1, 150) i"
    ))
    .await;
    shop.apply().await;
    let freshness = shop.status().await["freshness_ms"].clone();
    assert!(freshness["bulk"]["p50"].is_u64() && freshness["live"]["p50"].is_null(), "{freshness}");
    assert!(freshness["p50"].is_null(), "at the top are the live ones: {freshness}");
    shop.sql(&format!("UPDATE {TABLE} SET description = 'Edited' WHERE id = 1")).await;
    shop.apply().await;
    let freshness = shop.status().await["freshness_ms"].clone();
    assert_eq!(freshness["p50"], freshness["live"]["p50"]);
    assert!(freshness["live"]["p50"].is_u64(), "{freshness}");
}

/// Does all that makes an index differ behind the roles' back, and waits until nothing differs.
async fn mends_whatever_differs(shop: Shop) {
    shop.remove("1").await;
    shop.spoil_hash("2").await;
    shop.copy("4", "777").await;
    shop.copy("4", "30").await;
    shop.sql(&format!(
        "ALTER TABLE {TABLE} DISABLE TRIGGER ALL; UPDATE {TABLE} SET description = 'Unseen' WHERE id = 5; \
         DELETE FROM {TABLE} WHERE id = 6; ALTER TABLE {TABLE} ENABLE TRIGGER ALL"
    ))
    .await;
    shop.lose(7).await;
    // Its letter was purged, and one's record is right though its message was lost.
    shop.sql(
        "UPDATE refarch.ledger SET parked = true, dirty = true, content_hash = NULL WHERE id = '8'; \
         UPDATE refarch.ledger SET dirty = true WHERE id = '9'",
    )
    .await;
    assert!(!shop.line("in sync").await.contains("all of them"));
    let _roles = shop.start_roles();
    eventually("a round to end that found nothing", TIMEOUT, async || {
        let sql = "SELECT count(*) FROM refarch.proof_round r WHERE r.differences = 0 \
                   AND r.round_id > (SELECT min(round_id) FROM refarch.proof_round WHERE differences > 0)";
        shop.number(sql).await > 0
    })
    .await;
    let (_, differences, mended) = shop.rounds().await;
    assert_eq!((differences, mended), (9, 9));
    assert_eq!(shop.compare(&[]).await.0, Some(0));
    let line = shop.line("in sync").await;
    assert!(
        line.contains("29, all of them by the ledger; proved") && line.contains(": 0 differences"),
        "{line}"
    );
    let proof = shop.status().await["proof"].clone();
    assert_eq!((&proof["differences"], &proof["rows"]), (&json!(0), &json!(29)), "{proof}");
}

#[tokio::test(flavor = "multi_thread")]
async fn differences_are_repaired_automatically() {
    mends_whatever_differs(on_pgvector().await.filled().await.proving(&[])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn differences_in_an_index_outside_of_the_database_are_repaired_too() {
    let full = [("REFARCH_AUDIT_INDEX", "full")];
    mends_whatever_differs(on_pinecone().await.filled().await.proving(&full)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_and_orphaned_records_are_found_by_listing_ids() {
    let shop = on_pinecone().await.filled().await.proving(&[]);
    shop.remove("1").await;
    shop.copy("4", "777").await;
    let _roles = shop.start_roles();
    let double = shop.double.clone().unwrap();
    eventually("the records to be as they should", TIMEOUT, async || {
        let records = double.snapshot("");
        records.contains_key("1") && !records.contains_key("777")
    })
    .await;
    eventually("the round to be told", TIMEOUT, async || shop.rounds().await.0 > 0).await;
    let kind: String = shop
        .client
        .query_one("SELECT index_check FROM refarch.proof_round LIMIT 1", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!((kind.as_str(), shop.rounds().await.2), ("sample", 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewritten_column_is_indexed_again() {
    let shop = on_pgvector().await.filled().await.proving(&[]);
    shop.sql(&format!("ALTER TABLE {TABLE} ALTER description TYPE text USING upper(description)")).await;
    let _roles = shop.start_roles();
    eventually("the rewritten rows to be found", TIMEOUT, async || {
        shop.rounds().await.1 >= ROWS as i64 - 1 && shop.compare(&[]).await.0 == Some(0)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_update_is_repaired_even_if_the_queue_never_drains() {
    let shop = on_pgvector().await.filled().await.proving(&[]);
    shop.lose(7).await;
    // Of a time before everything else, and never received.
    shop.sql(
        "SELECT pgmq.send('refarch_live', jsonb_build_object('oldest', '2001-01-01T00:00:00Z'), '{\"changes\": 1}'::jsonb, 3600)",
    )
    .await;
    let _roles = shop.start_roles();
    eventually("the lost update to be mended", TIMEOUT, async || {
        shop.rounds().await.2 > 0 && shop.number("SELECT count(*) FROM refarch.ledger WHERE dirty").await == 0
    })
    .await;
    // The mended row's own message is acknowledged after its entry is settled.
    eventually("the old message to wait there alone", TIMEOUT, async || {
        shop.number("SELECT count(*) FROM pgmq.q_refarch_live").await == 1
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn status_says_that_no_proof_ended_yet_or_that_the_proof_is_off() {
    let mut shop = on_pgvector().await.filled().await;
    assert_eq!(shop.line("in sync").await, "in sync        30, all of them by the ledger; not proved yet");
    assert_eq!(shop.status().await["proof"]["ended_at"], json!(null));
    shop.env.push(("REFARCH_AUDIT_PERIOD_H", "0".to_owned()));
    assert_eq!(shop.line("in sync").await, "in sync        30, all of them by the ledger; the proof is off");
}

/// Steps until the round is over, and returns how many that took.
async fn finish(shop: &Shop, prover: &mut TimedProver) -> u32 {
    for steps in 1..200 {
        prover.step().await;
        if shop.rounds().await.0 > 0 {
            return steps;
        }
    }
    panic!("the round never ends");
}

/// Another process goes on with the round where the last one stopped, suspects included; until that one
/// has given the right back or is silent for long, nobody else works on it.
async fn goes_on(shop: Shop) {
    shop.remove("1").await;
    let backends = shop.backends().await;
    let mut first = prover(&backends, "first");
    let mut steps = 0;
    let store = PgRounds::new(backends.postgres.clone(), backends.generation.id, "first");
    loop {
        first.step().await;
        steps += 1;
        let round = store.acquire(Duration::from_secs(45)).await.unwrap().unwrap().round.unwrap();
        if round.walk == Walk::Rows && round.rows >= 10 {
            break;
        }
    }
    let mut second = prover(&backends, "second");
    second.step().await;
    assert!(first.0.is_ours() && !second.0.is_ours());
    first.0.release().await.unwrap();
    drop(first);
    steps += finish(&shop, &mut second).await;
    let row =
        shop.client.query_one("SELECT rows, records, mended FROM refarch.proof_round", &[]).await.unwrap();
    let counts: (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
    assert_eq!(counts, (ROWS as i64, ROWS as i64 - 2, 1), "each was seen once");
    assert!(steps < 40, "{steps} steps for some twenty pages");

    // A round that has ended is not begun again before its period is over, by nobody.
    second.step().await;
    assert!(second.0.is_ours());
    assert_eq!(shop.number("SELECT count(*) FROM refarch.proof WHERE round IS NOT NULL").await, 0);
    // A prover that died is replaced when its time is over.
    let mut third = prover(&backends, "third");
    third.step().await;
    assert!(!third.0.is_ours());
    shop.sql("UPDATE refarch.proof SET held_until = now()").await;
    third.step().await;
    assert!(third.0.is_ours());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_resumes_where_another_process_stopped() {
    goes_on(on_pgvector().await.filled().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_over_an_index_outside_of_the_database_resumes_too() {
    goes_on(on_pinecone().await.filled().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_stays_and_is_no_difference() {
    let shop = on_pgvector().await.filled().await;
    shop.sql(
        "UPDATE refarch.ledger SET parked = true, dirty = true, content_hash = NULL WHERE id IN ('8', '9'); \
         SELECT pgmq.send('refarch_dead', jsonb_build_object('v', 1, 'lane', 'live', 'source', 'products', \
           'oldest', '2026-01-01T00:00:00Z', 'groups', jsonb_build_array(jsonb_build_object('version', 1, 'op', 'upsert', 'ids', jsonb_build_array('9')))), '{\"changes\": 1}'::jsonb)",
    )
    .await;
    let letters = shop.backends().await.queue.dead_letters.list(None, 10).await.unwrap();
    assert_eq!((letters.len(), &letters[0].ids[..]), (1, &["9".to_owned()][..]));
    let backends = shop.backends().await;
    finish(&shop, &mut prover(&backends, "first")).await;
    // The dead letter of id 8 is gone.
    assert_eq!(shop.rounds().await, (1, 1, 1));
    assert_eq!(shop.number("SELECT count(*) FROM refarch.ledger WHERE parked AND id = '9'").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_trigger_is_reported_and_enabled_again() {
    let shop = on_pgvector().await.filled().await.proving(&[("REFARCH_AUDIT_ARMED_S", "1")]);
    let trigger = format!("ALTER TABLE {TABLE} DISABLE TRIGGER refarch_products_update");
    shop.sql(&trigger).await;
    assert!(!shop.line("in sync").await.contains("all of them"));
    assert_eq!(shop.status().await["capture_faults"].as_array().unwrap().len(), 1);
    assert!(shop.line("not captured").await.contains(TABLE));
    let port = common::free_port();
    let _serve = shop.command(&["serve", "--bind", &format!("127.0.0.1:{port}")]).spawn().unwrap();
    let ready = format!("http://127.0.0.1:{port}/readyz");
    eventually("readiness to tell the fault", TIMEOUT, async || {
        let Ok(answer) = reqwest::get(&ready).await else { return false };
        answer.status() == 503 && answer.text().await.unwrap().contains("not captured")
    })
    .await;
    let _roles = shop.start_roles();
    let enabled =
        "SELECT count(*) FROM pg_trigger WHERE tgname = 'refarch_products_update' AND tgenabled <> 'D'";
    for _ in 0..2 {
        eventually("the trigger to be armed again", TIMEOUT, async || shop.number(enabled).await == 1).await;
        shop.sql(&trigger).await;
    }
    eventually("the trigger to be armed again", TIMEOUT, async || shop.number(enabled).await == 1).await;
    assert!(shop.number("SELECT count(*) FROM refarch.event WHERE kind = 'rearmed'").await >= 1);
    eventually("readiness", TIMEOUT, async || reqwest::get(&ready).await.is_ok_and(|a| a.status() == 200))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_swapped_by_rename_is_captured_and_backfilled() {
    let shop = on_pgvector().await.filled().await.proving(&[("REFARCH_AUDIT_ARMED_S", "1")]);
    let _roles = shop.start_roles();
    eventually("a first round", TIMEOUT, async || shop.rounds().await.0 > 0).await;
    shop.sql(&format!(
        "BEGIN; CREATE TABLE public.made_anew (LIKE {TABLE} INCLUDING ALL); \
         INSERT INTO made_anew (id, description) SELECT i, 'Made anew ' || i FROM generate_series(20, 60) i; \
         ALTER TABLE {TABLE} RENAME TO made_before; ALTER TABLE made_anew RENAME TO {TABLE}; COMMIT"
    ))
    .await;
    eventually("the table of that name to be in step", TIMEOUT, async || {
        shop.number("SELECT count(*) FROM refarch.event WHERE kind = 'rearmed'").await > 0
            && shop.status().await["synced"] == json!(true)
    })
    .await;
    shop.sql(&format!("UPDATE {TABLE} SET description = 'Edited afterwards' WHERE id = 21")).await;
    eventually("nothing to differ", TIMEOUT, async || {
        let (code, report) = shop.compare(&["--wait", "5"]).await;
        code == Some(0) && report["rows"] == json!(41) && report["indexed"] == json!(41)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_pending_backfill_are_no_differences() {
    let shop = on_pgvector().await.filled().await;
    shop.on_vectors("TRUNCATE {vectors}; DELETE FROM refarch.ledger").await;
    shop.sql("SELECT refarch.request_backfill('products', false, true)").await;
    let (code, report) = shop.compare(&["--wait", "1"]).await;
    assert_eq!((code, &report["undecided"]), (Some(2), &json!(29)), "{report}");
    let backends = shop.backends().await;
    let mut prover = prover(&backends, "first");
    let asked = "SELECT count(*) FROM refarch.backfill";
    let seen =
        "SELECT coalesce(jsonb_array_length(round::jsonb -> 'suspects'), 0)::bigint FROM refarch.proof";
    // Longer than any difference must last, by the prover's clock.
    for _ in 0..600 {
        prover.step().await;
    }
    assert!(shop.number(seen).await > 0, "it goes on, however slowly");
    assert_eq!((shop.number(asked).await, shop.number("SELECT count(*) FROM refarch.outbox").await), (1, 0));
    // The changes are under way: differences that were seen before do not count.
    shop.role(&["listen", "--until-idle"]).await;
    for _ in 0..5 {
        prover.step().await;
    }
    shop.apply().await;
    finish(&shop, &mut prover).await;
    assert_eq!(shop.rounds().await, (1, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_with_outdated_columns_holds_its_work() {
    let mut shop = on_pgvector().await.filled().await;
    let old = shop.backends().await;
    old.ledger.peek(&["1".to_owned()]).await.unwrap();
    shop.env.push(("REFARCH_SOURCE_METADATA", "name".to_owned()));
    shop.role(&["migrate"]).await;
    for said in [
        old.ledger.peek(&["1".to_owned()]).await.map(drop),
        old.ledger.rows_after(None, 5).await.map(drop),
        prover(&old, "old").0.step().await.map(drop),
    ] {
        let error = said.expect_err("an old process does not hold");
        assert_eq!(error.class(), Class::Retryable, "{error}");
        assert!(
            error.message().contains("metadata") && error.message().contains("restart this process"),
            "{error}"
        );
    }
    shop.backends().await.ledger.peek(&["1".to_owned()]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_row_is_named_and_the_other_rows_are_compared() {
    let shop = on_pgvector().await.with(&NOTE);
    shop.sql(
        "CREATE TYPE state AS ENUM ('good', 'bad'); \
         CREATE FUNCTION told(state) RETURNS json LANGUAGE plpgsql AS $$ BEGIN \
           IF $1 = 'bad' THEN RAISE 'missing chunk number 0' USING ERRCODE = 'XX001'; END IF; RETURN '{}'; END $$; \
         CREATE CAST (state AS json) WITH FUNCTION told(state); \
         CREATE TABLE note (id bigint PRIMARY KEY, title text, extra state); \
         INSERT INTO note SELECT i, 'Note number ' || i, 'good' FROM generate_series(1, 20) i",
    )
    .await;
    shop.role(&["migrate"]).await;
    shop.apply().await;
    shop.sql(
        "ALTER TABLE note DISABLE TRIGGER ALL; UPDATE note SET extra = 'bad' WHERE id = 7; \
         ALTER TABLE note ENABLE TRIGGER ALL",
    )
    .await;
    shop.remove("8").await;
    let (code, report) = shop.compare(&["--wait", "1"]).await;
    assert_eq!(
        (code, &report["unreadable"], &report["missing"]),
        (Some(1), &json!(1), &json!(1)),
        "{report}"
    );
    assert_eq!(report["examples"][0], json!({ "id": "7", "kind": "unreadable" }));
    let backends = shop.backends().await;
    finish(&shop, &mut prover(&backends, "first")).await;
    assert_eq!(shop.number("SELECT unreadable FROM refarch.proof_round").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_queue_slows_the_proof_and_does_not_stop_it() {
    let shop = on_pgvector().await.filled().await;
    shop.sql(
        "SELECT pgmq.send('refarch_live', jsonb_build_object('oldest', '2001-01-01T00:00:00Z'), '{\"changes\": 1500}'::jsonb, 3600)",
    )
    .await;
    let backends = shop.backends().await;
    let mut prover = prover(&backends, "first");
    let seen = "SELECT coalesce((round::jsonb ->> 'records')::bigint, 0) FROM refarch.proof";
    for _ in 0..400 {
        prover.step().await;
    }
    assert!(shop.number(seen).await > 0, "not a page in an hour");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_was_ahead_does_not_turn_the_proof_off() {
    let shop = on_pgvector().await.filled().await;
    let backends = shop.backends().await;
    finish(&shop, &mut prover(&backends, "first")).await;
    shop.sql(
        "UPDATE refarch.proof_round SET began_at = now() + interval '1 year', ended_at = now() + interval '1 year'; \
         UPDATE refarch.proof SET worker_id = 'gone', held_until = now() + interval '1 year'",
    )
    .await;
    assert_eq!(shop.status().await["proof"]["overdue"], json!(true));
    let mut second = prover(&backends, "second");
    // A round is spread over its period.
    for _ in 0..1_000 {
        second.step().await;
        if shop.rounds().await.0 > 1 {
            break;
        }
    }
    assert_eq!(shop.rounds().await.0, 2, "no round begins");
    assert_eq!(shop.status().await["proof"]["overdue"], json!(false));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_missing_from_the_registry_registers_again() {
    let shop = on_pgvector().await.filled().await;
    let _roles = shop.start_roles();
    let there = "SELECT count(*) FROM refarch.worker WHERE role = 'embed' AND threads = 1 AND pid > 0";
    for _ in 0..2 {
        eventually("the worker to be in the registry", Duration::from_secs(30), async || {
            shop.number(there).await == 1
        })
        .await;
        shop.sql("DELETE FROM refarch.worker").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_is_down_at_the_start_is_shown_as_a_fault() {
    let shop = on_pinecone().await;
    shop.role(&["migrate"]).await;
    shop.sql("UPDATE refarch.target SET host = NULL").await;
    let mut command = shop.command(&["embed", "--workers", "1"]);
    command.env("REFARCH_INDEX_HOST", format!("http://127.0.0.1:{}", common::free_port()));
    let _embed = command.spawn().unwrap();
    eventually("the fault to be told", Duration::from_secs(30), async || {
        let faults = shop.status().await["faults"].clone();
        faults.as_array().unwrap().iter().any(|fault| fault["kind"] == json!("held"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn status_says_that_the_index_refuses_the_key() {
    for named in [false, true] {
        let mut shop = on_pinecone().await;
        let double = shop.double.clone().unwrap();
        if named {
            shop.env.extend([
                ("REFARCH_INDEX_HOST", String::new()),
                ("REFARCH_INDEX_NAME", "shop".to_owned()),
                ("REFARCH_INDEX_CONTROLLER", double.url()),
            ]);
        }
        let shop = shop.filled().await;
        double.revoke_keys();
        let status = shop.status().await;
        assert_eq!((&status["indexed"], &status["synced"]), (&json!(null), &json!(false)), "{status}");
        // A recorded place has no scheme, and the double no certificate.
        let why = if named { "" } else { "401" };
        assert!(status["indexed_error"].as_str().is_some_and(|said| said.contains(why)), "{status}");
        let line = shop.line("indexed").await;
        assert!(line.contains("not known: ") && line.contains(why), "{line}");
    }
}
