//! The job queue's contract, clause by clause, for every queue there is.

use std::time::Duration;

use async_trait::async_trait;
use refarch::pipeline::change::{Group, JOB_VERSION, Job, Lane, Op};
use refarch::pipeline::queue::{Backlog, DeadLetter, DeadLetterCause, JobQueue, Message, Queue, Reason};

/// Visibility of the queues under test.
pub const VISIBILITY: Duration = Duration::from_secs(2);

const TIMEOUT: Duration = Duration::from_secs(30);

/// A queue under test, and access around its trait.
#[async_trait]
pub trait Fixture: Send + Sync {
    fn queue(&self) -> Queue;

    /// Puts a body that is a JSON text straight into a queue: `live`, `bulk` or `dead`.
    async fn put(&self, place: &str, body: &str);

    /// Whether it counts dead letters by their changes, and keeps letters of one moment in their order.
    fn is_exact(&self) -> bool;
}

/// Calls a macro with the name of every clause.
macro_rules! for_each_clause {
    ($make:ident) => {
        $make! {
            a_sent_message_is_received_unchanged_in_its_lane,
            only_unacknowledged_messages_are_delivered_again,
            visibility_is_extended_and_released,
            a_dead_letter_keeps_its_body_and_reason_and_leaves_its_lane,
            a_part_of_a_message_is_dead_lettered_while_the_message_stays,
            dead_letters_are_read_page_by_page,
            a_redriven_dead_letter_is_back_in_its_lane_with_its_changes,
            all_dead_letters_are_redriven_or_none,
            a_foreign_dead_letter_is_listed_and_redriven_to_the_live_lane,
            a_body_that_is_no_job_is_received_unchanged,
            a_waiting_receiver_gets_a_message_sent_meanwhile,
            a_queue_with_messages_has_an_oldest_change,
            many_messages_are_sent_in_one_call,
        }
    };
}
pub(crate) use for_each_clause;

pub fn job(lane: Lane, ids: std::ops::Range<u32>) -> Job {
    let ids = ids.map(|id| id.to_string()).collect();
    Job {
        v: JOB_VERSION,
        source: "products".into(),
        lane,
        oldest: "2026-01-02T03:04:05.678Z".parse().unwrap(),
        trace: None,
        groups: vec![Group { version: 7, op: Op::Delete, after_ms: 3, ids }],
    }
}

pub fn why(error: &str) -> DeadLetterCause {
    DeadLetterCause { reason: Reason::Refused, error: error.into(), tries: 1 }
}

pub async fn receive_one(queue: &dyn JobQueue, lane: Lane) -> Message {
    let mut messages = queue.receive(lane, 1).await.unwrap();
    assert_eq!(messages.len(), 1);
    messages.remove(0)
}

/// Sends a job and dead-letters it whole; returns the letter's id.
pub async fn dead(queue: &Queue, job: Job) -> String {
    let known = letters(queue).await;
    queue.jobs.send(std::slice::from_ref(&job)).await.unwrap();
    let message = receive_one(&*queue.jobs, job.lane).await;
    queue.dead_letters.store(&message, None, &why("the index refuses it")).await.unwrap();
    let letters = letters(queue).await;
    letters.into_iter().find(|letter| known.iter().all(|other| other.id != letter.id)).unwrap().id
}

async fn letters(queue: &Queue) -> Vec<DeadLetter> {
    queue.dead_letters.list(None, 100).await.unwrap()
}

/// A backlog, whether it was counted or estimated: a queue without load is counted right in either way.
fn numbers(backlog: Backlog) -> Backlog {
    Backlog { estimated: false, ..backlog }
}

fn visible(visible: u64) -> Backlog {
    Backlog::counted(visible, 0)
}

fn in_flight(in_flight: u64) -> Backlog {
    Backlog::counted(0, in_flight)
}

pub async fn a_sent_message_is_received_unchanged_in_its_lane(fixture: &dyn Fixture) {
    let queue = fixture.queue();
    let jobs = [job(Lane::Live, 0..2), job(Lane::Bulk, 0..500), job(Lane::Live, 5..7)];
    queue.jobs.send(&jobs).await.unwrap();
    assert_eq!(numbers(queue.stats.backlog(Lane::Live).await.unwrap()), visible(4));
    assert_eq!(numbers(queue.stats.backlog(Lane::Bulk).await.unwrap()), visible(500));
    let live = queue.jobs.receive(Lane::Live, 10).await.unwrap();
    let mut bodies: Vec<&Job> = live.iter().map(|message| message.body.as_ref().unwrap()).collect();
    bodies.sort_by_key(|job| job.groups[0].ids.clone());
    assert_eq!(bodies, [&jobs[0], &jobs[2]]);
    assert_eq!((live[0].receive_count, live[0].receipt.lane), (1, Lane::Live));
    assert_eq!(receive_one(&*queue.jobs, Lane::Bulk).await.body.unwrap(), jobs[1]);
    assert_eq!(numbers(queue.stats.backlog(Lane::Live).await.unwrap()), in_flight(4));
    queue.jobs.send(&[]).await.unwrap();
    assert_eq!(numbers(queue.stats.backlog(Lane::Bulk).await.unwrap()), in_flight(500));
}

pub async fn only_unacknowledged_messages_are_delivered_again(fixture: &dyn Fixture) {
    let queue = fixture.queue();
    queue.jobs.send(&[job(Lane::Live, 0..1), job(Lane::Live, 1..2)]).await.unwrap();
    let first = receive_one(&*queue.jobs, Lane::Live).await;
    let second = receive_one(&*queue.jobs, Lane::Live).await;
    queue.jobs.acknowledge(std::slice::from_ref(&first.receipt)).await.unwrap();
    queue.jobs.acknowledge(&[]).await.unwrap();
    crate::common::eventually("the visibility timeout to end", TIMEOUT, async || {
        queue.stats.backlog(Lane::Live).await.unwrap().visible == 1
    })
    .await;
    let again = receive_one(&*queue.jobs, Lane::Live).await;
    assert_eq!((again.id, again.receive_count), (second.id, 2));
    // Acknowledging twice, or a message that is gone, is no error.
    queue.jobs.acknowledge(&[first.receipt.clone(), first.receipt, again.receipt]).await.unwrap();
    assert_eq!(queue.stats.backlog(Lane::Live).await.unwrap(), Backlog::default());
}

pub async fn visibility_is_extended_and_released(fixture: &dyn Fixture) {
    let queue = fixture.queue();
    queue.jobs.send(&[job(Lane::Bulk, 0..3)]).await.unwrap();
    let message = receive_one(&*queue.jobs, Lane::Bulk).await;
    queue
        .jobs
        .extend_visibility(std::slice::from_ref(&message.receipt), Duration::from_hours(1))
        .await
        .unwrap();
    queue.jobs.extend_visibility(&[], Duration::ZERO).await.unwrap();
    queue.jobs.send(&[job(Lane::Bulk, 7..10)]).await.unwrap();
    let short = receive_one(&*queue.jobs, Lane::Bulk).await;
    crate::common::eventually("the message that was not extended to come back", TIMEOUT, async || {
        numbers(queue.stats.backlog(Lane::Bulk).await.unwrap()) == Backlog::counted(3, 3)
    })
    .await;
    let again = receive_one(&*queue.jobs, Lane::Bulk).await;
    assert_eq!(again.id, short.id);
    queue.jobs.acknowledge(&[again.receipt]).await.unwrap();
    queue.jobs.extend_visibility(std::slice::from_ref(&message.receipt), Duration::ZERO).await.unwrap();
    assert_eq!(receive_one(&*queue.jobs, Lane::Bulk).await.receive_count, 2);
}

pub async fn a_dead_letter_keeps_its_body_and_reason_and_leaves_its_lane(fixture: &dyn Fixture) {
    let queue = fixture.queue();
    queue.jobs.send(&[job(Lane::Live, 0..4)]).await.unwrap();
    let message = receive_one(&*queue.jobs, Lane::Live).await;
    queue.dead_letters.store(&message, None, &why("the index refuses it")).await.unwrap();
    assert_eq!(queue.dead_letters.count().await.unwrap(), if fixture.is_exact() { 4 } else { 1 });
    assert_eq!(queue.stats.backlog(Lane::Live).await.unwrap(), Backlog::default());
    let letters = letters(&queue).await;
    let expected = DeadLetter {
        id: letters[0].id.clone(),
        at: letters[0].at,
        lane: Lane::Live,
        reason: Some(Reason::Refused),
        error: "the index refuses it".into(),
        tries: 1,
        receive_count: 1,
        changes: 4,
        ids: ["0", "1", "2", "3"].map(str::to_owned).into(),
        body: None,
    };
    assert_eq!(letters, [expected]);
}

pub async fn a_part_of_a_message_is_dead_lettered_while_the_message_stays(fixture: &dyn Fixture) {
    let queue = fixture.queue();
    queue.jobs.send(&[job(Lane::Bulk, 0..3)]).await.unwrap();
    let message = receive_one(&*queue.jobs, Lane::Bulk).await;
    let part = job(Lane::Bulk, 1..2);
    let why = DeadLetterCause { reason: Reason::Failed, error: "time\0out".into(), tries: 4 };
    queue.dead_letters.store(&message, Some(&part), &why).await.unwrap();
    assert_eq!(numbers(queue.stats.backlog(Lane::Bulk).await.unwrap()), in_flight(3));
    assert_eq!(queue.dead_letters.count().await.unwrap(), 1);
    let letters = letters(&queue).await;
    // Neither PostgreSQL nor SQS has NUL.
    assert_eq!(letters[0].error, "time\u{fffd}out");
    assert_eq!((letters[0].reason, letters[0].tries, letters[0].changes), (Some(Reason::Failed), 4, 1));
    assert_eq!((letters[0].lane, &letters[0].ids), (Lane::Bulk, &vec!["1".to_owned()]));
    queue.jobs.acknowledge(&[message.receipt]).await.unwrap();
    assert_eq!(queue.stats.backlog(Lane::Bulk).await.unwrap(), Backlog::default());
    assert_eq!(queue.dead_letters.count().await.unwrap(), 1);
}

pub async fn dead_letters_are_read_page_by_page(fixture: &dyn Fixture) {
    let queue = fixture.queue();
    assert_eq!(queue.dead_letters.list(None, 2).await.unwrap(), []);
    for n in 0..5 {
        dead(&queue, job([Lane::Live, Lane::Bulk][n as usize % 2], n..n + 1)).await;
    }
    let mut after: Option<String> = None;
    let mut pages = Vec::new();
    loop {
        let page = queue.dead_letters.list(after.as_deref(), 2).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.id.clone());
        pages.push(page.into_iter().flat_map(|letter| letter.ids).collect::<Vec<_>>());
    }
    assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 1]);
    let mut read = pages.concat();
    if !fixture.is_exact() {
        read.sort();
    }
    assert_eq!(read, ["0", "1", "2", "3", "4"]);
    // Listing neither removes nor hides dead letters.
    assert_eq!(letters(&queue).await.len(), 5);
}

pub async fn a_redriven_dead_letter_is_back_in_its_lane_with_its_changes(fixture: &dyn Fixture) {
    let queue = fixture.queue();
    let jobs = [job(Lane::Live, 0..4), job(Lane::Bulk, 0..500), job(Lane::Bulk, 500..501)];
    let mut ids = Vec::new();
    for job in &jobs {
        ids.push(dead(&queue, job.clone()).await);
    }
    let asked = [ids[1].clone(), "4711".into(), ids[0].clone(), ids[0].clone()];
    let mut back = queue.dead_letters.redrive(&asked).await.unwrap();
    back.sort();
    let mut expected = ids[..2].to_vec();
    expected.sort();
    assert_eq!(back, expected);
    assert_eq!(queue.dead_letters.count().await.unwrap(), 1);
    for (lane, job) in [(Lane::Live, &jobs[0]), (Lane::Bulk, &jobs[1])] {
        assert!(queue.stats.backlog(lane).await.unwrap().visible > 0);
        let message = receive_one(&*queue.jobs, lane).await;
        assert_eq!((message.receive_count, message.body.as_ref().unwrap()), (1, job));
        queue.jobs.acknowledge(&[message.receipt]).await.unwrap();
        assert_eq!(queue.stats.backlog(lane).await.unwrap(), Backlog::default(), "it was there once");
    }
    // These two are no dead letters any more; the third still is.
    assert_eq!(queue.dead_letters.redrive(&asked).await.unwrap(), Vec::<String>::new());
    assert_eq!(queue.dead_letters.redrive(&[]).await.unwrap(), Vec::<String>::new());
    let left: Vec<String> = letters(&queue).await.into_iter().map(|letter| letter.id).collect();
    assert_eq!(left, ids[2..]);
}

pub async fn all_dead_letters_are_redriven_or_none(fixture: &dyn Fixture) {
    let queue = fixture.queue();
    for n in 0..3 {
        dead(&queue, job([Lane::Live, Lane::Bulk][n as usize % 2], n..n + 1)).await;
    }
    let standing = async || {
        let live = queue.stats.backlog(Lane::Live).await.unwrap().visible;
        (
            live + queue.stats.backlog(Lane::Bulk).await.unwrap().visible,
            queue.dead_letters.count().await.unwrap(),
        )
    };
    match queue.dead_letters.redrive_all().await.unwrap() {
        Some(moved) => assert_eq!((moved, standing().await), (3, (3, 0))),
        None => assert_eq!(standing().await, (0, 3)),
    }
}

pub async fn a_foreign_dead_letter_is_listed_and_redriven_to_the_live_lane(fixture: &dyn Fixture) {
    let queue = fixture.queue();
    fixture.put("dead", r#""a""#).await;
    fixture.put("dead", r#""b""#).await;
    let letters = letters(&queue).await;
    let mut seen: Vec<_> =
        letters.iter().map(|it| (it.lane, it.reason, it.changes, it.body.as_deref())).collect();
    seen.sort_by_key(|letter| letter.3);
    assert_eq!(
        seen,
        [(Lane::Live, None, 1, Some(r#""a""#)), (Lane::Live, None, 1, Some(r#""b""#))],
        "{letters:?}"
    );
    let ids: Vec<String> = letters.into_iter().map(|letter| letter.id).collect();
    assert_eq!(queue.dead_letters.redrive(&ids).await.unwrap().len(), 2);
    assert_eq!(numbers(queue.stats.backlog(Lane::Live).await.unwrap()), visible(2));
}

pub async fn a_body_that_is_no_job_is_received_unchanged(fixture: &dyn Fixture) {
    let queue = fixture.queue();
    let bodies = [
        r#""text""#.to_owned(),
        "null".to_owned(),
        r#"{"v": 1, "price": 1.10, "big": 123456789012345678901234567890}"#.to_owned(),
        r#"{"v": 2}"#.to_owned(),
        // A larger number and a deeper nesting than the JSON parser accepts.
        format!("[1{}]", "0".repeat(400)),
        format!("{}{}", "[".repeat(300), "]".repeat(300)),
    ];
    for body in &bodies {
        fixture.put("live", body).await;
    }
    let received = async || {
        let mut messages = Vec::new();
        while messages.len() < bodies.len() {
            let more = queue.jobs.receive(Lane::Live, 10).await.unwrap();
            assert!(!more.is_empty());
            messages.extend(more);
        }
        messages.sort_by_key(|message| message.body.as_ref().unwrap_err().body.clone());
        messages
    };
    let messages = received().await;
    let sent: Vec<String> =
        messages.iter().map(|message| message.body.as_ref().unwrap_err().body.clone()).collect();
    for message in &messages {
        let undecodable = message.body.as_ref().unwrap_err();
        let why =
            DeadLetterCause { reason: Reason::Undecodable, error: undecodable.reason.clone(), tries: 0 };
        queue.dead_letters.store(message, None, &why).await.unwrap();
    }
    assert_eq!(queue.stats.backlog(Lane::Live).await.unwrap(), Backlog::default());
    let mut letters = letters(&queue).await;
    letters.sort_by_key(|letter| letter.body.clone());
    for (letter, body) in letters.iter().zip(&sent) {
        assert_eq!((letter.reason, letter.body.as_ref()), (Some(Reason::Undecodable), Some(body)));
        assert!(
            letter.error.starts_with("not a job: ") || letter.error.starts_with("job version 2"),
            "{}",
            letter.error
        );
    }
    let ids: Vec<String> = letters.into_iter().map(|letter| letter.id).collect();
    assert_eq!(queue.dead_letters.redrive(&ids).await.unwrap().len(), bodies.len());
    let again: Vec<String> =
        received().await.iter().map(|message| message.body.as_ref().unwrap_err().body.clone()).collect();
    assert_eq!(again, sent);
    assert_eq!(queue.dead_letters.count().await.unwrap(), 0);
}

pub async fn a_waiting_receiver_gets_a_message_sent_meanwhile(fixture: &dyn Fixture) {
    let queue = fixture.queue();
    let waiter = fixture.queue();
    let waiting = tokio::spawn(async move {
        loop {
            let messages = waiter.jobs.receive(Lane::Live, 1).await.unwrap();
            if let Some(message) = messages.into_iter().next() {
                return message;
            }
            waiter.jobs.wait(Lane::Live, TIMEOUT).await;
        }
    });
    queue.jobs.send(&[job(Lane::Live, 0..1)]).await.unwrap();
    let message = tokio::time::timeout(TIMEOUT / 2, waiting).await.expect("it did not come").unwrap();
    assert_eq!(message.body.unwrap().changes(), 1);
}

pub async fn a_queue_with_messages_has_an_oldest_change(fixture: &dyn Fixture) {
    let queue = fixture.queue();
    assert_eq!(queue.stats.oldest().await.unwrap(), None);
    queue.jobs.send(&[job(Lane::Bulk, 0..1)]).await.unwrap();
    let made = job(Lane::Bulk, 0..1).oldest;
    assert!(queue.stats.oldest().await.unwrap().is_some_and(|oldest| oldest <= made));
    let held = receive_one(&*queue.jobs, Lane::Bulk).await;
    assert!(queue.stats.oldest().await.unwrap().is_some_and(|oldest| oldest <= made), "held is not done");
    queue.jobs.acknowledge(&[held.receipt]).await.unwrap();
    assert_eq!(queue.stats.oldest().await.unwrap(), None);
}

pub async fn many_messages_are_sent_in_one_call(fixture: &dyn Fixture) {
    let queue = fixture.queue();
    let jobs: Vec<Job> = (0..25).map(|n| job(Lane::Bulk, n * 10..n * 10 + 10)).collect();
    queue.jobs.send(&jobs).await.unwrap();
    let mut receipts = Vec::new();
    let mut ids = Vec::new();
    while receipts.len() < jobs.len() {
        let messages = queue.jobs.receive(Lane::Bulk, 10).await.unwrap();
        assert!(!messages.is_empty() && messages.len() <= 10);
        for message in messages {
            ids.extend(message.body.unwrap().groups.remove(0).ids);
            receipts.push(message.receipt);
        }
    }
    ids.sort_by_key(|id| id.parse::<u32>().unwrap());
    assert_eq!(ids, (0..250).map(|id: u32| id.to_string()).collect::<Vec<_>>());
    queue.jobs.extend_visibility(&receipts, VISIBILITY * 2).await.unwrap();
    queue.jobs.acknowledge(&receipts).await.unwrap();
    assert_eq!(queue.stats.backlog(Lane::Bulk).await.unwrap(), Backlog::default());
}
