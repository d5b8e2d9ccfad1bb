//! Changes on their way from the outbox to a queue outside of the database.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use refarch::backend::postgres::Postgres;
use refarch::backend::postgres::outbox::{PgOutbox, pending};
use refarch::pipeline::change::{Job, Lane};
use refarch::pipeline::clock::BootClock;
use refarch::pipeline::failure::{Error, FailureKind, Result};
use refarch::pipeline::queue::{Backlog, JobQueue, Message, QueueStats, Receipt};
use refarch::pipeline::relay::{Relay, RelayOptions};
use tokio::sync::{Mutex, Notify};
use tokio_util::sync::CancellationToken;

use crate::common::source::{Migrated, settings};
use crate::common::{self, Database};

/// A queue that records its messages, and fails or stalls on demand.
#[derive(Default)]
struct RecordingQueue {
    sent: Mutex<Vec<Job>>,
    fails: AtomicBool,
    stalls: AtomicBool,
    stalled: Notify,
    standing: AtomicU64,
    bound: AtomicU64,
}

impl RecordingQueue {
    async fn ids(&self, lane: Lane) -> Vec<String> {
        let sent = self.sent.lock().await;
        let of_lane = sent.iter().filter(|job| job.lane == lane);
        let mut ids: Vec<String> =
            of_lane.flat_map(|job| &job.groups).flat_map(|group| group.ids.clone()).collect();
        ids.sort_by_key(|id| id.parse::<u32>().unwrap());
        ids
    }
}

#[async_trait]
impl JobQueue for RecordingQueue {
    async fn send(&self, jobs: &[Job]) -> Result<()> {
        if self.stalls.load(Ordering::SeqCst) {
            self.stalled.notify_one();
            std::future::pending::<()>().await;
        }
        if self.fails.load(Ordering::SeqCst) {
            return Err(Error::new(FailureKind::Unreachable, "send jobs", "the queue is away"));
        }
        self.sent.lock().await.extend_from_slice(jobs);
        Ok(())
    }

    async fn receive(&self, _: Lane, _: usize) -> Result<Vec<Message>> {
        unreachable!("a relay only sends")
    }

    async fn wait(&self, _: Lane, _: Duration) {
        unreachable!("a relay only sends")
    }

    async fn acknowledge(&self, _: &[Receipt]) -> Result<()> {
        unreachable!("a relay only sends")
    }

    async fn extend_visibility(&self, _: &[Receipt], _: Duration) -> Result<()> {
        unreachable!("a relay only sends")
    }

    fn visibility_timeout(&self) -> Duration {
        Duration::from_mins(1)
    }
}

#[async_trait]
impl QueueStats for RecordingQueue {
    async fn backlog(&self, lane: Lane) -> Result<Backlog> {
        let visible = if lane == Lane::Bulk { self.standing.load(Ordering::SeqCst) } else { 0 };
        Ok(Backlog::counted(visible, 0))
    }

    fn shared_bound(&self) -> Option<u64> {
        Some(self.bound.load(Ordering::SeqCst)).filter(|bound| *bound > 0)
    }

    async fn oldest(&self) -> Result<Option<Timestamp>> {
        unreachable!("a relay does not ask for it")
    }
}

struct Fixture {
    postgres: Postgres,
    sink: Arc<RecordingQueue>,
    database: Database,
}

impl Fixture {
    async fn new() -> Self {
        // Nobody asks the queue at that address: the sink is in its place.
        let settings = settings(&[("SQS_QUEUE_URL", "https://sqs.eu-west-1.amazonaws.com/1/jobs")]);
        let Migrated { postgres, report, database, .. } = Migrated::new("", settings, "pinecone").await;
        assert!(!report.created.iter().any(|name| name.contains("pgmq")), "{report:?}");
        Self { postgres, sink: Arc::default(), database }
    }

    fn relay(&self) -> Relay {
        Relay::new(
            Box::new(PgOutbox::shipping(self.postgres.clone(), "products", Arc::clone(&self.sink) as _)),
            Arc::clone(&self.sink) as _,
            Arc::new(BootClock),
            RelayOptions {
                source: "products".into(),
                changes_per_message: 500,
                bulk_threshold: 100,
                live_bound: 5_000,
                poll: Duration::from_millis(20),
                start_timeout: Duration::ZERO,
            },
        )
    }

    /// A relay whose first call to the queue goes unanswered.
    async fn stalled(&self) -> Relay {
        self.sink.stalls.store(true, Ordering::SeqCst);
        let mut relay = self.relay();
        relay.step().await.unwrap();
        self.sink.stalled.notified().await;
        relay
    }

    /// Relays until nothing is left.
    async fn drain(&self) {
        self.relay().run(&CancellationToken::new(), true).await.unwrap();
    }

    async fn insert(&self, ids: std::ops::Range<u32>) {
        let sql = "INSERT INTO products_with_increment (id, description) SELECT n, 'text' FROM generate_series($1::int, $2::int) n";
        let client = self.database.client().await;
        client.execute(sql, &[&(ids.start as i32), &(ids.end as i32 - 1)]).await.unwrap();
    }

    async fn shipments(&self) -> i64 {
        let client = self.database.client().await;
        client.query_one("SELECT count(*) FROM refarch.shipment", &[]).await.unwrap().get(0)
    }

    async fn pending(&self) -> u64 {
        pending(&self.postgres, "products").await.unwrap().changes
    }
}

fn numbers(ids: std::ops::Range<u32>) -> Vec<String> {
    ids.map(|id| id.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_sent_in_their_lanes_and_their_shipments_deleted() {
    let fixture = Fixture::new().await;
    fixture.insert(0..3).await;
    fixture.insert(1_000..3_000).await;
    fixture.drain().await;
    assert_eq!(fixture.sink.ids(Lane::Live).await, numbers(0..3));
    assert_eq!(fixture.sink.ids(Lane::Bulk).await, numbers(1_000..3_000));
    assert_eq!((fixture.shipments().await, fixture.pending().await), (0, 0));
    let client = fixture.database.client().await;
    let sql = "SELECT lane, messages, changes FROM refarch.packing ORDER BY lane";
    let packed: Vec<(String, i64, i64)> = client
        .query(sql, &[])
        .await
        .unwrap()
        .iter()
        .map(|row| (row.get(0), row.get(1), row.get(2)))
        .collect();
    assert_eq!(packed, [("bulk".to_owned(), 4, 2_000), ("live".to_owned(), 1, 3)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_the_queue_refuses_are_kept_and_sent_later() {
    let fixture = Fixture::new().await;
    fixture.insert(0..3).await;
    fixture.sink.fails.store(true, Ordering::SeqCst);
    let mut relay = fixture.relay();
    relay.step().await.unwrap();
    let error = loop {
        if let Err(error) = relay.step().await {
            break error;
        }
    };
    assert!(error.to_string().contains("the queue is away"), "{error}");
    assert_eq!((fixture.shipments().await, fixture.pending().await), (1, 3), "counted as not queued yet");
    fixture.sink.fails.store(false, Ordering::SeqCst);
    // Another relay, as after a crash.
    fixture.drain().await;
    assert_eq!(fixture.sink.ids(Lane::Live).await, numbers(0..3));
    assert_eq!((fixture.shipments().await, fixture.pending().await), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shipment_of_a_dead_relay_is_sent_only_after_its_lease_ends() {
    let fixture = Fixture::new().await;
    fixture.insert(0..3).await;
    let relay = fixture.stalled().await;
    // This ends its tasks too.
    drop(relay);
    fixture.sink.stalls.store(false, Ordering::SeqCst);
    fixture.drain().await;
    assert_eq!(fixture.sink.ids(Lane::Live).await, Vec::<String>::new(), "its lease stands");
    let client = fixture.database.client().await;
    let ran_out = "UPDATE refarch.shipment SET claimed_until = clock_timestamp() - interval '1 second'";
    assert_eq!(client.execute(ran_out, &[]).await.unwrap(), 1);
    fixture.drain().await;
    assert_eq!(fixture.sink.ids(Lane::Live).await, numbers(0..3));
    assert_eq!((fixture.shipments().await, fixture.pending().await), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_transaction_is_open_while_the_queue_is_called() {
    let fixture = Fixture::new().await;
    fixture.insert(0..3).await;
    let _relay = fixture.stalled().await;
    let client = fixture.database.client().await;
    let open: i64 = client
        .query_one(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() \
             AND backend_type = 'client backend' AND xact_start IS NOT NULL",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(open, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncation_is_sent_as_deletes_of_every_id_in_the_ledger() {
    let fixture = Fixture::new().await;
    let client = fixture.database.client().await;
    client
        .batch_execute(
            "INSERT INTO refarch.ledger (target, id) SELECT id, n::text FROM refarch.target, generate_series(1, 12000) n; \
             TRUNCATE products_with_increment",
        )
        .await
        .unwrap();
    fixture.drain().await;
    assert_eq!(fixture.sink.ids(Lane::Bulk).await, numbers(1..12_001));
    assert_eq!((fixture.shipments().await, fixture.pending().await), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_shared_queue_is_full_a_load_waits_in_the_outbox_and_edits_pass() {
    let fixture = Fixture::new().await;
    fixture.sink.bound.store(1_000, Ordering::SeqCst);
    fixture.sink.standing.store(1_000, Ordering::SeqCst);
    fixture.insert(1_000..3_000).await;
    fixture.insert(0..3).await;
    let mut relay = fixture.relay();
    // The shipments are deleted after they were sent.
    common::eventually("the edits alone to be sent and struck off", Duration::from_secs(30), async || {
        relay.step().await.unwrap();
        fixture.sink.ids(Lane::Live).await == numbers(0..3) && fixture.pending().await == 2_000
    })
    .await;
    assert_eq!(fixture.sink.ids(Lane::Bulk).await, Vec::<String>::new());
    fixture.sink.standing.store(0, Ordering::SeqCst);
    fixture.drain().await;
    assert_eq!(fixture.sink.ids(Lane::Bulk).await, numbers(1_000..3_000));
}
