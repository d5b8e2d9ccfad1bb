//! `refarch verify`: what it finds, what it leaves undecided, and what it repairs.

mod common;

use std::time::{Duration, Instant};

use common::{Database, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use refarch::role::chaos::double::Double;
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio_postgres::Client;

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_mins(2);

/// Length of the model's vectors.
const DIMENSIONS: usize = 384;

/// Rows of a test's table; one of them has no text.
const ROWS: u64 = 12;

/// A database in step with its index, and no role running.
struct InStep {
    database: Database,
    client: Client,
    double: Option<Double>,
}

impl InStep {
    async fn with(double: Option<Double>, setup: &str) -> Self {
        let database = Database::create().await;
        let client = database.client().await;
        client.batch_execute(setup).await.unwrap();
        let it = Self { database, client, double };
        it.run(&["migrate"]).await;
        it.sql(&format!(
            "INSERT INTO products_with_increment (id, name, description) \
             SELECT n, 'product ' || n, CASE n WHEN {ROWS} THEN NULL ELSE 'a lamp of kind ' || n || ' for reading' END \
             FROM generate_series(1, {ROWS}) n"
        ))
        .await;
        it.apply().await;
        it
    }

    async fn pgvector() -> Self {
        Self::with(None, "").await
    }

    async fn pinecone() -> Self {
        Self::with(Some(Double::start(DIMENSIONS, 1).await.unwrap()), "").await
    }

    fn refarch(&self, args: &[&str]) -> Command {
        let mut command = self.database.refarch();
        command.args(args).env("RAYON_NUM_THREADS", "1");
        if let Some(double) = &self.double {
            command
                .env("REFARCH_INDEX_KIND", "pinecone")
                .env("REFARCH_INDEX_HOST", double.url())
                .env("REFARCH_INDEX_API_KEY", "test")
                .env("REFARCH_INDEX_TIMEOUT_MS", "1000")
                .env("REFARCH_INDEXER_LEASE_MS", "4000")
                .env("REFARCH_INDEXER_SETTLE_MS", "2000");
        }
        command
    }

    async fn run(&self, args: &[&str]) -> String {
        let output = self.refarch(args).output().await.unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {error}");
        error
    }

    async fn sql(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// Applies what was captured.
    async fn apply(&self) {
        let mut roles = self.roles();
        eventually("everything to be applied", PATIENCE, async || {
            let output = self.refarch(&["status", "--json"]).output().await.unwrap();
            let status: Value = serde_json::from_slice(&output.stdout).unwrap();
            let sql = "SELECT count(*) FROM refarch.attempt";
            let attempts: i64 = self.client.query_one(sql, &[]).await.unwrap().get(0);
            let lanes = [
                "/queue/live/visible",
                "/queue/live/in_flight",
                "/queue/bulk/visible",
                "/queue/bulk/in_flight",
            ];
            attempts == 0
                && status["pending"] == 0
                && lanes.iter().all(|lane| status.pointer(lane).unwrap() == 0)
        })
        .await;
        stop(&mut roles).await;
    }

    fn roles(&self) -> [Child; 2] {
        [&["listen"][..], &["embed", "--workers", "1"]].map(|args| self.refarch(args).spawn().unwrap())
    }

    /// Verifies; the exit code and the report.
    async fn verify(&self, args: &[&str]) -> (i32, Value) {
        let mut all = vec!["verify", "--json"];
        if !args.contains(&"--sample") {
            all.extend(["--sample", "50"]);
        }
        all.extend(args);
        let output = self.refarch(&all).output().await.unwrap();
        let report = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
        (output.status.code().unwrap(), report)
    }

    async fn assert_clean(&self) {
        let (code, report) = self.verify(&[]).await;
        assert_eq!(code, 0, "{report}");
        assert_eq!((&report["rows"], &report["indexed"]), (&ROWS.into(), &(ROWS - 1).into()), "{report}");
        for key in
            ["missing", "stale", "orphaned", "undecided", "vector_mismatch", "repaired", "dead_letters"]
        {
            assert_eq!(report[key], 0, "{report}");
        }
        assert_eq!((&report["sampled"], &report["foreign"]), (&(ROWS - 1).into(), &false.into()), "{report}");
    }

    /// Asks the double's own interface.
    async fn post(&self, path: &str, body: Value) {
        let url = format!("{}{path}", self.double.as_ref().unwrap().url());
        let answer =
            reqwest::Client::new().post(url).header("Api-Key", "test").json(&body).send().await.unwrap();
        assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
    }

    /// Writes a record as it is, but for what `change` does to it, under an id.
    async fn rewrite(
        &self,
        from: &str,
        to: &str,
        change: impl Fn(&mut Vec<f32>, &mut serde_json::Map<String, Value>),
    ) {
        let mut record = self.double.as_ref().unwrap().snapshot("")[from].clone();
        change(&mut record.values, &mut record.metadata);
        let vector = json!({ "id": to, "values": record.values, "metadata": record.metadata });
        self.post("/vectors/upsert", json!({ "vectors": [vector] })).await;
    }
}

async fn stop(roles: &mut [Child]) {
    for role in roles {
        kill(Pid::from_raw(role.id().unwrap() as i32), Signal::SIGTERM).unwrap();
        assert!(role.wait().await.unwrap().success());
    }
}

fn counts(report: &Value) -> [u64; 6] {
    ["missing", "stale", "orphaned", "undecided", "vector_mismatch", "repaired"]
        .map(|key| report[key].as_u64().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_done_to_pgvector_behind_our_back_is_found_and_repaired() {
    let it = InStep::pgvector().await;
    it.assert_clean().await;
    it.sql(
        "DELETE FROM refarch.vector_1 WHERE id = '1'; \
         UPDATE refarch.vector_1 SET content_hash = sha256('other') WHERE id = '2'; \
         INSERT INTO refarch.vector_1 SELECT '999', embedding, content_hash FROM refarch.vector_1 WHERE id = '3'; \
         UPDATE refarch.vector_1 SET embedding = embedding * array_fill(-1, ARRAY[384])::halfvec WHERE id = '4'",
    )
    .await;
    let (code, report) = it.verify(&[]).await;
    assert_eq!((code, counts(&report)), (1, [1, 1, 1, 0, 1, 0]), "{report}");
    let (code, report) = it.verify(&["--repair"]).await;
    assert_eq!((code, counts(&report)), (1, [1, 1, 1, 0, 1, 4]), "{report}");
    it.apply().await;
    it.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_done_to_another_index_behind_our_back_is_found_and_repaired() {
    let it = InStep::pinecone().await;
    it.assert_clean().await;
    it.post("/vectors/delete", json!({ "ids": ["1"] })).await;
    it.rewrite("2", "2", |_, metadata| drop(metadata.insert("content_hash".into(), "00".repeat(32).into())))
        .await;
    it.rewrite("3", "3", |_, metadata| drop(metadata.insert("metadata_hash".into(), "00".repeat(32).into())))
        .await;
    it.rewrite("4", "999", |_, _| ()).await;
    it.rewrite("4", "no number", |_, _| ()).await;
    it.rewrite("5", "5", |values, _| values.iter_mut().for_each(|value| *value = -*value)).await;
    let (code, report) = it.verify(&[]).await;
    assert_eq!((code, counts(&report)), (1, [1, 2, 2, 0, 1, 0]), "{report}");
    let (code, report) = it.verify(&["--repair"]).await;
    assert_eq!((code, counts(&report)), (1, [1, 2, 2, 0, 1, 6]), "{report}");
    it.apply().await;
    it.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_not_captured_is_named_and_armed_by_repair() {
    let setup = "CREATE TABLE products_with_increment (id bigint PRIMARY KEY, created_at timestamp, name text, sku text, \
                 description text, price money, last_updated date, uuid text) PARTITION BY RANGE (id); \
                 CREATE TABLE low PARTITION OF products_with_increment FOR VALUES FROM (0) TO (1000)";
    let it = InStep::with(None, setup).await;
    it.sql("CREATE TABLE high PARTITION OF products_with_increment FOR VALUES FROM (1000) TO (2000)").await;
    it.sql("ALTER TABLE low DISABLE TRIGGER refarch_products_delete").await;
    let (code, report) = it.verify(&[]).await;
    assert_eq!((code, &report["unarmed"]), (1, &json!(["high", "low"])), "{report}");
    // Nobody notices this one.
    it.sql("INSERT INTO high (id, description) VALUES (1001, 'a chair that nobody captured')").await;
    let (code, report) = it.verify(&["--repair", "--wait", "1"]).await;
    assert_eq!((code, &report["unarmed"]), (2, &json!([])), "what was armed is queued anew: {report}");
    it.apply().await;
    let (code, report) = it.verify(&[]).await;
    assert_eq!(
        (code, &report["rows"], &report["indexed"]),
        (0, &(ROWS + 1).into(), &ROWS.into()),
        "{report}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_under_way_is_undecided() {
    let it = InStep::pgvector().await;
    it.sql("UPDATE products_with_increment SET description = 'on its way' WHERE id = 1").await;
    let (code, report) = it.verify(&["--wait", "1"]).await;
    assert_eq!((code, counts(&report)), (2, [0, 0, 0, 1, 0, 0]), "in the outbox: {report}");
    it.run(&["listen", "--until-idle"]).await;
    let (code, report) = it.verify(&["--wait", "1"]).await;
    assert_eq!((code, counts(&report)), (2, [0, 0, 0, 1, 0, 0]), "in the queue: {report}");
    it.run(&["embed", "--until-idle", "--workers", "1"]).await;
    it.assert_clean().await;
    // Somebody may be writing it, for all that the ledger says.
    it.sql(
        "DELETE FROM refarch.vector_1 WHERE id = '1'; \
         UPDATE refarch.ledger SET open = 1 WHERE id = '1'",
    )
    .await;
    let (code, report) = it.verify(&["--wait", "1"]).await;
    assert_eq!((code, counts(&report)), (2, [0, 0, 0, 1, 0, 0]), "open: {report}");
    let text = it.refarch(&["verify", "--wait", "1", "--sample", "0"]).output().await.unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.lines().last().unwrap().starts_with("could not tell"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_that_go_on_are_no_differences() {
    let it = InStep::pinecone().await;
    let mut roles =
        [it.refarch(&["listen"]).spawn().unwrap(), it.refarch(&["embed", "--workers", "1"]).spawn().unwrap()];
    let writer = it.database.client().await;
    let writing = tokio::spawn(async move {
        let started = Instant::now();
        let mut count = 0_u64;
        while started.elapsed() < Duration::from_secs(12) {
            count += 1;
            let id = i64::try_from(count % ROWS).unwrap() + 1;
            let text = format!("lamp {count} for reading");
            let sql = match count % 5 {
                0 => "DELETE FROM products_with_increment WHERE id = $1 AND $2::text <> ''",
                1 => {
                    "INSERT INTO products_with_increment (id, description) VALUES ($1, $2) ON CONFLICT (id) DO NOTHING"
                }
                _ => "UPDATE products_with_increment SET description = $2 WHERE id = $1",
            };
            writer.execute(sql, &[&id, &text]).await.unwrap();
        }
        count
    });
    while !writing.is_finished() {
        let (code, report) = it.verify(&["--wait", "2", "--sample", "0"]).await;
        assert!(code != 1, "{report}");
        assert_eq!(report["missing"].as_u64().unwrap() + report["stale"].as_u64().unwrap(), 0, "{report}");
        assert_eq!(report["orphaned"], 0, "{report}");
    }
    assert!(writing.await.unwrap() > 100, "too few writes to show anything");
    eventually("everything to be decided", PATIENCE, async || it.verify(&["--wait", "20"]).await.0 == 0)
        .await;
    stop(&mut roles).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_is_ahead_of_the_database_is_written_anew() {
    let it = InStep::pinecone().await;
    // As after a restore: the index has seen a later state than this one.
    it.sql("UPDATE refarch.lineage SET mark = mark - 1").await;
    it.rewrite("1", "1", |_, metadata| drop(metadata.insert("content_hash".into(), "00".repeat(32).into())))
        .await;
    it.rewrite("1", "777", |_, _| ()).await;
    let (code, report) = it.verify(&[]).await;
    assert_eq!((code, &report["foreign"]), (1, &true.into()), "{report}");
    let said = it.run(&["embed", "--until-idle", "--workers", "1"]).await;
    assert!(said.contains("every row is written anew"), "{said}");
    it.apply().await;
    // What this state of the database never knew is found by walking the index only.
    let (code, report) = it.verify(&["--repair"]).await;
    assert_eq!(
        (code, counts(&report), &report["foreign"]),
        (1, [0, 0, 1, 0, 0, 1], &false.into()),
        "{report}"
    );
    it.apply().await;
    it.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_looked_at_can_not_be_told() {
    let it = InStep::pinecone().await;
    let gone = format!("http://127.0.0.1:{}", common::free_port());
    let output = it.refarch(&["verify"]).env("REFARCH_INDEX_HOST", gone).output().await.unwrap();
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("could not tell") && error.contains("refused"), "{error}");
    let url = format!("postgres://nobody@127.0.0.1:{}/x", common::free_port());
    let output = it
        .refarch(&["verify"])
        .env("DATABASE_URL", url)
        .env("REFARCH_DATABASE_CONNECT_TIMEOUT_S", "1")
        .output()
        .await
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
}
