//! The job queue's contract, which every backend must keep, and what is a backend's own.
//!
//! On several threads, because a dropped database blocks its own until the server is rid of every
//! connection, and one that the queue is just making would wait for that very thread.

#[path = "../contract/queue.rs"]
mod contract;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use contract::{Fixture, VISIBILITY, job, receive_one};
use refarch::backend::pgmq::Pgmq;
use refarch::backend::postgres::Postgres;
use refarch::backend::postgres::outbox::PgOutbox;
use refarch::backend::sqs::{self, Sqs};
use refarch::double::sqs::{SqsDouble, SqsFaults};
use refarch::pipeline::change::{Job, Lane};
use refarch::pipeline::clock::BootClock;
use refarch::pipeline::queue::{Backlog, DeadLetters as _, JobQueue, Queue, QueueStats};
use refarch::pipeline::relay::{self, Relay};

use crate::common::python::{Moto, python};
use crate::common::source::{Migrated, settings};
use crate::common::{self, Database};

const TIMEOUT: Duration = Duration::from_secs(30);

async fn database() -> (Database, Postgres) {
    let Migrated { database, postgres, .. } = Migrated::new("", settings(&[]), "pgvector").await;
    (database, postgres)
}

struct OnPgmq {
    queue: Queue,
    database: Database,
}

async fn pgmq() -> OnPgmq {
    let (database, postgres) = database().await;
    OnPgmq { queue: Queue::new(Arc::new(Pgmq::new(postgres, "refarch", VISIBILITY))), database }
}

#[async_trait]
impl Fixture for OnPgmq {
    fn queue(&self) -> Queue {
        self.queue.clone()
    }

    async fn put(&self, place: &str, body: &str) {
        let sql = format!("SELECT pgmq.send('refarch_{place}', $1::text::jsonb)");
        self.database.client().await.execute(&sql, &[&body]).await.unwrap();
    }

    fn is_exact(&self) -> bool {
        true
    }
}

/// The queue on a server that speaks SQS.
struct OnSqs {
    queue: Queue,
    client: aws_sdk_sqs::Client,
    urls: [String; 3],
    options: sqs::SqsOptions,
    postgres: Postgres,
    _database: Database,
    double: Option<SqsDouble>,
    _moto: Option<Arc<Moto>>,
}

/// Makes queues that no other test has, by the API.
async fn create(client: &aws_sdk_sqs::Client) -> [String; 3] {
    create_with(client, &[]).await
}

/// Makes queues with attributes: each stands with the queue's name before it, as in `live.DelaySeconds`.
async fn create_with(client: &aws_sdk_sqs::Client, attributes: &[(&str, u64)]) -> [String; 3] {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let prefix = format!("t{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let create = async |name: &str, policy: Option<&str>| {
        let mut call = client.create_queue().queue_name(format!("{prefix}-{name}"));
        for (key, value) in attributes {
            let (queue, key) = key.split_once('.').unwrap();
            if queue == name {
                call = call.attributes(key.into(), value.to_string());
            }
        }
        if let Some(arn) = policy {
            let policy = format!(r#"{{"deadLetterTargetArn":"{arn}","maxReceiveCount":"50"}}"#);
            call = call.attributes(aws_sdk_sqs::types::QueueAttributeName::RedrivePolicy, policy);
        }
        call.send().await.unwrap().queue_url.unwrap()
    };
    let dead = create("dead", None).await;
    let arn = format!("arn:aws:sqs:us-east-1:123456789012:{prefix}-dead");
    [create("live", Some(&arn)).await, create("bulk", Some(&arn)).await, dead]
}

fn options(urls: &[String; 3]) -> sqs::SqsOptions {
    let [live, bulk, _] = urls;
    sqs::SqsOptions {
        url: live.clone(),
        bulk_url: Some(bulk.clone()),
        dead_url: None,
        visibility: VISIBILITY,
        wait: Duration::from_secs(1),
        shared_bound: 10_000,
        max_receives: 25,
        source: "products".into(),
    }
}

async fn sqs(endpoint: &str, moto: Option<Arc<Moto>>, double: Option<SqsDouble>) -> OnSqs {
    let client = sqs::connect_to(endpoint);
    let urls = create(&client).await;
    let (database, postgres) = database().await;
    let options = options(&urls);
    let queue = Sqs::open(client.clone(), postgres.clone(), options.clone()).await.unwrap();
    let queue = Queue::new(Arc::new(queue));
    OnSqs { queue, client, urls, options, postgres, _database: database, double, _moto: moto }
}

async fn sqs_on_moto() -> OnSqs {
    let moto = Moto::shared().await;
    let url = moto.url().to_owned();
    sqs(&url, Some(moto), None).await
}

async fn sqs_on_double() -> OnSqs {
    let double = SqsDouble::start(1).await.unwrap();
    sqs(&double.url(), None, Some(double)).await
}

#[async_trait]
impl Fixture for OnSqs {
    fn queue(&self) -> Queue {
        self.queue.clone()
    }

    async fn put(&self, place: &str, body: &str) {
        let url = &self.urls[["live", "bulk", "dead"].iter().position(|name| *name == place).unwrap()];
        self.client.send_message().queue_url(url).message_body(body).send().await.unwrap();
    }

    fn is_exact(&self) -> bool {
        false
    }
}

/// A test of every clause, for every queue.
macro_rules! keeps_the_contract {
    ($backend:ident, $($clause:ident,)*) => {
        mod $backend {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $clause() {
                    super::contract::$clause(&super::$backend().await).await;
                }
            )*
        }
    };
}
macro_rules! pgmq_keeps { ($($clause:ident,)*) => { keeps_the_contract!(pgmq, $($clause,)*); } }
macro_rules! moto_keeps { ($($clause:ident,)*) => { keeps_the_contract!(sqs_on_moto, $($clause,)*); } }
macro_rules! double_keeps { ($($clause:ident,)*) => { keeps_the_contract!(sqs_on_double, $($clause,)*); } }
contract::for_each_clause!(pgmq_keeps);
contract::for_each_clause!(moto_keeps);
contract::for_each_clause!(double_keeps);

#[tokio::test(flavor = "multi_thread")]
async fn the_oldest_change_of_each_lane_includes_messages_in_flight() {
    let OnPgmq { queue, database } = pgmq().await;
    let at = |lane, oldest: &str| Job { oldest: oldest.parse().unwrap(), ..job(lane, 0..1) };
    let oldest = async || queue.stats.oldest().await.unwrap().map(|oldest| oldest.to_string());
    assert_eq!(oldest().await, None);
    let client = database.client().await;
    for (queue, body) in [
        ("live", r#"{"oldest": "long ago"}"#),
        ("bulk", r#"{"oldest": "1999-02-30T00:00:00Z"}"#),
        ("bulk", "3"),
    ] {
        let sql = format!("SELECT pgmq.send('refarch_{queue}', '{body}')");
        client.batch_execute(&sql).await.unwrap();
    }
    assert_eq!(oldest().await, None, "what is no job has no age");
    queue.jobs.send(&[at(Lane::Live, "2026-01-02T03:04:05.678Z")]).await.unwrap();
    assert_eq!(oldest().await.unwrap(), "2026-01-02T03:04:05.678Z");
    queue
        .jobs
        .send(&[at(Lane::Bulk, "2026-01-02T03:04:05Z"), at(Lane::Live, "2026-01-03T00:00:00Z")])
        .await
        .unwrap();
    assert_eq!(oldest().await.unwrap(), "2026-01-02T03:04:05Z");
    let held = queue.jobs.receive(Lane::Bulk, 10).await.unwrap();
    assert_eq!(oldest().await.unwrap(), "2026-01-02T03:04:05Z", "held is not done");
    let receipts: Vec<_> = held.into_iter().map(|message| message.receipt).collect();
    queue.jobs.acknowledge(&receipts).await.unwrap();
    assert_eq!(oldest().await.unwrap(), "2026-01-02T03:04:05.678Z");
}

/// Processes of the server that listen for messages in this database.
async fn listening(client: &tokio_postgres::Client) -> Vec<i32> {
    let sql = "SELECT pid FROM pg_stat_activity WHERE query ILIKE 'LISTEN refarch_jobs%' AND datname = current_database()";
    client.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_receiver_wakes_when_something_is_sent() {
    let OnPgmq { queue, database } = pgmq().await;
    let client = database.client().await;
    // The listening connection is made in the background.
    common::eventually("the queue to listen", TIMEOUT, async || listening(&client).await.len() == 1).await;
    assert!(queue.jobs.receive(Lane::Live, 1).await.unwrap().is_empty());
    // The wake-up for what came before LISTEN took hold.
    queue.jobs.wait(Lane::Live, Duration::from_millis(200)).await;
    assert!(queue.jobs.receive(Lane::Live, 1).await.unwrap().is_empty());
    let waiter = Arc::clone(&queue.jobs);
    let waiting = tokio::spawn(async move { waiter.wait(Lane::Live, TIMEOUT).await });
    queue.jobs.send(&[job(Lane::Live, 0..1)]).await.unwrap();
    tokio::time::timeout(TIMEOUT / 2, waiting).await.expect("it woke up by the timeout only").unwrap();
    receive_one(&*queue.jobs, Lane::Live).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_receiver_wakes_after_the_listening_connection_was_lost() {
    let OnPgmq { queue, database } = pgmq().await;
    let client = database.client().await;
    common::eventually("the queue to listen", TIMEOUT, async || listening(&client).await.len() == 1).await;
    let lost = listening(&client).await;
    client.execute("SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) pid", &[&lost]).await.unwrap();
    common::eventually("the queue to listen again", TIMEOUT, async || {
        let now = listening(&client).await;
        now.len() == 1 && now != lost
    })
    .await;
    let waiter = Arc::clone(&queue.jobs);
    let waiting = tokio::spawn(async move {
        while waiter.receive(Lane::Live, 1).await.unwrap().is_empty() {
            waiter.wait(Lane::Live, TIMEOUT).await;
        }
    });
    queue.jobs.send(&[job(Lane::Live, 0..1)]).await.unwrap();
    tokio::time::timeout(TIMEOUT / 2, waiting).await.expect("it woke up by the timeout only").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_headers_stop_neither_counting_nor_listing() {
    let OnPgmq { queue, database } = pgmq().await;
    let client = database.client().await;
    let headers = [
        r#"{"changes": "x"}"#,
        r#"{"changes": 1e300}"#,
        r#"{"changes": -5}"#,
        r#"{"changes": 99999999999999999999}"#,
        r#"{"changes": 18446744073709551615, "tries": 99999999999, "lane": 7, "reason": "none", "error": 3}"#,
        r#"{"changes": null}"#,
        r#"{"changes": {}}"#,
        "[1]",
        "7",
        "null",
    ];
    for place in ["live", "dead"] {
        for header in headers {
            let sql = format!("SELECT pgmq.send('refarch_{place}', '{{}}'::jsonb, '{header}'::jsonb)");
            client.batch_execute(&sql).await.unwrap();
        }
    }
    let all = headers.len() as u64;
    assert_eq!(queue.stats.backlog(Lane::Live).await.unwrap(), Backlog::counted(all, 0));
    assert_eq!(queue.dead_letters.count().await.unwrap(), all);
    client
        .batch_execute("UPDATE pgmq.q_refarch_dead SET enqueued_at = 'infinity' WHERE msg_id = 1")
        .await
        .unwrap();
    let letters = queue.dead_letters.list(None, 100).await.unwrap();
    assert!(letters.iter().all(|letter| letter.changes == 1), "{letters:?}");
    let ids: Vec<String> = letters.into_iter().map(|letter| letter.id).collect();
    assert_eq!(queue.dead_letters.redrive(&ids).await.unwrap().len(), headers.len());
    assert_eq!(queue.stats.backlog(Lane::Live).await.unwrap().visible, 2 * all);
    queue.jobs.send(&[job(Lane::Live, 0..20)]).await.unwrap();
    assert_eq!(queue.stats.backlog(Lane::Live).await.unwrap().visible, 2 * all + 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bulk_threshold_setting_is_applied() {
    let (database, postgres) = database().await;
    let client = database.client().await;
    let relay = async |bulk_threshold: u64| {
        let queue: Arc<dyn QueueStats> = Arc::new(Pgmq::new(postgres.clone(), "refarch", VISIBILITY));
        let options = relay::RelayOptions {
            source: "products".into(),
            changes_per_message: 500,
            bulk_threshold,
            live_bound: 5_000,
            poll: Duration::from_millis(100),
            start_timeout: Duration::ZERO,
        };
        let outbox = Box::new(PgOutbox::new(postgres.clone(), "products", "refarch"));
        let mut relay = Relay::new(outbox, queue, Arc::new(BootClock), options);
        let (mut live, mut bulk) = (0, 0);
        loop {
            let done = relay.step().await.unwrap();
            if done.rows == 0 {
                return (live, bulk);
            }
            (live, bulk) = (live + done.live, bulk + done.bulk);
        }
    };
    // A statement for each row, and one statement for all.
    let apart = |rows: u64| {
        format!(
            "DO $$ BEGIN FOR n IN 1..{rows} LOOP INSERT INTO products_with_increment (name) VALUES ('x'); END LOOP; END $$"
        )
    };
    let together = |rows: u64| {
        format!("INSERT INTO products_with_increment (name) SELECT 'x' FROM generate_series(1, {rows})")
    };
    let makes: [&dyn Fn(u64) -> String; 2] = [&apart, &together];
    for (at, make) in makes.iter().enumerate() {
        for (threshold, rows, is_live) in
            [(1_000, 500, true), (1_000, 1_500, false), (10, 50, false), (10, 10, true), (100, 101, false)]
        {
            client.batch_execute(&make(rows)).await.unwrap();
            let expected = if is_live { (rows, 0) } else { (0, rows) };
            assert_eq!(relay(threshold).await, expected, "{at}: {threshold}, {rows} rows");
        }
    }
}

/// A queue for both lanes on a double.
async fn shared(bound: u64) -> (OnSqs, Arc<Sqs>) {
    let fixture = sqs_on_double().await;
    let options = sqs::SqsOptions { bulk_url: None, shared_bound: bound, ..fixture.options.clone() };
    let queue = Sqs::open(fixture.client.clone(), fixture.postgres.clone(), options).await.unwrap();
    (fixture, Arc::new(queue))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_receiver_separates_lanes_that_share_a_queue() {
    let (_bench, queue) = shared(100).await;
    queue.send(&[job(Lane::Bulk, 0..5), job(Lane::Bulk, 5..10), job(Lane::Live, 10..15)]).await.unwrap();
    // Messages of the other lane that were received meanwhile are kept for that lane.
    let live = receive_one(&*queue, Lane::Live).await;
    assert_eq!((live.receipt.lane, live.body.as_ref().unwrap().lane), (Lane::Live, Lane::Live));
    let mut bulk = Vec::new();
    while bulk.len() < 2 {
        let more = queue.receive(Lane::Bulk, 10).await.unwrap();
        assert!(!more.is_empty());
        bulk.extend(more);
    }
    assert!(bulk.iter().all(|message| message.receipt.lane == Lane::Bulk && message.receive_count == 1));
    let receipts: Vec<_> = bulk.into_iter().chain([live]).map(|message| message.receipt).collect();
    queue.acknowledge(&receipts).await.unwrap();
    for lane in Lane::ALL {
        assert_eq!(queue.backlog(lane).await.unwrap(), Backlog::default());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unread_lane_of_a_shared_queue_does_not_stop_the_other_lane() {
    let (_bench, queue) = shared(1_000).await;
    let bulk: Vec<Job> = (0..40).map(|n| job(Lane::Bulk, n..n + 1)).collect();
    queue.send(&bulk).await.unwrap();
    let waiter = Arc::clone(&queue);
    let live = tokio::spawn(async move {
        loop {
            let messages = waiter.receive(Lane::Live, 10).await.unwrap();
            if !messages.is_empty() {
                return messages;
            }
        }
    });
    queue.send(&[job(Lane::Live, 100..101)]).await.unwrap();
    // The other lane takes its share, as an indexer's does.
    let mut taken = 0;
    while taken < bulk.len() {
        taken += queue.receive(Lane::Bulk, 5).await.unwrap().len();
    }
    let live = tokio::time::timeout(TIMEOUT, live).await.expect("the live message never came").unwrap();
    assert_eq!(live.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn bulk_messages_in_a_shared_queue_are_no_live_backlog() {
    let (_bench, queue) = shared(30).await;
    queue.send(&[job(Lane::Bulk, 0..10), job(Lane::Bulk, 10..20)]).await.unwrap();
    assert_eq!(queue.backlog(Lane::Live).await.unwrap(), Backlog::default());
    assert_eq!(queue.backlog(Lane::Bulk).await.unwrap(), Backlog::estimated(20, 0));
    queue.send(&[job(Lane::Bulk, 20..30), job(Lane::Live, 30..40)]).await.unwrap();
    assert_eq!(queue.backlog(Lane::Live).await.unwrap(), Backlog::estimated(10, 0));
    assert_eq!(queue.backlog(Lane::Bulk).await.unwrap(), Backlog::estimated(30, 0));
    assert_eq!(queue.shared_bound(), Some(30));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_entries_that_failed_are_sent_again() {
    let fixture = sqs_on_double().await;
    let double = fixture.double.clone().unwrap();
    // Few enough that no entry fails at each of its tries.
    double.set_faults(SqsFaults { entry: 0.08, ..SqsFaults::default() });
    let jobs: Vec<Job> = (0..200).map(|n| job(Lane::Live, n..n + 1)).collect();
    fixture.queue.jobs.send(&jobs).await.unwrap();
    let counts = double.counts();
    // Half of the failures were done, and so come twice: that is what at least once means.
    assert!(counts.entries_failed > 3);
    assert!(
        counts.messages_sent <= 200 + counts.entries_failed,
        "{} sent, {} failed",
        counts.messages_sent,
        counts.entries_failed
    );
    let mut ids: Vec<String> = double
        .bodies(fixture.urls[0].rsplit('/').next().unwrap())
        .iter()
        .flat_map(|body| serde_json::from_str::<Job>(body).unwrap().groups.remove(0).ids)
        .collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 200);
    // Acknowledging and extending go through, too.
    let messages = fixture.queue.jobs.receive(Lane::Live, 10).await.unwrap();
    let receipts: Vec<_> = messages.into_iter().map(|message| message.receipt).collect();
    fixture.queue.jobs.extend_visibility(&receipts, VISIBILITY).await.unwrap();
    fixture.queue.jobs.acknowledge(&receipts).await.unwrap();
    double.set_faults(SqsFaults { entry: 1.0, ..SqsFaults::default() });
    let error = fixture.queue.jobs.send(&jobs[..1]).await.unwrap_err();
    assert!(error.to_string().contains("InternalError"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_calls_are_retried() {
    let fixture = sqs_on_double().await;
    let double = fixture.double.clone().unwrap();
    let faults =
        SqsFaults { unavailable: 0.1, false_error: 0.1, drop_connection: 0.1, ..SqsFaults::default() };
    double.set_faults(faults);
    for n in 0..10 {
        fixture.queue.jobs.send(&[job(Lane::Live, n..n + 1)]).await.unwrap();
    }
    let counts = double.counts();
    assert!(counts.unavailable + counts.lied + counts.dropped > 0);
    assert!(counts.messages_sent >= 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_receive_releases_its_messages() {
    let fixture = sqs_on_double().await;
    let double = fixture.double.clone().unwrap();
    fixture.queue.jobs.send(&[job(Lane::Live, 0..1)]).await.unwrap();
    double.set_faults(SqsFaults { latency: Duration::from_millis(300), ..SqsFaults::default() });
    let (queue, arrived) = (Arc::clone(&fixture.queue.jobs), double.counts().arrived);
    let waiting = tokio::spawn(async move { queue.receive(Lane::Live, 1).await });
    common::eventually("the call to arrive", TIMEOUT, async || double.counts().arrived > arrived).await;
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    common::eventually("the release", TIMEOUT, async || double.counts().extend == 1).await;
    assert_eq!(receive_one(&*fixture.queue.jobs, Lane::Live).await.receive_count, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn unsuitable_queues_are_refused_with_a_remedy() {
    let moto = Moto::shared().await;
    let client = sqs::connect_to(moto.url());
    let urls = create(&client).await;
    let (_database, postgres) = database().await;
    let refusal = async |options: sqs::SqsOptions| {
        Sqs::open(client.clone(), postgres.clone(), options).await.err().map(|error| error.to_string())
    };
    let options = options(&urls);
    assert_eq!(refusal(options.clone()).await, None);
    let missing = format!("{}-not", urls[0]);
    let error = refusal(sqs::SqsOptions { url: missing.clone(), ..options.clone() }).await.unwrap();
    assert!(error.contains(&missing) && error.contains("there is no such queue"), "{error}");
    // The dead-letter queue has no redrive policy itself.
    let lone = sqs::SqsOptions { url: urls[2].clone(), bulk_url: None, ..options.clone() };
    let error = refusal(lone.clone()).await.unwrap();
    assert!(error.contains("SQS_DEAD_LETTER_QUEUE_URL"), "{error}");
    assert_eq!(refusal(sqs::SqsOptions { dead_url: Some(urls[1].clone()), ..lone }).await, None);
    let error =
        refusal(sqs::SqsOptions { url: "http://x/1/a.fifo".into(), ..options.clone() }).await.unwrap();
    assert!(error.contains("FIFO"), "{error}");
    let elsewhere = sqs::SqsOptions {
        url: "https://sqs.eu-west-1.amazonaws.com/1/a".into(),
        bulk_url: Some("https://sqs.us-east-1.amazonaws.com/1/b".into()),
        ..options
    };
    let error = sqs::connect(&elsewhere).await.unwrap_err().to_string();
    assert!(error.contains("different regions"), "{error}");
}

/// Ids in jobs, in order.
fn ids<'a>(jobs: impl IntoIterator<Item = &'a Job>) -> Vec<String> {
    let groups = jobs.into_iter().flat_map(|job| &job.groups);
    let mut ids: Vec<String> = groups.flat_map(|group| group.ids.clone()).collect();
    ids.sort();
    ids
}

/// Takes and acknowledges what a lane holds, until the ids have come.
async fn drain(queue: &dyn JobQueue, lane: Lane, count: usize) -> Vec<Job> {
    let mut jobs = Vec::new();
    while ids(&jobs).len() < count {
        let messages = queue.receive(lane, 10).await.unwrap();
        assert!(!messages.is_empty(), "{} of {count} ids came", ids(&jobs).len());
        let receipts: Vec<_> = messages.iter().map(|message| message.receipt.clone()).collect();
        jobs.extend(messages.into_iter().map(|message| message.body.unwrap()));
        queue.acknowledge(&receipts).await.unwrap();
    }
    jobs
}

/// Messages travel through queues that take less than SQS's most.
async fn small_queues_carry_everything(endpoint: &str) {
    let client = sqs::connect_to(endpoint);
    let limits = [
        ("live.MaximumMessageSize", 1_024),
        ("bulk.MaximumMessageSize", 8_192),
        ("dead.MaximumMessageSize", 2_048),
    ];
    let urls = create_with(&client, &limits).await;
    let (_database, postgres) = database().await;
    let queue = Sqs::open(client.clone(), postgres, options(&urls)).await.unwrap();
    for lane in Lane::ALL {
        let sent = [job(lane, 0..500), job(lane, 500..501), job(lane, 501..1_000)];
        queue.send(&sent).await.unwrap();
        let came = drain(&queue, lane, 1_000).await;
        assert_eq!(ids(&came), ids(&sent), "{}", lane.name());
        assert!(lane == Lane::Bulk || came.len() > 3, "{} messages", came.len());
    }
    // A message that the lane takes and the dead-letter queue does not becomes several letters.
    let whole = job(Lane::Bulk, 0..400);
    queue.send(std::slice::from_ref(&whole)).await.unwrap();
    let message = receive_one(&queue, Lane::Bulk).await;
    let why = refarch::pipeline::queue::DeadLetterCause {
        reason: refarch::pipeline::queue::Reason::Received,
        error: "e".repeat(3_000),
        tries: 2,
    };
    queue.store(&message, None, &why).await.unwrap();
    assert_eq!(queue.backlog(Lane::Bulk).await.unwrap(), Backlog::default());
    let letters = queue.list(None, 100).await.unwrap();
    let mut found: Vec<String> = letters.iter().flat_map(|letter| letter.ids.clone()).collect();
    found.sort();
    assert_eq!(found, ids([&whole]));
    for letter in &letters {
        assert_eq!((letter.reason, letter.lane, letter.tries), (Some(why.reason), Lane::Bulk, 2));
        assert_eq!(letter.changes, letter.ids.len() as u64);
        assert!(letter.error.starts_with("eee"), "{letter:?}");
    }
    // The queue has been made smaller since: what goes back is cut for it.
    let name = aws_sdk_sqs::types::QueueAttributeName::MaximumMessageSize;
    client.set_queue_attributes().queue_url(&urls[1]).attributes(name, "1024").send().await.unwrap();
    let (_database, postgres) = self::database().await;
    let queue = Sqs::open(client, postgres, options(&urls)).await.unwrap();
    let asked: Vec<String> = letters.iter().map(|letter| letter.id.clone()).collect();
    assert_eq!(queue.redrive(&asked).await.unwrap().len(), letters.len());
    assert_eq!(ids(&drain(&queue, Lane::Bulk, 400).await), ids([&whole]));
    // A body that is no job and too long even for the dead letters is cut, and not held for ever.
    let foreign = refarch::pipeline::queue::Message {
        body: Err(refarch::pipeline::queue::Undecodable {
            reason: "not a job".into(),
            body: "é".repeat(4_000),
            later: None,
        }),
        ..message
    };
    queue.store(&foreign, None, &why).await.unwrap();
    let letters = queue.list(None, 100).await.unwrap();
    assert!(letters[0].body.as_ref().unwrap().starts_with("éé"), "{letters:?}");
    assert!(letters[0].error.contains("cut from 8000 bytes"), "{letters:?}");
    // A single change that fits no message of the queue is told with what to change.
    let mut long = job(Lane::Live, 0..1);
    long.groups[0].ids = vec!["x".repeat(2_000)];
    let error = queue.send(&[long]).await.unwrap_err().to_string();
    assert!(error.contains("MaximumMessageSize") && error.contains("1024"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_respect_each_queues_size_limit_on_moto() {
    small_queues_carry_everything(Moto::shared().await.url()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_respect_each_queues_size_limit_on_the_double() {
    let double = SqsDouble::start(1).await.unwrap();
    small_queues_carry_everything(&double.url()).await;
}

/// A run of the executable against queues of a double.
fn on_double(database: &Database, double: &SqsDouble, urls: &[String; 3]) -> tokio::process::Command {
    let mut command = database.refarch();
    command
        .env("AWS_ENDPOINT_URL_SQS", double.url())
        .env("AWS_REGION", "us-east-1")
        .env("AWS_ACCESS_KEY_ID", "test")
        .env("AWS_SECRET_ACCESS_KEY", "test")
        .env("SQS_QUEUE_URL", &urls[0])
        .env("SQS_BULK_QUEUE_URL", &urls[1])
        .env("SQS_DEAD_LETTER_QUEUE_URL", &urls[2])
        .env("REFARCH_QUEUE_WAIT_S", "1");
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_retention_period_is_reported_at_the_start_and_by_migrate() {
    const DAY: u64 = 86_400;
    let double = SqsDouble::start(1).await.unwrap();
    let client = sqs::connect_to(&double.url());
    let database = Database::create().await;
    let run = async |urls: &[String; 3], args: &[&str]| -> String {
        let output = on_double(&database, &double, urls).args(args).output().await.unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap() + &String::from_utf8_lossy(&output.stderr)
    };
    let short = [
        ("live.MessageRetentionPeriod", 3_600),
        ("bulk.MessageRetentionPeriod", 3 * DAY),
        ("dead.MessageRetentionPeriod", 3 * DAY - 1),
        ("live.MaximumMessageSize", 262_144),
        ("dead.MaximumMessageSize", 65_536),
    ];
    let urls = create_with(&client, &short).await;
    for args in [&["migrate"][..], &["migrate", "--dry-run"], &["listen", "--until-idle"]] {
        let said = run(&urls, args).await;
        for url in &urls {
            let about = |line: &&str| line.contains(url.as_str()) && line.contains("MessageRetentionPeriod");
            assert!(said.lines().any(|line| about(&line)), "{args:?}: {url}: {said}");
        }
        assert!(said.contains("MessageRetentionPeriod = 3600 s"), "{said}");
        assert!(said.contains("counts from when the message was first sent"), "{said}");
        assert!(said.lines().any(|line| line.contains("MaximumMessageSize = 65536")), "{said}");
    }
    // The default is worth a note of migrate's, and no warning.
    let default = create(&client).await;
    let said = run(&default, &["migrate"]).await;
    assert!(said.contains("note: ") && said.contains("MessageRetentionPeriod = 345600 s"), "{said}");
    assert!(!run(&default, &["listen", "--until-idle"]).await.contains("MessageRetentionPeriod"));
    let long: Vec<(&str, u64)> = ["live", "bulk", "dead"]
        .map(|name| [name, ".MessageRetentionPeriod"].concat())
        .iter()
        .map(|key| (&*key.clone().leak(), 14 * DAY))
        .collect();
    let said = run(&create_with(&client, &long).await, &["migrate"]).await;
    assert!(!said.contains("MessageRetentionPeriod"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_continues_with_a_warning_when_the_queues_cannot_be_inspected() {
    let double = SqsDouble::start(1).await.unwrap();
    let database = Database::create().await;
    let missing = ["a", "b", "c"].map(|name| format!("{}/123456789012/{name}", double.url()));
    let output = on_double(&database, &double, &missing).arg("migrate").output().await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("warning: ") && said.contains("there is no such queue"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_wait_for_the_disk_unless_queue_and_index_share_one_wal() {
    let double = SqsDouble::start(1).await.unwrap();
    let urls = create(&sqs::connect_to(&double.url())).await;
    let waits = async |with_sqs: bool, of_role: &str| -> Vec<(String, String)> {
        let database = Database::create().await;
        let refarch = |args: &[&str]| {
            let mut command =
                if with_sqs { on_double(&database, &double, &urls) } else { database.refarch() };
            command.args(args);
            command
        };
        let run = async |args: &[&str]| {
            let output = refarch(args).output().await.unwrap();
            assert!(output.status.success(), "{args:?}: {output:?}");
        };
        run(&["migrate"]).await;
        let client = database.client().await;
        let sql = format!(
            "ALTER DATABASE {} SET synchronous_commit = {of_role}; \
             CREATE TABLE public.seen (what text, setting text); \
             CREATE FUNCTION public.see() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN \
               INSERT INTO public.seen VALUES (TG_TABLE_NAME, current_setting('synchronous_commit')); RETURN NULL; END$$; \
             CREATE TRIGGER see AFTER INSERT ON refarch.vector_1 EXECUTE FUNCTION public.see(); \
             CREATE TRIGGER see AFTER UPDATE ON refarch.ledger EXECUTE FUNCTION public.see(); \
             INSERT INTO public.products_with_increment (name, description) VALUES ('a', 'blue')",
            database.name()
        );
        client.batch_execute(&sql).await.unwrap();
        run(&["listen", "--until-idle"]).await;
        run(&["embed", "--until-idle"]).await;
        let rows = client.query("SELECT DISTINCT what, setting FROM seen ORDER BY 1, 2", &[]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    };
    let seen = |setting: &str| ["ledger", "vector_1"].map(|what| (what.to_owned(), setting.to_owned()));
    assert_eq!(waits(false, "on").await, seen("off"));
    assert_eq!(waits(true, "on").await, seen("on"));
    // This holds whatever the role's own setting is; a setting that waits in another way is kept.
    assert_eq!(waits(true, "off").await, seen("on"));
    assert_eq!(waits(true, "local").await, seen("local"));
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_aws_credentials_end_the_role_with_a_remedy() {
    let database = Database::create().await;
    assert!(database.refarch().arg("migrate").status().await.unwrap().success());
    let run = async |env: &[(&str, &str)]| -> String {
        let mut command = database.refarch();
        command.args(["listen", "--until-idle"]);
        command.env("SQS_QUEUE_URL", "http://127.0.0.1:9/123456789012/jobs");
        command.env("AWS_EC2_METADATA_DISABLED", "true").env("AWS_CONFIG_FILE", "/none");
        command.env("AWS_SHARED_CREDENTIALS_FILE", "/none").envs(env.iter().copied());
        let output = command.output().await.unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let error = run(&[("AWS_REGION", "us-east-1")]).await;
    assert!(error.contains("there are no AWS credentials"), "{error}");
    let error = run(&[("AWS_ACCESS_KEY_ID", "k"), ("AWS_SECRET_ACCESS_KEY", "s")]).await;
    assert!(error.contains("set AWS_REGION"), "{error}");
    // A server that refuses the key.
    let refusing = axum::Router::new().fallback(|| async {
        let body = r#"{"__type":"com.amazon.coral.service#ExpiredTokenException","message":"The security token included in the request is expired"}"#;
        (axum::http::StatusCode::FORBIDDEN, body)
    });
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let server = tokio::spawn(async move { axum::serve(listener, refusing).await });
    let keys = [
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "k"),
        ("AWS_SECRET_ACCESS_KEY", "hidden-secret"),
        ("AWS_ENDPOINT_URL_SQS", endpoint.as_str()),
    ];
    let error = run(&keys).await;
    assert!(error.contains("ExpiredToken") && error.contains("get new credentials"), "{error}");
    assert!(!error.contains("hidden-secret"), "{error}");
    server.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_vendors_client_drives_the_double() {
    let double = SqsDouble::start(1).await.unwrap();
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/drive_sqs.py");
    let output = tokio::process::Command::new(python()).arg(script).arg(double.url()).output().await.unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    println!("{said}");
    assert!(said.contains("all as expected"), "{said}");
}
