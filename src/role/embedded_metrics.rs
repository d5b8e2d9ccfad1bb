//! The state of the fleet for Amazon CloudWatch: lines of JSON on standard output, in the embedded metric format.
//!
//! CloudWatch makes metrics of such lines wherever the log goes there. Scaling and alarms need no agent then.

use std::convert::Infallible;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::admin::Observed;
use crate::backend::Backends;
use crate::backend::postgres::status::Status;
use crate::pipeline::backlog::backlog_seconds;

/// Time between two lines. CloudWatch keeps a value for each minute, and one late line must not leave a gap.
const EVERY: Duration = Duration::from_secs(20);

/// The namespace of the metrics.
const NAMESPACE: &str = "refarch";

/// The dimension of the metrics. Its value is `log.emf`.
const DIMENSION: &str = "Deployment";

/// A metric with its unit and its value. A value that is not known is left out of the line.
type Metric = (&'static str, &'static str, Option<f64>);

/// Prints a line again and again, until it is dropped. Without a deployment it prints nothing.
pub(super) async fn print(observed: &Observed, backends: &Backends, deployment: &str) -> Infallible {
    if deployment.is_empty() {
        return std::future::pending().await;
    }
    let mut failed = false;
    loop {
        let error = match observed.fleet(backends).await {
            Ok(fleet) => {
                let line = line(deployment, Timestamp::now(), &metrics(&fleet.status, fleet.rate));
                super::output::print(format!("{line}\n").as_bytes()).err().map(|error| error.to_string())
            }
            Err(error) => Some(error.to_string()),
        };
        match &error {
            Some(error) if !failed => tracing::warn!(error, "metrics for CloudWatch are not written"),
            None if failed => tracing::info!("metrics for CloudWatch are written again"),
            _ => {}
        }
        failed = error.is_some();
        tokio::time::sleep(EVERY).await;
    }
}

/// The metrics of a state of the fleet, in which it applies so many changes a second.
fn metrics(status: &Status, rate: Option<f64>) -> Vec<Metric> {
    let outstanding = status.outstanding();
    let seconds = |ms: Option<u64>| ms.map(|ms| ms as f64 / 1000.0);
    let proof = &status.proof;
    vec![
        ("BacklogChanges", "Count", Some(outstanding as f64)),
        ("BacklogSeconds", "Seconds", known_seconds(outstanding, rate)),
        ("ChangesPerSecond", "Count/Second", Some(rate.unwrap_or_default())),
        ("FreshnessP50", "Seconds", seconds(status.freshness_ms.live.p50)),
        ("FreshnessP99", "Seconds", seconds(status.freshness_ms.live.p99)),
        ("BulkFreshnessP99", "Seconds", seconds(status.freshness_ms.bulk.p99)),
        ("DeadLetters", "Count", Some(status.dead_letters as f64)),
        ("ProofAge", "Seconds", proof.age_s.map(|age| age as f64)),
        ("ProofOverdue", "Count", (!proof.off).then(|| f64::from(u8::from(proof.overdue)))),
        ("Faults", "Count", Some((status.faults.len() + status.capture_faults.len()) as f64)),
    ]
}

/// The backlog in seconds; none if changes wait and no rate is known, because 0 would remove workers.
fn known_seconds(outstanding: u64, rate: Option<f64>) -> Option<f64> {
    let is_known = outstanding == 0 || rate.is_some_and(|rate| rate > 0.0);
    is_known.then(|| backlog_seconds(outstanding, rate, None))
}

/// A line in the embedded metric format.
fn line(deployment: &str, at: Timestamp, metrics: &[Metric]) -> Value {
    let known = metrics.iter().filter_map(|(name, unit, value)| value.map(|value| (*name, *unit, value)));
    let declared: Vec<Value> =
        known.clone().map(|(name, unit, _)| json!({ "Name": name, "Unit": unit })).collect();
    let mut line = json!({
        "_aws": {
            "Timestamp": at.as_millisecond(),
            "CloudWatchMetrics": [
                { "Namespace": NAMESPACE, "Dimensions": [[DIMENSION]], "Metrics": declared },
            ],
        },
        DIMENSION: deployment,
    });
    for (name, _, value) in known {
        line[name] = value.into();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_declares_each_metric_that_is_known_and_its_dimension() {
        let at = Timestamp::from_millisecond(1_764_201_600_123).unwrap();
        let metrics = [("BacklogChanges", "Count", Some(500.0)), ("ProofAge", "Seconds", None)];
        let expected = json!({
            "_aws": {
                "Timestamp": 1_764_201_600_123_i64,
                "CloudWatchMetrics": [{
                    "Namespace": "refarch",
                    "Dimensions": [["Deployment"]],
                    "Metrics": [{ "Name": "BacklogChanges", "Unit": "Count" }],
                }],
            },
            "Deployment": "shop",
            "BacklogChanges": 500.0,
        });
        let line = line("shop", at, &metrics);
        assert_eq!(line, expected);
        assert_eq!(line.to_string().lines().count(), 1, "CloudWatch reads line by line");
    }

    #[test]
    fn a_backlog_without_a_rate_is_not_known() {
        assert_eq!(known_seconds(0, None), Some(0.0));
        assert_eq!(known_seconds(900, Some(90.0)), Some(10.0));
        assert_eq!(known_seconds(900, None), None);
        assert_eq!(known_seconds(900, Some(0.0)), None);
    }
}
