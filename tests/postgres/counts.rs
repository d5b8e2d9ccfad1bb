//! The kept counts of ledger entries and vectors equal a recount.

use std::time::Duration;

use refarch::backend::postgres::counts::{self, Counts};
use refarch::backend::postgres::generation;
use refarch::pipeline::ledger::Ledger as _;
use refarch::pipeline::queue::Backlog;
use refarch::role::status::text;

use crate::common::eventually;
use crate::common::source::{ITEM, Migrated, migrate, settings, shape};
use crate::common::steps::SyncFixture;

/// A time limit that no step here reaches, even on a busy machine.
const TIMEOUT: Duration = Duration::from_mins(1);

const TABLE: &str = "CREATE TABLE item (id bigint PRIMARY KEY, body text)";

/// Counts the entries and vectors of the only target.
async fn recounted(it: &SyncFixture) -> Counts {
    let without_text = it.backends.generation.salt.hash("").0.to_vec();
    let sql = format!(
        "SELECT count(*) FILTER (WHERE open = 0 AND NOT dirty AND NOT deleted), \
                count(*) FILTER (WHERE open = 0 AND NOT dirty AND NOT deleted AND content_hash IS DISTINCT FROM $1), \
                count(*) FILTER (WHERE open <> 0 OR dirty), (SELECT count(*) FROM refarch.vector_{}) FROM refarch.ledger",
        it.backends.generation.id
    );
    let row = it.client.query_one(&sql, &[&without_text]).await.unwrap();
    let number = |at| row.get::<_, i64>(at) as u64;
    Counts { settled: number(0), with_text: number(1), unsettled: number(2), records: number(3) }
}

async fn kept(it: &SyncFixture) -> Counts {
    counts::read(&it.postgres, it.backends.generation.id).await.unwrap()
}

/// Checks that the kept counts and the status equal a recount. Returns the recount.
async fn agreed(it: &SyncFixture) -> Counts {
    let (counts, status) = (recounted(it).await, it.backends.status().await.unwrap());
    assert_eq!(kept(it).await, counts);
    assert_eq!(
        (status.expected, status.unsettled, status.indexed),
        (counts.with_text, counts.unsettled, Some(counts.records))
    );
    counts
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_equals_a_recount_after_a_mixed_history() {
    let it = SyncFixture::new(TABLE, &ITEM).await;
    let counts = |settled, with_text, unsettled, records| Counts { settled, with_text, unsettled, records };
    assert_eq!(agreed(&it).await, counts(0, 0, 0, 0));
    it.run(
        "INSERT INTO item SELECT n, CASE WHEN n % 10 > 0 THEN 'body ' || n END FROM generate_series(1, 60) n",
    )
    .await;
    it.settle().await;
    assert_eq!(agreed(&it).await, counts(60, 54, 0, 54));
    // Texts are changed, added and removed. Rows are deleted, and one of them is inserted again.
    it.run(
        "UPDATE item SET body = 'other' WHERE id <= 5; UPDATE item SET body = 'text' WHERE id = 10; \
            UPDATE item SET body = ' ' WHERE id = 11; DELETE FROM item WHERE id BETWEEN 41 AND 50; \
            INSERT INTO item VALUES (41, 'back')",
    )
    .await;
    it.settle().await;
    assert_eq!(agreed(&it).await, counts(51, 46, 0, 46));
    // Entries become dirty, tried and parked; one change is rolled back.
    let ledger = &it.backends.ledger;
    ledger.requeue(&["1".to_owned(), "2".to_owned(), "none".to_owned()]).await.unwrap();
    ledger.count_try("3", 1).await.unwrap();
    ledger.park("never seen").await.unwrap();
    it.run(
        "BEGIN; UPDATE refarch.ledger SET dirty = true; DELETE FROM refarch.ledger WHERE id = '4'; ROLLBACK",
    )
    .await;
    assert_eq!(agreed(&it).await, counts(49, 44, 4, 46));
    it.run("DELETE FROM refarch.ledger WHERE id = 'never seen'").await;
    it.settle().await;
    assert_eq!(agreed(&it).await, counts(51, 46, 0, 46));
    assert!(it.backends.status().await.unwrap().is_synced());
    // Tracked writes: opened, and then swept or closed.
    let opened = ledger.open("write", "test", &["1".to_owned(), "99".to_owned()]).await.unwrap();
    assert_eq!((opened.len(), agreed(&it).await), (2, counts(50, 45, 2, 46)));
    it.run("UPDATE refarch.ledger SET open = 0, dirty = false WHERE id = '1'; DELETE FROM refarch.ledger WHERE id = '99'").await;
    // All rows are deleted at once.
    it.run("TRUNCATE item").await;
    it.settle().await;
    assert_eq!(agreed(&it).await, counts(0, 0, 0, 0));
    it.run("INSERT INTO item VALUES (1, 'one')").await;
    it.settle().await;
    it.run("TRUNCATE refarch.ledger; TRUNCATE refarch.vector_1").await;
    assert_eq!(agreed(&it).await, counts(0, 0, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_reads_no_entry_of_the_ledger() {
    let it = SyncFixture::new(TABLE, &ITEM).await;
    it.run("INSERT INTO item SELECT n, 'body ' || n FROM generate_series(1, 20) n").await;
    it.settle().await;
    it.run("BEGIN; LOCK TABLE refarch.ledger IN ACCESS EXCLUSIVE MODE").await;
    let status =
        tokio::time::timeout(TIMEOUT, it.backends.status()).await.expect("an answer without the ledger");
    it.run("ROLLBACK").await;
    let status = status.unwrap();
    assert_eq!((status.expected, status.indexed, status.is_synced()), (20, Some(20), true));
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_counts_are_summed_up_and_those_of_a_target_that_is_gone_deleted() {
    let it = SyncFixture::new(TABLE, &ITEM).await;
    for id in 1..=60 {
        let sql = format!(
            "INSERT INTO refarch.ledger (target, id) SELECT id, '{id}' FROM refarch.target; \
             UPDATE refarch.ledger SET dirty = false WHERE id = '{id}'"
        );
        it.run(&sql).await;
    }
    it.run("INSERT INTO refarch.count_delta (target, settled) VALUES (1000000, 3)").await;
    let before = kept(&it).await;
    assert_eq!((before.settled, before.unsettled), (60, 0));
    // Other transactions add counts while the counts are summed up.
    let other = it.database.client().await;
    other.batch_execute("BEGIN; UPDATE refarch.ledger SET dirty = true WHERE id = '1'").await.unwrap();
    let (ledger, again) = (&it.backends.ledger, &it.backends.ledger);
    let (one, two) = tokio::join!(ledger.tidy(), again.tidy());
    one.unwrap();
    two.unwrap();
    other.batch_execute("COMMIT").await.unwrap();
    let rows: i64 =
        it.client.query_one("SELECT count(*) FROM refarch.count_delta", &[]).await.unwrap().get(0);
    assert!(rows <= 3, "{rows}");
    assert_eq!(agreed(&it).await, Counts { settled: 59, with_text: 59, unsettled: 1, records: 0 });
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_trigger_saw_is_corrected_by_a_count_and_never_looks_synced() {
    let it = SyncFixture::new(TABLE, &ITEM).await;
    it.run("INSERT INTO item SELECT n, 'body ' || n FROM generate_series(1, 20) n").await;
    it.settle().await;
    let generation = &it.backends.generation;
    assert!(!counts::recount(&it.postgres, generation).await.unwrap(), "nothing to correct");
    it.run("ALTER TABLE refarch.ledger DISABLE TRIGGER USER; UPDATE refarch.ledger SET dirty = true WHERE id = '7'; \
            DELETE FROM refarch.ledger WHERE id = '8'; ALTER TABLE refarch.ledger ENABLE TRIGGER USER")
        .await;
    assert_ne!(kept(&it).await, recounted(&it).await);
    // The triggers saw that the entry was settled, but not that it was dirty. So the sum is below zero.
    it.run("UPDATE refarch.ledger SET dirty = false WHERE id = '7'").await;
    assert_eq!(kept(&it).await.unsettled, 1);
    assert!(!it.backends.status().await.unwrap().is_synced());
    // Two recounts at once correct the counts only once, while another transaction writes.
    let other = it.database.client().await;
    other.batch_execute("BEGIN; UPDATE refarch.ledger SET dirty = true WHERE id = '9'").await.unwrap();
    let (one, two) =
        tokio::join!(counts::recount(&it.postgres, generation), counts::recount(&it.postgres, generation));
    assert!(one.unwrap() ^ two.unwrap());
    other.batch_execute("COMMIT").await.unwrap();
    assert_eq!(agreed(&it).await, Counts { settled: 18, with_text: 18, unsettled: 1, records: 20 });
}

#[tokio::test]
async fn a_database_from_before_the_counts_gets_them_and_a_dropped_generation_takes_them_away() {
    let it = Migrated::new(TABLE, settings(&ITEM), "pgvector").await;
    let first = it.generation().await;
    let run = async |sql: &str| {
        it.client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    };
    run(&format!(
        "INSERT INTO refarch.ledger (target, id, dirty) SELECT {id}, n::text, n > 30 FROM generate_series(1, 40) n; \
         INSERT INTO refarch.vector_{id} SELECT n::text, '[1,2,3]', '' FROM generate_series(1, 30) n",
        id = first.id
    ))
    .await;
    let counts = Counts { settled: 30, with_text: 30, unsettled: 10, records: 30 };
    assert_eq!(counts::read(&it.postgres, first.id).await.unwrap(), counts);
    // The state before the migration of the counts.
    run("DROP TABLE refarch.count_delta; DELETE FROM refarch.migration WHERE name = 'counts'; \
         DROP FUNCTION refarch.count_entries_insert, refarch.count_entries_update, refarch.count_entries_delete, \
           refarch.count_entries_truncate, refarch.count_records, refarch.begin_count, refarch.textless_hash CASCADE")
        .await;
    let report = migrate(&it.postgres, &it.settings, &it.shape).await.unwrap();
    assert_eq!(report.applied, ["0012_counts"]);
    assert_eq!(counts::read(&it.postgres, first.id).await.unwrap(), counts);
    run(&format!("DELETE FROM refarch.vector_{} WHERE id IN ('1', '2')", first.id)).await;
    assert_eq!(counts::read(&it.postgres, first.id).await.unwrap().records, 28);

    // Another model makes another generation.
    let mut other = shape("pgvector");
    other.model = "other".into();
    let options = refarch::backend::postgres::migrate::MigrateOptions { rebuild: true, ..Default::default() };
    let config = (&it.settings.source, &it.settings.queue);
    refarch::backend::postgres::migrate::migrate_with(&it.postgres, config.0, config.1, &other, &options)
        .await
        .unwrap();
    let second = generation::find(&it.postgres, &it.settings.source, &other).await.unwrap();
    let rows = format!("SELECT count(*) FROM refarch.count_delta WHERE target = {}", first.id);
    assert_eq!(it.client.query_one(&rows, &[]).await.unwrap().get::<_, i64>(0), 0);
    run(&format!("INSERT INTO refarch.vector_{} VALUES ('1', '[1,2,3]', '')", second.id)).await;
    let none = Counts { settled: 0, with_text: 0, unsettled: 0, records: 1 };
    assert_eq!(counts::read(&it.postgres, second.id).await.unwrap(), none);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_waiting_changes_are_estimated_and_few_counted() {
    let it = SyncFixture::new(TABLE, &ITEM).await;
    let pending = async || {
        let status = it.backends.status().await.unwrap();
        (status.pending, status.pending_estimated)
    };
    it.run("INSERT INTO refarch.outbox (source, op, ids) SELECT 'products', 'u', ARRAY[n::text] FROM generate_series(1, 2000) n").await;
    assert_eq!(pending().await, (2_000, false));
    it.run("INSERT INTO refarch.outbox (source, op, ids) SELECT 'products', 'u', ARRAY[n::text, 'x'] FROM generate_series(1, 100000) n").await;
    let (changes, estimated) = pending().await;
    assert!(estimated && (100_000..400_000).contains(&changes), "{changes}");
    it.run("DELETE FROM refarch.outbox WHERE seq > 3").await;
    assert_eq!(pending().await, (3, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_queued_changes_are_estimated_and_few_counted() {
    let it = SyncFixture::new(TABLE, &ITEM).await;
    let send = async |count: u32| {
        it.run(&format!(
            "INSERT INTO pgmq.q_refarch_live (vt, message, headers) \
             SELECT now(), '{{}}', '{{\"changes\": 2}}' FROM generate_series(1, {count})"
        ))
        .await;
        it.backends.status().await.unwrap()
    };
    let few = send(1_000).await;
    assert_eq!(few.queue.live, Backlog::counted(2_000, 0));
    assert!(text(&few).contains("queue, live    2000 visible"), "{}", text(&few));
    let many = send(30_000).await;
    let Backlog { visible, estimated, .. } = many.queue.live;
    assert!(estimated && (20_000..120_000).contains(&visible), "{visible}");
    assert!(text(&many).contains(&format!("queue, live    about {visible} visible")), "{}", text(&many));
    assert!(!many.queue.bulk.estimated && !many.pending_estimated);
    assert_eq!(serde_json::to_value(&many).unwrap()["queue"]["live"]["estimated"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_of_capture_is_seen_soon_and_its_end_at_once() {
    let it = SyncFixture::new(TABLE, &ITEM).await;
    let faults = async || it.backends.status().await.unwrap().capture_faults;
    assert_eq!(faults().await, [""; 0]);
    it.run("ALTER TABLE item DISABLE TRIGGER USER").await;
    eventually("the fault to be seen", TIMEOUT, async || !faults().await.is_empty()).await;
    it.run("ALTER TABLE item ENABLE TRIGGER USER").await;
    assert_eq!(faults().await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_table_is_counted_once_a_minute_and_a_difference_is_not_called_synced() {
    let it = SyncFixture::new(TABLE, &ITEM).await;
    // Wide rows without a text. The ledger says that all of them are settled.
    it.run("ALTER TABLE item DISABLE TRIGGER USER; ALTER TABLE item ADD COLUMN pad text; \
            INSERT INTO item SELECT n, NULL, repeat('x', 150) FROM generate_series(1, 210000) n; \
            ALTER TABLE item ENABLE TRIGGER USER; ANALYZE item; \
            INSERT INTO refarch.ledger (target, id, dirty, content_hash) \
            SELECT t.id, n::text, false, refarch.textless_hash(t.salt) FROM refarch.target t, generate_series(1, 210000) n")
        .await;
    let status = it.backends.status().await.unwrap();
    assert_eq!((status.source_rows, status.source_rows_estimated, status.is_synced()), (210_000, true, true));
    // The number follows the ledger: a row that was not captured counts only after the next count.
    it.run("INSERT INTO item VALUES (210001, NULL)").await;
    it.settle().await;
    it.run("ALTER TABLE item DISABLE TRIGGER USER; INSERT INTO item VALUES (210002, NULL); ALTER TABLE item ENABLE TRIGGER USER").await;
    assert_eq!(it.backends.status().await.unwrap().source_rows, 210_001);
    // Another process makes its own count.
    let other = refarch::backend::Backends::open(&it.postgres, &it.settings).await.unwrap();
    for _ in 0..2 {
        let status = other.status().await.unwrap();
        assert_eq!((status.source_rows, status.is_synced()), (210_002, false));
    }
}
