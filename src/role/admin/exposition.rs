//! The page of metrics, as Prometheus text or as `OpenMetrics`.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeMetric as _, MetricEncoder, NoLabelSet, prometheus_text, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::catalogue::{Kind, Metric};
use crate::pipeline::metrics::Distributed;

/// The media type of `OpenMetrics`.
const OPEN_METRICS: &str = "application/openmetrics-text";

/// A sample's labels and value.
pub(super) type Sample = (Vec<(&'static str, String)>, Value);

#[derive(Clone, Debug)]
pub(super) enum Value {
    Number(f64),
    Distribution(Distributed),
}

/// Samples of metrics, in the order in which they were added.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<(&'static Metric, Vec<Sample>)>);

/// The two forms of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus's text, version 0.0.4.
    Prometheus,
    /// `OpenMetrics` 1.0.0.
    OpenMetrics,
}

impl Format {
    /// The form that a client asks for.
    #[must_use]
    pub fn accepted(accept: Option<&str>) -> Self {
        let asked = |accept: &str| accept.split(',').any(|part| part.trim().starts_with(OPEN_METRICS));
        if accept.is_some_and(asked) { Self::OpenMetrics } else { Self::Prometheus }
    }

    /// Its media type.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => prometheus_text::CONTENT_TYPE,
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

impl Samples {
    /// Adds a number. `labels` are the values of the metric's labels, in its order.
    pub fn number(&mut self, metric: &'static Metric, labels: &[&str], value: f64) {
        debug_assert_ne!(metric.kind, Kind::Histogram, "{}", metric.name);
        self.add(metric, labels, Value::Number(value));
    }

    /// Adds a count.
    pub fn count(&mut self, metric: &'static Metric, labels: &[&str], value: u64) {
        self.number(metric, labels, value as f64);
    }

    /// Adds a distribution.
    pub fn distribution(&mut self, metric: &'static Metric, labels: &[&str], value: Distributed) {
        debug_assert_eq!(metric.kind, Kind::Histogram, "{}", metric.name);
        self.add(metric, labels, Value::Distribution(value));
    }

    fn add(&mut self, metric: &'static Metric, values: &[&str], value: Value) {
        debug_assert_eq!(values.len(), metric.labels.len(), "{}", metric.name);
        let labels = metric.labels.iter().zip(values).map(|(label, value)| (*label, (*value).to_owned()));
        let sample = (labels.collect(), value);
        match self.0.iter_mut().find(|(known, _)| known.name == metric.name) {
            Some((_, samples)) => samples.push(sample),
            None => self.0.push((metric, vec![sample])),
        }
    }

    /// Each metric with its samples.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&'static Metric, &[Sample])> {
        self.0.iter().map(|(metric, samples)| (*metric, samples.as_slice()))
    }

    /// The page.
    pub fn page(self, format: Format) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self));
        let mut page = String::new();
        match format {
            Format::Prometheus => prometheus_text::encode(&mut page, &registry)?,
            Format::OpenMetrics => text::encode(&mut page, &registry)?,
        }
        Ok(page)
    }
}

impl Collector for Samples {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        for (metric, samples) in &self.0 {
            // The encoder adds unit and `_total`.
            let name = metric.name.strip_suffix("_total").unwrap_or(metric.name);
            let bare = metric.unit.and_then(|unit| name.strip_suffix(unit)?.strip_suffix('_'));
            let name = bare.unwrap_or(name);
            let unit = metric.unit.map(|unit| Unit::Other(unit.into()));
            let kind = match metric.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
                Kind::Histogram => MetricType::Histogram,
            };
            let mut family = encoder.encode_descriptor(name, &metric.help(), unit.as_ref(), kind)?;
            for (labels, value) in samples {
                encode_value(family.encode_family(labels)?, metric.kind, value)?;
            }
        }
        Ok(())
    }
}

fn encode_value(mut encoder: MetricEncoder<'_>, kind: Kind, value: &Value) -> fmt::Result {
    match value {
        Value::Number(number) if kind == Kind::Counter => ConstCounter::new(*number).encode(encoder),
        Value::Number(number) => ConstGauge::new(*number).encode(encoder),
        Value::Distribution(seen) => {
            encoder.encode_histogram::<NoLabelSet>(seen.sum, seen.count(), &seen.buckets, None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalogue::{APPLIED, CPU, FRESHNESS, READY};
    use super::*;

    fn samples() -> Samples {
        let mut samples = Samples::default();
        samples.number(&CPU, &[], 1.5);
        samples.count(&APPLIED, &["a\"b", "live"], 3);
        samples.count(&READY, &[], 1);
        samples.count(&APPLIED, &["a\"b", "bulk"], 4);
        let seen = Distributed { buckets: vec![(0.5, 1), (f64::INFINITY, 2)], sum: 9.5 };
        samples.distribution(&FRESHNESS, &["a", "live"], seen);
        samples
    }

    #[test]
    fn the_page_is_prometheus_text() {
        let page = samples().page(Format::Prometheus).unwrap();
        let lines: Vec<&str> = page.lines().filter(|line| !line.starts_with("# HELP")).collect();
        assert_eq!(
            lines,
            [
                "# TYPE process_cpu_seconds_total counter",
                "process_cpu_seconds_total 1.5",
                "# TYPE refarch_changes_applied_total counter",
                "refarch_changes_applied_total{source=\"a\\\"b\",lane=\"live\"} 3.0",
                "refarch_changes_applied_total{source=\"a\\\"b\",lane=\"bulk\"} 4.0",
                "# TYPE refarch_ready gauge",
                "refarch_ready 1.0",
                "# TYPE refarch_freshness_seconds histogram",
                "refarch_freshness_seconds_bucket{source=\"a\",lane=\"live\",le=\"0.5\"} 1",
                "refarch_freshness_seconds_bucket{source=\"a\",lane=\"live\",le=\"+Inf\"} 3",
                "refarch_freshness_seconds_sum{source=\"a\",lane=\"live\"} 9.5",
                "refarch_freshness_seconds_count{source=\"a\",lane=\"live\"} 3",
            ]
        );
    }

    #[test]
    fn open_metrics_has_units_and_an_end() {
        let page = samples().page(Format::OpenMetrics).unwrap();
        for line in [
            "# TYPE process_cpu_seconds counter",
            "# UNIT process_cpu_seconds seconds",
            "process_cpu_seconds_total 1.5",
        ] {
            assert!(page.lines().any(|there| there == line), "{line} in {page}");
        }
        assert!(page.ends_with("# EOF\n"), "{page}");
    }

    #[test]
    fn open_metrics_is_for_those_who_ask() {
        let prometheus =
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        assert_eq!(Format::accepted(Some(prometheus)), Format::OpenMetrics);
        for other in [None, Some("*/*"), Some("text/plain"), Some("text/html, application/xml")] {
            assert_eq!(Format::accepted(other), Format::Prometheus);
        }
    }
}
