//! Whose an index is: a note for each namespace, the place of a target, the keys beside a row's columns, and
//! what happens when the database goes back.

use std::collections::BTreeMap;

use refarch::backend::Backends;
use refarch::backend::postgres::Postgres;
use refarch::backend::postgres::ownership::{self, KnownEpoch, Ownership, Renewal};
use tokio::process::Command;
use tokio_postgres::Client;

use super::*;
use crate::common;
use crate::common::source::settings;

/// As many as the model's vectors have.
pub const DIMENSIONS: usize = 384;

/// The namespace that the notes are kept in.
const OWNERSHIP_NAMESPACE: &str = "refarch-notes";

/// The table of the tests here: its columns have the names of keys that records once had of ours.
const TABLE: &str = "CREATE TABLE item (id bigint PRIMARY KEY, body text, name text, sku text, version integer, \
                     content_hash text, metadata_hash text)";

/// A database that feeds a namespace of an index.
pub struct Shop {
    database: Database,
    client: Client,
    env: BTreeMap<String, String>,
}

impl Shop {
    pub async fn new(double: &PineconeDouble, namespace: &str, metadata: &str) -> Self {
        let database = Database::create().await;
        let client = database.client().await;
        client.batch_execute(TABLE).await.unwrap();
        let env = [
            ("REFARCH_INDEX_KIND", "pinecone"),
            ("REFARCH_INDEX_HOST", &double.url()),
            ("REFARCH_INDEX_API_KEY", "x"),
            ("PINECONE_NAMESPACE", namespace),
            ("REFARCH_SOURCE_TABLE", "public.item"),
            ("REFARCH_SOURCE_TEXT", "body"),
            ("REFARCH_SOURCE_METADATA", metadata),
            ("REFARCH_LOG_LEVEL", "refarch=debug,warn"),
        ];
        let env = env.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Self { database, client, env }
    }

    /// Three rows in the index.
    pub async fn filled(self) -> Self {
        self.ok(&["migrate"]).await;
        self.sql(
            "INSERT INTO item SELECT i, 'The ' || i || ' bottles of green glass', 'n' || i, 's' || i, i, 'mine', 'too' \
             FROM generate_series(1, 3) i",
        )
        .await;
        self.sync().await;
        self
    }

    /// Late writes are waited for, but not for long.
    pub fn impatient(self) -> Self {
        self.with("REFARCH_INDEX_TIMEOUT_MS", "2000")
            .with("REFARCH_INDEXER_LEASE_MS", "4000")
            .with("REFARCH_INDEXER_SETTLE_MS", "0")
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.database.refarch();
        command.args(args).envs(&self.env);
        command
    }

    async fn run(&self, args: &[&str]) -> (Option<i32>, String) {
        let output = self.command(args).output().await.unwrap();
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.code(), said)
    }

    #[track_caller]
    fn ok<'a>(&'a self, args: &'a [&'a str]) -> impl Future<Output = String> + 'a {
        let at = std::panic::Location::caller();
        async move {
            let (code, said) = self.run(args).await;
            assert_eq!(code, Some(0), "{at}: {args:?}: {said}");
            said
        }
    }

    /// Applies what is pending, and returns what `embed` logged. Changes of one row in both lanes may overlap, and
    /// then are queued again.
    async fn sync(&self) -> String {
        let left = "SELECT count(*) FROM (SELECT seq FROM refarch.outbox UNION ALL SELECT 1 FROM refarch.backfill UNION ALL \
                    SELECT 1 FROM refarch.ledger WHERE open > 0 OR dirty) l";
        let mut said = String::new();
        eventually("all changes to be applied", TIMEOUT, async || {
            self.ok(&["listen", "--until-idle"]).await;
            said += &self.ok(&["embed", "--until-idle", "--workers", "1"]).await;
            self.number(left).await == 0
        })
        .await;
        said
    }

    /// The same for what was distrusted, with each row once: a row's second copy, which is for those that are
    /// gone, would be embedded if both were worked on at once.
    async fn sync_once(&self) -> String {
        self.sql("UPDATE refarch.backfill SET expand = false").await;
        self.sync().await
    }

    pub async fn agrees(&self) {
        let said = self.ok(&["verify", "--wait", "1"]).await;
        assert!(said.contains("index and table agree"), "{said}");
    }

    pub async fn sql(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    pub async fn number(&self, sql: &str) -> i64 {
        self.client.query_one(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
    }

    /// Rows and entries that are to be done again.
    pub async fn distrusted(&self) -> (i64, i64) {
        let queued = "SELECT coalesce(sum(cardinality(ids)), 0)::bigint FROM refarch.outbox WHERE op = 'u'";
        // What is asked for the relay queues.
        let asked = "SELECT count(*) FROM item WHERE EXISTS (SELECT FROM refarch.backfill)";
        let queued = self.number(queued).await + self.number(asked).await;
        (queued, self.number("SELECT count(*) FROM refarch.ledger WHERE dirty").await)
    }

    pub fn with(mut self, key: &str, value: &str) -> Self {
        self.env.insert(key.to_owned(), value.to_owned());
        self
    }

    /// The database and its target, in this process.
    async fn postgres(&self) -> (Postgres, i32) {
        let postgres = self.database.postgres(&settings(&[]));
        (postgres, self.client.query_one("SELECT id FROM refarch.target", &[]).await.unwrap().get(0))
    }
}

fn index_of(double: &PineconeDouble, namespace: &str) -> Pinecone {
    let options = pinecone::PineconeOptions {
        namespace: namespace.into(),
        dimensions: DIMENSIONS,
        ..options(&double.url())
    };
    Pinecone::new(options).unwrap()
}

/// Writes a record directly, past the roles.
pub async fn put(double: &PineconeDouble, namespace: &str, id: &str, values: &[f32], metadata: &Value) {
    let url = format!("{}/vectors/upsert", double.url());
    let body =
        json!({ "namespace": namespace, "vectors": [{ "id": id, "values": values, "metadata": metadata }] });
    let request = reqwest::Client::new().post(url).header("Api-Key", "x").json(&body);
    assert!(request.send().await.unwrap().status().is_success());
}

/// Leaves the one note that older versions kept for a whole index.
async fn put_old_ownership_record(double: &PineconeDouble, text: &str) {
    let delete = json!({ "namespace": OWNERSHIP_NAMESPACE, "deleteAll": true });
    let request = reqwest::Client::new().post(format!("{}/vectors/delete", double.url()));
    assert!(request.header("Api-Key", "x").json(&delete).send().await.unwrap().status().is_success());
    let mut values = vec![0.0; DIMENSIONS];
    values[0] = 1.0;
    put(double, OWNERSHIP_NAMESPACE, "note", &values, &json!({ "text": text })).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_databases_share_an_index_by_namespaces() {
    let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let n1 = Shop::new(&double, "n1", "id,name").await.filled().await;
    let n2 = Shop::new(&double, "n2", "id,name").await.filled().await;
    for shop in [&n1, &n2, &n1] {
        shop.agrees().await;
        let said = shop.sync().await;
        assert!(!said.contains("written anew") && shop.distrusted().await == (0, 0), "{said}");
    }
    // A second database in one of them is noticed.
    let other = Shop::new(&double, "n1", "id,name").await;
    other.ok(&["migrate"]).await;
    let (postgres, generation) = other.postgres().await;
    let index = index_of(&double, "n1");
    assert_eq!(ownership::compare(&postgres, generation, &index).await.unwrap(), Ownership::NotOwned);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ownership_record_of_an_older_version_is_accepted() {
    let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let shop = Shop::new(&double, "n1", "id,name").await.filled().await;
    let text: String =
        shop.client.query_one("SELECT name || '/' || mark FROM refarch.lineage", &[]).await.unwrap().get(0);
    put_old_ownership_record(&double, &text).await;
    let said = shop.sync().await;
    assert!(!said.contains("written anew"), "{said}");
    assert_eq!(double.snapshot(OWNERSHIP_NAMESPACE).len(), 2, "the old note and the namespace's own");
    // An empty namespace is nobody's, whatever a note for the whole index says.
    let new = Shop::new(&double, "n3", "id,name").await.filled().await;
    let index = index_of(&double, "n3");
    let (postgres, generation) = new.postgres().await;
    assert_eq!(ownership::compare(&postgres, generation, &index).await.unwrap(), Ownership::Owned);
    new.agrees().await;
    shop.agrees().await;
    // An old ownership record of this database says nothing about an empty namespace.
    let elsewhere = index_of(&double, "n4");
    let (postgres, generation) = shop.postgres().await;
    assert_eq!(ownership::compare(&postgres, generation, &elsewhere).await.unwrap(), Ownership::NotOwned);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_namespace_is_refused_before_anything_is_removed() {
    let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let shop = Shop::new(&double, "n1", "id,name").await.filled().await;
    let records = double.snapshot("n1");
    let shop = shop.with("PINECONE_NAMESPACE", "n3");
    for args in [&["migrate"][..], &["migrate", "--dry-run"]] {
        let (code, said) = shop.run(args).await;
        assert!(code == Some(1), "{said}");
        for part in ["n1", "n3", "refarch migrate --rebuild"] {
            assert!(said.contains(part), "{part:?} is not in: {said}");
        }
    }
    for role in ["embed", "listen"] {
        let (code, said) = shop.run(&[role, "--until-idle"]).await;
        assert!(code == Some(1) && said.contains("n1") && said.contains("n3"), "{role}: {said}");
    }
    assert_eq!(shop.distrusted().await, (0, 0));
    assert_eq!((double.snapshot("n1"), double.snapshot("n3").len()), (records, 0));
    let shop = shop.with("PINECONE_NAMESPACE", "n1");
    shop.agrees().await;
    // The same index under another address is the same place: its ownership record shows that.
    let tap = RecordingProxy::on(&double.url()).await;
    let shop = shop.with("REFARCH_INDEX_HOST", &tap.url);
    let (code, said) = shop.run(&["embed", "--until-idle"]).await;
    assert!(code == Some(1) && said.contains("run refarch migrate"), "{said}");
    shop.ok(&["migrate"]).await;
    shop.sync().await;
    shop.agrees().await;
    // Only when it is asked for is the index made anew, at the new place, and what is at the old one told of.
    let said = shop.ok(&["migrate", "--rebuild"]).await;
    assert!(said.contains("nothing to do"), "the place is the one that is there: {said}");
    let shop = shop.with("PINECONE_NAMESPACE", "n3");
    let said = shop.ok(&["migrate", "--rebuild"]).await;
    assert!(said.contains("n1") && said.contains("delete them there"), "{said}");
    shop.sync().await;
    shop.agrees().await;
    assert_eq!((double.snapshot("n1").len(), double.snapshot("n3").len()), (3, 3));
    // Another index is another place.
    let other = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let shop = shop.with("REFARCH_INDEX_HOST", &other.url());
    let (code, said) = shop.run(&["migrate"]).await;
    assert!(code == Some(1) && said.contains("--rebuild"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_location_that_was_never_recorded_is_recorded_and_not_refused() {
    let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let shop = Shop::new(&double, "n1", "id,name").await.filled().await;
    shop.sql("UPDATE refarch.target SET name = 'vector', namespace = '', host = NULL").await;
    shop.sync().await;
    let said = shop.ok(&["migrate"]).await;
    assert!(said.contains("nothing to do"), "{said}");
    assert_eq!(shop.number("SELECT count(*) FROM refarch.target WHERE namespace = 'n1'").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_named_like_internal_keys_are_stored_unchanged() {
    let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let shop = Shop::new(&double, "", "id,version,content_hash,metadata_hash").await.filled().await;
    let metadata = double.snapshot("")["2"].metadata.clone();
    let told = ["version", "content_hash", "metadata_hash"].map(|key| metadata.get(key).cloned());
    assert_eq!(told, [Some(json!(2)), Some(json!("mine")), Some(json!("too"))], "{metadata:?}");
    shop.agrees().await;
    let shop = shop.with("REFARCH_SOURCE_METADATA", "id,_refarch_note");
    let (code, said) = shop.run(&["migrate"]).await;
    assert!(code == Some(1) && said.contains("_refarch_note") && said.contains("source.metadata"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn records_of_an_older_version_are_readable() {
    let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let shop = Shop::new(&double, "", "id,name").await.filled().await;
    for (id, mut record) in double.snapshot("") {
        for key in ["version", "content_hash", "metadata_hash"] {
            if let Some(value) = record.metadata.remove(&format!("_refarch_{key}")) {
                record.metadata.insert(key.to_owned(), value);
            }
        }
        put(&double, "", &id, &record.values, &record.metadata.into()).await;
    }
    assert!(double.snapshot("")["1"].metadata["content_hash"].is_string());
    shop.agrees().await;
    // Where a column has the key's name, what stands there cannot be told from the column's value.
    let mut wanted = options(&double.url());
    wanted.dimensions = DIMENSIONS;
    wanted.metadata = vec!["content_hash".into()];
    let index = Pinecone::new(wanted).unwrap();
    let stored = index.fetch(&["1".to_owned()]).await.unwrap();
    assert_eq!((stored[0].content_hash, stored[0].metadata_hash), (None, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_metadata_column_is_sent_without_embedding_again() {
    let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let shop = Shop::new(&double, "", "id,name").await.filled().await;
    let vectors = double.snapshot("");
    let queued = "SELECT (SELECT count(*) FROM refarch.outbox) + (SELECT count(*) FROM refarch.backfill)";
    // In another order it is the same metadata.
    let shop = shop.with("REFARCH_SOURCE_METADATA", "name,id");
    shop.ok(&["migrate"]).await;
    assert_eq!(shop.number(queued).await, 0);
    shop.agrees().await;
    let shop = shop.with("REFARCH_SOURCE_METADATA", "id,name,sku");
    shop.ok(&["migrate"]).await;
    // Each row once: see `sync_once`.
    shop.sql("DELETE FROM refarch.outbox WHERE op = 't'").await;
    let said = shop.sync().await;
    assert!(said.contains("applied=3 embedded=0"), "{said}");
    for (id, record) in double.snapshot("") {
        assert_eq!(
            (&record.metadata["sku"], &record.values),
            (&json!(format!("s{id}")), &vectors[&id].values)
        );
    }
    shop.agrees().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_under_a_running_worker_is_noticed_at_the_next_ownership_check() {
    let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let shop = Shop::new(&double, "", "id,name").await.filled().await;
    let (postgres, generation) = shop.postgres().await;
    let index = index_of(&double, "");
    let notes = index.ownership_store().unwrap();
    for _ in 0..3 {
        ownership::renew(&postgres, generation, notes, Duration::ZERO).await.unwrap();
        assert_eq!(shop.distrusted().await, (0, 0), "marks alone are no restore");
    }
    let marks = (0..8).map(|_| ownership::renew(&postgres, generation, notes, Duration::ZERO));
    for marked in futures::future::join_all(marks).await {
        marked.unwrap();
    }
    assert_eq!(shop.distrusted().await, (0, 0), "nor are workers that mark at once");
    let seen = notes.record().await.unwrap();
    // As an older copy of the database has it.
    shop.sql("UPDATE refarch.lineage SET mark = 2").await;
    ownership::renew(&postgres, generation, notes, Duration::ZERO).await.unwrap();
    assert_eq!(shop.distrusted().await, (3, 3), "the note said {seen:?}");
    // Only once, whichever worker is next, and without embedding texts whose vectors the index holds.
    let said = shop.sync_once().await;
    assert!(said.contains("applied=3 embedded=0"), "{said}");
    for _ in 0..2 {
        ownership::renew(&postgres, generation, notes, Duration::ZERO).await.unwrap();
    }
    assert_eq!(shop.distrusted().await, (0, 0));
    shop.agrees().await;
}

/// How often every row was queued again.
const TIMES: &str = "SELECT max(epoch) FROM refarch.ledger";

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_lost_heartbeats_is_noticed_once() {
    let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let shop = Shop::new(&double, "", "id,name").await.impatient().filled().await;
    let mark = "SELECT mark FROM refarch.lineage";
    let beating = "SELECT count(*) FROM refarch.worker WHERE heartbeat_at > started_at + interval '1 second'";
    let claimed = shop.number(mark).await + 2;
    let _workers = [0, 1].map(|_| shop.command(&["embed", "--workers", "1"]).spawn().unwrap());
    eventually("both workers to run", TIMEOUT * 2, async || {
        shop.number(beating).await == 2 && shop.number(mark).await >= claimed
    })
    .await;
    assert_eq!(shop.distrusted().await, (0, 0));
    let before = shop.number(TIMES).await;
    // As a copy from ten seconds ago has it: server, timeline and mark are the same.
    shop.sql("UPDATE refarch.worker SET heartbeat_at = heartbeat_at - interval '10 seconds'").await;
    eventually("every row to be queued again", TIMEOUT * 2, async || shop.distrusted().await == (3, 3)).await;
    // The second worker marks only, as the first one does in the end.
    eventually("both workers to have marked", TIMEOUT * 2, async || shop.number(mark).await >= claimed + 3)
        .await;
    assert_eq!(shop.number(TIMES).await, before + 1, "whoever of the fleet notices it");
}

/// Sets a database back to an earlier copy of itself.
async fn copied(shop: Shop) -> (Shop, Database) {
    let Shop { database, client, env } = shop;
    drop(client);
    let copy = Database::create().await;
    let admin = common::connect(&database.url().replace(database.name(), "postgres")).await;
    eventually("the database to be free", TIMEOUT, async || {
        let (name, of) = (copy.name(), database.name());
        admin.batch_execute(&format!("DROP DATABASE IF EXISTS {name}")).await.unwrap();
        admin.batch_execute(&format!("CREATE DATABASE {name} TEMPLATE {of}")).await.is_ok()
    })
    .await;
    let client = database.client().await;
    (Shop { database, client, env }, copy)
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restore_the_index_equals_the_restored_table() {
    let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let (shop, copy) = copied(Shop::new(&double, "", "id,name").await.impatient().filled().await).await;
    shop.sql(
        "UPDATE item SET body = 'Another text' WHERE id = 1; UPDATE item SET name = 'other' WHERE id = 2; \
         DELETE FROM item WHERE id = 3; INSERT INTO item (id, body) VALUES (4, 'A new one')",
    )
    .await;
    shop.sync().await;
    assert_eq!(double.snapshot("").into_keys().collect::<Vec<_>>(), ["1", "2", "4"]);
    let client = copy.client().await;
    let restored = Shop { database: copy, client, env: shop.env.clone() };
    let said = restored.ok(&["embed", "--until-idle", "--workers", "1"]).await;
    assert!(said.contains("went back") && said.contains("every row is written anew"), "{said}");
    // The texts of 1 and 3 are not what the index holds; that of 2 is.
    let said = restored.sync_once().await;
    assert!(said.contains("applied=3 embedded=2"), "{said}");
    let (code, said) = restored.run(&["verify", "--repair"]).await;
    let orphan = said.lines().any(|line| line.starts_with("orphaned") && line.ends_with(" 1"));
    assert!(code == Some(1) && orphan, "a record whose row this database never knew: {said}");
    restored.sync().await;
    restored.agrees().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_timeline_sends_every_row_again_and_embeds_nothing() {
    let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let shop = Shop::new(&double, "", "id,name").await.filled().await;
    let known = "SELECT count(*) FROM refarch.lineage \
                 WHERE incarnation = refarch.incarnation() AND incarnation ~ '^[0-9]+/[0-9A-F]{8}$'";
    assert_eq!(shop.number(known).await, 1);
    let name = async || -> String {
        shop.client.query_one("SELECT name FROM refarch.lineage", &[]).await.unwrap().get(0)
    };
    let before = name().await;
    // As before a replica was promoted, which lost the newest update of the row and of the ledger.
    shop.sql("UPDATE refarch.lineage SET incarnation = split_part(incarnation, '/', 1) || '/0000000A'").await;
    let mut record = double.snapshot("")["2"].clone();
    record.metadata.insert("name".into(), json!("lost"));
    put(&double, "", "2", &record.values, &record.metadata.into()).await;
    let (postgres, generation) = shop.postgres().await;
    let index = index_of(&double, "");
    let mut worker = KnownEpoch::new(&postgres, generation).await.unwrap();
    shop.sql(&format!(
        "CREATE TABLE IF NOT EXISTS refarch.proof (target integer, worker_id text, held_until timestamptz, round jsonb); \
         CREATE TABLE IF NOT EXISTS refarch.proof_round (target integer, index_check text, began_at timestamptz, \
           rows bigint, records bigint, entries bigint, differences bigint, mended bigint, unreadable bigint); \
         INSERT INTO refarch.proof_round (target, index_check, began_at, rows, records, entries, differences, mended, unreadable) \
         VALUES ({generation}, 'full', now(), 3, 3, 3, 0, 0, 0)"
    ))
    .await;
    assert!(matches!(
        worker.renew(&postgres, generation, &index, Duration::ZERO).await.unwrap(),
        Renewal::Owned
    ));
    assert_eq!(shop.distrusted().await, (3, 3));
    let proved = "SELECT count(*) FROM refarch.proof_round";
    assert_eq!(shop.number(proved).await, 0, "what was proved of another state is to be proved again");
    assert_ne!(name().await, before, "the server that was left may go on under the old name");
    let said = shop.sync_once().await;
    assert!(said.contains("applied=3 embedded=0") && !said.contains("written anew"), "{said}");
    assert_eq!(double.snapshot("")["2"].metadata["name"], "n2");
    for _ in 0..2 {
        worker.renew(&postgres, generation, &index, Duration::ZERO).await.unwrap();
    }
    assert_eq!(shop.distrusted().await, (0, 0));
    shop.agrees().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_two_databases_write_to_one_namespace_the_first_one_stops() {
    let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let first = Shop::new(&double, "n1", "id,name").await.impatient().filled().await;
    let index = index_of(&double, "n1");
    let (postgres, generation) = first.postgres().await;
    let mut worker = KnownEpoch::new(&postgres, generation).await.unwrap();
    let second = Shop::new(&double, "n1", "id,name").await.impatient().filled().await;
    let Renewal::Lost(error) = worker.renew(&postgres, generation, &index, Duration::ZERO).await.unwrap()
    else {
        panic!("the second's note was not noticed")
    };
    assert!(error.class() == Class::Fatal && error.message().contains("index.namespace"), "{error}");
    assert_eq!(first.distrusted().await, (0, 0));
    // Started again it takes the namespace over, once; and it is not taken to and fro.
    first.ok(&["embed", "--until-idle", "--workers", "1"]).await;
    assert_eq!(first.distrusted().await, (3, 3));
    let (code, said) = second.run(&["embed", "--until-idle"]).await;
    assert!(code == Some(1) && said.contains("another database writes to this namespace too"), "{said}");
    first.sync().await;
    first.agrees().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restore_vectors_in_the_database_are_compared_and_not_made_again() {
    let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let shop = Shop::new(&double, "", "id,name").await.with("REFARCH_INDEX_KIND", "pgvector").filled().await;
    // A queue outside of the database has delivered and forgotten this change, which the restored copy had not
    // applied yet.
    let lost = "UPDATE item SET body = 'Lost by the queue' WHERE id = 2; DELETE FROM refarch.outbox";
    let (postgres, generation) = shop.postgres().await;
    let env: Vec<_> = shop.env.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let backends = Backends::open(&postgres, &settings(&env)).await.unwrap();
    let mut worker = KnownEpoch::new(&postgres, generation).await.unwrap();
    for _ in 0..2 {
        worker.renew(&postgres, generation, &*backends.index, Duration::ZERO).await.unwrap();
    }
    assert_eq!(shop.distrusted().await, (0, 0));
    for went_back in
        ["UPDATE refarch.lineage SET mark = 1", "UPDATE refarch.lineage SET incarnation = '1/0000000A'"]
    {
        shop.sql(lost).await;
        shop.sql(went_back).await;
        worker.renew(&postgres, generation, &*backends.index, Duration::ZERO).await.unwrap();
        assert_eq!(shop.distrusted().await, (3, 0), "{went_back}");
        shop.sync().await;
        shop.agrees().await;
        worker.renew(&postgres, generation, &*backends.index, Duration::ZERO).await.unwrap();
        assert_eq!(shop.distrusted().await, (0, 0), "{went_back}");
    }
    // Nor does it hold a heartbeat that was written: two workers notice that, and one queues the rows.
    let lost = shop.client.query_one("SELECT clock_timestamp()", &[]).await.unwrap().get(0);
    let mut other = KnownEpoch::new(&postgres, generation).await.unwrap();
    for (worker, queued) in [(&mut worker, 3), (&mut other, 0)] {
        worker.went_back(lost);
        worker.renew(&postgres, generation, &*backends.index, Duration::ZERO).await.unwrap();
        assert_eq!(shop.distrusted().await, (queued, 0));
        shop.sync().await;
    }
    shop.agrees().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_different_index_name_is_refused_before_the_index_is_created() {
    let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let mut shop = Shop::new(&double, "", "id,name").await;
    let host = shop.env.remove("REFARCH_INDEX_HOST").unwrap();
    let shop = shop
        .with("REFARCH_INDEX_NAME", "shop")
        .with("REFARCH_INDEX_CONTROLLER", &double.url())
        .filled()
        .await;
    let shop = shop.with("REFARCH_INDEX_NAME", "other");
    let (code, said) = shop.run(&["migrate"]).await;
    assert!(code == Some(1) && said.contains("index shop") && said.contains("index other"), "{said}");
    let error = control::host(&control_options(&double.url(), "other", DIMENSIONS)).await.unwrap_err();
    assert!(error.message().contains("there is no index"), "{error}");
    // By its host it is the same index.
    let shop = shop.with("REFARCH_INDEX_HOST", &host);
    shop.sync().await;
    shop.agrees().await;
    shop.ok(&["migrate"]).await;
    shop.agrees().await;
}
