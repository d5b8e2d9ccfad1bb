//! The whole loop on real parts: PostgreSQL, pgmq, pgvector and the real model.

use std::sync::Arc;
use std::time::Duration;

use refarch::backend::Backends;
use refarch::config::{Index, SearchMethod};
use refarch::pipeline::change::{Group, JOB_VERSION, Job, Lane, Op};
use refarch::pipeline::queue::Backlog;
use tokio::process::Child;
use tokio_util::sync::CancellationToken;

use crate::common::steps::{self, SyncFixture};
use crate::common::{self, Database};

/// Longer than anything here takes on a busy machine.
const TIMEOUT: Duration = Duration::from_mins(2);

impl SyncFixture {
    /// Relays and indexes until nothing is left, and proves the outcome.
    async fn converge(&self) {
        self.settle().await;
        assert_eq!(self.differences().await, Vec::<String>::new());
    }

    /// Ids whose row and vector do not agree, by comparing every one of them.
    async fn differences(&self) -> Vec<String> {
        let generation = self.backends.generation.id;
        let table = &self.backends.generation.table;
        let sql = format!(
            "SELECT coalesce(s.id, v.id) FROM (SELECT {id}::text AS id, {text} AS text FROM {relation} s WHERE {text} ~ '\\S') s \
             FULL JOIN refarch.vector_{generation} v ON v.id = s.id \
             WHERE v.id IS NULL OR s.id IS NULL OR v.content_hash <> \
               sha256(convert_to($1, 'UTF8') || '\\x00'::bytea || convert_to(s.text, 'UTF8'))",
            id = table.id,
            text = table.text,
            relation = table.relation,
        );
        let rows = self.client.query(&sql, &[&self.backends.generation.salt.as_str()]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    async fn find(&self, text: &str) -> Vec<String> {
        let vector = self.indexer_embed(text).await;
        self.backends.index.query(&vector, 3).await.unwrap().into_iter().map(|found| found.id).collect()
    }

    async fn indexer_embed(&self, text: &str) -> Arc<[f32]> {
        let embedder = steps::model(&self.settings).await.start(1);
        embedder.embed_texts(&[Arc::from(text)]).await.unwrap().remove(0)
    }
}

const KITCHEN: &str = "INSERT INTO products_with_increment (id, name, sku, description, price) VALUES \
    (1, 'Kettle', 'K-1', 'An electric kettle for tea', '$20'), (2, 'Tent', 'T-1', 'A tent for two hikers', '$120'), \
    (3, 'Chair', 'C-1', 'An office chair for bad backs', '$220')";

#[tokio::test(flavor = "multi_thread")]
async fn inserts_edits_deletes_and_truncations_reach_the_index() {
    let it = SyncFixture::new("", &[]).await;
    it.run(KITCHEN).await;
    it.converge().await;
    assert_eq!(it.find("boil water").await[0], "1");
    it.run("UPDATE products_with_increment SET description = 'A stove that burns wood' WHERE id = 3").await;
    it.run("DELETE FROM products_with_increment WHERE id = 1").await;
    it.converge().await;
    assert_eq!(it.find("fire").await[0], "3");
    assert!(!it.find("boil water").await.contains(&"1".to_owned()));
    it.run("TRUNCATE products_with_increment; INSERT INTO products_with_increment (id, description) VALUES (2, 'A garden hose')").await;
    it.converge().await;
    assert_eq!(it.find("watering").await, ["2"]);
    it.run("TRUNCATE products_with_increment").await;
    it.converge().await;
    assert_eq!(it.backends.index.count().await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_text_is_embedded_once_and_unchanged_text_not_at_all() {
    let it = SyncFixture::new("", &[]).await;
    it.run("INSERT INTO products_with_increment (id, description) SELECT i, 'one of ' || i % 7 || ' texts' FROM generate_series(1, 300) i").await;
    it.converge().await;
    assert_eq!(it.metrics.totals(), (300, 7));
    it.run("UPDATE products_with_increment SET price = '$5'").await;
    it.converge().await;
    assert_eq!(it.metrics.totals(), (600, 7), "only metadata changed");
    it.run("UPDATE products_with_increment SET uuid = uuid; UPDATE products_with_increment SET description = 'x' WHERE id = 1; \
            UPDATE products_with_increment SET description = 'one of 1 texts' WHERE id = 1").await;
    it.converge().await;
    assert_eq!(it.metrics.totals(), (600, 7), "it is as it was");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_without_text_are_in_sync_without_a_vector() {
    let it = SyncFixture::new("", &[]).await;
    it.run("INSERT INTO products_with_increment (id, name, description) VALUES (1, 'a', NULL), (2, 'b', ''), (3, NULL, E' \\n\\t'), (4, NULL, 'text')").await;
    it.converge().await;
    assert_eq!(it.backends.index.count().await.unwrap(), 1);
    assert!(it.backends.status().await.unwrap().is_synced());
    it.run("UPDATE products_with_increment SET description = NULL WHERE id = 4").await;
    it.converge().await;
    assert_eq!(it.backends.index.count().await.unwrap(), 0);
    assert!(it.backends.status().await.unwrap().is_synced());
}

#[tokio::test(flavor = "multi_thread")]
async fn unusual_texts_are_embedded_too() {
    let it = SyncFixture::new("", &[]).await;
    it.run("INSERT INTO products_with_increment (id, description) VALUES (1, repeat('very long ', 120000)), (2, repeat('x', 1000000)), \
            (3, E'\\u0007 \\U0001F600 \\u202E'), (4, '[CLS] [SEP] [MASK]')").await;
    it.converge().await;
    assert_eq!(it.backends.index.count().await.unwrap(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_a_load_are_bulk_and_edits_are_live() {
    let it = SyncFixture::new("", &[]).await;
    it.run("INSERT INTO products_with_increment (id, description) SELECT i, 'text' FROM generate_series(1, 250) i").await;
    it.run(
        "BEGIN; UPDATE products_with_increment SET description = 'a' WHERE id <= 60; \
            UPDATE products_with_increment SET description = 'b' WHERE id > 190; COMMIT",
    )
    .await;
    it.run("UPDATE products_with_increment SET description = 'c' WHERE id = 100").await;
    let done = it.relay.lock().await.step().await.unwrap();
    // 120 changes of one transaction are a load, however they were written; of the edited row one entry is kept.
    assert_eq!((done.changes, done.live, done.bulk), (371, 1, 249));
    let backlog = it.backends.queue.stats.backlog(Lane::Live).await.unwrap();
    assert_eq!(backlog, Backlog::counted(1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_change_is_claimed_ahead_of_an_importers_single_rows() {
    let it = SyncFixture::new("", &[]).await;
    let mut importer = it.database.client().await;
    let transaction = importer.transaction().await.unwrap();
    transaction
        .batch_execute("DO $$ BEGIN FOR i IN 1..6000 LOOP INSERT INTO products_with_increment (id, description) VALUES (i, 'imported'); END LOOP; END $$")
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    let first = it.relay.lock().await.step().await.unwrap();
    assert_eq!((first.live, first.bulk), (0, 2000));
    it.run("INSERT INTO products_with_increment (id, description) VALUES (9999, 'an edit')").await;
    let second = it.relay.lock().await.step().await.unwrap();
    assert_eq!(second.live, 1, "the edit overtakes 4,000 changes: {second:?}");
    it.relay().await;
    let backlog = it.backends.queue.stats.backlog(Lane::Bulk).await.unwrap();
    assert_eq!(backlog.visible, 6000);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_message_is_dead_lettered_with_the_reason() {
    let it = SyncFixture::new("", &[]).await;
    it.run("SELECT pgmq.send('refarch_live', '{\"hello\": 1}'); SELECT pgmq.send('refarch_bulk', '{\"v\": 99}'); \
            SELECT pgmq.send('refarch_live', '{\"v\": 1, \"source\": \"products\"}')").await;
    let foreign = Job {
        v: JOB_VERSION,
        source: "other".into(),
        lane: Lane::Live,
        oldest: jiff::Timestamp::now(),
        trace: None,
        groups: vec![Group { version: 1, op: Op::Upsert, after_ms: 0, ids: vec!["1".into()] }],
    };
    it.backends.queue.jobs.send(&[foreign]).await.unwrap();
    let stop = CancellationToken::new();
    it.indexer.run(&stop, &stop, true).await.unwrap();
    assert_eq!(it.backends.queue.dead_letters.count().await.unwrap(), 2);
    // What a later build or another source's worker can do waits for it.
    for lane in Lane::ALL {
        let left = it.backends.queue.stats.backlog(lane).await.unwrap();
        assert_eq!((left.visible, left.in_flight), (0, 1), "{lane:?}");
    }
    let rows = it
        .client
        .query("SELECT headers ->> 'error', message::text FROM pgmq.q_refarch_dead", &[])
        .await
        .unwrap();
    let dead: Vec<(String, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    for (reason, body) in [("no version", "hello"), ("missing field", "products")] {
        let found = dead.iter().any(|(r, b)| r.contains(reason) && b.contains(body));
        assert!(found, "{reason}: {dead:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_that_no_row_can_have_are_harmless() {
    let it = SyncFixture::new("", &[]).await;
    it.run(KITCHEN).await;
    it.relay().await;
    let job = Job {
        v: JOB_VERSION,
        source: "products".into(),
        lane: Lane::Live,
        oldest: jiff::Timestamp::now(),
        trace: None,
        groups: vec![Group {
            version: 1,
            op: Op::Upsert,
            after_ms: 0,
            ids: vec!["not a number".into(), "99999999999999999999".into(), "2".into(), "77".into()],
        }],
    };
    it.backends.queue.jobs.send(&[job]).await.unwrap();
    it.converge().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_with_other_names_and_types_is_kept_in_step() {
    let setup = "CREATE TABLE \"My Notes\" (\"The Id\" uuid PRIMARY KEY DEFAULT gen_random_uuid(), title text, body text, tags jsonb); \
                 INSERT INTO \"My Notes\" (title, body) VALUES ('Rain', 'It rains in the garden'), ('Tax', 'The tax is due in May')";
    let env = [
        ("REFARCH_SOURCE_TABLE", "public.My Notes"),
        ("REFARCH_SOURCE_ID", "The Id"),
        ("REFARCH_SOURCE_TEXT", "title,body"),
        ("REFARCH_SOURCE_METADATA", "tags"),
    ];
    let it = SyncFixture::new(setup, &env).await;
    it.converge().await;
    let tax: String = it
        .client
        .query_one("SELECT \"The Id\"::text FROM \"My Notes\" WHERE title = 'Tax'", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(it.find("when do I have to pay taxes").await[0], tax);
    it.run(
        "UPDATE \"My Notes\" SET title = NULL, tags = '[1]'; DELETE FROM \"My Notes\" WHERE body LIKE 'It%'",
    )
    .await;
    it.converge().await;
    assert_eq!(it.backends.index.count().await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_and_several_workers_at_once_converge() {
    let it = SyncFixture::new("", &[]).await;
    let mut roles: Vec<Child> = Vec::new();
    for role in [
        &["listen"][..],
        &["listen"],
        &["embed", "--workers", "1"],
        &["embed", "--workers", "1"],
        &["embed", "--workers", "2"],
    ] {
        roles.push(it.database.refarch().args(role).spawn().unwrap());
    }
    let writers = (0..4).map(|writer| {
        let url = it.database.url();
        tokio::spawn(async move {
            let client = common::connect(&url).await;
            let sql = "INSERT INTO products_with_increment (id, description) VALUES ($1::int, 'w' || $2::text || ' wrote ' || $1) \
                       ON CONFLICT (id) DO UPDATE SET description = excluded.description";
            for step in 0..150_i32 {
                let id = step * 7 % 60;
                if step % 5 == writer {
                    client.execute("DELETE FROM products_with_increment WHERE id = $1::int", &[&id]).await.unwrap();
                } else {
                    client.execute(sql, &[&id, &writer.to_string()]).await.unwrap();
                }
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    common::eventually("everything to be in sync", TIMEOUT, async || {
        it.backends.status().await.unwrap().is_synced()
    })
    .await;
    assert_eq!(it.differences().await, Vec::<String>::new());
    for mut role in roles {
        let pid = nix::unistd::Pid::from_raw(role.id().unwrap() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(role.wait().await.unwrap().success(), "a stopped role ends well");
    }
    let left = it.client.query_one("SELECT count(*) FROM refarch.worker", &[]).await.unwrap();
    assert_eq!(left.get::<_, i64>(0), 0, "workers leave the books");
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_a_killed_indexer_are_delivered_again() {
    let it = SyncFixture::new("", &[]).await;
    it.run("INSERT INTO products_with_increment (id, description) SELECT i, 'text ' || i FROM generate_series(1, 400) i").await;
    it.relay().await;
    let mut command = it.database.refarch();
    let mut doomed =
        command.args(["embed", "--workers", "1"]).env("REFARCH_QUEUE_VISIBILITY_S", "1").spawn().unwrap();
    common::eventually("the indexer to hold messages", TIMEOUT, async || {
        it.backends.queue.stats.backlog(Lane::Bulk).await.unwrap().in_flight > 0
    })
    .await;
    doomed.kill().await.unwrap();
    common::eventually("the messages to be visible again", TIMEOUT, async || {
        it.backends.queue.stats.backlog(Lane::Bulk).await.unwrap().in_flight == 0
    })
    .await;
    it.converge().await;
    assert_eq!(it.backends.index.count().await.unwrap(), 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_indexer_holds_few_messages_beyond_its_current_work() {
    let it = SyncFixture::new("", &[]).await;
    it.run("INSERT INTO products_with_increment (id, description) SELECT i, 'text ' || i FROM generate_series(1, 4000) i").await;
    it.relay().await;
    let mut indexer = it.database.refarch().args(["embed", "--workers", "1"]).spawn().unwrap();
    let mut most = 0;
    common::eventually("a message to be done", TIMEOUT, async || {
        let backlog = it.backends.queue.stats.backlog(Lane::Bulk).await.unwrap();
        most = most.max(backlog.in_flight);
        backlog.visible + backlog.in_flight < 4000
    })
    .await;
    indexer.kill().await.unwrap();
    assert!(most <= 1000, "one message is worked on and one fetched ahead, and {most} changes were held");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_graph_is_built_after_a_load_and_dropped_for_a_larger_load() {
    let it =
        SyncFixture::new("", &[("REFARCH_INDEX_SEARCH", "graph"), ("REFARCH_INDEX_GRAPH_MIN_ROWS", "20")])
            .await;
    let graph = async || -> bool {
        let sql = "SELECT EXISTS (SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE c.relname LIKE 'vector%graph' AND indisvalid)";
        it.client.query_one(sql, &[]).await.unwrap().get(0)
    };
    it.run("INSERT INTO products_with_increment (id, description) SELECT i, 'text ' || i FROM generate_series(1, 40) i").await;
    it.converge().await;
    // Settling takes long enough on a busy machine for the indexer to have built it.
    it.backends.index.maintain(50_000).await.unwrap();
    it.backends.index.maintain(5_000).await.unwrap();
    assert!(!graph().await, "a load is under way");
    let before = it.find("text 17").await;
    it.backends.index.maintain(0).await.unwrap();
    assert!(graph().await);
    assert_eq!(it.find("text 17").await, before, "the graph finds what exact search found");
    it.backends.index.maintain(9_000).await.unwrap();
    assert!(graph().await, "too small a load to build anew for");
    it.backends.index.maintain(50_000).await.unwrap();
    assert!(!graph().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_built_checked_built_again_and_dropped() {
    let it = SyncFixture::new("", &[("REFARCH_INDEX_SEARCH", "lists")]).await;
    let lists = async || -> Option<u32> {
        let sql = "SELECT c.oid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam \
                   WHERE a.amname = 'ivfflat' AND i.indisvalid";
        it.client.query_opt(sql, &[]).await.unwrap().map(|row| row.get(0))
    };
    it.run("INSERT INTO products_with_increment (id, description) SELECT i, 'text ' || i FROM generate_series(1, 1500) i").await;
    it.converge().await;
    let maintain = async || it.backends.index.maintain(0).await.unwrap();
    // The indexer may have built them already, or may have been stopped at it.
    common::eventually("the lists to be built and checked", TIMEOUT, async || {
        maintain().await;
        let checked = "SELECT EXISTS (SELECT FROM refarch.search_index WHERE recall IS NOT NULL)";
        it.client.query_one(checked, &[]).await.unwrap().get(0)
    })
    .await;
    let built = lists().await.expect("lists over 1,500 vectors");
    let state =
        it.client.query_one("SELECT lists, probes, recall FROM refarch.search_index", &[]).await.unwrap();
    let (count, probes, recall): (i32, i32, Option<f32>) = (state.get(0), state.get(1), state.get(2));
    // The root of the rows, of which the indexer may have seen 1,000 only.
    assert!((31..=38).contains(&count), "{count}");
    assert!((1..=4).contains(&probes) && recall.is_some_and(|recall| recall > 0.5), "{probes} {recall:?}");
    assert_eq!(it.find("text 17").await[0], "17");
    let status = it.backends.status().await.unwrap();
    assert_eq!(status.search.expect("the state of the lists").lists, count);
    // As if the table had grown since.
    it.run("UPDATE refarch.search_index SET rows = 900").await;
    maintain().await;
    let again = lists().await.expect("lists");
    assert_ne!(again, built);
    // As if searches found too little.
    it.run("UPDATE refarch.search_index SET degraded = true").await;
    maintain().await;
    let last = lists().await.expect("lists");
    assert_ne!(last, again);
    // As if a worker had stopped between the build and its record.
    it.run("DELETE FROM refarch.search_index").await;
    common::eventually("the lists to be adopted and checked", TIMEOUT, async || {
        maintain().await;
        it.backends.status().await.unwrap().search.is_some_and(|search| search.recall.is_some())
    })
    .await;
    assert_eq!(lists().await, Some(last), "they are not built once more");
    let adopted = it.backends.status().await.unwrap().search.expect("the state of the lists");
    assert_eq!((adopted.lists, adopted.rows_at_build), (38, 1_500));
    assert_eq!(it.find("text 17").await[0], "17");
    let mut settings = it.settings.clone();
    let Index::Pgvector(index) = &mut settings.index else { panic!("pgvector is the default") };
    index.search = SearchMethod::Exact;
    let exact = Backends::open(&it.postgres, &settings).await.unwrap();
    exact.index.maintain(0).await.unwrap();
    assert_eq!(lists().await, None);
    assert!(exact.status().await.unwrap().search.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_without_the_schema_is_reported() {
    let database = Database::create().await;
    for role in ["listen", "embed", "status"] {
        // A role waits for a while: somebody may be restoring or migrating the database.
        let mut command = database.refarch();
        command.arg(role).env("REFARCH_DATABASE_CONNECT_TIMEOUT_S", "1");
        let output = command.output().await.unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{role}: {error}");
        assert!(error.contains("run refarch migrate"), "{role}: {error}");
    }
}
