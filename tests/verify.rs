//! `refarch verify`: what it finds, what it repairs, and when it says that it can't tell.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use common::{Database, eventually};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use refarch::backend::Backends;
use refarch::backend::postgres::Postgres;
use refarch::backend::postgres::ledger::PgLedger;
use refarch::backend::postgres::lineage::{self, Standing};
use refarch::config::Settings;
use refarch::pipeline::audit::{Auditor, Options};
use refarch::pipeline::clock::BootClock;
use refarch::pipeline::failure::Result;
use refarch::pipeline::index::{Listing, Match, Notes, Stored, VectorIndex, Writes};
use refarch::pipeline::ledger::{Closed, Ledger, Opened, Outcome, Peeked, Pending, Swept};
use refarch::role::chaos::double::{Double, Record};
use refarch::secret::Secret;
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_mins(2);

/// As many as the model's vectors have.
const DIMENSIONS: usize = 384;

/// Rows of a filled shop; the last has no text.
const ROWS: u64 = 30;

/// The index of a shop, and how it is reached behind the roles' back.
enum Index {
    Pgvector,
    Pinecone(Double),
}

/// A database and an index of its own.
struct Shop {
    database: Database,
    client: Client,
    index: Index,
    env: Vec<(&'static str, String)>,
}

/// What a run of verify came to.
#[derive(Debug)]
struct Verified {
    code: Option<i32>,
    report: Value,
    err: String,
}

impl Verified {
    fn count(&self, key: &str) -> u64 {
        self.report[key].as_u64().unwrap_or_else(|| panic!("no count {key}: {self:?}"))
    }

    /// The counts that are not zero, but for those of what was compared.
    fn found(&self) -> Vec<(String, u64)> {
        let counts = self.report.as_object().unwrap().iter();
        counts
            .filter(|(key, _)| !matches!(key.as_str(), "rows" | "indexed" | "sampled"))
            .filter_map(|(key, value)| Some((key.clone(), value.as_u64().filter(|count| *count > 0)?)))
            .collect()
    }

    #[track_caller]
    fn assert(&self, code: i32, found: &[(&str, u64)]) {
        let expected: BTreeSet<(String, u64)> =
            found.iter().map(|(key, count)| ((*key).to_owned(), *count)).collect();
        assert_eq!((self.code, self.found().into_iter().collect()), (Some(code), expected), "{self:?}");
    }

    /// The only fault of capture.
    fn fault(&self) -> &str {
        match self.report["capture_faults"].as_array().map(Vec::as_slice) {
            Some([Value::String(fault)]) => fault,
            _ => panic!("not one fault: {self:?}"),
        }
    }

    fn examples(&self) -> BTreeSet<(&str, &str)> {
        let examples = self.report["examples"].as_array().unwrap().iter();
        examples.map(|one| (one["id"].as_str().unwrap(), one["kind"].as_str().unwrap())).collect()
    }
}

async fn on_pgvector() -> Shop {
    Shop::new(Database::create().await, Index::Pgvector).await
}

async fn on_pinecone() -> Shop {
    Shop::new(Database::create().await, Index::Pinecone(Double::start(DIMENSIONS, 1).await.unwrap())).await
}

impl Shop {
    async fn new(database: Database, index: Index) -> Self {
        let mut env = Vec::new();
        if let Index::Pinecone(double) = &index {
            env.extend([
                ("REFARCH_INDEX_KIND", "pinecone".to_owned()),
                ("REFARCH_INDEX_HOST", double.url()),
                ("REFARCH_INDEX_API_KEY", "x".to_owned()),
                ("REFARCH_INDEX_TIMEOUT_MS", "1000".to_owned()),
                ("REFARCH_INDEXER_LEASE_MS", "4000".to_owned()),
                ("REFARCH_INDEXER_SETTLE_MS", "2000".to_owned()),
            ]);
        }
        let client = database.client().await;
        Self { database, client, index, env }
    }

    async fn filled(self) -> Self {
        self.role(&["migrate"]).await;
        self.sql(&format!(
            "INSERT INTO products_with_increment (id, name, description) \
             SELECT i, 'product ' || i, CASE WHEN i < {ROWS} THEN 'The ' || i || ' bottles of green glass' END \
             FROM generate_series(1, {ROWS}) i"
        ))
        .await;
        self.apply().await;
        self
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.database.refarch();
        command.args(args).envs(self.env.iter().cloned()).stdin(Stdio::null());
        command
    }

    /// Runs a role to its end, and returns what it logged.
    async fn role(&self, args: &[&str]) -> String {
        let output = self.command(args).output().await.unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{args:?}: {err}");
        err
    }

    /// Applies what is pending. Changes of one row in both lanes may overlap, and then are queued again.
    async fn apply(&self) {
        let left = "SELECT EXISTS (SELECT FROM refarch.outbox) OR EXISTS (SELECT FROM refarch.attempt)";
        eventually("all changes to be applied", PATIENCE, async || {
            self.role(&["listen", "--until-idle"]).await;
            self.role(&["embed", "--until-idle", "--workers", "1"]).await;
            !self.client.query_one(left, &[]).await.unwrap().get::<_, bool>(0)
        })
        .await;
    }

    /// Starts the roles that keep the index in step.
    fn start_roles(&self) -> [Child; 2] {
        [&["listen"][..], &["embed", "--workers", "1"]].map(|args| self.command(args).spawn().unwrap())
    }

    async fn verify(&self, args: &[&str]) -> Verified {
        let output = self.command(&["verify", "--json"]).args(args).output().await.unwrap();
        let report = serde_json::from_slice(&output.stdout).unwrap_or_default();
        Verified { code: output.status.code(), report, err: String::from_utf8(output.stderr).unwrap() }
    }

    /// The last line for people.
    async fn verdict(&self, args: &[&str]) -> String {
        let output = self.command(&["verify"]).args(args).output().await.unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.starts_with("rows "), "{text} {}", String::from_utf8_lossy(&output.stderr));
        text.lines().last().unwrap().to_owned()
    }

    /// The backends, in this process.
    async fn backends(&self) -> Backends {
        let runtime = common::runtime_dir().display().to_string();
        let mut env: BTreeMap<String, String> = [("REFARCH_RUNTIME_DIR".to_owned(), runtime)].into();
        env.extend(self.env.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        let settings = Settings::load(None, &env, &[]).unwrap();
        let postgres = Postgres::new(&Secret::new(self.database.url()), &settings.database).unwrap();
        Backends::open(&postgres, &settings).await.unwrap()
    }

    async fn sql(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// Runs a statement over the table of vectors, which it calls `{vectors}`.
    async fn on_vectors(&self, sql: &str) {
        let target: i32 = self.client.query_one("SELECT id FROM refarch.target", &[]).await.unwrap().get(0);
        let sql = sql.replace("{vectors}", &format!("refarch.vector_{target}"));
        assert_eq!(self.client.execute(&sql, &[]).await.unwrap(), 1, "{sql}");
    }

    /// Takes a record out behind everybody's back.
    async fn remove(&self, id: &str) {
        match &self.index {
            Index::Pgvector => self.on_vectors(&format!("DELETE FROM {{vectors}} WHERE id = '{id}'")).await,
            Index::Pinecone(double) => send(double, "delete", json!({ "ids": [id] })).await,
        }
    }

    /// Makes a record one of another text.
    async fn spoil_hash(&self, id: &str) {
        match &self.index {
            Index::Pgvector => {
                let sql = "UPDATE {vectors} SET content_hash = sha256('another text') WHERE id = ";
                self.on_vectors(&format!("{sql}'{id}'")).await;
            }
            Index::Pinecone(double) => {
                rewrite(double, id, id, |record| {
                    record.metadata["_refarch_content_hash"] = json!("a7".repeat(32));
                })
                .await;
            }
        }
    }

    /// Gives a record another vector of length one, and leaves its hash.
    async fn spoil_vector(&self, id: &str) {
        let mut values = vec![0.0; DIMENSIONS];
        values[7] = 1.0;
        match &self.index {
            Index::Pgvector => {
                let sql = format!("UPDATE {{vectors}} SET embedding = '{values:?}' WHERE id = '{id}'");
                self.on_vectors(&sql).await;
            }
            Index::Pinecone(double) => rewrite(double, id, id, |record| record.values = values).await,
        }
    }

    /// Makes a record of another id out of one.
    async fn copy(&self, id: &str, to: &str) {
        match &self.index {
            Index::Pgvector => {
                let sql = format!(
                    "INSERT INTO {{vectors}} SELECT '{to}', embedding, content_hash FROM {{vectors}} WHERE id = '{id}'"
                );
                self.on_vectors(&sql).await;
            }
            Index::Pinecone(double) => rewrite(double, id, to, |_| ()).await,
        }
    }
}

async fn send(double: &Double, what: &str, body: Value) {
    let url = format!("{}/vectors/{what}", double.url());
    let request = reqwest::Client::new().post(url).header("Api-Key", "x").json(&body);
    assert!(request.send().await.unwrap().status().is_success(), "{what}: {body}");
}

/// Writes a record as the change leaves it, under the same id or another.
async fn rewrite(double: &Double, id: &str, to: &str, change: impl FnOnce(&mut Record)) {
    let mut record = double.snapshot("")[id].clone();
    change(&mut record);
    let record = json!({ "id": to, "values": record.values, "metadata": record.metadata });
    send(double, "upsert", json!({ "vectors": [record] })).await;
}

/// Each test once an index.
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
    what_agrees_is_said_to_agree,
    a_record_that_is_gone_is_missing,
    whatever_differs_is_told_apart_and_repaired,
    a_change_on_its_way_is_undecided,
    a_disabled_trigger_is_named_and_armed,
    a_writer_makes_no_difference,
);

async fn what_agrees_is_said_to_agree(shop: Shop) {
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

async fn a_record_that_is_gone_is_missing(shop: Shop) {
    shop.remove("1").await;
    let verified = shop.verify(&["--sample", "0"]).await;
    verified.assert(1, &[("missing", 1)]);
    assert_eq!(verified.examples(), [("1", "missing")].into());
    let verdict = shop.verdict(&["--sample", "0"]).await;
    assert_eq!(verdict, "index and table differ: run verify --repair to queue the differing rows");
}

async fn whatever_differs_is_told_apart_and_repaired(shop: Shop) {
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
    if let Index::Pinecone(double) = &shop.index {
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

async fn a_change_on_its_way_is_undecided(shop: Shop) {
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

async fn a_disabled_trigger_is_named_and_armed(shop: Shop) {
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

async fn a_writer_makes_no_difference(shop: Shop) {
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
    let mut dice = StdRng::seed_from_u64(11);
    let mut tick = tokio::time::interval(Duration::from_millis(20));
    loop {
        tick.tick().await;
        let id = dice.random_range(1..=40_i64);
        let text = format!("A crate of {} apples", dice.random_range(0..1_000));
        let done = match dice.random_range(0..10) {
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
async fn a_partition_that_is_not_captured_is_named_and_armed() {
    let mut shop = on_pgvector().await;
    shop.env.extend([
        ("REFARCH_SOURCE_TABLE", "public.note".to_owned()),
        ("REFARCH_SOURCE_TEXT", "body".to_owned()),
        ("REFARCH_SOURCE_METADATA", "id".to_owned()),
    ]);
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
async fn whatever_keeps_changes_from_being_captured_is_told() {
    let mut shop = on_pgvector().await;
    shop.env.extend([
        ("REFARCH_SOURCE_TABLE", "public.note".to_owned()),
        ("REFARCH_SOURCE_TEXT", "body".to_owned()),
        ("REFARCH_SOURCE_METADATA", "id".to_owned()),
    ]);
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
    assert!(verified.report["capture_faults"].to_string().contains("can't be: of a test"), "{verified:?}");
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
async fn a_write_that_may_still_come_is_undecided_until_it_is_swept() {
    let shop = on_pinecone().await.filled().await;
    shop.remove("1").await;
    // As a worker leaves it that died amid writing.
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
async fn an_index_of_a_later_state_is_foreign_until_every_row_is_written_anew() {
    let shop = on_pinecone().await.filled().await;
    let set_back = "UPDATE refarch.lineage SET mark = mark - 1";
    shop.sql(set_back).await;
    // What the lost time brought, and what it took.
    shop.copy("1", "55").await;
    shop.remove("2").await;
    let verified = shop.verify(&["--sample", "0"]).await;
    verified.assert(1, &[("missing", 1), ("orphaned", 1)]);
    assert_eq!(verified.report["foreign"], json!(true));

    let logged = shop.role(&["embed", "--until-idle", "--workers", "1"]).await;
    assert!(logged.contains("WARN") && logged.contains("every row is written anew"), "{logged}");
    let asked =
        "SELECT (SELECT count(*) FROM refarch.backfill), (SELECT count(*) FROM refarch.ledger WHERE dirty)";
    let asked = shop.client.query_one(asked, &[]).await.unwrap();
    assert_eq!((asked.get::<_, i64>(0), asked.get::<_, i64>(1)), (1, ROWS as i64));
    shop.apply().await;
    // Nobody here ever knew the record 55.
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
    let Index::Pinecone(double) = &first.index else { unreachable!() };
    let second = Shop::new(Database::create().await, Index::Pinecone(double.clone())).await;
    second.role(&["migrate"]).await;
    second
        .sql("INSERT INTO products_with_increment (id, description) SELECT i, 'Shelf ' || i FROM generate_series(1, 20) i")
        .await;
    let verified = second.verify(&["--sample", "0", "--wait", "1"]).await;
    assert_eq!((verified.code, &verified.report["foreign"]), (Some(1), &json!(true)), "{verified:?}");
    let logged = second.role(&["embed", "--until-idle", "--workers", "1"]).await;
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
async fn what_cannot_be_reached_cannot_be_told() {
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
struct Racing {
    ledger: Arc<PgLedger>,
    client: Client,
    moment: Moment,
    calls: AtomicU32,
}

impl Racing {
    async fn change_at(&self, moment: Moment, call: u32) {
        if moment == self.moment && self.calls.fetch_add(1, Ordering::Relaxed) == call {
            let sql = "UPDATE products_with_increment SET description = 'Changed' WHERE id = 1";
            self.client.batch_execute(sql).await.unwrap();
        }
    }
}

#[async_trait]
impl Ledger for Racing {
    async fn peek(&self, ids: &[String]) -> Result<Vec<Peeked>> {
        // The first time is for the ids that the index holds.
        self.change_at(Moment::Look, 1).await;
        self.ledger.peek(ids).await
    }

    async fn rows_after(&self, id: Option<&str>, limit: usize) -> Result<Vec<Peeked>> {
        self.change_at(Moment::Page, 0).await;
        self.ledger.rows_after(id, limit).await
    }

    async fn open(&self, attempt: &str, worker: &str, ids: &[String]) -> Result<Vec<Opened>> {
        self.ledger.open(attempt, worker, ids).await
    }

    async fn close(&self, attempt: &str, worker: &str, closing: &[(Opened, Outcome)]) -> Result<Closed> {
        self.ledger.close(attempt, worker, closing).await
    }

    async fn disown(&self, worker: &str, in_hand: &[String]) -> Result<u64> {
        self.ledger.disown(worker, in_hand).await
    }

    async fn sweep(&self, settle: Duration, limit: usize) -> Result<Swept> {
        self.ledger.sweep(settle, limit).await
    }

    async fn requeue(&self, ids: &[String]) -> Result<()> {
        self.ledger.requeue(ids).await
    }

    async fn pending(&self) -> Result<Pending> {
        self.ledger.pending().await
    }

    async fn count_try(&self, id: &str, by: i32) -> Result<u32> {
        self.ledger.count_try(id, by).await
    }

    async fn park(&self, id: &str) -> Result<()> {
        self.ledger.park(id).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_amid_the_audit_is_waited_for() {
    for moment in [Moment::Page, Moment::Look] {
        let shop = on_pgvector().await.filled().await;
        if moment == Moment::Look {
            shop.remove("1").await;
        }
        let backends = shop.backends().await;
        let ledger = Racing {
            ledger: Arc::clone(&backends.ledger),
            client: shop.database.client().await,
            moment,
            calls: AtomicU32::new(0),
        };
        let auditor = Auditor {
            ledger: &ledger,
            index: &*backends.index,
            queue: &*backends.queue,
            embedder: None,
            clock: &BootClock,
            options: Options { sample: 0, wait: Duration::from_secs(1), repair: false },
        };
        let report = auditor.run(&|_| ()).await.unwrap();
        assert_eq!((report.differences(), report.undecided), (0, 1), "{moment:?}: {report:?}");
    }
}

/// An index whose note is read while workers make marks.
struct Marked {
    index: Arc<dyn VectorIndex>,
    postgres: Postgres,
    target: i32,
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

    async fn maintain(&self, backlog: u64) -> Result<()> {
        self.index.maintain(backlog).await
    }

    async fn probe(&self) -> Result<()> {
        self.index.probe().await
    }

    fn notes(&self) -> Option<&dyn Notes> {
        Some(self)
    }
}

#[async_trait]
impl Notes for Marked {
    async fn note(&self) -> Result<Option<String>> {
        let notes = self.index.notes().unwrap();
        lineage::mark(&self.postgres, self.target, notes, Duration::ZERO).await?;
        let note = notes.note().await;
        lineage::mark(&self.postgres, self.target, notes, Duration::ZERO).await?;
        note
    }

    async fn set_note(&self, note: &str) -> Result<()> {
        self.index.notes().unwrap().set_note(note).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mark_that_is_made_meanwhile_makes_no_index_foreign() {
    let shop = on_pinecone().await;
    shop.role(&["migrate"]).await;
    let Backends { postgres, target, index, .. } = shop.backends().await;
    let index = Marked { index, postgres: postgres.clone(), target: target.id };
    for _ in 0..2 {
        assert_eq!(lineage::compare(&postgres, target.id, &index).await.unwrap(), Standing::Ours);
    }
}
