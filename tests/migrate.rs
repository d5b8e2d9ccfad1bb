//! Coming and going: a database of the reference architecture taken over, a plan that changes nothing, and
//! everything of ours taken away again.

mod common;

use std::collections::BTreeSet;

use common::Database;
use serde_json::Value;
use tokio_postgres::Client;

/// Rows that the reference architecture holds.
const ROWS: i64 = 3_000;

const REFERENCE: &str = include_str!("fixtures/reference_schema.sql");

async fn refarch(database: &Database, args: &[&str]) -> (Option<i32>, String, String) {
    let output = database.refarch().args(args).output().await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

async fn migrate(database: &Database, args: &[&str]) -> Value {
    let args = [&["migrate", "--json"], args].concat();
    let (code, stdout, stderr) = refarch(database, &args).await;
    assert_eq!(code, Some(0), "{stderr}");
    serde_json::from_str(&stdout).unwrap()
}

/// Everything that the catalog has of our own making, and how full the tables are.
async fn snapshot(client: &Client) -> BTreeSet<String> {
    let sql = "SELECT 'class ' || c.oid::regclass || ' ' || c.relkind::text || ' ' || c.relfilenode FROM pg_class c WHERE c.relnamespace NOT IN \
                 ('pg_catalog'::regnamespace, 'information_schema'::regnamespace) AND c.relnamespace::regnamespace::text NOT LIKE 'pg\\_%' \
               UNION ALL SELECT 'function ' || oid::regprocedure || ' ' || md5(prosrc) FROM pg_proc WHERE pronamespace NOT IN \
                 ('pg_catalog'::regnamespace, 'information_schema'::regnamespace) \
               UNION ALL SELECT 'trigger ' || tgname || ' on ' || tgrelid::regclass || ' ' || tgenabled::text FROM pg_trigger WHERE NOT tgisinternal \
               UNION ALL SELECT 'extension ' || extname FROM pg_extension \
               UNION ALL SELECT 'schema ' || nspname FROM pg_namespace WHERE nspname NOT LIKE 'pg\\_%' \
               UNION ALL SELECT 'type ' || oid::regtype FROM pg_type WHERE typnamespace NOT IN \
                 ('pg_catalog'::regnamespace, 'information_schema'::regnamespace) AND typnamespace::regnamespace::text NOT LIKE 'pg\\_%'";
    client.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// Every row of the table, bit for bit.
async fn checksum(client: &Client) -> (i64, String) {
    let sql = "SELECT count(*), md5(string_agg(p::text || p.xmin::text || p.ctid::text, ',' ORDER BY id)) FROM products_with_increment p";
    let row = client.query_one(sql, &[]).await.unwrap();
    (row.get(0), row.get(1))
}

async fn number(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.unwrap().get(0)
}

/// A database as the reference architecture leaves it.
async fn reference() -> (Database, Client) {
    let database = Database::create().await;
    let client = database.client().await;
    client.batch_execute(REFERENCE).await.unwrap();
    let fill = "INSERT INTO products_with_increment (name, sku, description, price, last_updated, uuid, processed) \
                SELECT 'name ' || n, 'sku-' || n, 'A thing that is number ' || n, n::numeric::money, '2024-05-01', gen_random_uuid()::text, n % 2 = 0 \
                FROM generate_series(1, $1::bigint::int) n";
    client.execute(fill, &[&ROWS]).await.unwrap();
    (database, client)
}

const OLD_TRIGGERS: &str = "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'products_with_increment'::regclass AND tgname LIKE 'products_%'";
const OURS: &str = "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'products_with_increment'::regclass AND tgname LIKE 'refarch_%'";
const QUEUED: &str = "SELECT coalesce(sum(cardinality(ids)), 0)::bigint FROM refarch.outbox WHERE op = 'u'";

#[tokio::test(flavor = "multi_thread")]
async fn a_reference_database_is_taken_over_with_its_rows_as_they_were() {
    let (database, client) = reference().await;
    // Triggers of somebody else's, one of them by a name of the original's.
    client
        .batch_execute(
            "CREATE FUNCTION theirs() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$; \
             CREATE TRIGGER products_audited AFTER INSERT ON products_with_increment FOR EACH ROW EXECUTE FUNCTION theirs()",
        )
        .await
        .unwrap();
    let (_listener, _hears) = database.listener("table_change").await;
    let before = checksum(&client).await;
    assert_eq!((before.0, number(&client, OLD_TRIGGERS).await), (ROWS, 4));

    let report = migrate(&database, &[]).await;
    let after = checksum(&client).await;
    println!(
        "rows before {}, after {}, queued {}; removed {}",
        before.0, after.0, report["queued"], report["removed"]
    );
    assert_eq!(after, before, "bit for bit, not even rewritten");
    assert_eq!(report["queued"], ROWS);
    let removed: Vec<&str> = report["removed"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let expected = ["deleted", "inserted", "updated"]
        .map(|kind| format!("trigger products_{kind} on products_with_increment"));
    assert_eq!(removed, expected);
    assert_eq!((number(&client, OLD_TRIGGERS).await, number(&client, OURS).await), (1, 4));
    assert_eq!(number(&client, QUEUED).await, ROWS);
    let distinct = "SELECT count(DISTINCT id) FROM refarch.outbox, unnest(ids) AS id";
    assert_eq!(number(&client, distinct).await, ROWS, "each once");
    let note = report["notes"][0].as_str().unwrap();
    assert!(note.contains("DROP FUNCTION notify_change()") && note.contains("bootstrapping_state"), "{note}");
    assert!(report["warnings"][0].as_str().unwrap().contains("still LISTEN"), "{report}");

    // Twice changes nothing.
    let catalog = snapshot(&client).await;
    let again = migrate(&database, &[]).await;
    for key in ["applied", "created", "removed", "armed", "warnings", "notes"] {
        assert_eq!(again[key], serde_json::json!([]), "{key}");
    }
    assert_eq!(again["queued"], 0);
    assert_eq!(snapshot(&client).await, catalog);
    assert_eq!(checksum(&client).await, before);
    assert_eq!(number(&client, QUEUED).await, ROWS);

    // The original's listener marks rows as processed; nobody here is told.
    client.batch_execute("UPDATE products_with_increment SET processed = true").await.unwrap();
    assert_eq!(number(&client, QUEUED).await, ROWS);
    // A description near the original's limit is no trouble any more.
    let long = "x".repeat(9_000);
    client
        .execute("UPDATE products_with_increment SET description = $1 WHERE id = 1", &[&long])
        .await
        .unwrap();
    assert_eq!(number(&client, QUEUED).await, ROWS + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_tells_all_and_changes_nothing() {
    let (database, client) = reference().await;
    let (catalog, rows) = (snapshot(&client).await, checksum(&client).await);
    let plan = migrate(&database, &["--dry-run"]).await;
    assert_eq!((snapshot(&client).await, checksum(&client).await), (catalog, rows));
    let (code, text, _) = refarch(&database, &["migrate", "--dry-run"]).await;
    assert_eq!(code, Some(0));
    for line in [
        "would apply: 0001_core",
        "would remove: trigger products_deleted",
        "would queue: 3000 rows that are there",
    ] {
        assert!(text.contains(line), "{text}");
    }
    assert_eq!(migrate(&database, &[]).await, plan, "and that is what is done then");
    let (_, text, _) = refarch(&database, &["migrate", "--dry-run"]).await;
    assert!(text.starts_with("nothing to do"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_installed_is_taken_away_without_a_trace() {
    let (database, client) = reference().await;
    // As the original's, which do not come back.
    client
        .batch_execute(
            "DROP TRIGGER products_inserted ON products_with_increment; DROP TRIGGER products_updated ON products_with_increment; \
             DROP TRIGGER products_deleted ON products_with_increment",
        )
        .await
        .unwrap();
    let (catalog, rows) = (snapshot(&client).await, checksum(&client).await);
    migrate(&database, &[]).await;
    assert_ne!(snapshot(&client).await, catalog);

    let (code, planned, said) = refarch(&database, &["migrate", "--uninstall"]).await;
    assert!(code == Some(2) && said.contains("add --yes"), "{said}");
    assert!(
        planned.contains("would remove schema refarch") && planned.contains("would remove extension vector"),
        "{planned}"
    );
    assert_eq!(number(&client, OURS).await, 4, "only a plan");
    let (code, _, _) = refarch(&database, &["migrate", "--uninstall", "--dry-run"]).await;
    assert_eq!(code, Some(0));

    // Not under a role that runs.
    let worker = "INSERT INTO refarch.worker (worker_id, role, host, pid) VALUES ('w', 'listen', 'here', 7)";
    client.batch_execute(worker).await.unwrap();
    let (code, _, said) = refarch(&database, &["migrate", "--uninstall", "--yes"]).await;
    assert!(code == Some(1) && said.contains("listen on here (7)"), "{said}");
    let (code, done, said) = refarch(&database, &["migrate", "--uninstall", "--yes", "--force"]).await;
    assert_eq!(code, Some(0), "{said}");
    assert!(done.contains("removed schema pgmq") && done.contains("the table and its rows stay"), "{done}");
    assert_eq!((snapshot(&client).await, checksum(&client).await), (catalog, rows));
    let (code, done, _) = refarch(&database, &["migrate", "--uninstall", "--yes"]).await;
    assert!(code == Some(0) && done.starts_with("nothing to do"), "{done}");
    // And back.
    assert_eq!(migrate(&database, &[]).await["queued"], ROWS);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_use_stays() {
    let (database, client) = reference().await;
    migrate(&database, &[]).await;
    client
        .batch_execute(
            "SELECT pgmq.create('theirs'); CREATE TABLE public.their_vectors (v vector(3)); \
             DROP TABLE products_with_increment CASCADE",
        )
        .await
        .unwrap();
    let (code, done, said) = refarch(&database, &["migrate", "--uninstall", "--yes"]).await;
    assert_eq!(code, Some(0), "{said}");
    assert!(
        done.contains("schema pgmq stays: 1 queue(s)") && done.contains("extension vector stays"),
        "{done}"
    );
    assert_eq!(number(&client, "SELECT count(*) FROM pgmq.meta").await, 1);
    assert_eq!(number(&client, "SELECT count(*) FROM public.their_vectors").await, 0);
    assert_eq!(number(&client, "SELECT count(*) FROM pg_namespace WHERE nspname = 'refarch'").await, 0);
}
