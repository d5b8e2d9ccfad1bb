//! `refarch redrive`: the dead letters, as a person or a script lists them and brings them back.
//!
//! On several threads, because a dropped database blocks its own until the server is rid of every
//! connection, and one that the queue is just making would wait for that very thread.

use std::time::Duration;

use refarch::backend::pgmq::Pgmq;
use refarch::pipeline::change::{Group, JOB_VERSION, Job, Lane, Op};
use refarch::pipeline::queue::{
    Backlog, DeadLetterCause, DeadLetters as _, JobQueue as _, QueueStats as _, Reason,
};
use serde_json::{Value, json};

use crate::common::Database;
use crate::common::source::settings;

/// Longer than anything here takes on a busy machine.
const TIMEOUT: Duration = Duration::from_mins(2);

/// A migrated database with its queue at hand.
struct QueueFixture {
    database: Database,
    queue: Pgmq,
}

/// What a run printed, and its exit code.
#[derive(Debug)]
struct Run {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Run {
    /// The JSON that a run printed, an object a line.
    fn json(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

async fn redrive(database: &Database, args: &[&str]) -> Run {
    let run = database.refarch().arg("redrive").args(args).output();
    let output = tokio::time::timeout(TIMEOUT, run).await.expect("it does not end").unwrap();
    Run {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

impl QueueFixture {
    async fn new() -> Self {
        let database = Database::create().await;
        assert!(database.refarch().arg("migrate").output().await.unwrap().status.success());
        let settings = settings(&[]);
        let queue = Pgmq::new(database.postgres(&settings), &settings.queue.name, Duration::from_mins(1));
        Self { database, queue }
    }

    /// Dead-letters a job with as many changes; returns the letter's id.
    async fn dead(&self, lane: Lane, ids: std::ops::Range<u32>, error: &str) -> String {
        let job = Job {
            v: JOB_VERSION,
            source: "products".into(),
            lane,
            oldest: "2026-01-02T03:04:05.678Z".parse().unwrap(),
            trace: None,
            groups: vec![Group {
                version: 7,
                op: Op::Upsert,
                after_ms: 3,
                ids: ids.map(|id| id.to_string()).collect(),
            }],
        };
        self.queue.send(&[job]).await.unwrap();
        self.give_up(lane, Reason::Refused, error).await
    }

    async fn give_up(&self, lane: Lane, reason: Reason, error: &str) -> String {
        let message = self.queue.receive(lane, 1).await.unwrap().remove(0);
        let why = DeadLetterCause { reason, error: error.into(), tries: 1 };
        self.queue.store(&message, None, &why).await.unwrap();
        self.queue.list(None, 100).await.unwrap().pop().unwrap().id
    }

    async fn redrive(&self, args: &[&str]) -> Run {
        redrive(&self.database, args).await
    }

    /// Changes in the live lane, the bulk lane and the dead letters.
    async fn counts(&self) -> (u64, u64, u64) {
        let visible = async |lane| {
            let Backlog { visible, in_flight, .. } = self.queue.backlog(lane).await.unwrap();
            assert_eq!(in_flight, 0);
            visible
        };
        (visible(Lane::Live).await, visible(Lane::Bulk).await, self.queue.count().await.unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_dead_letter_queue_is_reported_and_nothing_is_redriven() {
    let post = QueueFixture::new().await;
    let list = post.redrive(&[]).await;
    assert_eq!((list.code, list.out.as_str()), (Some(0), "no dead letters\n"), "{list:?}");
    let list = post.redrive(&["--json"]).await;
    assert_eq!((list.code, list.out.as_str()), (Some(0), ""), "{list:?}");
    let all = post.redrive(&["--all"]).await;
    assert_eq!(
        (all.code, all.out.as_str()),
        (Some(0), "0 dead letters with 0 changes queued again\n"),
        "{all:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_shows_each_dead_letter_and_its_reason() {
    let post = QueueFixture::new().await;
    let first = post.dead(Lane::Bulk, 1..501, "the index\nrefuses it").await;
    let client = post.database.client().await;
    client.batch_execute(r#"SELECT pgmq.send('refarch_live', '{"price": 1.10}')"#).await.unwrap();
    let second = post.give_up(Lane::Live, Reason::Undecodable, "not a job").await;
    let list = post.redrive(&[]).await;
    assert_eq!(list.code, Some(0), "{list:?}");
    let blocks: Vec<&str> = list.out.split("\n\n").collect();
    assert_eq!(blocks.len(), 2, "{}", list.out);
    for says in [
        format!("id             {first}\n"),
        "Z, in the bulk lane\n".into(),
        "why            it was refused for good\n".into(),
        "tries          received once, tried alone once\n".into(),
        "rows           1, 2, 3, 4, 5 and 495 more\n".into(),
        "error          the index refuses it".into(),
    ] {
        assert!(blocks[0].contains(&says), "{says:?}: {}", list.out);
    }
    for says in [
        format!("id             {second}\n"),
        "it is not a job of ours\n".into(),
        "body           {\"price\": 1.10}\n".into(),
    ] {
        assert!(blocks[1].contains(&says), "{says:?}: {}", list.out);
    }
    let letters = post.redrive(&["--json"]).await.json();
    assert_eq!(letters.len(), 2);
    assert_eq!(letters[0]["id"], json!(first));
    assert_eq!(letters[0]["ids"].as_array().unwrap().len(), 500);
    assert_eq!(letters[0]["error"], json!("the index\nrefuses it"));
    assert_eq!((&letters[0]["reason"], &letters[0]["lane"]), (&json!("refused"), &json!("bulk")));
    assert_eq!(letters[1]["body"], json!("{\"price\": 1.10}"));
    assert_eq!(post.counts().await, (0, 0, 501), "looking changes nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_dead_letters_are_redriven_and_a_dry_run_changes_nothing() {
    let post = QueueFixture::new().await;
    post.dead(Lane::Live, 0..3, "no").await;
    post.dead(Lane::Bulk, 3..10, "no").await;
    let dry = post.redrive(&["--all", "--dry-run"]).await;
    assert_eq!(
        (dry.code, dry.out.as_str()),
        (Some(0), "2 dead letters with 10 changes would be queued again\n"),
        "{dry:?}"
    );
    let dry = post.redrive(&["--all", "--dry-run", "--json"]).await;
    assert_eq!(dry.json(), [json!({ "redriven": 2, "changes": 10, "missing": [], "dry_run": true })]);
    assert_eq!(post.counts().await, (0, 0, 10));
    let all = post.redrive(&["--all", "--json"]).await;
    assert_eq!(
        (all.code, all.json()),
        (Some(0), vec![json!({ "redriven": 2, "changes": 10, "missing": [] })])
    );
    assert_eq!(post.counts().await, (3, 7, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_named_dead_letters_are_redriven_and_a_missing_one_fails() {
    let post = QueueFixture::new().await;
    let mut ids = Vec::new();
    for n in 0..4 {
        ids.push(post.dead(Lane::Live, n..n + 1, "no").await);
    }
    let dry = post.redrive(&["--id", &ids[1], "--dry-run"]).await;
    assert_eq!(
        (dry.code, dry.out.as_str()),
        (Some(0), "1 dead letter with 1 change would be queued again\n"),
        "{dry:?}"
    );
    assert_eq!(post.counts().await, (0, 0, 4));
    let two = post.redrive(&["--id", &ids[1], "--id", &ids[3], "--id", &ids[3]]).await;
    assert_eq!(
        (two.code, two.out.as_str()),
        (Some(0), "2 dead letters with 2 changes queued again\n"),
        "{two:?}"
    );
    assert_eq!(post.counts().await, (2, 0, 2));
    let args = ["--json", "--id", &ids[1], "--id", "4711", "--id", "first", "--id", &ids[0]];
    let dry = post.redrive(&[&args[..], &["--dry-run"]].concat()).await;
    let missing = json!([ids[1], "4711", "first"]);
    assert_eq!(
        (dry.code, dry.json()),
        (Some(1), vec![json!({ "redriven": 1, "changes": 1, "missing": missing, "dry_run": true })])
    );
    let run = post.redrive(&args).await;
    assert_eq!(
        (run.code, run.json()),
        (Some(1), vec![json!({ "redriven": 1, "changes": 1, "missing": missing })])
    );
    let says = format!("refarch: no dead letter has the id {}, 4711, first: refarch redrive lists", ids[1]);
    assert!(run.err.starts_with(&says), "{}", run.err);
    assert_eq!(post.counts().await, (3, 0, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn redrive_all_takes_the_dead_letters_present_at_the_start_however_many() {
    let post = QueueFixture::new().await;
    let client = post.database.client().await;
    // Each letter that goes back is dead at once.
    client
        .batch_execute(
            "INSERT INTO pgmq.q_refarch_dead (vt, message, headers) \
             SELECT now(), '\"text\"', '{\"lane\": \"live\", \"changes\": 2}' FROM generate_series(1, 1200); \
             CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
               INSERT INTO pgmq.q_refarch_dead (vt, message, headers) VALUES (now(), NEW.message, NEW.headers); \
               RETURN NULL; \
             END $$; \
             CREATE TRIGGER die BEFORE INSERT ON pgmq.q_refarch_live FOR EACH ROW EXECUTE FUNCTION die()",
        )
        .await
        .unwrap();
    assert_eq!(post.redrive(&["--json"]).await.json().len(), 1200);
    let all = post.redrive(&["--all", "--json"]).await;
    assert_eq!(
        (all.code, all.json()),
        (Some(0), vec![json!({ "redriven": 1200, "changes": 2400, "missing": [] })]),
        "{all:?}"
    );
    assert_eq!(post.counts().await, (0, 0, 2400));
    client.batch_execute("DROP TRIGGER die ON pgmq.q_refarch_live").await.unwrap();
    post.redrive(&["--all"]).await;
    assert_eq!(post.counts().await, (2400, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_usage_and_a_missing_schema_are_reported() {
    let database = Database::create().await;
    for args in [&["--id", "1", "--all"][..], &["--dry-run"], &["--id"]] {
        let run = redrive(&database, args).await;
        assert_eq!((run.code, run.out.as_str()), (Some(2), ""), "{run:?}");
    }
    let run = redrive(&database, &[]).await;
    assert_eq!((run.code, run.out.as_str()), (Some(1), ""), "{run:?}");
    assert!(run.err.contains("run refarch migrate"), "{}", run.err);
}
