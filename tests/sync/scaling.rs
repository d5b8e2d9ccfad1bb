//! Threads and processes follow the load, with the real executable.

use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Child;

use crate::common::{eventually, number};
use crate::shop::{Shop, TABLE, TIMEOUT, on_pgvector};

/// Short cooldowns, and a small target.
const SETTINGS: [(&str, &str); 5] = [
    ("REFARCH_SCALING_BACKLOG_S", "1"),
    ("REFARCH_SCALING_COOLDOWN_OUT_S", "1"),
    ("REFARCH_SCALING_COOLDOWN_IN_S", "1"),
    ("REFARCH_UP_PRODUCTS", "0"),
    ("REFARCH_SERVE_BIND", "127.0.0.1:0"),
];

const WAITING: &str = "SELECT (SELECT count(*) FROM products_with_increment) \
                            - (SELECT count(*) FROM refarch.ledger WHERE open = 0 AND NOT dirty)";

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().unwrap() as i32), signal).unwrap();
}

/// Steps from and to so many workers that are recorded.
async fn steps(shop: &Shop, comparison: &str) -> i64 {
    number(
        &shop.client,
        &format!(
            "SELECT count(*) FROM refarch.event WHERE kind = 'scaled' \
             AND (detail ->> 'to')::int {comparison} (detail ->> 'from')::int"
        ),
    )
    .await
}

/// Inserts rows, ever more of them, until workers are added: however fast the machine is, they wait long
/// enough then.
async fn load_until_scaled_out(shop: &Shop) {
    let (mut rows, mut next) = (5_000, 0);
    eventually("workers to be added", TIMEOUT, async || {
        if number(&shop.client, WAITING).await < rows / 2 {
            shop.sql(&format!(
                "INSERT INTO {TABLE} (id, name, description) \
                 SELECT i, 'product ' || i, 'The ' || i || ' bottles' FROM generate_series({next} + 1, {next} + {rows}) i"
            ))
            .await;
            next += rows;
            rows *= 2;
        }
        steps(shop, ">").await > 0
    })
    .await;
}

/// The end of the load: what waits has not to be embedded any more.
async fn empty(shop: &Shop) {
    shop.sql(&format!("DELETE FROM {TABLE}")).await;
}

async fn start(workers: &[&str]) -> (Shop, Child) {
    let shop = on_pgvector().await.with(&SETTINGS);
    shop.role(&["migrate"]).await;
    let up = shop.command(&["up"]).args(workers).stdout(Stdio::null()).spawn().unwrap();
    (shop, up)
}

/// The events that `refarch events` lists.
async fn listed(shop: &Shop) -> Vec<Value> {
    let out = shop.role(&["events", "--json", "--since", "1h"]).await;
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn threads_are_added_under_a_backlog_and_end_afterwards() {
    let (shop, mut up) = start(&["--workers", "1..2"]).await;
    let threads = "SELECT coalesce(sum(threads), 0)::bigint FROM refarch.worker WHERE role = 'embed'";
    let threads = async |wanted: i64| {
        let what = format!("{wanted} threads");
        eventually(&what, TIMEOUT, async || number(&shop.client, threads).await == wanted).await;
    };
    let mut follow = shop.command(&["events", "--follow"]).stdout(Stdio::piped()).spawn().unwrap();
    threads(1).await;
    load_until_scaled_out(&shop).await;
    threads(2).await;
    empty(&shop).await;
    eventually("a thread to end", TIMEOUT, async || steps(&shop, "<").await > 0).await;
    threads(1).await;
    let events = listed(&shop).await;
    let scaled: Vec<&str> = events
        .iter()
        .filter(|event| event["kind"] == "scaled")
        .map(|event| event["text"].as_str().unwrap())
        .collect();
    assert!(
        scaled[0].starts_with("1 -> 2 threads: backlog ") && scaled[0].ends_with(" s > 1 s"),
        "{scaled:?}"
    );
    assert!(
        scaled[1].starts_with("2 -> 1 threads: backlog ") && scaled[1].ends_with(" s < 1 s"),
        "{scaled:?}"
    );
    assert!(events.is_sorted_by_key(|event| event["event_id"].as_i64()), "the newest last");
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    for wanted in [" joined", scaled[0], scaled[1]] {
        loop {
            let line =
                tokio::time::timeout(TIMEOUT, lines.next_line()).await.expect(wanted).unwrap().unwrap();
            if line.contains(wanted) {
                break;
            }
        }
    }
    let status: Value = serde_json::from_str(&shop.role(&["status", "--json"]).await).unwrap();
    let last = &status["scaling"][1];
    assert_eq!(
        (&last["workers"], &last["from"], &last["to"]),
        (&"threads".into(), &2.into(), &1.into()),
        "{status}"
    );
    assert!(shop.role(&["status"]).await.contains("scaled         1 -> 2 threads, backlog "));
    signal(&up, Signal::SIGTERM);
    assert!(up.wait().await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_are_started_under_a_backlog_and_drained_afterwards() {
    let (shop, mut up) = start(&["--processes", "1..3"]).await;
    let embeds = "SELECT count(*) FROM refarch.worker WHERE role = 'embed' AND heartbeat_at > now() - interval '5 seconds'";
    let embeds = async |what: &str, condition: &dyn Fn(i64) -> bool| {
        eventually(what, TIMEOUT, async || condition(number(&shop.client, embeds).await)).await;
    };
    embeds("one process", &|count| count == 1).await;
    load_until_scaled_out(&shop).await;
    embeds("another process", &|count| count > 1).await;
    // One that ends by itself is started again.
    let pid = number(&shop.client, "SELECT max(pid)::bigint FROM refarch.worker WHERE role = 'embed'").await;
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
    let ended = "SELECT count(*) FROM refarch.event WHERE kind = 'ended'";
    eventually("its end to be noted", TIMEOUT, async || number(&shop.client, ended).await == 1).await;
    let joined = "SELECT count(*) FROM refarch.event WHERE kind = 'joined' AND worker_id LIKE 'embed-%'";
    eventually("a third start", TIMEOUT, async || number(&shop.client, joined).await >= 3).await;
    empty(&shop).await;
    eventually("processes to be drained", TIMEOUT, async || steps(&shop, "<").await > 0).await;
    embeds("one process again", &|count| count == 1).await;
    let events = listed(&shop).await;
    let text = |kind: &str| {
        let event = events
            .iter()
            .find(|event| event["kind"] == kind)
            .unwrap_or_else(|| panic!("no {kind}: {events:?}"));
        event["text"].as_str().unwrap()
    };
    assert!(text("scaled").starts_with("1 -> 2 processes: backlog "), "{events:?}");
    assert!(text("ended").contains(" ended (signal: 9 (SIGKILL)), and is started again in "), "{events:?}");
    // However this process ends, its processes end too.
    signal(&up, Signal::SIGKILL);
    up.wait().await.unwrap();
    let left = "SELECT count(*) FROM refarch.worker WHERE role = 'embed' AND pid <> ";
    eventually("the last process to leave", TIMEOUT, async || {
        number(&shop.client, &format!("{left} {pid}")).await == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_ends_with_its_processes() {
    let (shop, mut up) = start(&["--processes", "2"]).await;
    let embeds = "SELECT count(*) FROM refarch.worker WHERE role = 'embed'";
    eventually("two processes", TIMEOUT, async || number(&shop.client, embeds).await == 2).await;
    let names = "SELECT count(*) FROM refarch.event WHERE kind = 'left' AND worker_id LIKE 'embed-%'";
    signal(&up, Signal::SIGTERM);
    assert!(up.wait().await.unwrap().success());
    assert_eq!(
        (number(&shop.client, embeds).await, number(&shop.client, names).await),
        (0, 2),
        "both have left"
    );
}
