//! The job queue's contract, which every backend must keep.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::Database;
use refarch::backend::pgmq::Pgmq;
use refarch::backend::postgres::Postgres;
use refarch::backend::postgres::migrate::{self, IndexShape};
use refarch::config::Settings;
use refarch::pipeline::change::{Group, JOB_VERSION, Job, Lane, Op};
use refarch::pipeline::queue::{Backlog, JobQueue, Message, Reason, Why};
use refarch::secret::Secret;

const VISIBILITY: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(30);

async fn pgmq() -> (Database, Arc<dyn JobQueue>) {
    let database = Database::create().await;
    let settings = Settings::load(None, &std::collections::BTreeMap::new(), &[]).unwrap();
    let postgres = Postgres::new(&Secret::new(database.url()), &settings.database).unwrap();
    let shape = IndexShape { kind: "pgvector".into(), model: "test".into(), dimensions: 3 };
    migrate::migrate(&postgres, &settings.source, &settings.queue, &shape).await.unwrap();
    (database, Arc::new(Pgmq::new(postgres, &settings.queue.name, VISIBILITY)))
}

fn job(lane: Lane, ids: std::ops::Range<u32>) -> Job {
    let ids = ids.map(|id| id.to_string()).collect();
    Job {
        v: JOB_VERSION,
        source: "products".into(),
        lane,
        oldest: "2026-01-02T03:04:05.678Z".parse().unwrap(),
        groups: vec![Group { version: 7, op: Op::Delete, after_ms: 3, ids }],
    }
}

fn why(error: &str) -> Why {
    Why { reason: Reason::Refused, error: error.into(), tries: 1 }
}

async fn receive_one(queue: &dyn JobQueue, lane: Lane) -> Message {
    let mut messages = queue.receive(lane, 1).await.unwrap();
    assert_eq!(messages.len(), 1);
    messages.remove(0)
}

#[tokio::test]
async fn what_is_sent_is_received_in_its_lane_as_it_was() {
    let (_database, queue) = pgmq().await;
    let jobs = [job(Lane::Live, 0..2), job(Lane::Bulk, 0..500), job(Lane::Live, 5..6)];
    queue.send(&jobs).await.unwrap();
    assert_eq!(queue.backlog(Lane::Live).await.unwrap(), Backlog { visible: 3, in_flight: 0 });
    assert_eq!(queue.backlog(Lane::Bulk).await.unwrap(), Backlog { visible: 500, in_flight: 0 });
    let live = queue.receive(Lane::Live, 10).await.unwrap();
    assert_eq!(live.len(), 2);
    assert_eq!(live[0].body.as_ref().unwrap(), &jobs[0]);
    assert_eq!((live[0].receive_count, live[0].receipt.lane), (1, Lane::Live));
    assert_eq!(receive_one(&*queue, Lane::Bulk).await.body.unwrap(), jobs[1]);
    assert_eq!(queue.backlog(Lane::Live).await.unwrap(), Backlog { visible: 0, in_flight: 3 });
    assert!(queue.receive(Lane::Live, 10).await.unwrap().is_empty());
}

#[tokio::test]
async fn an_acknowledged_message_is_gone_and_another_comes_again() {
    let (_database, queue) = pgmq().await;
    queue.send(&[job(Lane::Live, 0..1), job(Lane::Live, 1..2)]).await.unwrap();
    let first = receive_one(&*queue, Lane::Live).await;
    let second = receive_one(&*queue, Lane::Live).await;
    queue.acknowledge(std::slice::from_ref(&first.receipt)).await.unwrap();
    queue.acknowledge(&[]).await.unwrap();
    common::eventually("the visibility timeout to end", PATIENCE, async || {
        queue.backlog(Lane::Live).await.unwrap().visible == 1
    })
    .await;
    let again = receive_one(&*queue, Lane::Live).await;
    assert_eq!((again.id, again.receive_count), (second.id, 2));
    // Acknowledging twice, or what is gone, is no error.
    queue.acknowledge(&[first.receipt.clone(), first.receipt, again.receipt]).await.unwrap();
    assert_eq!(queue.backlog(Lane::Live).await.unwrap(), Backlog::default());
}

#[tokio::test]
async fn visibility_is_extended_and_released() {
    let (_database, queue) = pgmq().await;
    queue.send(&[job(Lane::Bulk, 0..3)]).await.unwrap();
    let message = receive_one(&*queue, Lane::Bulk).await;
    queue.extend(std::slice::from_ref(&message.receipt), Duration::from_hours(1)).await.unwrap();
    let other = job(Lane::Bulk, 9..10);
    queue.send(&[other]).await.unwrap();
    let short = receive_one(&*queue, Lane::Bulk).await;
    common::eventually("the message that was not extended to come back", PATIENCE, async || {
        queue.backlog(Lane::Bulk).await.unwrap() == Backlog { visible: 1, in_flight: 3 }
    })
    .await;
    queue.acknowledge(&[short.receipt]).await.unwrap();
    queue.extend(std::slice::from_ref(&message.receipt), Duration::ZERO).await.unwrap();
    assert_eq!(receive_one(&*queue, Lane::Bulk).await.receive_count, 2);
}

#[tokio::test]
async fn a_dead_letter_keeps_body_and_reason_and_leaves_its_lane() {
    let (database, queue) = pgmq().await;
    queue.send(&[job(Lane::Live, 0..4)]).await.unwrap();
    let message = receive_one(&*queue, Lane::Live).await;
    queue.dead_letter(&message, None, &why("the index refuses it")).await.unwrap();
    assert_eq!(queue.dead_letters().await.unwrap(), 4);
    assert_eq!(queue.backlog(Lane::Live).await.unwrap(), Backlog::default());
    let client = database.client().await;
    let sql = "SELECT headers ->> 'error', message -> 'groups' -> 0 ->> 'version' FROM pgmq.q_refarch_dead";
    let row = client.query_one(sql, &[]).await.unwrap();
    assert_eq!((row.get(0), row.get(1)), ("the index refuses it", "7"));
}

#[tokio::test]
async fn a_waiting_receiver_wakes_when_something_is_sent() {
    let (database, queue) = pgmq().await;
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
