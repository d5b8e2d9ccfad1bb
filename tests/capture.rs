//! What the triggers catch, what they don't, and what they cost the writer's own statement: nothing
//! but time. Every statement runs for real, and the outbox is read back.

mod common;

use std::collections::BTreeMap;

use common::Database;
use refarch::backend::postgres::Postgres;
use refarch::backend::postgres::migrate::{self, Report};
use refarch::backend::postgres::target::{IndexShape, Place};
use refarch::config::Settings;
use refarch::pipeline::failure::Error;
use refarch::secret::Secret;
use tokio_postgres::Client;

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
    async fn with(setup: &str, settings: &[(&str, &str)]) -> Self {
        let database = Database::create().await;
        let client = database.client().await;
        client.batch_execute(setup).await.unwrap();
        let env = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let settings = Settings::load(None, &env, &[]).unwrap();
        let captured = Self { database, settings, client };
        captured.migrate().await.unwrap();
        captured
    }

    async fn migrate(&self) -> Result<Report, Error> {
        migrate_with(&self.database, &self.settings).await
    }

    async fn run(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// Takes what the outbox holds: ids by operation, sorted. A truncation shows as `t` without ids.
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

    /// Runs a statement and takes what it captured.
    async fn capture(&self, sql: &str) -> BTreeMap<String, Vec<String>> {
        self.take().await;
        self.run(sql).await;
        self.take().await
    }
}

async fn migrate_with(database: &Database, settings: &Settings) -> Result<Report, Error> {
    let postgres = Postgres::new(&Secret::new(database.url()), &settings.database)?;
    let shape =
        IndexShape { kind: "pgvector".into(), model: "test".into(), dimensions: 3, place: Place::default() };
    migrate::migrate(&postgres, &settings.source, &settings.queue, &shape).await
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
async fn plain_statements_are_captured_once_each() {
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
    // Ids that change places are changes of both rows.
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
async fn only_watched_columns_matter() {
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
async fn what_is_rolled_back_leaves_no_trace() {
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
async fn writes_to_a_partition_are_captured_since_leaves_are_armed() {
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
    // Captured for the root and for each leaf, which is harmless.
    assert_eq!(captured.capture("TRUNCATE item").await, ids("t", &[]));
}

#[tokio::test]
async fn a_partition_that_was_added_later_is_missed_until_migrate_runs_again() {
    let captured = Captured::with(PARTITIONED, &ITEM).await;
    captured.run("CREATE TABLE item_top PARTITION OF item FOR VALUES FROM (200) TO (300)").await;
    assert_eq!(captured.capture("INSERT INTO item_top VALUES (201, 'x')").await, nothing());
    let report = captured.migrate().await.unwrap();
    assert_eq!((report.armed, report.queued), (vec!["item_top".to_owned()], 1));
    let mut unseen = ids("u", &["201"]);
    unseen.extend(ids("t", &[]));
    assert_eq!(captured.take().await, unseen, "what was missed is queued");
    assert_eq!(captured.capture("INSERT INTO item_top VALUES (202, 'y')").await, ids("u", &["202"]));
}

#[tokio::test]
async fn inheritance_children_are_armed() {
    let setup = "CREATE TABLE item (id bigint PRIMARY KEY, body text); CREATE TABLE child (extra int) INHERITS (item)";
    let captured = Captured::with(setup, &ITEM).await;
    assert_eq!(captured.capture("INSERT INTO child VALUES (1, 'a', 0)").await, ids("u", &["1"]));
    assert_eq!(captured.capture("UPDATE child SET extra = 1").await, nothing());
    assert_eq!(captured.capture("DELETE FROM item").await, ids("d", &["1"]));
}

#[tokio::test]
async fn the_replica_role_is_not_captured() {
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
async fn a_sleeping_relay_is_rung_and_an_awake_one_is_not() {
    let captured = Captured::products().await;
    let (listener, mut notifications) = captured.database.listener("refarch_outbox").await;
    captured.run(THREE).await;
    assert!(common::rings(&listener, &mut notifications).await, "asleep is what a missing flag means");
    captured.run("INSERT INTO refarch.doorbell (asleep) VALUES (false); DELETE FROM products_with_increment WHERE id = 1").await;
    assert!(!common::rings(&listener, &mut notifications).await);
    captured
        .run("UPDATE refarch.doorbell SET asleep = true; UPDATE products_with_increment SET name = name")
        .await;
    assert!(!common::rings(&listener, &mut notifications).await, "nothing changed");
    captured.run("UPDATE products_with_increment SET name = 'x'").await;
    assert!(common::rings(&listener, &mut notifications).await);
}

#[tokio::test]
async fn a_description_of_a_megabyte_does_not_abort_the_writer() {
    let captured = Captured::products().await;
    let sql = "INSERT INTO products_with_increment (id, description) VALUES (1, repeat('words ', 200000))";
    assert_eq!(captured.capture(sql).await, ids("u", &["1"]));
}

#[tokio::test]
async fn migrating_again_changes_nothing_and_many_at_once_are_safe() {
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
async fn tables_that_cannot_be_kept_in_step_are_refused_with_the_reason() {
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
