//! Traces and metrics for a collector that speaks OTLP over HTTP.
//!
//! Spans come finished from the [`pipeline`](crate::pipeline::trace). They wait in a bounded queue, and a thread of the
//! SDK sends them. When the queue is full or the collector is away, spans are lost; the work never waits. Metrics are
//! read when they are sent (`role/admin/otlp.rs`).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{BatchSpanProcessor, SpanData, SpanEvents, SpanLinks, SpanProcessor as _};
use percent_encoding::percent_decode_str;
use prost::Message as _;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};

use crate::config;
use crate::pipeline::trace::{Sampler, Span, SpanSink};

/// How long one sending of metrics may take.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// The connection of a role to its collector.
pub struct Otlp {
    spans: BatchSpanProcessor,
    share: f64,
}

impl Otlp {
    /// The connection of a worker; none if there is no collector in the settings. Sends nothing yet.
    pub fn open(
        settings: &config::Otlp,
        role: &'static str,
        worker: &str,
    ) -> anyhow::Result<Option<Arc<Self>>> {
        if settings.endpoint.is_empty() {
            return Ok(None);
        }
        let headers: HashMap<String, String> = headers(settings)?
            .iter()
            .filter_map(|(name, value)| Some((name.to_string(), value.to_str().ok()?.to_owned())))
            .collect();
        let spans = SpanExporter::builder()
            .with_http()
            .with_headers(headers)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(address(settings, "/v1/traces"))
            .build()
            .context(WRONG)?;
        let resource = Resource::builder()
            .with_service_name("refarch")
            .with_attributes([
                KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
                KeyValue::new("service.instance.id", worker.to_owned()),
                KeyValue::new("refarch.role", role),
            ])
            .build();
        let mut spans = BatchSpanProcessor::builder(spans).build();
        spans.set_resource(&resource);
        Ok(Some(Arc::new(Self { spans, share: settings.sample })))
    }

    /// Chooses the messages that are traced.
    #[must_use]
    pub fn sampler(self: &Arc<Self>) -> Sampler {
        Sampler::new(self.share, Arc::clone(self) as _)
    }

    /// Sends what waits, for some seconds at most.
    pub async fn close(self: Arc<Self>) {
        // The SDK blocks until its thread is done.
        match tokio::task::spawn_blocking(move || self.spans.shutdown()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "cannot send the last spans to the collector"),
            Err(error) => tracing::warn!(%error, "cannot send the last spans to the collector"),
        }
    }
}

/// What is wrong where no exporter can be made.
const WRONG: &str = "cannot send to the collector of otlp.endpoint";

/// The address of a path of the collector.
fn address(settings: &config::Otlp, path: &str) -> String {
    settings.endpoint.trim_end_matches('/').to_owned() + path
}

/// The headers of the settings: `name=value`, with commas between, percent-encoded.
fn headers(settings: &config::Otlp) -> anyhow::Result<HeaderMap> {
    let pairs = settings.headers.expose().split(',').map(str::trim).filter(|pair| !pair.is_empty());
    let header = |pair: &str| -> Option<(HeaderName, HeaderValue)> {
        let (name, value) = pair.split_once('=')?;
        let value = percent_decode_str(value.trim()).decode_utf8().ok()?;
        let mut value = HeaderValue::from_str(&value).ok()?;
        value.set_sensitive(true);
        Some((HeaderName::from_bytes(name.trim().as_bytes()).ok()?, value))
    };
    pairs
        .map(header)
        .collect::<Option<_>>()
        .context("otlp.headers are not as in api-key=abc,tenant=shop: correct them")
}

/// Sends metrics to the collector.
pub struct MetricsSender {
    client: reqwest::Client,
    url: String,
}

impl MetricsSender {
    /// The sender; none if there is no collector in the settings. Sends nothing yet.
    pub fn open(settings: &config::Otlp) -> anyhow::Result<Option<Self>> {
        if settings.endpoint.is_empty() {
            return Ok(None);
        }
        let client = reqwest::Client::builder()
            .default_headers(headers(settings)?)
            .user_agent(concat!("refarch/", env!("CARGO_PKG_VERSION")))
            .timeout(SEND_TIMEOUT)
            // The headers would be sent to the new address.
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .context(WRONG)?;
        Ok(Some(Self { client, url: address(settings, "/v1/metrics") }))
    }

    /// Sends once.
    pub async fn send(&self, metrics: &ExportMetricsServiceRequest) -> reqwest::Result<()> {
        let request = self.client.post(&self.url).header(CONTENT_TYPE, "application/x-protobuf");
        let answer = request.body(metrics.encode_to_vec()).send().await;
        answer.and_then(reqwest::Response::error_for_status).map(drop).map_err(reqwest::Error::without_url)
    }
}

impl SpanSink for Otlp {
    fn record(&self, span: Span) {
        let context = |id| {
            let (trace, flags) = (TraceId::from_bytes(span.trace), TraceFlags::SAMPLED);
            SpanContext::new(trace, SpanId::from_bytes(id), flags, true, TraceState::default())
        };
        let span_kind = match span.name {
            "capture" => SpanKind::Producer,
            "queue" => SpanKind::Consumer,
            _ => SpanKind::Internal,
        };
        self.spans.on_end(SpanData {
            span_context: context(span.id),
            parent_span_id: span.parent.map_or(SpanId::INVALID, SpanId::from_bytes),
            parent_span_is_remote: span.name == "queue",
            span_kind,
            name: span.name.into(),
            start_time: span.start,
            end_time: span.end,
            attributes: vec![
                KeyValue::new("lane", span.lane.name()),
                KeyValue::new("changes", span.changes as i64),
            ],
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: InstrumentationScope::builder("refarch").build(),
        });
    }
}
