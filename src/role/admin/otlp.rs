//! The catalogue's metrics for a collector: the same names, units and labels as on the admin endpoint.
//!
//! Names keep their unit and `_total`, as the conventions of OpenTelemetry want it of metrics that come from Prometheus.
//! A collector that offers them to Prometheus again changes no name.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::metrics::v1::number_data_point::Value as Number;
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric as Exported, NumberDataPoint,
    ResourceMetrics, ScopeMetrics, Sum,
};
use opentelemetry_proto::tonic::resource::v1::Resource;
use tokio_util::sync::CancellationToken;

use super::catalogue::{Kind, Metric};
use super::exposition::{Sample, Samples, Value};
use super::observed::Observed;
use crate::config;
use crate::otlp::MetricsSender;
use crate::pipeline::failure::chain;
use crate::pipeline::metrics::Distributed;
use crate::telemetry;

/// How long a turn may take: no role waits longer at its end.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Sends all metrics again and again, and once more after `done`.
pub async fn export_until(
    observed: &Observed,
    settings: &config::Otlp,
    sender: &MetricsSender,
    done: &CancellationToken,
) {
    let mut failed = false;
    loop {
        let is_last = done.run_until_cancelled(tokio::time::sleep(settings.interval)).await.is_none();
        let turn = async {
            let samples = observed.collect().await;
            sender.send(&request(&samples, observed.role, observed.started)).await
        };
        let sent = match tokio::time::timeout(TIMEOUT, turn).await {
            Ok(sent) => sent.map_err(|error| chain(&error)),
            Err(_) => Err(format!("it took more than {} s", TIMEOUT.as_secs())),
        };
        match &sent {
            Err(error) if !failed => tracing::warn!(error, "metrics are not sent to the collector"),
            Ok(()) if failed => tracing::info!("metrics are sent to the collector again"),
            _ => {}
        }
        failed = sent.is_err();
        if is_last {
            return;
        }
    }
}

fn request(samples: &Samples, role: &str, started: SystemTime) -> ExportMetricsServiceRequest {
    let attributes = [
        ("service.name", "refarch"),
        ("service.version", env!("CARGO_PKG_VERSION")),
        ("service.instance.id", &telemetry::worker()),
        ("refarch.role", role),
    ];
    let (started, now) = (nanos(started), nanos(SystemTime::now()));
    let metrics = samples.iter().map(|(metric, samples)| exported(metric, samples, started, now));
    ExportMetricsServiceRequest {
        resource_metrics: vec![ResourceMetrics {
            resource: Some(Resource {
                attributes: attributes.map(|(key, value)| attribute(key, value)).into(),
                ..Resource::default()
            }),
            scope_metrics: vec![ScopeMetrics {
                scope: Some(InstrumentationScope {
                    name: "refarch".into(),
                    ..InstrumentationScope::default()
                }),
                metrics: metrics.collect(),
                ..ScopeMetrics::default()
            }],
            ..ResourceMetrics::default()
        }],
    }
}

fn nanos(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

fn attribute(key: &str, value: &str) -> KeyValue {
    let value = AnyValue { value: Some(Any::StringValue(value.into())) };
    KeyValue { key: key.into(), value: Some(value), ..KeyValue::default() }
}

/// The unit as OTLP writes it (UCUM).
fn unit(unit: Option<&'static str>) -> &'static str {
    match unit {
        Some("seconds") => "s",
        Some("bytes") => "By",
        Some("ratio") => "1",
        other => other.unwrap_or_default(),
    }
}

fn exported(metric: &Metric, samples: &[Sample], started: u64, now: u64) -> Exported {
    let cumulative = AggregationTemporality::Cumulative as i32;
    let numbers = || samples.iter().filter_map(|sample| number(sample, started, now)).collect();
    let data = match metric.kind {
        Kind::Counter => {
            Data::Sum(Sum { data_points: numbers(), aggregation_temporality: cumulative, is_monotonic: true })
        }
        Kind::Gauge => Data::Gauge(Gauge { data_points: numbers() }),
        Kind::Histogram => Data::Histogram(Histogram {
            data_points: samples.iter().filter_map(|sample| distribution(sample, started, now)).collect(),
            aggregation_temporality: cumulative,
        }),
    };
    Exported {
        name: metric.name.into(),
        description: metric.help(),
        unit: unit(metric.unit).into(),
        data: Some(data),
        ..Exported::default()
    }
}

fn attributes(labels: &[(&'static str, String)]) -> Vec<KeyValue> {
    labels.iter().map(|(label, value)| attribute(label, value)).collect()
}

fn number((labels, value): &Sample, started: u64, now: u64) -> Option<NumberDataPoint> {
    let Value::Number(value) = value else { return None };
    Some(NumberDataPoint {
        attributes: attributes(labels),
        start_time_unix_nano: started,
        time_unix_nano: now,
        value: Some(Number::AsDouble(*value)),
        ..NumberDataPoint::default()
    })
}

fn distribution((labels, value): &Sample, started: u64, now: u64) -> Option<HistogramDataPoint> {
    let Value::Distribution(Distributed { buckets, sum }) = value else { return None };
    Some(HistogramDataPoint {
        attributes: attributes(labels),
        start_time_unix_nano: started,
        time_unix_nano: now,
        count: buckets.iter().map(|(_, count)| count).sum(),
        sum: Some(*sum),
        bucket_counts: buckets.iter().map(|(_, count)| *count).collect(),
        // The bound above all others is not written.
        explicit_bounds: buckets.iter().map(|(bound, _)| *bound).filter(|bound| bound.is_finite()).collect(),
        ..HistogramDataPoint::default()
    })
}

#[cfg(test)]
mod tests {
    use super::super::catalogue::{APPLIED, FRESHNESS, RECALL, RESIDENT};
    use super::*;

    #[test]
    fn a_metric_keeps_its_name_unit_labels_and_values() {
        let mut samples = Samples::default();
        samples.count(&APPLIED, &["a", "live"], 3);
        samples.number(&RESIDENT, &[], 7.0);
        samples.number(&RECALL, &["a", "1"], 0.99);
        let buckets = vec![(0.5, 1), (f64::INFINITY, 2)];
        samples.distribution(&FRESHNESS, &["a", "live"], Distributed { buckets, sum: 9.5 });
        let request = request(&samples, "embed", UNIX_EPOCH);
        let metrics = &request.resource_metrics[0].scope_metrics[0].metrics;
        let named: Vec<(&str, &str)> =
            metrics.iter().map(|metric| (metric.name.as_str(), metric.unit.as_str())).collect();
        let wanted = [
            ("refarch_changes_applied_total", ""),
            ("process_resident_memory_bytes", "By"),
            ("refarch_search_recall_at_10_ratio", "1"),
            ("refarch_freshness_seconds", "s"),
        ];
        assert_eq!(named, wanted);
        let Some(Data::Sum(applied)) = &metrics[0].data else { panic!("{:?}", metrics[0]) };
        assert!(applied.is_monotonic && applied.aggregation_temporality == 2);
        let point = &applied.data_points[0];
        assert_eq!(point.attributes, [attribute("source", "a"), attribute("lane", "live")]);
        assert_eq!(point.value, Some(Number::AsDouble(3.0)));
        let Some(Data::Histogram(fresh)) = &metrics[3].data else { panic!("{:?}", metrics[3]) };
        let point = &fresh.data_points[0];
        assert_eq!((point.count, point.sum), (3, Some(9.5)));
        assert_eq!((&point.bucket_counts[..], &point.explicit_bounds[..]), (&[1, 2][..], &[0.5][..]));
    }
}
