//! The roles as processes of their own against SQS and Pinecone: an independent server for the one, the
//! double for the other.
//!
//! Small enough for the suite; `REFARCH_ROWS` makes it large. Prints what it saw.

use std::time::{Duration, Instant};

use refarch::backend::sqs;
use refarch::double::pinecone::PineconeDouble;
use serde_json::Value;
use tokio::process::{Child, Command};

use crate::common::python::Moto;
use crate::common::{self, Database};

fn rows() -> u64 {
    std::env::var("REFARCH_ROWS").map_or(120, |text| text.parse().expect("a number"))
}

fn drain_timeout() -> Duration {
    Duration::from_mins(3) + Duration::from_millis(rows() * 100)
}

/// A database, a queue and an index that are not in one place.
struct Cloud {
    database: Database,
    double: PineconeDouble,
    env: Vec<(String, String)>,
    _moto: std::sync::Arc<Moto>,
}

impl Cloud {
    async fn start(prefix: &str, lanes: usize) -> Self {
        let moto = Moto::shared().await;
        let client = sqs::connect_to(moto.url());
        let name = |kind: &str| format!("{prefix}-{}-{kind}", std::process::id());
        let dead = client.create_queue().queue_name(name("dead")).send().await.unwrap().queue_url.unwrap();
        let policy = format!(
            r#"{{"deadLetterTargetArn":"arn:aws:sqs:us-east-1:123456789012:{}","maxReceiveCount":"30"}}"#,
            name("dead")
        );
        let mut urls = Vec::new();
        for lane in &["live", "bulk"][..lanes] {
            let policy_name = aws_sdk_sqs::types::QueueAttributeName::RedrivePolicy;
            let create = client.create_queue().queue_name(name(lane)).attributes(policy_name, &policy);
            urls.push(create.send().await.unwrap().queue_url.unwrap());
        }
        let double = PineconeDouble::start(384, 1).await.unwrap();
        // Writes are found a moment after they are answered, as in the real one.
        double.set_delay(Duration::from_millis(300));
        let mut env = vec![
            ("SQS_QUEUE_URL", urls[0].clone()),
            ("SQS_DEAD_LETTER_QUEUE_URL", dead),
            ("AWS_ENDPOINT_URL_SQS", moto.url().to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_ACCESS_KEY_ID", "test".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "test".to_owned()),
            ("REFARCH_QUEUE_WAIT_S", "2".to_owned()),
            // Messages that a killed role had received are visible again soon.
            ("REFARCH_QUEUE_VISIBILITY_S", "5".to_owned()),
            ("PINECONE_INDEX", "shop".to_owned()),
            ("PINECONE_API_KEY", "test".to_owned()),
            ("REFARCH_INDEX_CONTROLLER", double.url()),
            ("REFARCH_INDEX_FRESHNESS_MS", "200".to_owned()),
        ];
        env.extend(urls.get(1).map(|url| ("SQS_BULK_QUEUE_URL", url.clone())));
        let env = env.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        Self { database: Database::create().await, double, env, _moto: moto }
    }

    fn refarch(&self, args: &[&str]) -> Command {
        let mut command = self.database.refarch();
        command.args(args).envs(self.env.iter().map(|(key, value)| (key, value)));
        command
    }

    async fn run(&self, args: &[&str]) -> (Option<i32>, String) {
        let output = self.refarch(args).output().await.unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        }
        (output.status.code(), said)
    }

    fn spawn(&self, args: &[&str]) -> Child {
        self.refarch(args).spawn().unwrap()
    }

    async fn status(&self) -> Value {
        let (code, said) = self.run(&["status", "--json"]).await;
        assert_eq!(code, Some(0));
        serde_json::from_str(&said).unwrap()
    }

    async fn synced(&self) -> Value {
        let started = Instant::now();
        loop {
            let status = self.status().await;
            let outstanding = |lane: &str| {
                let lane = &status["queue"][lane];
                lane["visible"].as_u64().unwrap() + lane["in_flight"].as_u64().unwrap()
            };
            let left = status["pending"].as_u64().unwrap() + outstanding("live") + outstanding("bulk");
            if left == 0 && status["in_sync"] == status["source_rows"] {
                return status;
            }
            assert!(started.elapsed() < drain_timeout(), "not in step: {status}");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }
}

async fn stays_in_step(cloud: Cloud) {
    let rows = rows();
    assert_eq!(cloud.run(&["migrate"]).await.0, Some(0));
    let (code, _) = cloud.run(&["generate", "--count", &rows.to_string(), "--load"]).await;
    assert_eq!(code, Some(0));
    let started = Instant::now();
    let port = common::free_port();
    let bind = format!("127.0.0.1:{port}");
    let mut roles = [
        cloud.spawn(&["listen"]),
        cloud.spawn(&["embed", "--workers", "1"]),
        cloud.spawn(&["embed", "--workers", "1"]),
        cloud.spawn(&["serve", "--bind", &bind]),
    ];
    cloud.synced().await;
    println!("{rows} rows in step after {:.1} s", started.elapsed().as_secs_f64());
    let client = cloud.database.client().await;
    for n in 1..=10 {
        let sql = format!(
            "UPDATE products_with_increment SET description = 'A violin bow, number {n}' WHERE id = {n}"
        );
        client.batch_execute(&sql).await.unwrap();
    }
    client.batch_execute("DELETE FROM products_with_increment WHERE id BETWEEN 20 AND 29").await.unwrap();
    client
        .batch_execute("INSERT INTO products_with_increment (name, description) VALUES ('new', 'A hat for a rainy day'), ('none', NULL)")
        .await
        .unwrap();
    let status = cloud.synced().await;
    assert_eq!(status["source_rows"], rows - 8);
    // Once a query finds them, and not before.
    common::eventually("freshness to be known", drain_timeout(), async || {
        cloud.status().await["freshness_ms"]["p50"].is_u64()
    })
    .await;
    let status = cloud.status().await;
    println!("freshness {}", status["freshness_ms"]);
    let found: Value = reqwest::get(format!("http://{bind}/api/v1/search?q=violin%20bow"))
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let text = found.to_string();
    assert!(text.contains("A violin bow, number"), "{text}");
    let (code, said) = cloud.run(&["verify", "--sample", "50"]).await;
    println!("{said}");
    assert_eq!(code, Some(0), "{said}");
    // A row without text has no record.
    assert_eq!(cloud.double.snapshot("").len() as u64, rows - 9);
    for role in &mut roles {
        role.kill().await.unwrap();
    }
    // A foreign message does no harm.
    let client = sqs::connect_to(&cloud.env[2].1);
    client.send_message().queue_url(&cloud.env[0].1).message_body("not ours").send().await.unwrap();
    let (code, _) = cloud.run(&["embed", "--until-idle"]).await;
    assert_eq!(code, Some(0));
    let (_, letters) = cloud.run(&["redrive"]).await;
    assert!(letters.contains("not ours") && letters.contains("is not a job of ours"), "{letters}");
}

#[tokio::test(flavor = "multi_thread")]
async fn separate_processes_stay_in_step_over_two_queues() {
    stays_in_step(Cloud::start("two", 2).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn separate_processes_stay_in_step_over_one_queue() {
    stays_in_step(Cloud::start("one", 1).await).await;
}
