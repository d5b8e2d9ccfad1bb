//! `refarch plan` over a database.

use serde_json::Value;

use crate::common::{self, Database};

/// One process of embed applied a load of 500 rows a second for ten seconds, was idle, and applied 300 a second for ten
/// seconds. Another one applied single edits.
const WORKED: &str = "\
INSERT INTO refarch.sample (worker_id, at, applied, embedded, bulk_buckets, bulk_counts) \
  SELECT 'embed-a', now() - interval '20 minutes' + n * interval '1 second', 500, 500, '{100}', '{500}' \
  FROM generate_series(0, 10) n; \
INSERT INTO refarch.sample (worker_id, at, applied, embedded, bulk_buckets, bulk_counts) \
  SELECT 'embed-a', now() - interval '10 minutes' + n * interval '1 second', 300, 300, '{100}', '{300}' \
  FROM generate_series(0, 10) n; \
INSERT INTO refarch.sample (worker_id, at, applied, embedded, freshness_buckets, freshness_counts) \
  SELECT 'embed-b', now() - interval '20 minutes' + n * interval '1 second', 1, 1, '{20}', '{1}' \
  FROM generate_series(0, 900) n";

#[tokio::test]
async fn a_plan_takes_the_rate_at_which_a_worker_applied_loads_in_the_last_hour() {
    let database = Database::create().await;
    let run = async |args: &[&str]| {
        let output = database.refarch().args(args).output().await.unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.success(), text(output.stdout), text(output.stderr))
    };
    let plan = ["plan", "--records=100k", "--rate-from-status", "--workers=1", "--startup=0"];
    assert!(run(&["migrate"]).await.0);
    let (planned, _, why) = run(&plan).await;
    assert!(!planned && why.contains("no worker applied a load in the last hour"), "{why}");
    assert!(why.contains("--worker-rate"), "it says what to do: {why}");
    common::run(&database.client().await, WORKED).await;
    let (planned, text, why) = run(&plan).await;
    assert!(planned && text.contains("400 rows/s each (measured here in the last hour)"), "{text} {why}");
    let json = run(&[&plan[..], &["--json"]].concat()).await.1;
    let report: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(report["worker_rate"], 400.0, "{report}");
    let drained = report["drained_s"].as_f64().unwrap();
    assert!((drained - 250.0).abs() < 1.0, "100,000 rows at 400 a second: {drained} s");
}
