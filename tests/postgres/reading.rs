//! Reading of the source's table: keys of every type, tables that change, roles with unusual settings, and failures that
//! must not look like a deleted row.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use refarch::backend::pgvector::PgVector;
use refarch::backend::postgres::Postgres;
use refarch::backend::postgres::ledger::PgLedger;
use refarch::backend::postgres::migrate;
use refarch::backend::{self, Backends};
use refarch::double::pinecone::PineconeDouble;
use refarch::pipeline::clock::{BootClock, Clock};
use refarch::pipeline::failure::Class;
use refarch::pipeline::fault;
use refarch::pipeline::index::{Desired, Planned, VectorIndex as _, Writes};
use refarch::pipeline::lease::Lease;
use refarch::pipeline::ledger::{Ledger as _, Outcome};
use refarch::secret::Secret;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use crate::common::source::{ITEM, graph_options, settings};
use crate::common::steps::SyncFixture;
use crate::common::{self, Database, eventually};

/// A time limit that no step here reaches, even on a busy machine.
const TIMEOUT: Duration = Duration::from_mins(2);

/// Settings of a role that would break code that relies on the defaults.
const ODD: &[&str] = &[
    "search_path = ''",
    "statement_timeout = '50ms'",
    "lock_timeout = '10ms'",
    "default_transaction_isolation = 'serializable'",
    "default_transaction_read_only = on",
    "timezone = 'Asia/Tokyo'",
    "datestyle = 'German'",
    "intervalstyle = 'iso_8601'",
    "bytea_output = 'escape'",
    "extra_float_digits = -3",
    "row_security = on",
];

impl SyncFixture {
    /// A fixture whose role has these settings and only the rights that `migrate --roles` gives it.
    async fn by_role(setup: &str, env: &[(&str, &str)], role_settings: &[&str]) -> Self {
        let it = Self::new(setup, env).await;
        let name = it.role();
        let mut sql = format!("CREATE ROLE {name} LOGIN PASSWORD 'secret';");
        for one in role_settings {
            let _ = write!(sql, "ALTER ROLE {name} SET {one};");
        }
        it.run(&sql).await;
        let roles = ["listen", "embed"].map(|part| (part.to_owned(), name.clone())).into();
        let options = migrate::MigrateOptions { roles, ..migrate::MigrateOptions::default() };
        // Boxed, because the future is large.
        Box::pin(backend::migrate_with(&it.postgres, &it.settings, &options)).await.unwrap();
        let url = Secret::new(url_of(&it.database, &name));
        let postgres = Postgres::new(&url, &it.settings.database).unwrap();
        it.by(postgres).await
    }

    /// The role of [`Self::by_role`].
    fn role(&self) -> String {
        format!("role_{}", self.database.name())
    }

    /// Starts to index in the background.
    fn index(&self) -> (CancellationToken, tokio::task::JoinHandle<()>) {
        let stop = CancellationToken::new();
        let (indexer, stopped) = (Arc::clone(&self.indexer), stop.clone());
        let task = tokio::spawn(async move { indexer.run(&stopped, &stopped, false).await.unwrap() });
        (stop, task)
    }

    /// Ids in the index, sorted.
    async fn indexed(&self) -> Vec<String> {
        let mut ids = self.backends.index.list(None, 1000).await.unwrap().ids;
        ids.sort();
        ids
    }

    /// Ids of the table as the ledger reads them, sorted.
    async fn rows(&self) -> Vec<String> {
        let mut ids = Vec::new();
        loop {
            let page = self.backends.ledger.rows_after(ids.last().map(String::as_str), 7).await.unwrap();
            let full = page.len() == 7;
            ids.extend(page.into_iter().map(|peeked| peeked.id));
            if !full {
                break;
            }
        }
        ids.sort();
        ids
    }

    async fn verify(&self) -> (bool, String) {
        let mut command = self.database.refarch();
        for (key, value) in [
            ("REFARCH_SOURCE_TABLE", self.settings.source.table.clone()),
            ("REFARCH_SOURCE_ID", self.settings.source.id.clone()),
            ("REFARCH_SOURCE_TEXT", self.settings.source.text.join(",")),
            ("REFARCH_SOURCE_METADATA", self.settings.source.metadata.join(",")),
        ] {
            command.env(key, value);
        }
        let output = command.arg("verify").output().await.unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.success(), text + &String::from_utf8_lossy(&output.stderr))
    }

    /// Deletes the role.
    async fn end(&self) {
        self.postgres.pool.close();
        let role = self.role();
        self.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
    }
}

fn url_of(database: &Database, role: &str) -> String {
    let config: tokio_postgres::Config = database.url().parse().unwrap();
    let host = match &config.get_hosts()[0] {
        tokio_postgres::config::Host::Tcp(name) => name.clone(),
        tokio_postgres::config::Host::Unix(path) => path.display().to_string(),
    };
    let port = config.get_ports()[0];
    format!("host={host} port={port} user={role} password=secret dbname={}", database.name())
}

fn strings(ids: &[&str]) -> Vec<String> {
    ids.iter().map(|id| (*id).to_owned()).collect()
}

/// The message of a read error. The error must be retryable, so that the work is kept.
async fn held(it: &SyncFixture, ids: &[&str]) -> String {
    let error = it.backends.ledger.peek(&strings(ids)).await.expect_err("must not be believed");
    assert_eq!(error.class(), Class::Retryable, "{error}");
    let page = it.backends.ledger.rows_after(None, 10).await.expect_err("must not be believed");
    assert_eq!(page.class(), Class::Retryable, "{page}");
    error.to_string()
}

/// A type in a schema that is on no search path. It ignores case, as citext does.
const FOLDED: &str = "CREATE SCHEMA ext; CREATE TYPE ext.folded; \
    CREATE FUNCTION ext.folded_in(cstring) RETURNS ext.folded LANGUAGE internal IMMUTABLE STRICT AS 'textin'; \
    CREATE FUNCTION ext.folded_out(ext.folded) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout'; \
    CREATE TYPE ext.folded (INPUT = ext.folded_in, OUTPUT = ext.folded_out, LIKE = text); \
    CREATE CAST (ext.folded AS text) WITHOUT FUNCTION AS IMPLICIT; \
    CREATE FUNCTION ext.cmp(ext.folded, ext.folded) RETURNS integer LANGUAGE sql IMMUTABLE STRICT \
      AS $$ SELECT bttextcmp(lower($1::text), lower($2::text)) $$;";

/// The type with its operators and their class.
fn folded() -> String {
    let mut sql = FOLDED.to_owned();
    for (name, operator) in [("lt", "<"), ("le", "<="), ("eq", "="), ("ge", ">="), ("gt", ">")] {
        let _ = write!(
            sql,
            "CREATE FUNCTION ext.{name}(ext.folded, ext.folded) RETURNS boolean LANGUAGE sql IMMUTABLE STRICT \
               AS $$ SELECT ext.cmp($1, $2) {operator} 0 $$; \
             CREATE OPERATOR ext.{operator} (LEFTARG = ext.folded, RIGHTARG = ext.folded, FUNCTION = ext.{name});"
        );
    }
    sql + "CREATE OPERATOR CLASS ext.folded_ops DEFAULT FOR TYPE ext.folded USING btree AS OPERATOR 1 ext.<, \
           OPERATOR 2 ext.<=, OPERATOR 3 ext.=, OPERATOR 4 ext.>=, OPERATOR 5 ext.>, FUNCTION 1 ext.cmp(ext.folded, ext.folded);"
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_every_kind_reach_the_index() {
    let kinds = [
        ("char(26)", "left(upper(md5(g::text)), 26)"),
        ("char(26)", "repeat('a', g)"),
        ("varchar(12)", "left(md5(g::text), 12)"),
        ("bit(9)", "g::bit(9)"),
        ("varbit(9)", "g::bit(9)::varbit"),
        ("numeric(12,3)", "g / 8.0"),
        ("numeric", "g / 8.0"),
        ("short_code", "left(upper(md5(g::text)), 8)"),
        ("short_bits", "g::bit(5)"),
        ("float8", "g / 3.0"),
        ("float4", "g / 3.0"),
        ("date", "'2026-02-27'::date + g"),
        ("timestamptz", "'2026-02-27 10:00:00.000001+09'::timestamptz + g * interval '7 hours'"),
        ("timestamp", "'2026-02-27 10:00:00.000001'::timestamp + g * interval '7 hours'"),
        ("timetz", "make_time(g, 30, 1.5)::timetz"),
        ("interval", "g * interval '1 month 2 days 03:04:05.6'"),
        ("bytea", "decode(md5(g::text), 'hex')"),
        ("money", "g::money * 1000.5"),
        ("uuid", "md5(g::text)::uuid"),
        ("name", "md5(g::text)"),
        ("\"char\"", "chr(96 + g)"),
        ("cidr", "set_masklen(('10.0.0.0'::inet + g * 256)::cidr, 24)"),
        ("macaddr", "left(md5(g::text), 12)::macaddr"),
        ("jsonb", "jsonb_build_object('b', g, 'aa', md5(g::text))"),
        ("color", "(enum_range(NULL::color))[g]"),
        ("int4range", "int4range(g, g + 5)"),
        ("smallint", "g - 10"),
        ("ext.folded", "(md5(g::text) || 'x')::text::ext.folded"),
    ];
    let types = "CREATE DOMAIN short_code AS char(8) CHECK (VALUE <> ''); CREATE DOMAIN short AS bit(5); \
                 CREATE DOMAIN short_bits AS short NOT NULL; \
                 DO $$ BEGIN EXECUTE (SELECT 'CREATE TYPE color AS ENUM (' || string_agg(quote_literal('c' || g), ',') || ')' FROM generate_series(1, 20) g); END $$;";
    for (kind, value) in kinds {
        let folded = folded() + "CREATE CAST (text AS ext.folded) WITHOUT FUNCTION AS ASSIGNMENT;";
        let setup = format!(
            "{folded} {types} CREATE TABLE item (id {kind} PRIMARY KEY, body text); \
             INSERT INTO item SELECT {value}, 'text' FROM generate_series(1, 20) g"
        );
        let it = SyncFixture::new(&setup, &ITEM).await;
        let expected = it.rows().await;
        assert_eq!(expected.len(), 20, "{kind}: {expected:?}");
        let peeked = it.backends.ledger.peek(&expected).await.unwrap();
        let gone: Vec<_> = peeked.iter().filter(|one| one.row.is_none()).collect();
        assert!(gone.is_empty(), "{kind}: {gone:?}");
        // The ids are queued as the ledger reads them.
        it.run("DELETE FROM refarch.outbox").await;
        it.backends.ledger.requeue(&expected).await.unwrap();
        it.settle().await;
        assert_eq!(it.indexed().await, expected, "{kind}");
        let sql =
            "DELETE FROM item WHERE body = 'text' AND ctid = (SELECT min(ctid) FROM item) RETURNING id::text";
        it.client.query_one(sql, &[]).await.unwrap();
        it.backends.ledger.requeue(&expected).await.unwrap();
        it.settle().await;
        assert_eq!(it.indexed().await.len(), 19, "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_has_one_spelling_of_its_id_whichever_session_wrote_it() {
    let odd = "SET timezone = 'Asia/Tokyo'; SET datestyle = 'German'; SET intervalstyle = 'iso_8601'; \
               SET bytea_output = 'escape'; SET extra_float_digits = -3; SET quote_all_identifiers = on;";
    for (kind, value) in [
        ("char(26)", "left(upper(md5(g::text)), 20)"),
        ("bit(9)", "g::bit(9)"),
        ("varchar(12)", "left(md5(g::text), 12)"),
        ("numeric(12,3)", "g / 8.0"),
        ("short_code", "left(upper(md5(g::text)), 8)"),
        ("day", "'2026-02-27'::date + g"),
        ("date", "'2026-02-27'::date + g"),
        ("timestamptz", "'2026-02-27 10:00:00.000001+09'::timestamptz + g * interval '7 hours'"),
        ("interval", "g * interval '1 month 2 days 03:04:05.6'"),
        ("bytea", "decode(md5(g::text), 'hex')"),
        ("float8", "g / 3.0"),
        ("money", "g::money * 1000.5"),
        ("ext.folded", "(md5(g::text) || 'x')::text::ext.folded"),
    ] {
        let folded = folded() + "CREATE CAST (text AS ext.folded) WITHOUT FUNCTION AS ASSIGNMENT;";
        let setup = format!(
            "{folded} CREATE DOMAIN short_code AS char(8); CREATE DOMAIN day AS date; CREATE TABLE item (id {kind} PRIMARY KEY, body text); \
             {odd} INSERT INTO item SELECT {value}, 'text' FROM generate_series(1, 10) g"
        );
        let it = SyncFixture::new(&setup, &ITEM).await;
        it.settle().await;
        assert_eq!(it.indexed().await.len(), 10, "{kind}");
        it.run(&format!(
            "INSERT INTO public.item SELECT {value}, 'text' FROM generate_series(11, 20) g; \
             UPDATE public.item SET body = 'new' WHERE ctid IN (SELECT ctid FROM public.item LIMIT 3); \
             DELETE FROM public.item WHERE ctid IN (SELECT min(ctid) FROM public.item)"
        ))
        .await;
        it.settle().await;
        let rows = it.rows().await;
        assert_eq!((it.indexed().await, rows.len()), (rows, 19), "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn six_hundred_keys_of_fixed_length_are_indexed_and_verified() {
    let setup = "CREATE TABLE item (id char(26) PRIMARY KEY, body text); \
                 INSERT INTO item SELECT left(upper(md5(g::text)), 26), 'text ' || g % 5 FROM generate_series(1, 600) g";
    let it = SyncFixture::new(setup, &ITEM).await;
    it.settle().await;
    assert_eq!(it.backends.index.count().await.unwrap(), 600);
    it.run("DELETE FROM item WHERE id = (SELECT min(id) FROM item); UPDATE item SET body = 'new' WHERE id = (SELECT max(id) FROM item)")
        .await;
    it.settle().await;
    let (agrees, text) = it.verify().await;
    assert!(agrees && text.contains("indexed          599"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_spellings_of_a_key_only_the_rows_own_finds_it() {
    let setup = folded()
        + "CREATE CAST (text AS ext.folded) WITHOUT FUNCTION AS ASSIGNMENT; \
           CREATE TABLE item (id ext.folded PRIMARY KEY, body text); INSERT INTO item VALUES ('Kettle'::text, 'text')";
    let it = SyncFixture::new(&setup, &ITEM).await;
    let peeked = it.backends.ledger.peek(&strings(&["KETTLE", "Kettle", "kettle", "tent"])).await.unwrap();
    let seen: Vec<_> = peeked.iter().map(|one| (&*one.id, one.row.is_some())).collect();
    assert_eq!(seen, [("KETTLE", false), ("Kettle", true), ("kettle", false), ("tent", false)]);
    // The id of the row gets another spelling: the record of the old spelling is deleted, the new one is added.
    it.settle().await;
    assert_eq!(it.indexed().await, ["Kettle"]);
    it.run("ALTER TABLE item DISABLE TRIGGER ALL; UPDATE item SET id = 'KETTLE'::text").await;
    it.backends.ledger.requeue(&strings(&["Kettle", "KETTLE"])).await.unwrap();
    it.settle().await;
    assert_eq!(it.indexed().await, ["KETTLE"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_without_an_order_is_refused() {
    let database = Database::create().await;
    let client = database.client().await;
    // The type has no default order in PostgreSQL.
    let kind = folded()
        .replace("CREATE CAST (ext.folded AS text) WITHOUT FUNCTION AS IMPLICIT;", "")
        .replace("DEFAULT FOR TYPE", "FOR TYPE");
    client.batch_execute(&kind).await.unwrap();
    client
        .batch_execute("CREATE TABLE item (id ext.folded NOT NULL, body text); CREATE UNIQUE INDEX ON item (id ext.folded_ops)")
        .await
        .unwrap();
    client.batch_execute("CREATE TABLE arrays (id int[] PRIMARY KEY, body text)").await.unwrap();
    for (table, reason) in [("item", "no default order"), ("arrays", "array")] {
        let set = settings(&[ITEM[1], ITEM[2], ("REFARCH_SOURCE_TABLE", table)]);
        let postgres = Postgres::new(&Secret::new(database.url()), &set.database).unwrap();
        let error = backend::migrate(&postgres, &set).await.unwrap_err();
        assert_eq!(error.class(), Class::Fatal);
        assert!(
            error.message().contains("source.id") && error.message().contains(reason),
            "{table}: {error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_that_are_invalid_for_the_key_type_are_absent_and_do_no_harm() {
    let setup =
        "CREATE TABLE item (id date PRIMARY KEY, body text); INSERT INTO item VALUES ('2026-02-27', 'text')";
    let it = SyncFixture::new(setup, &ITEM).await;
    let asked = strings(&["not a date", "2026-02-27", "27.02.2026", "2026-02-30", "today", ""]);
    let peeked = it.backends.ledger.peek(&asked).await.unwrap();
    assert_eq!(
        peeked.iter().map(|one| one.row.is_some()).collect::<Vec<_>>(),
        [false, true, false, false, false, false]
    );
    it.backends.ledger.requeue(&asked).await.unwrap();
    it.settle().await;
    assert_eq!(it.indexed().await, ["2026-02-27"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_hidden_by_a_policy_are_not_treated_as_deleted() {
    let setup = "CREATE TABLE item (id integer PRIMARY KEY, tenant text, body text); \
                 INSERT INTO item SELECT g, 't' || g % 2, 'text' FROM generate_series(1, 20) g";
    let it = SyncFixture::by_role(setup, &ITEM, &[]).await;
    let role = it.role();
    it.settle().await;
    it.run(
        "ALTER TABLE item ENABLE ROW LEVEL SECURITY; ALTER TABLE item FORCE ROW LEVEL SECURITY; \
         CREATE POLICY own ON item USING (tenant = current_setting('app.tenant', true)); \
         UPDATE item SET body = 'new'",
    )
    .await;
    let error = held(&it, &["1", "2"]).await;
    assert!(error.contains(&role) && error.contains("BYPASSRLS"), "{error}");
    // The write that reads rows again must fail too.
    let Writes::Transactional(transactional) = it.backends.index.writes() else { panic!("pgvector fences") };
    let plan = Planned { id: "1".into(), revision: None, version: 1, desired: Desired::Absent };
    let error = transactional.apply(&[plan]).await.unwrap_err();
    assert!(error.class() == Class::Retryable && error.to_string().contains("BYPASSRLS"), "{error}");
    assert_eq!(it.indexed().await.len(), 20);

    it.relay().await;
    let (stop, task) = it.index();
    let status = it.backends.status().await;
    assert!(status.is_err_and(|error| error.class() == Class::Retryable));
    // Meanwhile one fault says which role lacks what.
    eventually("the fault to be shown", TIMEOUT, async || !it.faults.current().is_empty()).await;
    let faults = it.faults.current();
    assert_eq!((faults.len(), faults[0].kind), (1, fault::INDEXING_BLOCKED), "{faults:?}");
    assert!(faults[0].message.contains(&role) && faults[0].message.contains("BYPASSRLS"), "{faults:?}");
    assert_eq!(it.indexed().await.len(), 20);
    it.run(&format!("ALTER ROLE {role} BYPASSRLS")).await;
    // Each transaction checks again which rows its session may see.
    eventually("all to be in sync", TIMEOUT, async || {
        it.backends.status().await.is_ok_and(|status| status.is_synced() && status.indexed == Some(20))
    })
    .await;
    eventually("the fault to be gone", TIMEOUT, async || it.faults.current().is_empty()).await;
    stop.cancel();
    task.await.unwrap();
    assert_eq!(it.backends.queue.dead_letters.count().await.unwrap(), 0);
    it.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_key_type_is_read_without_a_restart() {
    let setup = "CREATE TABLE item (id integer PRIMARY KEY, body text); INSERT INTO item SELECT g, 'text' FROM generate_series(1, 5) g";
    let it = SyncFixture::new(setup, &ITEM).await;
    it.settle().await;
    it.run("ALTER TABLE item ALTER id TYPE bigint; INSERT INTO item VALUES (3000000000, 'text')").await;
    it.settle().await;
    assert_eq!(it.indexed().await, ["1", "2", "3", "3000000000", "4", "5"]);
    assert_eq!(it.rows().await.len(), 6);
    // The key becomes text, and one id is not a number.
    it.run("ALTER TABLE item ALTER id TYPE text; INSERT INTO item VALUES ('six', 'text')").await;
    it.backends.ledger.requeue(&strings(&["six", "1"])).await.unwrap();
    it.settle().await;
    assert_eq!(it.indexed().await.len(), 7);
    // The plan takes the row for deleted. The write reads the row again, and must find it although the type of the key
    // changed after the plan was made.
    let Writes::Transactional(transactional) = it.backends.index.writes() else { panic!("pgvector fences") };
    it.run("ALTER TABLE item ALTER id TYPE varchar(40)").await;
    let revision =
        it.backends.ledger.peek(&strings(&["six"])).await.unwrap()[0].entry.as_ref().map(|e| e.revision);
    it.run("ALTER TABLE item ALTER id TYPE text COLLATE \"C\"").await;
    let plan = Planned { id: "six".into(), revision, version: 1, desired: Desired::Absent };
    assert_eq!(transactional.apply(&[plan]).await.unwrap().conflicted, ["six"], "the row is there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_column_holds_the_work_until_it_is_back() {
    let setup = "CREATE TABLE item (id integer PRIMARY KEY, body text, note text); INSERT INTO item SELECT g, 'text' FROM generate_series(1, 5) g";
    let env = [ITEM[0], ITEM[1], ("REFARCH_SOURCE_METADATA", "id,note")];
    let it = SyncFixture::new(setup, &env).await;
    it.settle().await;
    for (away, back, missing) in [
        ("RENAME body TO headline", "RENAME headline TO body", "body"),
        ("RENAME id TO key", "RENAME key TO id", "id"),
        ("RENAME note TO remark", "RENAME remark TO note", "note"),
        ("RENAME TO things", "", "item"),
    ] {
        it.run(&format!("ALTER TABLE item {away}")).await;
        let error = held(&it, &["1"]).await;
        assert!(error.contains(missing), "{away}: {error}");
        let back = if back.is_empty() { "things RENAME TO item" } else { &format!("item {back}") };
        it.run(&format!("ALTER TABLE {back}")).await;
        assert!(it.backends.ledger.peek(&strings(&["1"])).await.unwrap()[0].row.is_some(), "{back}");
    }
    // The same while the roles run: no role ends, no change is given up, and the work goes on once the table is right.
    let (stop, task) = it.index();
    it.backends.ledger.requeue(&strings(&["1", "2"])).await.unwrap();
    it.run("ALTER TABLE item DISABLE TRIGGER ALL; ALTER TABLE item RENAME body TO headline; UPDATE item SET headline = 'new'").await;
    it.relay().await;
    eventually("the work to be held", TIMEOUT, async || {
        let live = it.backends.queue.stats.backlog(refarch::pipeline::change::Lane::Live).await.unwrap();
        live.in_flight > 0
    })
    .await;
    it.run("ALTER TABLE item RENAME headline TO body").await;
    eventually("the change to be applied", TIMEOUT, async || {
        it.backends.status().await.unwrap().outstanding() == 0
    })
    .await;
    stop.cancel();
    task.await.unwrap();
    assert_eq!(it.backends.queue.dead_letters.count().await.unwrap(), 0);
    assert_eq!(it.indexed().await.len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_table_under_the_same_name_is_not_trusted() {
    let setup = "CREATE TABLE item (id integer PRIMARY KEY, body text); INSERT INTO item SELECT g, 'text' FROM generate_series(1, 5) g";
    let it = SyncFixture::new(setup, &ITEM).await;
    it.settle().await;
    it.run(
        "BEGIN; ALTER TABLE item RENAME TO item_old; CREATE TABLE public.item (id integer PRIMARY KEY, body text); COMMIT",
    )
    .await;
    let error = held(&it, &["1"]).await;
    assert!(error.contains("another table"), "{error}");
    // Once capture is installed on it, the table is trusted.
    it.run("UPDATE refarch.source SET relation = 'public.item'::regclass").await;
    assert!(it.backends.ledger.peek(&strings(&["1"])).await.unwrap()[0].row.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_a_hundred_columns_are_kept_in_step() {
    let columns: Vec<String> = (1..=120).map(|n| format!("c{n}")).collect();
    let texts: Vec<String> = (1..=110).map(|n| format!("t{n}")).collect();
    let define = |names: &[String]| {
        names
            .iter()
            .map(|name| format!("{name} text DEFAULT 'value of {name}'"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let setup = format!(
        "CREATE TABLE item (id integer PRIMARY KEY, {}, {}); INSERT INTO item (id) SELECT g FROM generate_series(1, 3) g",
        define(&columns),
        define(&texts)
    );
    let (columns, texts) = (columns.join(","), texts.join(","));
    let env = [ITEM[0], ("REFARCH_SOURCE_TEXT", &*texts), ("REFARCH_SOURCE_METADATA", &*columns)];
    let it = SyncFixture::new(&setup, &env).await;
    it.settle().await;
    assert_eq!(it.indexed().await.len(), 3);
    let row = it.backends.ledger.peek(&strings(&["1"])).await.unwrap().remove(0).row.unwrap();
    let metadata: BTreeMap<String, String> = serde_json::from_str(&row.metadata).unwrap();
    assert_eq!((metadata.len(), &*metadata["c120"]), (120, "value of c120"));
    assert_eq!(row.text.lines().count(), 110);
}

/// Thirty rows, and a graph over their vectors. The SQL `setup` installs pgvector.
async fn with_graph(setup: &str) -> SyncFixture {
    let setup = format!(
        "{setup}; CREATE TABLE item (id integer PRIMARY KEY, body text); \
         INSERT INTO item SELECT g, 'text ' || g FROM generate_series(1, 30) g"
    );
    let graph = [("REFARCH_INDEX_SEARCH", "graph"), ("REFARCH_INDEX_GRAPH_MIN_ROWS", "10")];
    SyncFixture::new(&setup, &[ITEM.as_slice(), &graph].concat()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn pgvector_may_be_in_any_schema() {
    let setup = "CREATE SCHEMA \"my Extensions\"; CREATE EXTENSION vector SCHEMA \"my Extensions\"; \
                 DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path = public, \"my Extensions\"', current_database()); END $$";
    let it = with_graph(setup).await;
    it.run(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path = ''''', current_database()); END $$",
    )
    .await;
    let postgres = Postgres::new(&Secret::new(it.database.url()), &it.settings.database).unwrap();
    let index = Backends::open(&postgres, &it.settings).await.unwrap().index;
    it.settle().await;
    index.maintain(0).await.unwrap();
    assert!(has_graph(&it).await);
    let vector: Vec<f32> = index.fetch(&strings(&["7"])).await.unwrap()[0].embedding.to_vec();
    assert_eq!(index.query(&vector, 1).await.unwrap()[0].id, "7");
}

async fn has_graph(it: &SyncFixture) -> bool {
    let sql = "SELECT EXISTS (SELECT FROM pg_index i JOIN pg_am a ON true JOIN pg_class c ON c.oid = i.indexrelid AND c.relam = a.oid \
               WHERE a.amname = 'hnsw' AND i.indisvalid)";
    it.client.query_one(sql, &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_with_unusual_settings_reads_and_writes_the_same_values() {
    let setup = "CREATE TABLE item (id timestamptz PRIMARY KEY, body text, price money, cost float8, at timestamptz, data bytea); \
                 INSERT INTO item SELECT '2026-02-27'::timestamptz + g * interval '1 hour', 'text ' || g, 12.5, 0.1, '2026-02-27 00:00:00+00', '\\x00ff' \
                 FROM generate_series(1, 30) g";
    let env = [ITEM[0], ITEM[1], ("REFARCH_SOURCE_METADATA", "id,price,cost,at,data")];
    let plain = SyncFixture::new(setup, &env).await;
    let odd = SyncFixture::by_role(setup, &env, ODD).await;
    let id = "2026-02-27 01:00:00+00";
    let read = async |it: &SyncFixture| it.backends.ledger.peek(&strings(&[id])).await.unwrap().remove(0).row;
    let (one, other) = (read(&plain).await, read(&odd).await);
    assert_eq!(one, other);
    assert!(one.is_some());
    // Every kind of work of a role.
    odd.run("DELETE FROM refarch.outbox").await;
    let rows = odd.rows().await;
    odd.backends.ledger.requeue(&rows).await.unwrap();
    odd.settle().await;
    assert_eq!((odd.indexed().await, rows.len()), (rows, 30));
    // A session waits longer than the role's statement timeout.
    let worker = "worker";
    let first = odd.database.client().await;
    first
        .batch_execute("SELECT pg_advisory_lock(hashtext('refarch.worker'), hashtext('worker'))")
        .await
        .unwrap();
    let lease = Arc::new(Lease::new(Arc::new(BootClock), Duration::from_secs(10)));
    let stop = CancellationToken::new();
    let (postgres, kept, stopped) = (odd.postgres.clone(), Arc::clone(&lease), stop.clone());
    let session = tokio::spawn(async move {
        refarch::backend::postgres::worker_lock::keep(&postgres, worker, &kept, &stopped).await
    });
    let waiting = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory' \
                   AND state_change < now() - interval '200 ms'";
    eventually("the session to wait on", TIMEOUT, async || {
        odd.client.query_opt(waiting, &[]).await.unwrap().is_some()
    })
    .await;
    drop(first);
    eventually("the session", TIMEOUT, async || lease.term() > 0).await;
    stop.cancel();
    session.await.unwrap().unwrap();
    assert!(odd.postgres.supports_sessions().await.unwrap());
    // The role can build the graph once it owns the table.
    let (role, generation) = (odd.role(), &odd.backends.generation);
    odd.run(&format!(
        "ALTER TABLE refarch.vector_{} OWNER TO {role}; GRANT CREATE ON SCHEMA refarch TO {role}",
        generation.id
    ))
    .await;
    let table = Arc::new(generation.table.clone());
    let index =
        PgVector::new(odd.postgres.clone(), table, generation.salt.clone(), generation.id, graph_options(10));
    index.maintain(0).await.unwrap();
    assert!(has_graph(&odd).await);
    odd.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_setting_outlives_its_transaction() {
    let it = SyncFixture::by_role("CREATE TABLE item (id integer PRIMARY KEY, body text)", &ITEM, ODD).await;
    let settings = "SELECT name || '=' || setting FROM pg_catalog.pg_settings WHERE name <> 'application_name' ORDER BY name";
    let read = async |client: &Client| -> Vec<String> {
        client.query(settings, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
    };
    let fresh = common::connect(&url_of(&it.database, &it.role())).await;
    let expected = read(&fresh).await;
    // Each kind of statement once, on the only connection of the pool.
    let mut client = it.postgres.client().await.unwrap();
    client.query("SELECT 1", &[]).await.unwrap();
    assert!(client.query("SELECT 1 / 0", &[]).await.is_err());
    client.batch_execute("SELECT 1").await.unwrap();
    client.transaction().await.unwrap().commit().await.unwrap();
    drop(client.transaction().await.unwrap());
    let left: Vec<String> =
        (*client).query(settings, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    assert_eq!(left, expected);
    drop(client);
    it.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cached_plan_whose_result_type_changed_is_prepared_again() {
    let it = SyncFixture::new("CREATE TABLE item (id integer PRIMARY KEY, body text); CREATE TABLE other (a integer); INSERT INTO other VALUES (1)", &ITEM).await;
    let client = it.postgres.client().await.unwrap();
    client.query("SELECT * FROM public.other", &[]).await.unwrap();
    it.run("ALTER TABLE other ALTER a TYPE text, ADD b integer").await;
    let rows = client.query("SELECT * FROM public.other", &[]).await.unwrap();
    assert_eq!(rows[0].get::<_, &str>(0), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_name_follows_sql_quoting() {
    let setup = "CREATE TABLE \"We ird\" (id integer PRIMARY KEY, body text); CREATE SCHEMA \"Sch.ema\"; \
                 CREATE TABLE \"Sch.ema\".t (id integer PRIMARY KEY, body text); CREATE TABLE \"Sch.ema\".\"q\"\"t\" (id integer PRIMARY KEY, body text); \
                 CREATE TABLE plain (id integer PRIMARY KEY, body text); CREATE SCHEMA app; CREATE TABLE app.theirs (id integer PRIMARY KEY, body text); \
                 DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path = app, public', current_database()); END $$;";
    let database = Database::create().await;
    database.client().await.batch_execute(setup).await.unwrap();
    let find = async |name: &str| {
        let set = settings(&[("REFARCH_SOURCE_TABLE", name), ITEM[1], ITEM[2]]);
        let postgres = Postgres::new(&Secret::new(database.url()), &set.database).unwrap();
        let mut client = postgres.client().await.unwrap();
        let transaction = client.transaction().await.unwrap();
        refarch::backend::postgres::source::SourceTable::find(&*transaction, &set.source)
            .await
            .map(|table| table.relation)
            .map_err(|error| error.to_string())
    };
    for (name, relation) in [
        ("public.\"We ird\"", "\"public\".\"We ird\""),
        ("public.We ird", "\"public\".\"We ird\""),
        ("\"We ird\"", "\"public\".\"We ird\""),
        ("\"Sch.ema\".t", "\"Sch.ema\".\"t\""),
        ("\"Sch.ema\".T", "\"Sch.ema\".\"t\""),
        ("\"Sch.ema\".\"q\"\"t\"", "\"Sch.ema\".\"q\"\"t\""),
        ("Public.PLAIN", "\"public\".\"plain\""),
        ("PLAIN", "\"public\".\"plain\""),
        ("plain", "\"public\".\"plain\""),
        ("theirs", "\"app\".\"theirs\""),
    ] {
        assert_eq!(find(name).await, Ok(relation.to_owned()), "{name}");
    }
    let error = find("public.We_ird").await.unwrap_err();
    assert!(error.contains("public.\"We ird\""), "{error}");
    let error = find("public.plane").await.unwrap_err();
    assert!(error.contains("public.plain"), "{error}");
    let error = find("\"PLAIN\"").await.unwrap_err();
    assert!(error.contains("public.plain"), "{error}");
    let error = find("public.\"open").await.unwrap_err();
    assert!(error.contains("quote"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_is_compared_by_names_and_values_and_not_by_order() {
    let setup = "CREATE TABLE item (id integer PRIMARY KEY, body text, name text, sku text); \
                 INSERT INTO item SELECT g, 'text ' || g, 'name', 'sku' FROM generate_series(1, 10) g; INSERT INTO item VALUES (11, 'text 1', 'name', NULL)";
    let env = [ITEM[0], ITEM[1], ("REFARCH_SOURCE_METADATA", "id,name")];
    let it = SyncFixture::new(setup, &env).await;
    it.settle().await;
    let (applied, embedded) = it.metrics.totals();
    let with = async |metadata: &str| {
        let set = settings(&[ITEM[0], ITEM[1], ("REFARCH_SOURCE_METADATA", metadata)]);
        let backends = Backends::open(&it.postgres, &set).await.unwrap();
        // A process whose settings name other columns than the record reads nothing.
        let client = it.postgres.client().await.unwrap();
        let record = "UPDATE refarch.source SET metadata_columns = $1";
        client.execute(record, &[&set.source.metadata]).await.unwrap();
        drop(client);
        let ids: Vec<String> = (1..=11).map(|id| id.to_string()).collect();
        let peeked = backends.ledger.peek(&ids).await.unwrap();
        peeked.iter().filter(|one| !one.entry.as_ref().unwrap().matches(one.row.as_ref())).count()
    };
    assert_eq!(with("name,id").await, 0, "reordered");
    assert_eq!(with("id,name,sku").await, 10, "of one the new column is null");
    assert_eq!(with("id,sku").await, 11);
    assert_eq!(it.metrics.totals(), (applied, embedded));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_added_metadata_column_is_sent_without_embedding_again() {
    let database = Database::create().await;
    let client = database.client().await;
    let setup = "CREATE TABLE item (id integer PRIMARY KEY, body text, name text, sku text); \
                 INSERT INTO item SELECT g, 'text ' || g, 'name', 'sku ' || g FROM generate_series(1, 10) g";
    client.batch_execute(setup).await.unwrap();
    let double = PineconeDouble::start(384, 1).await.unwrap();
    let run = async |metadata: &str, roles: &[&[&str]]| {
        for args in roles {
            let mut command = database.refarch();
            command.args(*args).envs([ITEM[0], ITEM[1], ("REFARCH_SOURCE_METADATA", metadata)]);
            command.envs([("PINECONE_INDEX_HOST", double.url()), ("PINECONE_API_KEY", "none".to_owned())]);
            let output = command.output().await.unwrap();
            assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
    };
    let sync: [&[&str]; 2] = [&["listen", "--until-idle"], &["embed", "--until-idle"]];
    let embedded = async || {
        let sql = "SELECT coalesce(sum(applied), 0)::bigint, coalesce(sum(embedded), 0)::bigint FROM refarch.sample";
        let row = client.query_one(sql, &[]).await.unwrap();
        (row.get::<_, i64>(0), row.get::<_, i64>(1))
    };
    run("id,name", &[&["migrate"]]).await;
    run("id,name", &sync).await;
    assert_eq!(embedded().await, (10, 10));
    run("id,name,sku", &[&["migrate"]]).await;
    run("id,name,sku", &sync).await;
    // `verify` would report records with other metadata as stale.
    run("id,name,sku", &[&["verify"]]).await;
    let (sent, embedded_now) = embedded().await;
    assert!(sent >= 20, "{sent}");
    assert_eq!(embedded_now, 10, "sent again, and not embedded again");
    run("sku,name,id", &[&["migrate"]]).await;
    run("sku,name,id", &sync).await;
    assert_eq!(embedded().await, (sent, 10), "in another order they are the same");
}

/// A clock that a test moves forward.
#[derive(Default)]
struct ManualClock(AtomicU64);

#[async_trait]
impl Clock for ManualClock {
    fn now(&self) -> Duration {
        Duration::from_secs(self.0.load(Ordering::Relaxed))
    }

    fn chance(&self) -> f64 {
        0.5
    }

    async fn sleep(&self, _: Duration) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jump_of_the_databases_clock_does_not_shorten_the_settling_time() {
    let it = SyncFixture::new("CREATE TABLE item (id integer PRIMARY KEY, body text)", &ITEM).await;
    let hand = Arc::new(ManualClock::default());
    let generation = &it.backends.generation;
    let ledger = PgLedger::new(
        it.postgres.clone(),
        Arc::new(generation.table.clone()),
        generation.id,
        generation.salt.clone(),
    )
    .with_clock(Arc::clone(&hand) as _);
    let settle = Duration::from_mins(1);
    let opened = ledger.open("a", "w", &strings(&["1"])).await.unwrap().remove(0);
    ledger.close("a", "w", &[(opened, Outcome::Doubtful)]).await.unwrap();
    let sweep = async || ledger.sweep(settle, 10).await.unwrap().writes;
    assert_eq!(sweep().await, 0);
    // The database's clock jumps ahead.
    it.run("UPDATE refarch.attempt SET abandoned_at = abandoned_at - interval '1 hour'").await;
    hand.0.store(59, Ordering::Relaxed);
    assert_eq!(sweep().await, 0);
    hand.0.store(61, Ordering::Relaxed);
    assert_eq!(sweep().await, 1);
    // This process's clock alone is not enough either.
    let opened = ledger.open("b", "w", &strings(&["1"])).await.unwrap().remove(0);
    ledger.close("b", "w", &[(opened, Outcome::Doubtful)]).await.unwrap();
    assert_eq!(sweep().await, 0);
    hand.0.store(1000, Ordering::Relaxed);
    assert_eq!(sweep().await, 0);
    it.run("UPDATE refarch.attempt SET abandoned_at = abandoned_at - interval '1 hour'").await;
    assert_eq!(sweep().await, 1);
}

/// Lines that were logged at a level.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().push(String::from_utf8_lossy(bytes).into_owned());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_failed_graph_build_is_logged_once_and_retried_with_backoff() {
    let setup = "CREATE TABLE item (id integer PRIMARY KEY, body text); INSERT INTO item SELECT g, 'text ' || g FROM generate_series(1, 30) g";
    let it = SyncFixture::by_role(setup, &ITEM, &[]).await;
    it.settle().await;
    let hand = Arc::new(ManualClock::default());
    let generation = &it.backends.generation;
    // The table belongs to another role, and this role may not call the function that builds the index.
    it.run("REVOKE EXECUTE ON FUNCTION refarch.build_graph(integer, integer, integer) FROM PUBLIC").await;
    it.run(&format!(
        "REVOKE EXECUTE ON FUNCTION refarch.build_graph(integer, integer, integer) FROM {}",
        it.role()
    ))
    .await;
    let table = Arc::new(generation.table.clone());
    let index =
        PgVector::new(it.postgres.clone(), table, generation.salt.clone(), generation.id, graph_options(10))
            .with_clock(Arc::clone(&hand) as _);
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .with_writer(move || writer.clone())
        .with_ansi(false)
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    for second in 0..600 {
        hand.0.store(second, Ordering::Relaxed);
        index.maintain(0).await.unwrap();
    }
    let told: Vec<String> = lines
        .0
        .lock()
        .unwrap()
        .iter()
        .filter(|line| line.contains("cannot build the search index"))
        .cloned()
        .collect();
    let (warnings, others): (Vec<&String>, Vec<&String>) =
        told.iter().partition(|line| line.contains("WARN"));
    assert_eq!(warnings.len(), 1, "{told:?}");
    assert!(warnings[0].contains("permission denied"), "{told:?}");
    assert!((2..12).contains(&others.len()), "{told:?}");
    it.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_pgvector_works_without_a_graph() {
    let setup =
        "CREATE EXTENSION vector; UPDATE pg_extension SET extversion = '0.8.1' WHERE extname = 'vector'";
    let it = with_graph(setup).await;
    let report = backend::migrate(&it.postgres, &it.settings).await.unwrap();
    assert!(report.warnings.iter().any(|warning| warning.contains("0.8.1")), "{report:?}");
    it.settle().await;
    it.backends.index.maintain(0).await.unwrap();
    assert!(!has_graph(&it).await);
    let vector: Vec<f32> = it.backends.index.fetch(&strings(&["7"])).await.unwrap()[0].embedding.to_vec();
    assert_eq!(it.backends.index.query(&vector, 1).await.unwrap()[0].id, "7");
    it.run("UPDATE pg_extension SET extversion = '0.6.2' WHERE extname = 'vector'").await;
    let error = backend::migrate(&it.postgres, &it.settings).await.unwrap_err();
    assert!(error.to_string().contains("0.6.2"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cast_that_another_role_created_is_not_run() {
    let setup = "CREATE TABLE seen (who name); GRANT INSERT ON seen TO PUBLIC; \
                 CREATE TABLE item (id integer PRIMARY KEY, body text, more text); INSERT INTO item VALUES (1, 'text', 'x')";
    let env = [ITEM[0], ITEM[1], ("REFARCH_SOURCE_METADATA", "more")];
    let it = SyncFixture::by_role(setup, &env, &[]).await;
    let owner = format!("owner_{}", it.database.name());
    let enums = ["key", "note", "label"].map(|name| {
        let body = "LANGUAGE plpgsql AS $$BEGIN INSERT INTO public.seen VALUES (current_user); RETURN";
        format!(
            "CREATE TYPE {name} AS ENUM ('1', 'text', 'x'); \
             CREATE FUNCTION {name}_text({name}) RETURNS text {body} '1'; END$$; \
             CREATE FUNCTION text_{name}(text) RETURNS {name} {body} '1'; END$$; \
             CREATE FUNCTION {name}_json({name}) RETURNS json {body} '1'; END$$;"
        )
    });
    it.run(&format!(
        "CREATE ROLE {owner}; GRANT CREATE, USAGE ON SCHEMA public TO {owner}; ALTER TABLE item OWNER TO {owner}; \
         SET ROLE {owner}; SET search_path = public; {} CREATE DOMAIN label_of AS label; \
         ALTER TABLE item ALTER id TYPE key USING id::text::key, ALTER body TYPE note USING body::note, \
           ALTER more TYPE label_of[] USING ARRAY[more::label]",
        enums.concat()
    ))
    .await;
    let mut wrong = Vec::new();
    for (cast, other, told) in [
        ("key AS text", "key_text(key)", "source.id"),
        ("text AS key", "text_key(text)", "source.id"),
        ("note AS text", "note_text(note)", "source.text"),
        ("label AS json", "label_json(label)", "source.metadata"),
    ] {
        it.run(&format!("CREATE CAST ({cast}) WITH FUNCTION {other}")).await;
        let opened = Backends::open(&it.postgres, &it.settings).await.map(drop);
        let said = opened.map_or_else(|error| format!("{error:#}"), |()| "no error".to_owned());
        if !(said.contains("drop that cast") && said.contains(told)) {
            wrong.push(format!("{cast}: {said}"));
        }
        it.run(&format!("DROP CAST ({cast})")).await;
    }
    let opened = Backends::open(&it.postgres, &it.settings).await;
    let read = match opened {
        Ok(backends) => backends.ledger.peek(&strings(&["1"])).await.map(|peeked| peeked[0].row.is_some()),
        Err(error) => panic!("without a cast: {error:#}"),
    };
    it.run("RESET ROLE").await;
    let others = it.client.query_one("SELECT count(*) FROM seen WHERE who <> $1", &[&owner]).await.unwrap();
    it.run(&format!("DROP OWNED BY {owner} CASCADE; DROP ROLE {owner}")).await;
    assert_eq!((wrong, others.get::<_, i64>(0)), (Vec::new(), 0));
    assert!(read.unwrap());
    it.end().await;
}
