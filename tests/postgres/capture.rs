//! The statements that the triggers capture and do not capture. Capture must never make the application's statement
//! fail. Every statement runs on a real database, and the test reads the outbox.

use std::collections::BTreeMap;

use refarch::backend::postgres::Postgres;
use refarch::backend::postgres::capture::{self, CaptureState};
use refarch::backend::postgres::migrate::Report;
use refarch::config::Settings;
use refarch::pipeline::failure::Error;
use tokio_postgres::Client;

use crate::common::source::{self, Migrated, settings, shape};
use crate::common::{self, Database};
use crate::live::Live;

/// A database with the schema, and a session in it.
struct Captured {
    database: Database,
    settings: Settings,
    client: Client,
}

impl Captured {
    /// Migrates with the table of products.
    async fn products() -> Self {
        Self::with("", &[]).await
    }

    /// Runs `setup`, then migrates with these settings.
    async fn with(setup: &str, env: &[(&str, &str)]) -> Self {
        let Migrated { database, settings, client, .. } =
            Migrated::new(setup, settings(env), "pgvector").await;
        Self { database, settings, client }
    }

    async fn migrate(&self) -> Result<Report, Error> {
        migrate_with(&self.database, &self.settings).await
    }

    async fn run(&self, sql: &str) {
        common::run(&self.client, sql).await;
    }

    /// Deletes and returns the rows of the outbox: ids by operation, sorted. A TRUNCATE is `t` without ids.
    async fn take(&self) -> BTreeMap<String, Vec<String>> {
        let rows =
            self.client.query("DELETE FROM refarch.outbox RETURNING op::text, ids", &[]).await.unwrap();
        let mut taken: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for row in rows {
            taken.entry(row.get(0)).or_default().extend(row.get::<_, Vec<String>>(1));
        }
        for ids in taken.values_mut() {
            ids.sort();
        }
        taken
    }

    /// Runs a statement, and takes the outbox rows that it caused.
    async fn capture(&self, sql: &str) -> BTreeMap<String, Vec<String>> {
        self.take().await;
        self.run(sql).await;
        self.take().await
    }
}

async fn migrate_with(database: &Database, settings: &Settings) -> Result<Report, Error> {
    source::migrate(&database.postgres(settings), settings, &shape("pgvector")).await
}

fn ids(op: &str, ids: &[&str]) -> BTreeMap<String, Vec<String>> {
    BTreeMap::from([(op.to_owned(), ids.iter().map(|id| (*id).to_owned()).collect())])
}

fn nothing() -> BTreeMap<String, Vec<String>> {
    BTreeMap::new()
}

const THREE: &str = "INSERT INTO products_with_increment (id, name, description) \
                     VALUES (1, 'a', 'one'), (2, 'b', 'two'), (3, 'c', 'three')";

#[tokio::test]
async fn each_plain_statement_is_captured_once() {
    let captured = Captured::products().await;
    assert_eq!(captured.capture(THREE).await, ids("u", &["1", "2", "3"]));
    let update = "UPDATE products_with_increment SET description = 'new' WHERE id > 1";
    assert_eq!(captured.capture(update).await, ids("u", &["2", "3"]));
    let delete = "DELETE FROM products_with_increment WHERE id = 2";
    assert_eq!(captured.capture(delete).await, ids("d", &["2"]));
    assert_eq!(captured.capture("TRUNCATE products_with_increment").await, ids("t", &[]));
}

#[tokio::test]
async fn an_update_of_the_id_is_a_delete_and_an_upsert() {
    let captured = Captured::products().await;
    captured.run(THREE).await;
    let mut both = ids("d", &["3"]);
    both.extend(ids("u", &["30"]));
    assert_eq!(captured.capture("UPDATE products_with_increment SET id = 30 WHERE id = 3").await, both);
    // If two rows swap their ids, both rows are captured.
    captured.run("UPDATE products_with_increment SET id = -id").await;
    let swap =
        "UPDATE products_with_increment SET id = CASE id WHEN -1 THEN -2 ELSE -1 END WHERE id IN (-1, -2)";
    captured.run("ALTER TABLE products_with_increment DROP CONSTRAINT products_with_increment_pkey, ADD PRIMARY KEY (id) DEFERRABLE INITIALLY DEFERRED").await;
    assert_eq!(captured.capture(swap).await, ids("u", &["-1", "-2"]));
}

#[tokio::test]
async fn statements_that_change_nothing_are_not_captured() {
    let captured = Captured::products().await;
    captured.run(THREE).await;
    for sql in [
        "UPDATE products_with_increment SET description = 'x' WHERE id = 99",
        "DELETE FROM products_with_increment WHERE id = 99",
        "INSERT INTO products_with_increment (name) SELECT 'x' WHERE false",
        "UPDATE products_with_increment SET description = description, price = price",
    ] {
        assert_eq!(captured.capture(sql).await, nothing(), "{sql}");
    }
}

#[tokio::test]
async fn only_changes_of_watched_columns_are_captured() {
    let setup = "CREATE TABLE note (id uuid PRIMARY KEY, body text, tags jsonb, seen int); \
                 INSERT INTO note VALUES ('00000000-0000-0000-0000-000000000001', 'a', '{}', 0)";
    let env = [
        ("REFARCH_SOURCE_TABLE", "note"),
        ("REFARCH_SOURCE_TEXT", "body"),
        ("REFARCH_SOURCE_METADATA", "tags"),
    ];
    let captured = Captured::with(setup, &env).await;
    let one = ids("u", &["00000000-0000-0000-0000-000000000001"]);
    assert_eq!(captured.take().await, one, "rows that were there are queued");
    assert_eq!(captured.capture("UPDATE note SET seen = 1").await, nothing());
    assert_eq!(captured.capture("UPDATE note SET tags = '{\"a\": 1}'").await, one);
    assert_eq!(captured.capture("UPDATE note SET body = NULL").await, one);
    assert_eq!(captured.capture("UPDATE note SET body = ''").await, one);
}

#[tokio::test]
async fn copy_merge_upsert_ctes_views_and_cascades_are_captured() {
    let captured = Captured::products().await;
    captured.run(THREE).await;
    captured.take().await;

    let copied: Vec<String> = (10..1210).map(|id| id.to_string()).collect();
    let sink =
        captured.client.copy_in("COPY products_with_increment (id, description) FROM STDIN").await.unwrap();
    common::copy(sink, copied.iter().map(|id| format!("{id}\tcopied\n"))).await;
    let packed =
        captured.client.query("SELECT cardinality(ids) FROM refarch.outbox ORDER BY seq", &[]).await.unwrap();
    assert_eq!(packed.iter().map(|row| row.get(0)).collect::<Vec<i32>>(), [500, 500, 200]);
    let mut sorted = copied.clone();
    sorted.sort();
    assert_eq!(captured.take().await, BTreeMap::from([("u".to_owned(), sorted)]));
    captured.run("DELETE FROM products_with_increment WHERE id >= 10").await;

    let merge = "MERGE INTO products_with_increment p USING (VALUES (1, 'm'), (2, NULL), (9, 'n')) AS v(id, d) ON p.id = v.id \
                 WHEN MATCHED AND v.d IS NULL THEN DELETE WHEN MATCHED THEN UPDATE SET description = v.d \
                 WHEN NOT MATCHED THEN INSERT (id, description) VALUES (v.id, v.d)";
    let mut merged = ids("u", &["1", "9"]);
    merged.extend(ids("d", &["2"]));
    assert_eq!(captured.capture(merge).await, merged);

    let upsert = "INSERT INTO products_with_increment (id, description) VALUES (1, 'again'), (4, 'new') \
                  ON CONFLICT (id) DO UPDATE SET description = excluded.description";
    assert_eq!(captured.capture(upsert).await, ids("u", &["1", "4"]));

    let cte = "WITH gone AS (DELETE FROM products_with_increment WHERE id = 3 RETURNING description) \
               INSERT INTO products_with_increment (id, description) SELECT 5, description FROM gone";
    let mut moved = ids("u", &["5"]);
    moved.extend(ids("d", &["3"]));
    assert_eq!(captured.capture(cte).await, moved);

    captured.run("CREATE VIEW cheap AS SELECT id, description FROM products_with_increment").await;
    assert_eq!(
        captured.capture("UPDATE cheap SET description = 'by view' WHERE id = 1").await,
        ids("u", &["1"])
    );

    captured
        .run("CREATE TABLE maker (id bigint PRIMARY KEY); INSERT INTO maker VALUES (1), (4); \
              ALTER TABLE products_with_increment ADD FOREIGN KEY (id) REFERENCES maker ON DELETE CASCADE ON UPDATE CASCADE NOT VALID")
        .await;
    assert_eq!(captured.capture("DELETE FROM maker WHERE id = 1").await, ids("d", &["1"]));
    let mut renumbered = ids("u", &["40"]);
    renumbered.extend(ids("d", &["4"]));
    assert_eq!(captured.capture("UPDATE maker SET id = 40 WHERE id = 4").await, renumbered);
}

#[tokio::test]
async fn a_rolled_back_statement_is_not_captured() {
    let captured = Captured::products().await;
    let sql = "BEGIN; INSERT INTO products_with_increment (id) VALUES (1); SAVEPOINT s; \
               INSERT INTO products_with_increment (id) VALUES (2); ROLLBACK TO s; COMMIT";
    assert_eq!(captured.capture(sql).await, ids("u", &["1"]));
    let sql = "BEGIN; DELETE FROM products_with_increment; ROLLBACK";
    assert_eq!(captured.capture(sql).await, nothing());
}

#[tokio::test]
async fn an_application_role_without_rights_on_the_schema_can_write() {
    let captured = Captured::products().await;
    let role = format!("app_{}", captured.database.name());
    captured
        .run(&format!(
            "CREATE ROLE {role}; GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON products_with_increment TO {role}; SET ROLE {role}"
        ))
        .await;
    let denied = captured.client.batch_execute("SELECT * FROM refarch.outbox").await.unwrap_err();
    assert_eq!(denied.code().map(tokio_postgres::error::SqlState::code), Some("42501"));
    captured
        .run("SET search_path = pg_temp; INSERT INTO public.products_with_increment (id) VALUES (1); \
              UPDATE public.products_with_increment SET name = 'x'; DELETE FROM public.products_with_increment; \
              TRUNCATE public.products_with_increment; RESET ROLE; RESET search_path")
        .await;
    let mut all = ids("u", &["1", "1"]);
    all.extend(ids("d", &["1"]));
    all.extend(ids("t", &[]));
    assert_eq!(captured.take().await, all);
    captured.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

const PARTITIONED: &str = "CREATE TABLE item (id bigint NOT NULL, body text) PARTITION BY RANGE (id); \
     CREATE TABLE item_low PARTITION OF item FOR VALUES FROM (0) TO (100); \
     CREATE TABLE item_high PARTITION OF item FOR VALUES FROM (100) TO (200); \
     ALTER TABLE item ADD PRIMARY KEY (id)";
const ITEM: [(&str, &str); 3] =
    [("REFARCH_SOURCE_TABLE", "item"), ("REFARCH_SOURCE_TEXT", "body"), ("REFARCH_SOURCE_METADATA", "body")];

#[tokio::test]
async fn writes_to_a_partition_are_captured() {
    let captured = Captured::with(PARTITIONED, &ITEM).await;
    assert_eq!(
        captured.capture("INSERT INTO item VALUES (1, 'a'), (101, 'b')").await,
        ids("u", &["1", "101"])
    );
    assert_eq!(captured.capture("INSERT INTO item_low VALUES (2, 'c')").await, ids("u", &["2"]));
    assert_eq!(captured.capture("UPDATE item_high SET body = 'd'").await, ids("u", &["101"]));
    let mut moved = ids("d", &["2"]);
    moved.extend(ids("u", &["102"]));
    assert_eq!(captured.capture("UPDATE item SET id = 102 WHERE id = 2").await, moved);
    assert_eq!(captured.capture("DELETE FROM item_low").await, ids("d", &["1"]));
    // The TRUNCATE is captured for the root and for each leaf. The repetition does no harm.
    assert_eq!(captured.capture("TRUNCATE item").await, ids("t", &[]));
}

#[tokio::test]
async fn a_later_partition_is_not_captured_until_migrate_runs_again() {
    let captured = Captured::with(PARTITIONED, &ITEM).await;
    captured.run("CREATE TABLE item_top PARTITION OF item FOR VALUES FROM (200) TO (300)").await;
    assert_eq!(captured.capture("INSERT INTO item_top VALUES (201, 'x')").await, nothing());
    let report = captured.migrate().await.unwrap();
    assert_eq!((report.armed, report.queued), (vec!["refarch.item_top".to_owned()], 1));
    assert_eq!(captured.take().await, ids("u", &["201"]), "what was missed is queued");
    assert_eq!(captured.capture("INSERT INTO item_top VALUES (202, 'y')").await, ids("u", &["202"]));
}

#[tokio::test]
async fn writes_to_inheritance_children_are_captured() {
    let setup = "CREATE TABLE item (id bigint PRIMARY KEY, body text); CREATE TABLE child (extra int) INHERITS (item)";
    let captured = Captured::with(setup, &ITEM).await;
    assert_eq!(captured.capture("INSERT INTO child VALUES (1, 'a', 0)").await, ids("u", &["1"]));
    assert_eq!(captured.capture("UPDATE child SET extra = 1").await, nothing());
    assert_eq!(captured.capture("DELETE FROM item").await, ids("d", &["1"]));
}

#[tokio::test]
async fn writes_with_the_replica_role_are_not_captured() {
    let captured = Captured::products().await;
    let sql = "SET session_replication_role = replica; INSERT INTO products_with_increment (id) VALUES (1); \
               RESET session_replication_role";
    assert_eq!(captured.capture(sql).await, nothing());
}

#[tokio::test]
async fn logical_replication_is_not_captured_and_migrate_says_so() {
    let upstream = Database::create().await;
    let publisher = upstream.client().await;
    let slot = format!("slot_{}", upstream.name());
    publisher
        .batch_execute("CREATE TABLE item (id bigint PRIMARY KEY, body text); CREATE PUBLICATION all_items FOR TABLE item")
        .await
        .unwrap();
    publisher.query("SELECT pg_create_logical_replication_slot($1, 'pgoutput')", &[&slot]).await.unwrap();
    let captured = Captured::with("CREATE TABLE item (id bigint PRIMARY KEY, body text)", &ITEM).await;
    let connection = upstream.url().replace('\'', "''");
    captured
        .run(&format!(
            "CREATE SUBSCRIPTION {slot} CONNECTION '{connection}' PUBLICATION all_items \
             WITH (create_slot = false, slot_name = '{slot}', copy_data = false)"
        ))
        .await;
    captured.run("ALTER TABLE item ENABLE ALWAYS TRIGGER refarch_products_insert").await;
    let report = captured.migrate().await.unwrap();
    assert!(report.warnings.iter().any(|w| w.contains("logical replication")), "{report:?}");
    captured.take().await;
    publisher.batch_execute("INSERT INTO item VALUES (1, 'from upstream')").await.unwrap();
    common::eventually("the row to be replicated", std::time::Duration::from_secs(30), async || {
        captured.client.query_one("SELECT count(*) FROM item", &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    assert_eq!(captured.take().await, nothing());
    captured.run(&format!("DROP SUBSCRIPTION {slot}")).await;
}

#[tokio::test]
async fn only_a_sleeping_relay_is_notified() {
    let captured = Captured::products().await;
    let (listener, mut notifications) = captured.database.listener("refarch_outbox").await;
    captured.run(THREE).await;
    assert!(common::was_notified(&listener, &mut notifications).await, "asleep is what a missing flag means");
    captured.run("INSERT INTO refarch.doorbell (asleep) VALUES (false); DELETE FROM products_with_increment WHERE id = 1").await;
    assert!(!common::was_notified(&listener, &mut notifications).await);
    captured
        .run("UPDATE refarch.doorbell SET asleep = true; UPDATE products_with_increment SET name = name")
        .await;
    assert!(!common::was_notified(&listener, &mut notifications).await, "nothing changed");
    captured.run("UPDATE products_with_increment SET name = 'x'").await;
    assert!(common::was_notified(&listener, &mut notifications).await);
}

#[tokio::test]
async fn a_text_of_a_megabyte_does_not_abort_the_writers_statement() {
    let captured = Captured::products().await;
    let sql = "INSERT INTO products_with_increment (id, description) VALUES (1, repeat('words ', 200000))";
    assert_eq!(captured.capture(sql).await, ids("u", &["1"]));
}

#[tokio::test]
async fn repeated_and_concurrent_migrations_are_safe() {
    let captured = Captured::products().await;
    captured.run(THREE).await;
    captured.take().await;
    let again = futures::future::join_all((0..4).map(|_| captured.migrate())).await;
    for report in again {
        assert_eq!(report.unwrap(), Report::default());
    }
    assert_eq!(captured.take().await, nothing());
}

#[tokio::test]
async fn unsupported_tables_are_refused_with_the_reason() {
    let setup = "CREATE TABLE loose (id bigint, body text); CREATE VIEW seen AS SELECT 1 AS id, 'x' AS body; \
                 CREATE TABLE pair (id bigint, part bigint, body text, PRIMARY KEY (id, part))";
    let captured = Captured::with(setup, &[]).await;
    for (table, text, reason) in [
        ("nowhere", "body", "there is no such table"),
        ("loose", "body", "must be unique by itself and never null"),
        ("pair", "body", "must be unique by itself and never null"),
        ("seen", "body", "it is a view"),
        ("public.loose", "nobody", "must be unique"),
    ] {
        let mut settings = captured.settings.clone();
        settings.source.table = table.into();
        settings.source.text = vec![text.into()];
        settings.source.metadata = vec!["body".into()];
        let error = migrate_with(&captured.database, &settings).await.unwrap_err().to_string();
        assert!(error.contains(table) && error.contains(reason), "{error}");
    }
}

const ARTICLES: &str =
    "CREATE TABLE articles (id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, title text, body text)";

impl Live {
    async fn articles() -> Self {
        Self::new(ARTICLES, "title,body", "id").await
    }

    /// Deletes and returns the rows of the outbox: operation and id, sorted.
    async fn take(&self) -> Vec<String> {
        let rows =
            self.client.query("DELETE FROM refarch.outbox RETURNING op::text, ids", &[]).await.unwrap();
        let mut taken: Vec<String> = rows
            .iter()
            .flat_map(|row| {
                let (op, ids): (String, Vec<String>) = (row.get(0), row.get(1));
                ids.into_iter().map(move |id| format!("{op} {id}"))
            })
            .collect();
        taken.sort();
        taken
    }

    async fn capture(&self, sql: &str) -> Vec<String> {
        self.take().await;
        self.run(sql).await;
        self.take().await
    }

    async fn faults(&self) -> Vec<String> {
        let (postgres, settings) = self.connections();
        capture::faults(&postgres, &settings.source).await.unwrap()
    }

    async fn state(&self) -> CaptureState {
        let (postgres, settings) = self.connections();
        capture::check(&postgres, &settings.source).await.unwrap()
    }

    fn connections(&self) -> (Postgres, Settings) {
        let env: Vec<_> = self.env.iter().map(|(key, value)| (*key, value.as_str())).collect();
        let settings = settings(&env);
        (self.database.postgres(&settings), settings)
    }
}

const IN_NEED: &str = "SELECT (SELECT count(*) FROM refarch.mark) + (SELECT count(*) FROM refarch.backfill)";

#[tokio::test(flavor = "multi_thread")]
async fn capture_never_uses_types_of_the_writer() {
    let live = Live::articles().await;
    live.done(&["migrate"]).await;
    let role = format!("mallory_{}", live.database.name());
    live.run(&format!(
        "CREATE TABLE seen (who name); GRANT INSERT ON seen TO PUBLIC; CREATE ROLE {role}; \
         GRANT INSERT, UPDATE, DELETE, SELECT ON articles TO {role}; SET ROLE {role}; \
         CREATE FUNCTION pg_temp.f(pg_catalog.text) RETURNS bool LANGUAGE plpgsql AS \
           $$BEGIN INSERT INTO public.seen VALUES (current_user); RETURN true; END$$; \
         CREATE FUNCTION pg_temp.g(pg_catalog.int8) RETURNS bool LANGUAGE plpgsql AS \
           $$BEGIN INSERT INTO public.seen VALUES (current_user); RETURN true; END$$; \
         CREATE DOMAIN pg_temp.text AS pg_catalog.text CHECK (pg_temp.f(VALUE)); \
         CREATE DOMAIN pg_temp.int8 AS pg_catalog.int8 CHECK (pg_temp.g(VALUE)); \
         INSERT INTO articles (id, title) VALUES (1, 'x'); UPDATE articles SET title = 'y'; DELETE FROM articles; RESET ROLE"
    ))
    .await;
    let others = format!("SELECT count(*) FROM seen WHERE who <> '{role}'");
    let (ran, captured) = (live.number(&others).await, live.take().await);
    live.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
    assert_eq!(ran, 0, "code of the writer's ran as another role");
    assert_eq!(captured, ["d 1", "u 1", "u 1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_succeeds_however_the_columns_changed() {
    for change in ["RENAME title TO headline", "DROP title", "RENAME id TO number"] {
        let live = Live::articles().await;
        live.run("INSERT INTO articles (title, body) VALUES ('a', 'b'), ('c', 'd')").await;
        live.done(&["migrate"]).await;
        live.run(&format!("ALTER TABLE articles {change}")).await;
        live.take().await;
        live.run("UPDATE articles SET body = 'new'; INSERT INTO articles (body) VALUES ('e'); DELETE FROM articles WHERE body = 'e'; TRUNCATE articles")
            .await;
        assert!(live.number(IN_NEED).await > 0, "{change}: marked");
        let faults = live.faults().await.join("; ");
        assert!(faults.contains("column") && faults.contains("refarch migrate"), "{change}: {faults}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_column_loses_no_change() {
    let mut live = Live::articles().await;
    live.run("INSERT INTO articles (title, body) SELECT 'Title ' || i, 'A text of number ' || i FROM generate_series(1, 20) i").await;
    live.done(&["migrate"]).await;
    live.sync().await;
    live.done(&["verify", "--sample", "0"]).await;
    live.run(
        "ALTER TABLE articles RENAME title TO headline; UPDATE articles SET body = 'a lighthouse' WHERE id = 1; \
         DELETE FROM articles WHERE id = 2",
    )
    .await;
    let (code, _) = live.refarch(&["migrate"]).await;
    assert_eq!(code, Some(1), "the settings name a column that is gone");
    live.set("REFARCH_SOURCE_TEXT", "headline,body");
    let said = live.done(&["migrate"]).await;
    assert!(!said.contains("embedded again"), "{said}");
    assert_eq!(live.number("SELECT max(id)::bigint FROM refarch.target").await, 1, "the same index");
    live.sync().await;
    live.done(&["verify", "--sample", "20"]).await;
    assert_eq!(live.number("SELECT count(*) FROM refarch.vector_1").await, 19);
    assert_eq!(live.number(IN_NEED).await, 0);
    assert_eq!(live.faults().await, Vec::<String>::new());
    assert_eq!(live.capture("UPDATE articles SET headline = 'other' WHERE id = 3").await, ["u 3"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn generated_columns_are_captured_through_their_source_columns() {
    for kind in ["VIRTUAL", "STORED"] {
        let setup = format!(
            "CREATE TABLE articles (id bigint PRIMARY KEY, title text, body text, other text, \
             doc text GENERATED ALWAYS AS (title || ' ' || body) {kind}); \
             INSERT INTO articles VALUES (1, 'a', 'b', 'c')"
        );
        let live = Live::new(&setup, "doc", "id").await;
        live.done(&["migrate"]).await;
        assert_eq!(live.capture("UPDATE articles SET title = 'x'").await, ["u 1"], "{kind}");
        assert_eq!(live.capture("UPDATE articles SET body = 'y'").await, ["u 1"], "{kind}");
        assert_eq!(live.capture("UPDATE articles SET other = 'y'").await, Vec::<String>::new(), "{kind}");
        // Every column that the settings name still exists, so refarch installs capture again without a migration.
        live.run("ALTER TABLE articles RENAME title TO headline; UPDATE articles SET body = 'z'").await;
        live.done(&["listen", "--until-idle"]).await;
        assert_eq!(live.capture("UPDATE articles SET headline = 'z'").await, ["u 1"], "{kind}");
        assert_eq!(live.number(IN_NEED).await, 0, "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_can_be_prepared_while_the_relay_sleeps() {
    let options = refarch::backend::embedded::ClusterOptions {
        dir: std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("postgres-prepared"),
        extra: [("fsync", "off"), ("max_prepared_transactions", "10")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        ..refarch::backend::embedded::ClusterOptions::in_runtime_dir(&common::runtime_dir())
    };
    let cluster = refarch::backend::embedded::Cluster::join(options).await.unwrap();
    let url = cluster.url().expose().to_owned();
    let client = common::connect(&url).await;
    client
        .batch_execute(&format!(
            "DROP SCHEMA IF EXISTS refarch CASCADE; DROP TABLE IF EXISTS articles; {ARTICLES}"
        ))
        .await
        .unwrap();
    let migrated = common::refarch()
        .arg("migrate")
        .envs([("DATABASE_URL", url.as_str()), ("REFARCH_SOURCE_TABLE", "public.articles")])
        .envs([("REFARCH_SOURCE_TEXT", "title,body"), ("REFARCH_SOURCE_METADATA", "id")])
        .output()
        .await
        .unwrap();
    assert!(migrated.status.success(), "{migrated:?}");
    let prepare = "BEGIN; INSERT INTO articles (title) VALUES ('x'); PREPARE TRANSACTION 'a'";
    let prepared = client.batch_execute(prepare).await;
    if prepared.is_ok() {
        client.batch_execute("COMMIT PREPARED 'a'").await.unwrap();
    }
    let captured =
        client.query_one("SELECT count(*) FROM refarch.outbox", &[]).await.unwrap().get::<_, i64>(0);
    client.batch_execute("DROP SCHEMA refarch CASCADE; DROP TABLE articles").await.unwrap();
    drop(client);
    cluster.leave().await.unwrap();
    prepared.unwrap();
    assert_eq!(captured, 1);
}

/// A type that ignores case, in its own schema, as an extension creates it.
const FOLDED: &str = "CREATE SCHEMA ext; CREATE TYPE ext.folded; \
     CREATE FUNCTION ext.folded_in(cstring) RETURNS ext.folded LANGUAGE internal IMMUTABLE STRICT AS 'textin'; \
     CREATE FUNCTION ext.folded_out(ext.folded) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout'; \
     CREATE TYPE ext.folded (INPUT = ext.folded_in, OUTPUT = ext.folded_out, LIKE = pg_catalog.text); \
     CREATE CAST (ext.folded AS text) WITHOUT FUNCTION AS IMPLICIT; CREATE CAST (text AS ext.folded) WITHOUT FUNCTION AS ASSIGNMENT; \
     CREATE FUNCTION ext.cmp(ext.folded, ext.folded) RETURNS int LANGUAGE sql IMMUTABLE STRICT AS \
       'SELECT pg_catalog.bttextcmp(lower($1::text), lower($2::text))'; \
     CREATE FUNCTION ext.eq(ext.folded, ext.folded) RETURNS bool LANGUAGE sql IMMUTABLE STRICT AS 'SELECT ext.cmp($1, $2) = 0'; \
     CREATE FUNCTION ext.lt(ext.folded, ext.folded) RETURNS bool LANGUAGE sql IMMUTABLE STRICT AS 'SELECT ext.cmp($1, $2) < 0'; \
     CREATE FUNCTION ext.le(ext.folded, ext.folded) RETURNS bool LANGUAGE sql IMMUTABLE STRICT AS 'SELECT ext.cmp($1, $2) <= 0'; \
     CREATE FUNCTION ext.gt(ext.folded, ext.folded) RETURNS bool LANGUAGE sql IMMUTABLE STRICT AS 'SELECT ext.cmp($1, $2) > 0'; \
     CREATE FUNCTION ext.ge(ext.folded, ext.folded) RETURNS bool LANGUAGE sql IMMUTABLE STRICT AS 'SELECT ext.cmp($1, $2) >= 0'; \
     CREATE OPERATOR ext.= (FUNCTION = ext.eq, LEFTARG = ext.folded, RIGHTARG = ext.folded, COMMUTATOR = OPERATOR(ext.=), MERGES); \
     CREATE OPERATOR ext.< (FUNCTION = ext.lt, LEFTARG = ext.folded, RIGHTARG = ext.folded); \
     CREATE OPERATOR ext.<= (FUNCTION = ext.le, LEFTARG = ext.folded, RIGHTARG = ext.folded); \
     CREATE OPERATOR ext.> (FUNCTION = ext.gt, LEFTARG = ext.folded, RIGHTARG = ext.folded); \
     CREATE OPERATOR ext.>= (FUNCTION = ext.ge, LEFTARG = ext.folded, RIGHTARG = ext.folded); \
     CREATE OPERATOR CLASS ext.folded_ops DEFAULT FOR TYPE ext.folded USING btree AS \
       OPERATOR 1 ext.<, OPERATOR 2 ext.<=, OPERATOR 3 ext.=, OPERATOR 4 ext.>=, OPERATOR 5 ext.>, FUNCTION 1 ext.cmp(ext.folded, ext.folded); \
     CREATE TABLE articles (id ext.folded PRIMARY KEY, title text); \
     INSERT INTO articles SELECT (CASE i % 2 WHEN 0 THEN 'row ' ELSE 'ROW ' END || i)::ext.folded, 'x' FROM generate_series(1, 1200) i";

#[tokio::test(flavor = "multi_thread")]
async fn ids_of_an_extension_type_are_compared_byte_by_byte() {
    let live = Live::new(FOLDED, "title", "title").await;
    live.done(&["migrate"]).await;
    let queued = "SELECT count(DISTINCT id) FROM refarch.outbox, unnest(ids) AS id";
    assert_eq!(live.number(queued).await, 1200, "each page begins after the last");
    assert_eq!(live.capture("INSERT INTO articles VALUES ('a', 'x')").await, ["u a"]);
    assert_eq!(
        live.capture("UPDATE articles SET title = 'y' WHERE id OPERATOR(ext.=) 'A'::ext.folded").await,
        ["u a"]
    );
    assert_eq!(
        live.capture("UPDATE articles SET id = 'A' WHERE id OPERATOR(ext.=) 'a'::ext.folded").await,
        ["d a", "u A"]
    );
    assert_eq!(live.capture("DELETE FROM articles WHERE id OPERATOR(ext.=) 'a'::ext.folded").await, ["d A"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_has_one_spelling_in_every_session() {
    let setup = "CREATE TABLE articles (id timestamptz PRIMARY KEY, title text)";
    let live = Live::new(setup, "title", "title").await;
    live.done(&["migrate"]).await;
    let write = "SET timezone = 'Asia/Tokyo'; SET datestyle = 'German'; INSERT INTO articles VALUES ('2024-05-01 00:00Z', 'x'); \
                 UPDATE articles SET title = 'y'; RESET timezone; RESET datestyle";
    assert_eq!(live.capture(write).await, ["u 2024-05-01 00:00:00+00", "u 2024-05-01 00:00:00+00"]);

    let setup = "CREATE TABLE articles (id bytea PRIMARY KEY, title text)";
    let live = Live::new(setup, "title", "title").await;
    live.done(&["migrate"]).await;
    let write =
        "SET bytea_output = 'escape'; INSERT INTO articles VALUES ('\\x00ff', 'x'); RESET bytea_output";
    assert_eq!(live.capture(write).await, ["u \\x00ff"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_a_captured_table_are_reported_and_capture_is_repaired() {
    let live = Live::articles().await;
    live.run("INSERT INTO articles (title) VALUES ('a'), ('b')").await;
    live.done(&["migrate"]).await;
    assert_eq!(live.faults().await, Vec::<String>::new());
    let rearm = "SELECT refarch.rearm('products')::int::bigint";
    assert_eq!(live.number(rearm).await, 0, "nothing to do");
    for (change, told) in [
        (
            "ALTER TABLE articles DISABLE TRIGGER ALL; UPDATE articles SET title = 'unseen'",
            "missing or disabled",
        ),
        ("DROP TRIGGER refarch_products_update ON articles", "missing or disabled"),
        (
            "ALTER TABLE articles ALTER title TYPE varchar USING upper(title)",
            "was text and is now character varying",
        ),
        (
            "CREATE TABLE successor (LIKE articles INCLUDING ALL); INSERT INTO successor VALUES (7, 'c'), (1, 'other'); \
             ALTER TABLE articles RENAME TO articles_old; ALTER TABLE successor RENAME TO articles",
            "another table",
        ),
    ] {
        live.take().await;
        live.run(change).await;
        let faults = live.faults().await.join("; ");
        assert!(faults.contains(told), "{change}: {faults}");
        assert_eq!(live.number(rearm).await, 1, "{change}");
        while live.number(rearm).await > 0 {}
        assert_eq!(live.number("SELECT count(*) FROM refarch.backfill").await, 1, "{change}");
        let step = "SELECT refarch.backfill_step('products', 10)";
        assert_eq!(live.number(step).await, 2, "{change}");
        assert_eq!(live.number(IN_NEED).await, 0, "{change}");
        assert_eq!(live.number("SELECT count(*) FROM refarch.outbox WHERE op = 't'").await, 1, "{change}");
        assert_eq!(live.faults().await, Vec::<String>::new(), "{change}");
    }
    assert_eq!(live.capture("UPDATE articles SET title = 'seen' WHERE id = 7").await, ["u 7"]);
    assert_eq!(live.capture("UPDATE articles_old SET title = 'no more'").await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn row_security_that_hides_rows_is_reported() {
    let live = Live::articles().await;
    live.done(&["migrate"]).await;
    let role = format!("reader_{}", live.database.name());
    live.run(&format!(
        "CREATE ROLE {role}; GRANT SELECT ON articles TO {role}; ALTER TABLE articles ENABLE ROW LEVEL SECURITY; \
         ALTER DATABASE {} SET role = {role}",
        live.database.name()
    ))
    .await;
    live.run(&format!(
        "INSERT INTO refarch.granted VALUES ('serve', '{role}'); SELECT refarch.give_rights()"
    ))
    .await;
    let faults = live.faults().await.join("; ");
    live.run(&format!(
        "ALTER DATABASE {} RESET role; DROP OWNED BY {role}; DROP ROLE {role}",
        live.database.name()
    ))
    .await;
    assert!(faults.contains(&format!("hides rows from the role {role}")), "{faults}");
}

#[tokio::test(flavor = "multi_thread")]
async fn code_of_the_table_owner_never_runs_as_the_migrating_role() {
    let live = Live::articles().await;
    live.run("INSERT INTO articles (title) VALUES ('a'), ('b')").await;
    live.done(&["migrate"]).await;
    let role = format!("owner_{}", live.database.name());
    live.run(&format!(
        "CREATE TABLE seen (who name); GRANT INSERT ON seen TO PUBLIC; CREATE ROLE {role}; GRANT CREATE, USAGE ON SCHEMA public TO {role}; \
         ALTER TABLE articles ALTER id DROP IDENTITY; ALTER TABLE articles OWNER TO {role}; DELETE FROM refarch.outbox; SET ROLE {role}; \
         CREATE TYPE number AS ENUM ('1', '2'); \
         CREATE FUNCTION number_text(number) RETURNS text LANGUAGE plpgsql AS \
           $$BEGIN INSERT INTO public.seen VALUES (current_user); RETURN 'x'; END$$; \
         CREATE FUNCTION text_number(text) RETURNS number LANGUAGE plpgsql AS \
           $$BEGIN INSERT INTO public.seen VALUES (current_user); RETURN '1'; END$$; \
         ALTER TABLE articles ALTER id TYPE number USING id::text::number; \
         CREATE CAST (number AS text) WITH FUNCTION number_text(number); \
         CREATE CAST (text AS number) WITH FUNCTION text_number(text); \
         UPDATE articles SET title = 'x'"
    ))
    .await;
    live.run("BEGIN ISOLATION LEVEL REPEATABLE READ; UPDATE articles SET title = 'y'; COMMIT; RESET ROLE")
        .await;
    let step = "SELECT refarch.backfill_step('products', 10)";
    live.number(step).await;
    let held = "SELECT count(*) FROM refarch.backfill WHERE held LIKE '%drop that cast%'";
    let is_held = live.number(held).await;
    // Capture is installed while the cast is missing, and the cast is created again later. The triggers use the type's
    // own output.
    live.run("DROP CAST (number AS text); UPDATE articles SET title = 'marked'").await;
    while live.number(IN_NEED).await > 0 {
        live.number(step).await;
    }
    live.run(&format!(
        "SET ROLE {role}; CREATE CAST (number AS text) WITH FUNCTION number_text(number); RESET ROLE"
    ))
    .await;
    let captured = live.capture("UPDATE articles SET title = 'z' WHERE id = '2'").await;
    // A backfill that reads its cursor does not run the check of a domain.
    live.run(&format!(
        "SET ROLE {role}; CREATE FUNCTION checked(bigint) RETURNS bool LANGUAGE plpgsql AS \
           $$BEGIN INSERT INTO public.seen VALUES (current_user); RETURN true; END$$; \
         CREATE DOMAIN key AS bigint CHECK (checked(VALUE)); DROP CAST (number AS text); \
         ALTER TABLE articles ALTER id TYPE key USING id::text::bigint; INSERT INTO articles SELECT i, 'x' FROM generate_series(3, 1200) i; \
         RESET ROLE"
    ))
    .await;
    while live.number(IN_NEED).await > 0 {
        live.number(step).await;
    }
    let others = live.number(&format!("SELECT count(*) FROM seen WHERE who <> '{role}'")).await;
    live.run(&format!("DROP OWNED BY {role} CASCADE; DROP ROLE {role}")).await;
    assert_eq!(others, 0, "code of the owner's ran as another role");
    assert_eq!(is_held, 1);
    assert_eq!(captured, ["u 2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_with_a_snapshot_older_than_a_column_change_succeeds() {
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        for change in ["RENAME title TO headline", "DROP title", "RENAME id TO number"] {
            let live = Live::articles().await;
            live.run("INSERT INTO articles (title, body) VALUES ('a', 'b'), ('c', 'd')").await;
            live.done(&["migrate"]).await;
            live.take().await;
            let writer = live.database.client().await;
            writer
                .batch_execute(&format!("BEGIN ISOLATION LEVEL {level}; SELECT 1 FROM refarch.source"))
                .await
                .unwrap();
            live.run(&format!("ALTER TABLE public.articles {change}")).await;
            writer
                .batch_execute("UPDATE public.articles SET body = 'x'; DELETE FROM public.articles WHERE body = 'x'; COMMIT")
                .await
                .unwrap_or_else(|error| panic!("{level}, {change}: {error:?}"));
            assert!(live.number(IN_NEED).await > 0, "{level}, {change}: marked");
        }
        let live = Live::articles().await;
        live.done(&["migrate"]).await;
        let sql = format!(
            "BEGIN ISOLATION LEVEL {level}; INSERT INTO articles (title) VALUES ('a'); UPDATE articles SET title = 'b'; COMMIT"
        );
        assert_eq!(live.capture(&sql).await, ["u 1", "u 1"], "{level}");
        assert_eq!(live.number(IN_NEED).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn repairing_capture_locks_one_table_at_a_time() {
    let setup = "CREATE TABLE articles (id bigint PRIMARY KEY, title text) PARTITION BY RANGE (id); \
                 CREATE TABLE low PARTITION OF articles FOR VALUES FROM (0) TO (10); \
                 CREATE TABLE high PARTITION OF articles FOR VALUES FROM (10) TO (20); \
                 CREATE TABLE successor (id bigint PRIMARY KEY, title text); INSERT INTO articles VALUES (1, 'a')";
    let live = Live::new(setup, "title", "title").await;
    live.done(&["migrate"]).await;
    live.take().await;
    live.run(
        "ALTER TABLE low DISABLE TRIGGER ALL; ALTER TABLE high DISABLE TRIGGER ALL; \
         ALTER TABLE articles RENAME TO former; ALTER TABLE successor RENAME TO articles; INSERT INTO articles VALUES (2, 'b'); \
         INSERT INTO refarch.mark (source) VALUES ('products')",
    )
    .await;
    let locked = "SELECT count(DISTINCT relation) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'relation' \
                  AND mode IN ('ShareRowExclusiveLock', 'AccessExclusiveLock') AND relation::regclass::text IN ('articles', 'former', 'low', 'high')";
    let mut steps = 0;
    while live.number(IN_NEED).await > 0 {
        live.run("BEGIN").await;
        let queued = live.number("SELECT refarch.backfill_step('products', 10)").await;
        let locks = live.number(locked).await;
        live.run("COMMIT").await;
        assert!(locks <= 1 && (locks == 0 || queued <= 0), "{locks} tables locked, {queued} rows queued");
        steps += locks;
    }
    assert!(steps >= 4, "{steps}");
    let triggers = "SELECT count(DISTINCT tgrelid) FROM pg_trigger WHERE tgname LIKE 'refarch_%'";
    assert_eq!(live.number(triggers).await, 1);
    assert_eq!(live.capture("UPDATE articles SET title = 'c'").await, ["u 2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn id_changes_are_captured_if_the_text_depends_on_no_column() {
    let setup = "CREATE TABLE articles (id bigint PRIMARY KEY, doc text GENERATED ALWAYS AS ('always') VIRTUAL); \
                 INSERT INTO articles VALUES (1)";
    let live = Live::new(setup, "doc", "doc").await;
    live.done(&["migrate"]).await;
    assert_eq!(live.capture("UPDATE articles SET id = 2").await, ["d 1", "u 2"]);
    assert_eq!(live.capture("DELETE FROM articles").await, ["d 2"]);
}

const LOW_AND_HIGH: &str = "CREATE TABLE articles (id bigint PRIMARY KEY, title text) PARTITION BY RANGE (id); \
     CREATE TABLE low PARTITION OF articles FOR VALUES FROM (0) TO (10); \
     CREATE TABLE high PARTITION OF articles FOR VALUES FROM (10) TO (20); \
     INSERT INTO articles VALUES (1, 'A lighthouse'), (2, 'A harbour'), (11, 'A glacier'), (12, 'A valley')";

const REARM: &str = "SELECT refarch.rearm('products')::int::bigint";
const STEP: &str = "SELECT refarch.backfill_step('products', 1)";
const TRUNCATIONS: &str = "SELECT count(*) FROM refarch.outbox WHERE op = 't'";

impl Live {
    /// Installs capture where it is due, and queues the rows that must be read again. Returns operations and ids, and
    /// how many times the ledger must be queued.
    async fn armed_again(&self) -> (Vec<String>, i64) {
        while self.number(REARM).await > 0 {}
        while self.number(IN_NEED).await > 0 {
            self.number(STEP).await;
        }
        let truncations = self.number(TRUNCATIONS).await;
        (self.take().await, truncations)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_rows_of_a_new_partition_are_queued() {
    let live = Live::new(LOW_AND_HIGH, "title", "title").await;
    live.done(&["migrate"]).await;
    live.take().await;
    for (change, of, queued) in [
        (
            "CREATE TABLE made PARTITION OF articles FOR VALUES FROM (20) TO (30); INSERT INTO made VALUES (21, 'x')",
            "made",
            "u 21",
        ),
        (
            "CREATE TABLE attached (LIKE articles INCLUDING ALL); INSERT INTO attached VALUES (31, 'x'); \
             ALTER TABLE articles ATTACH PARTITION attached FOR VALUES FROM (30) TO (40)",
            "attached",
            "u 31",
        ),
        (
            "CREATE TABLE above PARTITION OF articles FOR VALUES FROM (40) TO (60) PARTITION BY RANGE (id); \
             CREATE TABLE below PARTITION OF above FOR VALUES FROM (40) TO (50); INSERT INTO below VALUES (41, 'x')",
            "below",
            "u 41",
        ),
    ] {
        live.run(change).await;
        assert_eq!(live.take().await, Vec::<String>::new(), "{change}");
        let faults = live.faults().await.join("; ");
        assert!(faults.contains(&format!("changes of public.{of} are not captured yet")), "{faults}");
        let state = live.state().await;
        assert!(state.faults.is_empty(), "a worker does it by itself: {state:?}");
        assert!(state.new_parts.iter().any(|part| part.table == format!("public.{of}")), "{state:?}");
        assert_eq!(live.armed_again().await, (vec![queued.to_owned()], 0), "{change}");
        assert_eq!(live.faults().await, Vec::<String>::new(), "{change}");
        assert_eq!(live.capture(&format!("UPDATE {of} SET title = 'y'")).await, [queued]);
    }
    // A migration does the same, also for a partition of several pages.
    live.run(
        "CREATE TABLE large PARTITION OF articles FOR VALUES FROM (1000) TO (9000); \
         INSERT INTO large SELECT i, 'x' FROM generate_series(1001, 2200) i",
    )
    .await;
    let said = live.done(&["migrate"]).await;
    assert!(said.contains("queued: 1200 rows"), "{said}");
    assert_eq!((live.number(TRUNCATIONS).await, live.take().await.len()), (0, 1200));
    assert!(live.done(&["migrate"]).await.starts_with("nothing to do"));
    // A partition that had triggers before may have lost deletes.
    live.run("DROP TRIGGER refarch_products_delete ON made; DELETE FROM made").await;
    let (queued, truncations) = live.armed_again().await;
    assert_eq!((queued.len(), truncations), (4 + 2 + 1200, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_rows_of_a_new_inheritance_child_are_queued() {
    let live = Live::articles().await;
    live.run("INSERT INTO articles (title) VALUES ('a'), ('b')").await;
    live.done(&["migrate"]).await;
    live.take().await;
    live.run("CREATE TABLE child () INHERITS (articles); INSERT INTO child VALUES (7, 'c')").await;
    assert_eq!(live.armed_again().await, (vec!["u 7".to_owned()], 0));
    assert_eq!(live.capture("UPDATE child SET title = 'd'").await, ["u 7"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_new_partition_are_queued_after_its_open_transactions_end() {
    let live = Live::new(LOW_AND_HIGH, "title", "title").await;
    live.done(&["migrate"]).await;
    live.take().await;
    live.run("CREATE TABLE made PARTITION OF articles FOR VALUES FROM (20) TO (30)").await;
    while live.number(REARM).await > 0 {}
    let (writer, elsewhere) = (live.database.client().await, live.database.client().await);
    writer.batch_execute("BEGIN; INSERT INTO public.made VALUES (21, 'x')").await.unwrap();
    elsewhere.batch_execute("BEGIN; INSERT INTO public.low VALUES (3, 'x')").await.unwrap();
    assert_eq!(live.number(STEP).await, 0);
    let faults = live.faults().await.join("; ");
    assert!(
        faults.contains("public.made must be read again") && faults.contains("1 transaction"),
        "{faults}"
    );
    let state = live.state().await;
    assert!(state.faults.is_empty() && state.new_parts[0].table == "public.made", "{state:?}");
    writer.batch_execute("COMMIT").await.unwrap();
    assert_eq!(live.number(STEP).await, 1);
    assert_eq!(live.number(IN_NEED).await, 0);
    elsewhere.batch_execute("COMMIT").await.unwrap();
    // Dropping the partition removes its request.
    live.run("CREATE TABLE brief PARTITION OF articles FOR VALUES FROM (30) TO (40)").await;
    while live.number(REARM).await > 0 {}
    live.run("DROP TABLE brief").await;
    live.number(STEP).await;
    assert_eq!(live.number(IN_NEED).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_during_a_backfill_starts_one_more_after_it() {
    let live = Live::articles().await;
    live.run("INSERT INTO articles (title) SELECT 'x' FROM generate_series(1, 1200)").await;
    live.done(&["migrate"]).await;
    live.take().await;
    live.run("SELECT refarch.request_backfill('products', false, false)").await;
    let mut steps = Vec::new();
    for _ in 0..3 {
        steps.push(live.number(STEP).await);
        live.run("SELECT refarch.request_backfill('products', false, true)").await;
    }
    assert_eq!((steps, live.number(TRUNCATIONS).await), (vec![500, 500, 200], 0), "the round ends");
    let queued = live.take().await;
    assert_eq!((queued.len(), live.number(IN_NEED).await), (1200, 1));
    let (again, truncations) = live.armed_again().await;
    assert_eq!((again, truncations), (queued, 1), "and there is one more, which expands the ledger");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backfill_restarts_when_the_id_type_changes() {
    let live = Live::articles().await;
    live.run("INSERT INTO articles (title) SELECT 'x' FROM generate_series(1, 1200)").await;
    live.done(&["migrate"]).await;
    live.take().await;
    live.run("SELECT refarch.request_backfill('products', false, false)").await;
    assert_eq!(live.number(STEP).await, 500);
    live.take().await;
    // The key's order changes: most ids now sort before the last id that was queued.
    live.run("ALTER TABLE articles ALTER id DROP IDENTITY; ALTER TABLE articles ALTER id TYPE text").await;
    while live.number(STEP).await > 0 {}
    assert_eq!((live.number(IN_NEED).await, live.take().await.len()), (0, 1200));
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_dropped_partition_leave_the_index() {
    let live = Live::new(LOW_AND_HIGH, "title", "title").await;
    live.run(
        "CREATE TABLE top PARTITION OF articles FOR VALUES FROM (20) TO (30); \
         INSERT INTO articles VALUES (21, 'A summit'), (22, 'A ridge')",
    )
    .await;
    live.done(&["migrate"]).await;
    live.sync().await;
    let indexed = "SELECT count(*) FROM refarch.vector_1";
    assert_eq!(live.number(indexed).await, 6);
    live.run("DROP TABLE high").await;
    let faults = live.faults().await.join("; ");
    assert!(faults.contains("a part of public.articles was dropped"), "{faults}");
    while live.number(REARM).await > 0 {}
    assert_eq!((live.number(TRUNCATIONS).await, live.number(IN_NEED).await), (1, 0), "no row is read");
    live.sync().await;
    assert_eq!(live.number(indexed).await, 4);

    live.run("ALTER TABLE articles DETACH PARTITION top").await;
    let faults = live.faults().await.join("; ");
    assert!(faults.contains("public.top is no part of public.articles any more"), "{faults}");
    // A migration does the same.
    live.done(&["migrate"]).await;
    assert_eq!((live.number(TRUNCATIONS).await, live.faults().await), (1, Vec::new()));
    live.sync().await;
    assert_eq!(live.number(indexed).await, 2);
    assert_eq!(live.capture("UPDATE top SET title = 'no more'").await, Vec::<String>::new());
    // Attached again, the partition counts as new.
    live.run("ALTER TABLE articles ATTACH PARTITION top FOR VALUES FROM (20) TO (30)").await;
    assert_eq!(live.armed_again().await, (vec!["u 21".to_owned(), "u 22".to_owned()], 0));
}
