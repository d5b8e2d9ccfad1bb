//! Installing and removing: taking over a database of the reference architecture, dry runs that change nothing,
//! uninstalling everything; a table in use, roles with settings and few rights, and migrations that are refused.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::common::{self, Database, number};
use crate::live::Live;

/// Rows that the reference architecture holds.
const ROWS: i64 = 3_000;

const REFERENCE: &str = include_str!("../fixtures/reference_schema.sql");

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

/// Every object of refarch in the catalog, and how many rows its tables have.
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
async fn a_database_of_the_reference_architecture_is_taken_over_with_its_rows_unchanged() {
    let (database, client) = reference().await;
    // Foreign triggers, one of them with a name that the reference architecture uses.
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
        .map(|kind| format!("trigger products_{kind} on public.products_with_increment"));
    assert_eq!(removed, expected);
    assert_eq!((number(&client, OLD_TRIGGERS).await, number(&client, OURS).await), (1, 4));
    assert_eq!(number(&client, QUEUED).await, ROWS);
    let distinct = "SELECT count(DISTINCT id) FROM refarch.outbox, unnest(ids) AS id";
    assert_eq!(number(&client, distinct).await, ROWS, "each once");
    let note = report["notes"][0].as_str().unwrap();
    assert!(
        note.contains("DROP FUNCTION public.notify_change()") && note.contains("bootstrapping_state"),
        "{note}"
    );
    assert!(report["warnings"][0].as_str().unwrap().contains("still LISTEN"), "{report}");

    // A second migration changes nothing.
    let catalog = snapshot(&client).await;
    let again = migrate(&database, &[]).await;
    for key in ["applied", "created", "removed", "armed", "warnings", "notes"] {
        assert_eq!(again[key], serde_json::json!([]), "{key}");
    }
    assert_eq!(again["queued"], 0);
    assert_eq!(snapshot(&client).await, catalog);
    assert_eq!(checksum(&client).await, before);
    assert_eq!(number(&client, QUEUED).await, ROWS);

    // The reference architecture's listener marks rows as processed; that must not be captured.
    client.batch_execute("UPDATE products_with_increment SET processed = true").await.unwrap();
    assert_eq!(number(&client, QUEUED).await, ROWS);
    // A description beyond the limit of the reference architecture's triggers is accepted now.
    let long = "x".repeat(9_000);
    client
        .execute("UPDATE products_with_increment SET description = $1 WHERE id = 1", &[&long])
        .await
        .unwrap();
    assert_eq!(number(&client, QUEUED).await, ROWS + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_reports_every_step_and_changes_nothing() {
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
async fn uninstall_removes_everything_that_migrate_installed() {
    let (database, client) = reference().await;
    // The reference architecture's triggers are dropped first, because an uninstallation does not bring them back.
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

    // Refused while a role runs.
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
    // A migration back to the first settings queues every row.
    assert_eq!(migrate(&database, &[]).await["queued"], ROWS);
}

#[tokio::test(flavor = "multi_thread")]
async fn uninstall_keeps_objects_that_others_use() {
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

const ARTICLES: &str = "CREATE TABLE articles (id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, title text, body text, sku text); \
     INSERT INTO articles (title, body, sku) SELECT 'Title ' || i, 'A text of number ' || i, 's' FROM generate_series(1, 20) i";

async fn articles() -> Live {
    Live::new(ARTICLES, "title,body", "id").await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_writer_waits_long_for_a_migration_that_waits_for_another_writer() {
    let articles = self::articles().await;
    let holder = articles.database.client().await;
    holder.batch_execute("BEGIN; UPDATE articles SET body = 'held' WHERE id = 1").await.unwrap();
    let mut migrating =
        articles.database.refarch().arg("migrate").envs(articles.env.iter().cloned()).spawn().unwrap();
    // The migration waits for the lock meanwhile.
    let waits = "SELECT count(*) FROM pg_locks WHERE relation = 'articles'::regclass AND NOT granted";
    let ready = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'refarch'";
    common::eventually("the migration to wait", Duration::from_mins(1), async || {
        articles.number(waits).await > 0 || articles.number(ready).await == 0
    })
    .await;
    let (started, mut longest) = (Instant::now(), Duration::ZERO);
    while started.elapsed() < Duration::from_secs(6) {
        let at = Instant::now();
        articles.run("UPDATE articles SET body = body || '.' WHERE id = 2").await;
        longest = longest.max(at.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("the longest wait of a writer: {longest:?}");
    holder.batch_execute("COMMIT").await.unwrap();
    assert!(migrating.wait().await.unwrap().success());
    assert!(longest < Duration::from_secs(2), "{longest:?}");
    let unseen = "SELECT count(DISTINCT id) FROM refarch.outbox, unnest(ids) AS id";
    assert_eq!(articles.number(unseen).await, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_would_discard_the_index_are_refused() {
    let mut articles = self::articles().await;
    articles.done(&["migrate"]).await;
    articles.sync().await;
    let vectors = "SELECT count(*) FROM refarch.vector_1";
    articles.set("REFARCH_SOURCE_TEXT", "title");
    for args in [&["migrate"][..], &["migrate", "--dry-run"]] {
        let said = articles.refused(args).await;
        assert!(
            said.contains("source.text was title, body and is title") && said.contains("--rebuild"),
            "{said}"
        );
    }
    assert_eq!(articles.number(vectors).await, 20);
    // The settings name another table.
    articles
        .run("CREATE TABLE other (id bigint PRIMARY KEY, headline text); INSERT INTO other VALUES (1, 'x')")
        .await;
    articles.set("REFARCH_SOURCE_TABLE", "public.other");
    articles.set("REFARCH_SOURCE_TEXT", "headline");
    let said = articles.refused(&["migrate"]).await;
    assert!(said.contains("public.articles") && said.contains("20 rows"), "{said}");
    articles.run("UPDATE articles SET title = 'still captured' WHERE id = 1").await;
    // Refused while a role runs.
    articles
        .run("INSERT INTO refarch.worker (worker_id, role, host, pid) VALUES ('w', 'embed', 'here', 7)")
        .await;
    let said = articles.refused(&["migrate", "--rebuild"]).await;
    assert!(said.contains("embed on here (7)"), "{said}");
    assert_eq!(articles.number(vectors).await, 20);
    articles.run("DELETE FROM refarch.worker").await;
    let said = articles.done(&["migrate", "--rebuild"]).await;
    assert!(said.contains("removed: capture triggers on public.articles"), "{said}");
    articles.run("UPDATE articles SET title = 'not captured any more'").await;
    articles.sync().await;
    articles.done(&["verify", "--sample", "0"]).await;
    assert_eq!(articles.number("SELECT count(*) FROM refarch.vector_2").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_may_change_before_anything_was_indexed() {
    let mut articles = self::articles().await;
    articles.done(&["migrate"]).await;
    articles.set("REFARCH_SOURCE_TEXT", "title");
    articles.done(&["migrate"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn adding_or_removing_a_metadata_column_queues_every_row_and_reordering_none() {
    let mut articles = self::articles().await;
    articles.set("REFARCH_SOURCE_METADATA", "id,title");
    articles.done(&["migrate"]).await;
    articles.sync().await;
    for (metadata, queued) in [("title,id", 0), ("id,title,sku", 20), ("title", 20)] {
        articles.set("REFARCH_SOURCE_METADATA", metadata);
        articles.done(&["migrate"]).await;
        assert_eq!(articles.number(QUEUED).await, queued, "{metadata}");
        assert_eq!(articles.number("SELECT count(*) FROM refarch.vector_1").await, 20);
        articles.run("DELETE FROM refarch.outbox").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_queue_is_refused_while_the_old_queue_holds_messages() {
    let mut articles = self::articles().await;
    articles.done(&["migrate"]).await;
    articles.done(&["listen", "--until-idle"]).await;
    articles.set("REFARCH_QUEUE_NAME", "other");
    let said = articles.refused(&["migrate"]).await;
    assert!(said.contains("left in the queue refarch_") && said.contains("queue.name"), "{said}");
    articles.set("REFARCH_QUEUE_NAME", "refarch");
    articles.done(&["embed", "--until-idle", "--workers", "1"]).await;
    articles.set("REFARCH_QUEUE_NAME", "other");
    articles.done(&["migrate"]).await;
    articles.run("UPDATE articles SET title = 'by the other one'").await;
    articles.sync().await;
    articles.done(&["verify", "--sample", "0"]).await;
}

/// The name of a model folder in earlier releases, which hashed only samples of the weights.
fn former_name(folder: &str, weights: &[u8]) -> String {
    let mut digest = Sha256::new();
    digest.update((weights.len() as u64).to_le_bytes());
    for sample in 0..64 {
        digest.update(&weights[weights.len() / 64 * sample..][..4_096]);
    }
    let start = digest.finalize()[..6].iter().fold(0, |number, byte| (number << 8) | u64::from(*byte));
    format!("{folder}@{start:012x}/f32")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_whose_model_folder_has_its_former_name_is_kept() {
    let mut articles = self::articles().await;
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("my-own");
    std::fs::create_dir(&folder).unwrap();
    let stock = common::runtime_dir().join("runtime/model");
    for file in ["config.json", "tokenizer.json"] {
        std::fs::copy(stock.join(file), folder.join(file)).unwrap();
    }
    let mut weights = std::fs::read(stock.join("model.safetensors")).unwrap();
    let sampled = weights.len() / 64 * 3;
    weights[sampled] ^= 1;
    std::fs::write(folder.join("model.safetensors"), &weights).unwrap();
    articles.set("REFARCH_EMBEDDER_MODEL", folder.to_str().unwrap());
    articles.done(&["migrate"]).await;
    articles.sync().await;
    let generation = "SELECT model || ' ' || salt FROM refarch.target WHERE id = 1";
    let name = async || articles.client.query_one(generation, &[]).await.unwrap().get::<_, String>(0);
    let now = name().await;
    assert!(now.starts_with("bert-6x384@"), "{now}");
    let call = async |model: &str| {
        let sql = "UPDATE refarch.target SET model = $1, salt = $1 || ' as it was'";
        articles.client.execute(sql, &[&model]).await.unwrap();
    };

    let former = former_name("my-own", &weights);
    call(&former).await;
    articles.done(&["embed", "--until-idle", "--workers", "1"]).await;
    articles.done(&["migrate", "--dry-run"]).await;
    assert_eq!(name().await, format!("{former} {former} as it was"));
    let said = articles.done(&["migrate"]).await;
    assert!(!said.contains("queued"), "{said}");
    let model = now.split(' ').next().unwrap();
    assert_eq!(name().await, format!("{model} {former} as it was"), "hashes are made as before");
    assert_eq!(articles.number("SELECT count(*) FROM refarch.vector_1").await, 20);
    articles.done(&["embed", "--until-idle", "--workers", "1"]).await;

    // A recorded name of another folder, or a name without a hash: the model is another one, or may be.
    for other in [former_name("other", &weights), "all-MiniLM-L6-v2/f32".to_owned()] {
        call(&other).await;
        let said = articles.refused(&["migrate"]).await;
        assert!(said.contains("--rebuild"), "{said}");
        articles.refused(&["embed", "--until-idle", "--workers", "1"]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_holds_no_exclusive_lock_while_it_counts_rows() {
    let articles = self::articles().await;
    let holder = articles.database.client().await;
    holder.batch_execute("BEGIN; LOCK TABLE public.articles IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let planning = articles
        .database
        .refarch()
        .args(["migrate", "--dry-run"])
        .envs(articles.env.iter().cloned())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let counting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                    AND wait_event_type = 'Lock' AND query LIKE 'SELECT count(*)%'";
    common::eventually("the plan to count", Duration::from_mins(1), async || {
        articles.number(counting).await > 0
    })
    .await;
    let locks = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid \
                 WHERE a.datname = current_database() AND a.application_name = 'refarch' AND l.granted \
                   AND (l.mode = 'AccessExclusiveLock' OR l.locktype = 'advisory')";
    let held = articles.number(locks).await;
    holder.batch_execute("COMMIT").await.unwrap();
    let output = planning.wait_with_output().await.unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && said.contains("20 rows"), "{said}");
    assert_eq!(held, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_works_with_unusual_database_settings_and_an_extension_schema() {
    let articles = self::articles().await;
    articles
        .run(&format!(
            "CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions; \
             INSERT INTO articles (title) SELECT 'x' FROM generate_series(1, 30000); \
             ALTER DATABASE {0} SET search_path = ''; ALTER DATABASE {0} SET statement_timeout = '50ms'; \
             ALTER DATABASE {0} SET default_transaction_isolation = 'serializable'; \
             ALTER DATABASE {0} SET default_transaction_read_only = on; ALTER DATABASE {0} SET row_security = off",
            articles.database.name()
        ))
        .await;
    articles.done(&["migrate", "--dry-run"]).await;
    let said = articles.done(&["migrate"]).await;
    assert!(said.contains("queued: 30020 rows"), "{said}");
    let said = articles.done(&["migrate", "--uninstall", "--yes"]).await;
    assert!(said.contains("removed schema refarch"), "{said}");
    assert_eq!(articles.number("SELECT count(*) FROM pg_extension WHERE extname = 'vector'").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_work_with_the_rights_that_migrate_gives_them_and_no_more() {
    let articles = self::articles().await;
    let name = articles.database.name().to_owned();
    let role = |part: &str| format!("{part}_{name}");
    let parts = ["listen", "embed", "serve", "verify"];
    for part in parts {
        articles.run(&format!("CREATE ROLE {} LOGIN", role(part))).await;
    }
    let wanted: Vec<String> = parts.iter().map(|part| format!("{part}={}", role(part))).collect();
    let mut wrong: Vec<String> = Vec::new();
    let said = articles.refused(&["migrate", "--roles", "embed=nobody_of_this_name"]).await;
    assert!(said.contains("CREATE ROLE nobody_of_this_name"), "{said}");
    articles.done(&["migrate", "--roles", &wanted.join(",")]).await;
    // An earlier version gave more.
    articles.run(&format!("GRANT DELETE ON refarch.proof_round TO {}", role("serve"))).await;
    articles.done(&["migrate"]).await;
    // Each role runs with its own login. Failures are collected, so that the logins are always deleted.
    for (part, args) in [
        ("listen", &["listen", "--until-idle"][..]),
        ("embed", &["embed", "--until-idle", "--workers", "1"]),
        ("serve", &["status", "--json"]),
        ("verify", &["verify", "--sample", "0", "--repair"]),
    ] {
        // The role is set for the database, because the cluster's access file allows only the owner to log in.
        articles.run(&format!("ALTER DATABASE {name} SET role = '{}'", role(part))).await;
        let (code, said) = articles.refarch(args).await;
        if code != Some(0) || said.contains("permission denied") || said.contains("must be owner") {
            wrong.push(format!("{part}: {code:?} {said}"));
        }
        articles.run(&format!("ALTER DATABASE {name} RESET role")).await;
    }
    let graph = format!("SET ROLE {}; SELECT refarch.build_graph(1, 16, 64); RESET ROLE", role("embed"));
    articles.run(&graph).await;
    for (part, sql) in [
        ("listen", "UPDATE public.articles SET title = 'x'"),
        ("embed", "DELETE FROM public.articles"),
        ("serve", "UPDATE public.articles SET title = 'x'"),
        ("serve", "SELECT refarch.rearm('products')"),
        ("verify", "UPDATE refarch.source SET relation = 'pg_class'"),
        ("embed", "SELECT refarch.make_capture('a', 'articles', 'id', '{}')"),
        ("serve", "DROP TABLE refarch.outbox"),
        ("serve", "DELETE FROM refarch.outbox"),
        ("serve", "DELETE FROM refarch.proof_round"),
        ("serve", "UPDATE refarch.search_index SET recall = 1"),
        ("serve", "DELETE FROM refarch.event"),
        ("serve", "INSERT INTO refarch.count_delta (target) VALUES (1)"),
        ("serve", "DELETE FROM pgmq.q_refarch_live"),
        ("serve", "INSERT INTO refarch.granted (part, name) VALUES ('edit', current_user)"),
        ("serve", "SELECT refarch.give_rights()"),
        ("listen", "DROP TABLE refarch.outbox"),
        ("listen", "DELETE FROM refarch.vector_1"),
        ("listen", "DELETE FROM refarch.ledger"),
        ("embed", "DROP TABLE refarch.vector_1"),
        ("embed", "ALTER TABLE public.articles DISABLE TRIGGER ALL"),
        ("embed", "DROP SCHEMA refarch CASCADE"),
        ("verify", "DELETE FROM refarch.vector_1"),
        ("verify", "UPDATE refarch.proof SET round = NULL"),
    ] {
        articles.run(&format!("SET ROLE {}", role(part))).await;
        let refused = articles.client.batch_execute(sql).await.err().and_then(|error| error.code().cloned());
        if refused != Some(SqlState::INSUFFICIENT_PRIVILEGE) {
            wrong.push(format!("{part} may {sql}, or something else failed: {refused:?}"));
        }
        articles.run("RESET ROLE").await;
    }
    // Only who edits may write to the table.
    articles.done(&["migrate", "--roles", &format!("edit={}", role("serve"))]).await;
    articles
        .run(&format!("SET ROLE {}; UPDATE public.articles SET title = 'y'; RESET ROLE", role("serve")))
        .await;
    let open = "SELECT count(*) FROM pg_proc p WHERE pronamespace = 'refarch'::regnamespace \
                AND has_function_privilege('public', oid, 'EXECUTE')";
    let open = articles.number(open).await;
    for part in parts {
        articles.run(&format!("DROP OWNED BY {0}; DROP ROLE {0}", role(part))).await;
    }
    assert_eq!((wrong, open), (Vec::new(), 0));
    assert_eq!(articles.number("SELECT count(*) FROM pg_class WHERE relname = 'vector_1_graph'").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_queued_after_transactions_under_the_old_settings_end() {
    let mut articles = self::articles().await;
    articles.done(&["migrate"]).await;
    articles.sync().await;
    // No trigger captures this column yet.
    let writer = articles.database.client().await;
    writer.batch_execute("BEGIN; UPDATE public.articles SET sku = 'new' WHERE id = 1").await.unwrap();
    articles.set("REFARCH_SOURCE_METADATA", "id,sku");
    let said = articles.done(&["migrate"]).await;
    assert!(said.contains("1 transaction(s) that wrote to") && said.contains("not all queued yet"), "{said}");
    assert_eq!(articles.number(QUEUED).await, 0);
    let said = articles.done(&["status", "--json"]).await;
    assert!(said.contains("\"pending\":1"), "not in sync meanwhile: {said}");
    writer.batch_execute("COMMIT").await.unwrap();
    articles.done(&["listen", "--until-idle"]).await;
    let requests = "SELECT count(*) FROM refarch.backfill";
    assert_eq!(articles.number(requests).await, 0);
    let queued = "SELECT count(DISTINCT i) FROM (SELECT message FROM pgmq.q_refarch_live UNION ALL SELECT message FROM pgmq.q_refarch_bulk) q, \
                  jsonb_array_elements(message -> 'groups') g, jsonb_array_elements_text(g -> 'ids') i";
    assert_eq!(articles.number(queued).await, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_row_is_queued_after_leaving_a_queue_outside_of_the_database() {
    let articles = self::articles().await;
    articles.done(&["migrate"]).await;
    articles.sync().await;
    articles.run("UPDATE refarch.queue SET kind = 'sqs', name = 'https://queue.example/changes'").await;
    let said = articles.done(&["migrate"]).await;
    assert!(
        said.contains("https://queue.example/changes before") && said.contains("queued: 20 rows"),
        "{said}"
    );
    assert!(articles.done(&["migrate"]).await.starts_with("nothing to do"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_row_is_queued_after_leaving_a_queue_that_an_older_version_did_not_record() {
    let articles = self::articles().await;
    articles.done(&["migrate"]).await;
    articles.sync().await;
    articles
        .run(
            "DELETE FROM refarch.queue; DELETE FROM refarch.worker; INSERT INTO refarch.packing VALUES ('products', 'live', 1, 1); \
             INSERT INTO refarch.worker (worker_id, role, host, pid) VALUES ('w', 'embed', 'here', 7)",
        )
        .await;
    let said = articles.refused(&["migrate"]).await;
    assert!(said.contains("embed on here (7)"), "{said}");
    articles.run("DELETE FROM refarch.worker").await;
    let said = articles.done(&["migrate"]).await;
    assert!(said.contains("queued: 20 rows"), "{said}");
    assert!(articles.done(&["migrate"]).await.starts_with("nothing to do"));
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_by_another_role_than_the_installing_one_is_refused() {
    let articles = self::articles().await;
    articles.done(&["migrate"]).await;
    let role = format!("app_owner_{}", articles.database.name());
    articles.run(&format!("CREATE ROLE {role}; ALTER TABLE refarch.migration OWNER TO {role}")).await;
    let (code, said) = articles.refarch(&["migrate"]).await;
    articles.run(&format!("ALTER TABLE refarch.migration OWNER TO CURRENT_USER; DROP ROLE {role}")).await;
    assert!(code == Some(1) && said.contains(&format!("run refarch migrate as {role}")), "{said}");
    articles.done(&["migrate"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn triggers_left_by_an_interrupted_migration_are_removed_by_the_next() {
    let mut articles = self::articles().await;
    articles.done(&["migrate"]).await;
    articles.run("CREATE TABLE other (id bigint PRIMARY KEY, title text, body text)").await;
    articles.set("REFARCH_SOURCE_TABLE", "public.other");
    // The state after the first part of a migration to the other table.
    articles
        .run("UPDATE refarch.source SET relation = 'public.other'::regclass, table_name = 'public.other'")
        .await;
    for args in [&["migrate", "--dry-run"][..], &["migrate"]] {
        let said = articles.done(args).await;
        assert!(said.contains("capture triggers on public.articles"), "{said}");
    }
    articles.run("DELETE FROM refarch.outbox; UPDATE articles SET title = 'not captured'").await;
    assert_eq!(articles.number("SELECT count(*) FROM refarch.outbox").await, 0);
    assert!(articles.done(&["migrate"]).await.starts_with("nothing to do"));
}

#[tokio::test(flavor = "multi_thread")]
async fn granted_rights_cover_schemas_and_queues_of_other_names() {
    let mut articles = self::articles().await;
    let role = format!("embed_{}", articles.database.name());
    articles
        .run(&format!(
            "CREATE ROLE {role}; CREATE SCHEMA shop; ALTER TABLE articles SET SCHEMA shop; CREATE SCHEMA extensions; \
             CREATE EXTENSION vector SCHEMA extensions"
        ))
        .await;
    articles.set("REFARCH_SOURCE_TABLE", "shop.articles");
    articles.set("REFARCH_QUEUE_NAME", "mine");
    articles.done(&["migrate"]).await;
    // Without this record, the queues look as if refarch had not made them.
    articles.run("DELETE FROM refarch.made").await;
    articles.done(&["migrate", "--roles", &format!("embed={role}")]).await;
    let mut wrong = Vec::new();
    for (kind, thing, right) in [
        ("schema", "shop", "USAGE"),
        ("schema", "extensions", "USAGE"),
        ("table", "shop.articles", "SELECT"),
        ("table", "pgmq.q_mine_live", "DELETE"),
        ("table", "pgmq.a_mine_dead", "INSERT"),
    ] {
        let sql = format!("SELECT has_{kind}_privilege('{role}', '{thing}', '{right}')::int::bigint");
        if articles.number(&sql).await == 0 {
            wrong.push(format!("{right} on {thing}"));
        }
    }
    // After the table was dropped, the rights on other tables are still given.
    articles
        .run(&format!(
            "DROP TABLE shop.articles; REVOKE SELECT ON refarch.ledger FROM {role}; SELECT refarch.give_rights()"
        ))
        .await;
    let sql = format!("SELECT has_table_privilege('{role}', 'refarch.ledger', 'SELECT')::int::bigint");
    let given = articles.number(&sql).await;
    articles.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
    assert_eq!((wrong, given), (Vec::new(), 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_with_another_checksum_under_a_recorded_number_is_refused() {
    let (database, client) = reference().await;
    migrate(&database, &[]).await;
    let recorded = async || {
        let sql = "SELECT version, checksum FROM refarch.migration ORDER BY version";
        let rows = client.query(sql, &[]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect::<Vec<(i32, Option<String>)>>()
    };
    let first = recorded().await;
    let sql = "SELECT encode(sha256(convert_to($1, 'UTF8')), 'hex')";
    let file = include_str!("../../src/backend/postgres/schema/0001_core.sql");
    let checksum: String = client.query_one(sql, &[&file]).await.unwrap().get(0);
    assert_eq!(first[0], (1, Some(checksum)));
    assert!(first.iter().all(|(_, checksum)| checksum.is_some()), "{first:?}");

    // The state that an earlier build leaves.
    let earlier = "ALTER TABLE refarch.migration DROP COLUMN checksum; \
                   DELETE FROM refarch.migration WHERE name = 'checksums'";
    client.batch_execute(earlier).await.unwrap();
    let report = migrate(&database, &[]).await;
    assert_eq!(report["applied"], serde_json::json!(["0010_checksums"]));
    assert_eq!(recorded().await, first);

    let other = "UPDATE refarch.migration SET checksum = repeat('0', 64) WHERE version = 5";
    client.batch_execute(other).await.unwrap();
    let commands: [&[&str]; 4] =
        [&["migrate"], &["migrate", "--dry-run"], &["listen", "--until-idle"], &["status"]];
    for args in commands {
        let (code, _, stderr) = refarch(&database, args).await;
        assert_eq!(code, Some(1), "{args:?}: {stderr}");
        let says = "migration 0005_capture was applied to this database with other content than this build's";
        assert!(stderr.contains(says), "{args:?}: {stderr}");
    }
    assert_eq!(number(&client, "SELECT count(*) FROM refarch.migration WHERE checksum IS NULL").await, 0);
}

/// Indexes for matches by SKU and name that can be used.
async fn lower_case_indexes(client: &Client) -> Vec<String> {
    let sql = "SELECT pg_get_expr(i.indexprs, i.indrelid) FROM pg_index i \
               WHERE i.indrelid = 'products_with_increment'::regclass AND i.indisvalid AND i.indexprs IS NOT NULL ORDER BY 1";
    client.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_of_products_that_refarch_made_gets_the_indexes_that_it_lacks() {
    let database = Database::create().await;
    let client = database.client().await;
    migrate(&database, &[]).await;
    let made = lower_case_indexes(&client).await;
    assert_eq!(made, ["lower((name)::text)", "lower((sku)::text)"]);
    // As an earlier version made it, with what an interrupted build leaves.
    client
        .batch_execute(
            "DROP INDEX products_with_increment_lower_idx, products_with_increment_lower_idx1; \
             ALTER TABLE products_with_increment ADD COLUMN more text; \
             CREATE INDEX products_with_increment_lower_sku ON products_with_increment (lower(sku)); \
             UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'products_with_increment_lower_sku'::regclass",
        )
        .await
        .unwrap();
    let expected =
        ["sku", "name"].map(|column| format!("index on lower({column}) of public.products_with_increment"));
    let planned = migrate(&database, &["--dry-run"]).await;
    assert_eq!(planned["created"], serde_json::json!(expected));
    assert_eq!(lower_case_indexes(&client).await, [""; 0]);
    let report = migrate(&database, &[]).await;
    assert_eq!(
        (&report["created"], &report["warnings"]),
        (&serde_json::json!(expected), &serde_json::json!([]))
    );
    assert_eq!(lower_case_indexes(&client).await, made);
    assert_eq!(migrate(&database, &[]).await["created"], serde_json::json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_of_products_of_the_user_gets_no_index() {
    let (database, client) = reference().await;
    let report = migrate(&database, &[]).await;
    assert!(!report["created"].to_string().contains("lower("), "{report}");
    assert_eq!(lower_case_indexes(&client).await, [""; 0]);
}
