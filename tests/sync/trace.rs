//! One trace from the statement until the change is searchable, as a collector receives it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::routing::post;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::metrics::v1::Metric;
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;
use refarch::double::pinecone::PineconeDouble;
use refarch::role::admin::catalogue::{self, Kind};
use tokio::process::Child;

use crate::common::{self, Database, eventually};

const TIMEOUT: Duration = Duration::from_mins(2);

/// The statement whose trace is followed.
const INSERT: &str = "INSERT INTO products_with_increment (id, description) VALUES (7, 'A kettle for tea')";

/// What a collector has received.
#[derive(Clone, Default)]
struct Collector {
    spans: Arc<Mutex<Vec<Span>>>,
    /// By name.
    metrics: Arc<Mutex<BTreeMap<String, Metric>>>,
}

impl Collector {
    /// Starts a collector, and returns it with its address.
    async fn start() -> (Self, String) {
        let collector = Self::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let router = axum::Router::new()
            .route("/v1/traces", post(Self::take_spans))
            .route("/v1/metrics", post(Self::take_metrics))
            .with_state(collector.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        (collector, address)
    }

    #[allow(clippy::unused_async, reason = "a handler of axum")]
    async fn take_spans(State(this): State<Self>, body: Bytes) {
        let request = ExportTraceServiceRequest::decode(body).unwrap();
        for resource in request.resource_spans {
            let attributes = resource.resource.unwrap().attributes;
            assert!(attributes.iter().any(|attribute| attribute.key == "service.name"), "{attributes:?}");
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            this.spans.lock().unwrap().extend(spans);
        }
    }

    #[allow(clippy::unused_async, reason = "a handler of axum")]
    async fn take_metrics(State(this): State<Self>, body: Bytes) {
        let request = ExportMetricsServiceRequest::decode(body).unwrap();
        let scopes = request.resource_metrics.into_iter().flat_map(|resource| resource.scope_metrics);
        let metrics = scopes.flat_map(|scope| scope.metrics).map(|metric| (metric.name.clone(), metric));
        this.metrics.lock().unwrap().extend(metrics);
    }

    /// The spans of each trace, by name.
    fn traces(&self) -> Vec<BTreeMap<String, Span>> {
        let mut traces: BTreeMap<Vec<u8>, BTreeMap<String, Span>> = BTreeMap::new();
        for span in self.spans.lock().unwrap().iter() {
            traces.entry(span.trace_id.clone()).or_default().insert(span.name.clone(), span.clone());
        }
        traces.into_values().collect()
    }

    /// Metrics of the roles of the test that were not sent yet.
    fn missing(&self) -> Vec<&'static str> {
        let sent = self.metrics.lock().unwrap();
        let of_the_roles =
            |roles: &str| ["all", "`listen`", "`embed`"].iter().any(|role| roles.contains(role));
        let wanted = catalogue::ALL.iter().filter(|metric| of_the_roles(metric.roles));
        // Some appear only once something has happened, or with another index.
        let always = wanted.filter(|metric| {
            let help = metric.help();
            !["Missing", "appears with", "outside of the database"].iter().any(|word| help.contains(word))
        });
        always.map(|metric| metric.name).filter(|name| !sent.contains_key(*name)).collect()
    }

    /// Each metric has the kind, the unit and the labels that the catalogue tells.
    fn check_metrics(&self) {
        for (name, metric) in self.metrics.lock().unwrap().iter() {
            let known = catalogue::ALL.iter().find(|known| known.name == name);
            let known = known.unwrap_or_else(|| panic!("{name} is not in the catalogue"));
            let (kind, points): (Kind, Vec<_>) = match metric.data.as_ref().unwrap() {
                Data::Sum(sum) => {
                    assert!(sum.is_monotonic, "{name}");
                    (Kind::Counter, sum.data_points.iter().map(|point| &point.attributes).collect())
                }
                Data::Gauge(gauge) => {
                    (Kind::Gauge, gauge.data_points.iter().map(|point| &point.attributes).collect())
                }
                Data::Histogram(histogram) => {
                    (Kind::Histogram, histogram.data_points.iter().map(|point| &point.attributes).collect())
                }
                other => panic!("{name}: {other:?}"),
            };
            assert_eq!(kind, known.kind, "{name}");
            let unit = match known.unit {
                Some("seconds") => "s",
                Some("bytes") => "By",
                Some("ratio") => "1",
                other => other.unwrap_or_default(),
            };
            assert_eq!(metric.unit, unit, "{name}");
            for attributes in points {
                let labels: Vec<&str> = attributes.iter().map(|attribute| attribute.key.as_str()).collect();
                assert_eq!(labels, known.labels, "{name}");
            }
        }
        let metrics = self.metrics.lock().unwrap();
        let Some(Data::Sum(applied)) = &metrics["refarch_changes_applied_total"].data else { panic!() };
        let live = applied
            .data_points
            .iter()
            .find(|point| point.attributes.iter().any(|label| format!("{:?}", label.value).contains("live")));
        let one = Some(opentelemetry_proto::tonic::metrics::v1::number_data_point::Value::AsDouble(1.0));
        assert_eq!(live.unwrap().value, one);
    }

    /// Waits for a trace with these spans.
    async fn whole(&self, names: &[&str]) -> BTreeMap<String, Span> {
        let find =
            || self.traces().into_iter().find(|trace| names.iter().all(|name| trace.contains_key(*name)));
        common::eventually("a whole trace", TIMEOUT, async || find().is_some()).await;
        find().unwrap()
    }
}

/// The roles as processes that send to a collector.
struct Fleet {
    database: Database,
    env: Vec<(&'static str, String)>,
}

impl Fleet {
    fn spawn(&self, role: &str) -> Child {
        let envs = self.env.iter().map(|(name, value)| (*name, value.as_str()));
        self.database.refarch().arg(role).envs(envs).spawn().unwrap()
    }

    async fn migrate(&self) {
        let envs = self.env.iter().map(|(name, value)| (*name, value.as_str()));
        assert!(self.database.refarch().arg("migrate").envs(envs).status().await.unwrap().success());
    }
}

/// Lets the fleet apply one insert, and checks the trace.
async fn traced(index: Vec<(&'static str, String)>, parts: &[&str]) {
    let (collector, address) = Collector::start().await;
    let database = Database::create().await;
    let client = database.client().await;
    let mut env = vec![
        ("REFARCH_OTLP_ENDPOINT", address),
        ("REFARCH_OTLP_SAMPLE", "1".to_owned()),
        // The SDK's own: send soon.
        ("OTEL_BSP_SCHEDULE_DELAY", "50".to_owned()),
        ("OTEL_METRIC_EXPORT_INTERVAL", "100".to_owned()),
    ];
    env.extend(index);
    let fleet = Fleet { database, env };
    fleet.migrate().await;
    let (listen, embed) = (fleet.spawn("listen"), fleet.spawn("embed"));
    common::run(&client, INSERT).await;

    let names = [&["capture", "queue", "apply"], parts].concat();
    let trace = collector.whole(&names).await;
    let span = |name: &str| &trace[name];
    assert_eq!(span("capture").parent_span_id, Vec::<u8>::new());
    assert_eq!(span("queue").parent_span_id, span("capture").span_id);
    assert_eq!(span("apply").parent_span_id, span("queue").span_id);
    for part in parts {
        assert_eq!(span(part).parent_span_id, span("apply").span_id, "{part}");
    }
    for (name, span) in &trace {
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano, "{name}");
        let attribute = |key: &str| span.attributes.iter().any(|attribute| attribute.key == key);
        assert!(attribute("lane") && attribute("changes"), "{name}: {:?}", span.attributes);
        let took = (span.end_time_unix_nano - span.start_time_unix_nano) as f64 / 1e6;
        let since = (span.start_time_unix_nano - trace["capture"].start_time_unix_nano) as f64 / 1e6;
        println!("{name:<12} from {since:>8.1} ms, {took:>8.1} ms");
    }
    // One after the other, as far as one process's clock tells.
    let ordered: Vec<u64> = parts.iter().map(|part| span(part).end_time_unix_nano).collect();
    assert!(ordered.is_sorted(), "{ordered:?}");

    let mut missing = Vec::new();
    eventually("every metric of both roles", TIMEOUT, async || {
        missing = collector.missing();
        missing.is_empty()
    })
    .await;
    for mut role in [listen, embed] {
        kill(Pid::from_raw(role.id().unwrap() as i32), Signal::SIGTERM).unwrap();
        assert!(role.wait().await.unwrap().success());
    }
    collector.check_metrics();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_goes_from_the_statement_to_searchable_in_pgvector() {
    traced(Vec::new(), &["read", "embed", "write", "searchable"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_goes_from_the_statement_to_searchable_in_pinecone() {
    let double = PineconeDouble::start(384, 1).await.unwrap();
    // Writes are found a moment after they are answered.
    double.set_delay(Duration::from_millis(300));
    let index = vec![
        ("PINECONE_INDEX", "shop".to_owned()),
        ("PINECONE_API_KEY", "test".to_owned()),
        ("REFARCH_INDEX_CONTROLLER", double.url()),
        ("REFARCH_INDEX_FRESHNESS_MS", "100".to_owned()),
    ];
    traced(index, &["read", "embed", "write", "close", "searchable"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_stops_nothing() {
    let database = Database::create().await;
    let client = database.client().await;
    let address = format!("http://127.0.0.1:{}", common::free_port());
    let env = vec![("REFARCH_OTLP_ENDPOINT", address), ("REFARCH_OTLP_SAMPLE", "1".to_owned())];
    let fleet = Fleet { database, env };
    fleet.migrate().await;
    let (listen, embed) = (fleet.spawn("listen"), fleet.spawn("embed"));
    common::run(&client, INSERT).await;
    let settled = "SELECT count(*) FROM refarch.ledger WHERE id = '7' AND NOT deleted";
    common::eventually("the row is indexed", TIMEOUT, async || common::number(&client, settled).await == 1)
        .await;
    for mut role in [listen, embed] {
        kill(Pid::from_raw(role.id().unwrap() as i32), Signal::SIGTERM).unwrap();
        assert!(role.wait().await.unwrap().success());
    }
}
