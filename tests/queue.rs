//! The job queue's contract, which every backend must keep.
//!
//! On several threads, because a dropped database blocks its own until the server is rid of every
//! connection, and one that the queue is just making would wait for that very thread.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::Database;
use refarch::backend::pgmq::Pgmq;
use refarch::backend::postgres::Postgres;
use refarch::backend::postgres::migrate::{self, IndexShape};
use refarch::config::Settings;
use refarch::pipeline::change::{Group, JOB_VERSION, Job, Lane, Op};
use refarch::pipeline::queue::{Backlog, DeadLetter, JobQueue, Message, Reason, Why};
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

/// Sends a job and dead-letters it whole; returns the letter's id.
async fn dead(queue: &dyn JobQueue, job: Job) -> String {
    queue.send(std::slice::from_ref(&job)).await.unwrap();
    let message = receive_one(queue, job.lane).await;
    queue.dead_letter(&message, None, &why("the index refuses it")).await.unwrap();
    queue.read_dead_letters(None, 100).await.unwrap().pop().unwrap().id
}

#[tokio::test(flavor = "multi_thread")]
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

#[tokio::test(flavor = "multi_thread")]
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

#[tokio::test(flavor = "multi_thread")]
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

#[tokio::test(flavor = "multi_thread")]
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

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_a_message_is_dead_lettered_while_the_message_stays() {
    let (_database, queue) = pgmq().await;
    queue.send(&[job(Lane::Bulk, 0..3)]).await.unwrap();
    let message = receive_one(&*queue, Lane::Bulk).await;
    let part = job(Lane::Bulk, 1..2);
    let why = Why { reason: Reason::Failed, error: "time\0out".into(), tries: 4 };
    queue.dead_letter(&message, Some(&part), &why).await.unwrap();
    assert_eq!(queue.backlog(Lane::Bulk).await.unwrap(), Backlog { visible: 0, in_flight: 3 });
    assert_eq!(queue.dead_letters().await.unwrap(), 1);
    let letters = queue.read_dead_letters(None, 10).await.unwrap();
    let expected = DeadLetter {
        id: letters[0].id.clone(),
        at: letters[0].at,
        lane: Lane::Bulk,
        reason: Some(Reason::Failed),
        // PostgreSQL has no NUL.
        error: "time\u{fffd}out".into(),
        tries: 4,
        receive_count: 1,
        changes: 1,
        ids: vec!["1".into()],
        body: None,
    };
    assert_eq!(letters, [expected]);
    queue.acknowledge(&[message.receipt]).await.unwrap();
    assert_eq!(queue.backlog(Lane::Bulk).await.unwrap(), Backlog::default());
    assert_eq!(queue.dead_letters().await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_read_in_their_order_page_by_page() {
    let (_database, queue) = pgmq().await;
    assert_eq!(queue.read_dead_letters(None, 2).await.unwrap(), []);
    for n in 0..5 {
        dead(&*queue, job([Lane::Live, Lane::Bulk][n as usize % 2], n..n + 1)).await;
    }
    let mut after: Option<String> = None;
    let mut pages = Vec::new();
    loop {
        let page = queue.read_dead_letters(after.as_deref(), 2).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.id.clone());
        pages.push(page.into_iter().flat_map(|letter| letter.ids).collect::<Vec<_>>());
    }
    assert_eq!(pages, [vec!["0", "1"], vec!["2", "3"], vec!["4"]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redriven_letter_is_back_in_its_lane_with_its_changes() {
    let (_database, queue) = pgmq().await;
    let jobs = [job(Lane::Live, 0..4), job(Lane::Bulk, 0..500), job(Lane::Bulk, 500..507)];
    let mut ids = Vec::new();
    for job in &jobs {
        ids.push(dead(&*queue, job.clone()).await);
    }
    let asked = [ids[1].clone(), "4711".into(), ids[0].clone(), ids[0].clone()];
    let mut back = queue.redrive(&asked).await.unwrap();
    back.sort();
    assert_eq!(back, ids[..2]);
    assert_eq!(queue.dead_letters().await.unwrap(), 7);
    for (lane, job) in [(Lane::Live, &jobs[0]), (Lane::Bulk, &jobs[1])] {
        let visible = job.changes() as u64;
        assert_eq!(queue.backlog(lane).await.unwrap(), Backlog { visible, in_flight: 0 });
        let message = receive_one(&*queue, lane).await;
        assert_eq!((message.receive_count, message.body.as_ref().unwrap()), (1, job));
        assert!(queue.receive(lane, 1).await.unwrap().is_empty(), "it is there once");
    }
    // They are gone now.
    assert_eq!(queue.redrive(&asked).await.unwrap(), Vec::<String>::new());
    assert_eq!(queue.redrive(&[]).await.unwrap(), Vec::<String>::new());
    assert!(queue.redrive(&["first".into()]).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_letter_of_somebody_else_is_listed_and_redriven_as_a_live_one() {
    let (database, queue) = pgmq().await;
    let client = database.client().await;
    client
        .batch_execute(
            r#"SELECT pgmq.send('refarch_dead', '"a"'); SELECT pgmq.send('refarch_dead', '"b"', '{"lane": "slow"}'::jsonb)"#,
        )
        .await
        .unwrap();
    let letters = queue.read_dead_letters(None, 10).await.unwrap();
    let seen: Vec<_> =
        letters.iter().map(|it| (it.lane, it.reason, it.changes, it.body.as_deref())).collect();
    assert_eq!(
        seen,
        [(Lane::Live, None, 1, Some(r#""a""#)), (Lane::Live, None, 1, Some(r#""b""#))],
        "{letters:?}"
    );
    let ids: Vec<String> = letters.into_iter().map(|letter| letter.id).collect();
    assert_eq!(queue.redrive(&ids).await.unwrap().len(), 2);
    assert_eq!(queue.backlog(Lane::Live).await.unwrap(), Backlog { visible: 2, in_flight: 0 });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_no_job_comes_through_as_it_was() {
    let (database, queue) = pgmq().await;
    let client = database.client().await;
    let bodies = [
        "\"text\"".to_owned(),
        "null".to_owned(),
        r#"{"v": 1, "price": 1.10, "big": 123456789012345678901234567890}"#.to_owned(),
        // More than the parser of ours takes.
        format!("[1{}]", "0".repeat(400)),
        format!("{}{}", "[".repeat(300), "]".repeat(300)),
    ];
    for body in &bodies {
        client.execute("SELECT pgmq.send('refarch_live', $1::text::jsonb)", &[body]).await.unwrap();
    }
    let stored = async |table: &str| -> Vec<String> {
        let sql = format!("SELECT message::text FROM pgmq.q_refarch_{table} ORDER BY msg_id");
        client.query(&sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
    };
    let sent = stored("live").await;
    for (message, body) in queue.receive(Lane::Live, 10).await.unwrap().iter().zip(&sent) {
        let undecodable = message.body.as_ref().unwrap_err();
        assert_eq!(&undecodable.body, body);
        let why = Why { reason: Reason::Undecodable, error: undecodable.reason.clone(), tries: 0 };
        queue.dead_letter(message, None, &why).await.unwrap();
    }
    assert_eq!(stored("live").await, Vec::<String>::new());
    assert_eq!(stored("dead").await, sent);
    let letters = queue.read_dead_letters(None, 10).await.unwrap();
    for (letter, body) in letters.iter().zip(&sent) {
        assert_eq!((letter.reason, letter.body.as_ref()), (Some(Reason::Undecodable), Some(body)));
        assert!(letter.error.starts_with("not a job: "), "{}", letter.error);
        // One by one, so that they keep their order.
        let id = std::slice::from_ref(&letter.id);
        assert_eq!(queue.redrive(id).await.unwrap(), id);
    }
    assert_eq!(stored("live").await, sent);
    assert_eq!(queue.dead_letters().await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_oldest_change_of_both_lanes_is_known_held_or_not() {
    let (database, queue) = pgmq().await;
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
