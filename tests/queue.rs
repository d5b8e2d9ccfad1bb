//! The job queue's contract, which every backend must keep, and what is a backend's own.
//!
//! On several threads, because a dropped database blocks its own until the server is rid of every
//! connection, and one that the queue is just making would wait for that very thread.

mod common;
#[path = "contract/queue.rs"]
mod contract;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_sqs::config::{BehaviorVersion, Credentials, Region};
use common::Database;
use common::python::{Moto, python};
use contract::{Bench, VISIBILITY, dead, job, receive_one};
use refarch::backend::pgmq::Pgmq;
use refarch::backend::postgres::Postgres;
use refarch::backend::postgres::migrate::{self, IndexShape};
use refarch::backend::sqs::{self, Sqs};
use refarch::config::Settings;
use refarch::pipeline::change::{Job, Lane};
use refarch::pipeline::queue::JobQueue;
use refarch::role::chaos::queue_double::{QueueDouble, QueueFaults};
use refarch::secret::Secret;

const PATIENCE: Duration = Duration::from_secs(30);

async fn database() -> (Database, Postgres) {
    let database = Database::create().await;
    let settings = Settings::load(None, &std::collections::BTreeMap::new(), &[]).unwrap();
    let postgres = Postgres::new(&Secret::new(database.url()), &settings.database).unwrap();
    let shape = IndexShape { kind: "pgvector".into(), model: "test".into(), dimensions: 3 };
    migrate::migrate(&postgres, &settings.source, &settings.queue, &shape).await.unwrap();
    (database, postgres)
}

struct OnPgmq {
    queue: Arc<dyn JobQueue>,
    database: Database,
}

async fn pgmq() -> OnPgmq {
    let (database, postgres) = database().await;
    OnPgmq { queue: Arc::new(Pgmq::new(postgres, "refarch", VISIBILITY)), database }
}

#[async_trait]
impl Bench for OnPgmq {
    fn queue(&self) -> Arc<dyn JobQueue> {
        Arc::clone(&self.queue)
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
    queue: Arc<dyn JobQueue>,
    client: aws_sdk_sqs::Client,
    urls: [String; 3],
    options: sqs::Options,
    postgres: Postgres,
    _database: Database,
    double: Option<QueueDouble>,
    _moto: Option<Arc<Moto>>,
}

/// A client of a server that takes any credentials.
fn client(endpoint: &str) -> aws_sdk_sqs::Client {
    let config = aws_sdk_sqs::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .credentials_provider(Credentials::new("test", "test", None, None, "test"))
        .endpoint_url(endpoint)
        .build();
    aws_sdk_sqs::Client::from_conf(config)
}

/// Makes queues that no other test has, by the API.
async fn create(client: &aws_sdk_sqs::Client) -> [String; 3] {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let prefix = format!("t{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let create = async |name: &str, policy: Option<&str>| {
        let mut call = client.create_queue().queue_name(format!("{prefix}-{name}"));
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

fn options(urls: &[String; 3]) -> sqs::Options {
    let [live, bulk, _] = urls;
    sqs::Options {
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

async fn sqs(endpoint: &str, moto: Option<Arc<Moto>>, double: Option<QueueDouble>) -> OnSqs {
    let client = client(endpoint);
    let urls = create(&client).await;
    let (database, postgres) = database().await;
    let options = options(&urls);
    let queue = Arc::new(Sqs::open(client.clone(), postgres.clone(), options.clone()).await.unwrap());
    OnSqs { queue, client, urls, options, postgres, _database: database, double, _moto: moto }
}

async fn sqs_on_moto() -> OnSqs {
    let moto = Moto::shared().await;
    let url = moto.url().to_owned();
    sqs(&url, Some(moto), None).await
}

async fn sqs_on_double() -> OnSqs {
    let double = QueueDouble::start(1).await.unwrap();
    sqs(&double.url(), None, Some(double)).await
}

#[async_trait]
impl Bench for OnSqs {
    fn queue(&self) -> Arc<dyn JobQueue> {
        Arc::clone(&self.queue)
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
async fn the_oldest_change_of_both_lanes_is_known_held_or_not() {
    let OnPgmq { queue, database } = pgmq().await;
    let at = |lane, oldest: &str| Job { oldest: oldest.parse().unwrap(), ..job(lane, 0..1) };
    let oldest = async || queue.oldest().await.unwrap().map(|oldest| oldest.to_string());
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
    queue.send(&[at(Lane::Live, "2026-01-02T03:04:05.678Z")]).await.unwrap();
    assert_eq!(oldest().await.unwrap(), "2026-01-02T03:04:05.678Z");
    queue
        .send(&[at(Lane::Bulk, "2026-01-02T03:04:05Z"), at(Lane::Live, "2026-01-03T00:00:00Z")])
        .await
        .unwrap();
    assert_eq!(oldest().await.unwrap(), "2026-01-02T03:04:05Z");
    let held = queue.receive(Lane::Bulk, 10).await.unwrap();
    assert_eq!(oldest().await.unwrap(), "2026-01-02T03:04:05Z", "held is not done");
    let receipts: Vec<_> = held.into_iter().map(|message| message.receipt).collect();
    queue.acknowledge(&receipts).await.unwrap();
    assert_eq!(oldest().await.unwrap(), "2026-01-02T03:04:05.678Z");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_receiver_wakes_when_something_is_sent() {
    let OnPgmq { queue, database } = pgmq().await;
    // The listening connection is made in the background.
    let client = database.client().await;
    common::eventually("the queue to listen", PATIENCE, async || {
        let sql = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE query ILIKE 'LISTEN refarch_jobs%' AND datname = current_database())";
        client.query_one(sql, &[]).await.unwrap().get(0)
    })
    .await;
    assert!(queue.receive(Lane::Live, 1).await.unwrap().is_empty());
    // The ring for what came before LISTEN took hold.
    queue.wait(Lane::Live, Duration::from_millis(200)).await;
    assert!(queue.receive(Lane::Live, 1).await.unwrap().is_empty());
    let waiter = Arc::clone(&queue);
    let waiting = tokio::spawn(async move { waiter.wait(Lane::Live, PATIENCE).await });
    queue.send(&[job(Lane::Live, 0..1)]).await.unwrap();
    tokio::time::timeout(PATIENCE / 2, waiting).await.expect("it woke up by the timeout only").unwrap();
    receive_one(&*queue, Lane::Live).await;
}
