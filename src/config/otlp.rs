//! `[otlp]`

use std::time::Duration;

use toml::Value;

use super::declare::Rule::{Address, AtLeast, Is, Variable};
use super::declare::lies;
use super::read::section;
use crate::secret::Secret;

section! {
    /// `[otlp]`: traces and metrics for a collector.
    pub struct Otlp in "otlp" {
        /// A collector that takes OTLP over HTTP, such as `http://127.0.0.1:4318`. The role sends traces and metrics to
        /// /v1/traces and /v1/metrics there. Empty: nothing is traced and nothing is sent.
        endpoint: String = "", Address, Variable("OTEL_EXPORTER_OTLP_ENDPOINT"), Is(is_endpoint, ENDPOINT_RULE);
        /// Headers that the collector needs, as in `api-key=abc,tenant=shop`.
        headers: Secret = "", Variable("OTEL_EXPORTER_OTLP_HEADERS");
        /// How often metrics are sent.
        interval as "interval_ms": Duration = 60000, AtLeast(100), Variable("OTEL_METRIC_EXPORT_INTERVAL");
        /// The part of the messages that are traced, from 0 to 1.
        sample: f64 = 0.01, Is(is_share, "use 0 to 1, such as 0.01 for one in a hundred");
    }
}

const ENDPOINT_RULE: &str = "use an address that begins with http:// or https://";

fn is_endpoint(value: &Value) -> bool {
    let schemes = ["http://", "https://"];
    value
        .as_str()
        .is_some_and(|text| text.is_empty() || schemes.iter().any(|scheme| text.starts_with(scheme)))
}

fn is_share(value: &Value) -> bool {
    lies(value, 0, 1)
}
