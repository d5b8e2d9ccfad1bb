//! Traces and metrics for a collector that speaks OTLP over HTTP.
//!
//! Spans come finished from the [`pipeline`](crate::pipeline::trace). They wait in a bounded queue, and a thread of the
//! SDK sends them. When the queue is full or the collector is away, spans are lost; the work never waits.

use std::sync::Arc;

use anyhow::Context as _;
use opentelemetry::metrics::MeterProvider as _;
use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{MetricExporter, Protocol, SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use opentelemetry_sdk::trace::{BatchSpanProcessor, SpanData, SpanEvents, SpanLinks, SpanProcessor as _};

use crate::config;
use crate::pipeline::metrics::Metrics;
use crate::pipeline::trace::{Sampler, Span, SpanSink};

/// The connection of a role to its collector.
pub struct Otlp {
    spans: BatchSpanProcessor,
    meters: SdkMeterProvider,
    share: f64,
}

impl Otlp {
    /// The connection of a worker; none if there is no collector in the settings. Sends nothing yet.
    pub fn open(
        settings: &config::Otlp,
        role: &'static str,
        worker: &str,
        metrics: &Arc<Metrics>,
    ) -> anyhow::Result<Option<Arc<Self>>> {
        if settings.endpoint.is_empty() {
            return Ok(None);
        }
        let base = settings.endpoint.trim_end_matches('/');
        let wrong = || "cannot send to the collector of otlp.endpoint";
        let spans = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{base}/v1/traces"))
            .build()
            .with_context(wrong)?;
        let measured = MetricExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{base}/v1/metrics"))
            .build()
            .with_context(wrong)?;
        let resource = Resource::builder()
            .with_service_name("refarch")
            .with_attributes([
                KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
                KeyValue::new("service.instance.id", worker.to_owned()),
                KeyValue::new("refarch.role", role),
            ])
            .build();
        let meters = SdkMeterProvider::builder()
            .with_periodic_exporter(measured)
            .with_resource(resource.clone())
            .build();
        observe(&meters, metrics);
        let mut spans = BatchSpanProcessor::builder(spans).build();
        spans.set_resource(&resource);
        Ok(Some(Arc::new(Self { spans, meters, share: settings.sample })))
    }

    /// Chooses the messages that are traced.
    #[must_use]
    pub fn sampler(self: &Arc<Self>) -> Sampler {
        Sampler::new(self.share, Arc::clone(self) as _)
    }

    /// Sends what waits, for some seconds at most.
    pub async fn close(self: Arc<Self>) {
        // The SDK blocks until its threads are done.
        let closed = tokio::task::spawn_blocking(move || {
            let spans = self.spans.shutdown();
            spans.and(self.meters.shutdown())
        });
        match closed.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "cannot send the last spans to the collector"),
            Err(error) => tracing::warn!(%error, "cannot send the last spans to the collector"),
        }
    }
}

/// Offers the counters of a process to each reading.
fn observe(meters: &SdkMeterProvider, metrics: &Arc<Metrics>) {
    let meter = meters.meter("refarch");
    let counted = Arc::clone(metrics);
    meter
        .u64_observable_counter("refarch.changes.applied")
        .with_description("Changes whose outcome is in the index")
        .with_callback(move |observer| observer.observe(counted.totals().0, &[]))
        .build();
    let counted = Arc::clone(metrics);
    meter
        .u64_observable_counter("refarch.texts.embedded")
        .with_description("Texts that went through the model")
        .with_callback(move |observer| observer.observe(counted.totals().1, &[]))
        .build();
    let counted = Arc::clone(metrics);
    meter
        .u64_observable_gauge("refarch.freshness")
        .with_unit("ms")
        .with_description("Time from statement to searchable, since the start")
        .with_callback(move |observer| {
            let freshness = counted.freshness();
            for (name, quantile) in [("0.5", 0.5), ("0.99", 0.99)] {
                if let Some(ms) = freshness.quantile(quantile) {
                    observer.observe(ms, &[KeyValue::new("quantile", name)]);
                }
            }
        })
        .build();
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
