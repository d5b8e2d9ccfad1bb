//! Measures the throughput from the outbox through SQS, and the number of SQS calls.
//!
//! SQS is the test double of `refarch chaos`, in this process, with a latency for each call. So the double,
//! the database and the measured code share the machine's cores. The database is a private one. Run this
//! bench with
//! `scripts/bench queue`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use refarch::backend;
use refarch::backend::embedded::{Cluster, ClusterOptions};
use refarch::backend::pinecone::{self, Pinecone};
use refarch::backend::postgres::Postgres;
use refarch::backend::postgres::generation::{self, IndexLocation, IndexShape};
use refarch::backend::postgres::ledger::PgLedger;
use refarch::backend::postgres::migrate;
use refarch::backend::postgres::outbox::PgOutbox;
use refarch::backend::postgres::worker_lock;
use refarch::backend::postgres::worker_registry::WorkerRegistration;
use refarch::backend::sqs::{self, Sqs};
use refarch::config::{QueueKind, Settings};
use refarch::double::pinecone::PineconeDouble;
use refarch::double::sqs::{SqsCounts, SqsDouble, SqsFaults};
use refarch::pipeline::clock::{BootClock, Clock};
use refarch::pipeline::embed_scheduler::EmbedScheduler;
use refarch::pipeline::embedder::{BatchSize, Embedder, Embedding, Tokens};
use refarch::pipeline::failure::Result;
use refarch::pipeline::indexer::{self, Indexer};
use refarch::pipeline::lease::Lease;
use refarch::pipeline::metrics::Metrics;
use refarch::pipeline::queue::Queue;
use refarch::pipeline::relay::{self, Relay};
use refarch::secret::Secret;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

/// Length of the vectors. Short, because the bench does not measure the embedder and the index.
const DIMENSIONS: usize = 3;

/// Latencies of an SQS call.
const LATENCIES_MS: [u64; 3] = [0, 5, 20];

/// The statements that made the changes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Load {
    /// One statement for all rows.
    Bulk,
    /// One statement for each row.
    Single,
}

impl Load {
    fn name(self) -> &'static str {
        match self {
            Self::Bulk => "bulk load",
            Self::Single => "single-row statements",
        }
    }
}

struct Arguments {
    rows: u64,
    runs: usize,
    json: Option<PathBuf>,
}

fn arguments() -> Arguments {
    let mut arguments = Arguments { rows: 1_000_000, runs: 5, json: None };
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let mut value = || given.next().unwrap_or_else(|| panic!("{name} needs a value"));
        match name.as_str() {
            "--rows" => arguments.rows = value().parse().expect("--rows takes a number"),
            "--runs" => arguments.runs = value().parse().expect("--runs takes a number"),
            "--json" => arguments.json = Some(value().into()),
            // Cargo passes this argument.
            "--bench" => {}
            other => panic!("unknown argument {other}: use --rows N, --runs N, --json FILE"),
        }
    }
    arguments
}

/// An embedder that returns the same vector for every text, without delay.
struct ConstantEmbedder;

#[async_trait]
impl Embedder for ConstantEmbedder {
    fn dimensions(&self) -> usize {
        DIMENSIONS
    }

    fn model(&self) -> &'static str {
        "constant"
    }

    fn batch_size(&self) -> BatchSize {
        BatchSize::Timed
    }

    async fn tokenize(&self, texts: Vec<Arc<str>>) -> Result<Vec<Tokens>> {
        Ok(texts.into_iter().map(|text| Tokens::Text { count: 1, text }).collect())
    }

    async fn embed(&self, batch: Vec<Tokens>) -> Result<Vec<Embedding>> {
        Ok(batch.iter().map(|_| Embedding::from([1.0, 0.0, 0.0])).collect())
    }
}

struct Bench {
    settings: Settings,
    postgres: Postgres,
    double: SqsDouble,
    queue: Queue,
    rows: u64,
}

impl Bench {
    async fn new(cluster: &Cluster, rows: u64) -> Self {
        let double = SqsDouble::start(1).await.unwrap();
        let urls = double.create("bench", 50);
        let variables = ["SQS_QUEUE_URL", "SQS_BULK_QUEUE_URL", "SQS_DEAD_LETTER_QUEUE_URL"];
        let env: BTreeMap<_, _> = variables.map(str::to_owned).into_iter().zip(urls).collect();
        let settings = Settings::load(None, &env, &[]).unwrap();
        let QueueKind::Sqs(queue) = &settings.queue.kind else { unreachable!("the variables choose SQS") };
        let options = backend::sqs_options(&settings, queue);
        let postgres = Postgres::new(cluster.url(), &settings.database).unwrap();
        migrate::migrate(&postgres, &settings.source, &settings.queue, &shape()).await.unwrap();
        let queue = Sqs::open(sqs::connect_to(&double.url()), postgres.clone(), options).await.unwrap();
        Self { settings, postgres, double, queue: Queue::new(Arc::new(queue)), rows }
    }

    async fn sql(&self, sql: &str) {
        self.postgres.client().await.unwrap().batch_execute(sql).await.unwrap();
    }

    /// Puts changes of all rows into an empty outbox, as the triggers would.
    async fn fill(&self, load: Load) {
        let rows = self.rows;
        self.sql("TRUNCATE refarch.outbox").await;
        match load {
            Load::Bulk => {
                self.sql(&format!(
                    "INSERT INTO refarch.outbox (source, op, ids) SELECT 'products', 'u', array_agg(n::text) \
                     FROM generate_series(1, {rows}) n GROUP BY (n - 1) / 500 ORDER BY min(n)"
                ))
                .await;
            }
            // Each change belongs to its own past transaction.
            Load::Single => {
                self.sql(&format!(
                    "INSERT INTO refarch.outbox (source, op, ids, xid) SELECT 'products', 'u', ARRAY[n::text], n::text::xid8 \
                     FROM generate_series(1, {rows}) n"
                ))
                .await;
            }
        }
        self.sql("VACUUM ANALYZE refarch.outbox").await;
        self.sql("CHECKPOINT").await;
    }

    /// Relays all changes to the queue. Returns the duration.
    async fn relay(&self) -> Duration {
        let set = &self.settings.relay;
        let mut relay = Relay::new(
            Box::new(PgOutbox::shipping(self.postgres.clone(), "products", Arc::clone(&self.queue.jobs))),
            Arc::clone(&self.queue.stats),
            Arc::new(BootClock),
            relay::RelayOptions {
                source: "products".into(),
                changes_per_message: set.pack,
                bulk_threshold: set.bulk_threshold,
                live_bound: set.live_bound,
                poll: set.poll,
                start_timeout: Duration::ZERO,
            },
        );
        let started = Instant::now();
        relay.run(&CancellationToken::new(), true).await.unwrap();
        started.elapsed()
    }

    async fn purge(&self) {
        for lane in ["live", "bulk"] {
            let url = format!("{}/123456789012/bench-{lane}", self.double.url());
            let client = sqs::connect_to(&self.double.url());
            client.purge_queue().queue_url(url).send().await.unwrap();
        }
    }

    /// Measures rows per second from the outbox to the queue.
    async fn throughput(&self, load: Load, latency_ms: u64, runs: usize) -> Value {
        let mut speeds = Vec::new();
        let mut calls = 0;
        for _ in 0..runs {
            self.double.set_faults(SqsFaults::default());
            self.purge().await;
            self.fill(load).await;
            let latency = Duration::from_millis(latency_ms);
            self.double.set_faults(SqsFaults { latency, ..SqsFaults::default() });
            let before = self.double.counts();
            let took = self.relay().await;
            let after = self.double.counts();
            calls = after.send - before.send;
            speeds.push((self.rows as f64 / took.as_secs_f64()).round());
        }
        speeds.sort_by(f64::total_cmp);
        let median = speeds[speeds.len() / 2];
        println!(
            "{:<22} {latency_ms:>3} ms a call: {median:>9} rows/s (runs {speeds:?}), {calls} sends",
            load.name()
        );
        json!({ "load": load.name(), "latency_ms": latency_ms, "rows_per_s": median, "send_calls": calls, "rows": self.rows })
    }

    /// Counts the SQS calls from the outbox to the acknowledged message.
    async fn calls(&self, load: Load) -> Value {
        self.double.set_faults(SqsFaults::default());
        self.purge().await;
        self.sql("UPDATE refarch.ledger SET dirty = true").await;
        self.fill(load).await;
        let before = self.double.counts();
        let relayed = self.relay().await;
        let embedded = self.index().await;
        let after = self.double.counts();
        let SqsCounts { send, receive, delete, extend, other, billed, .. } = after;
        let counts = [
            send - before.send,
            receive - before.receive,
            delete - before.delete,
            extend - before.extend,
            other - before.other,
        ];
        let billed = billed - before.billed;
        let total: u64 = counts.iter().sum();
        let [send, receive, delete, extend, other] = counts;
        println!(
            "{:<22} {total} calls: {send} send, {receive} receive, {delete} delete, {extend} extend, {other} count; {billed} billed requests; \
             relayed in {:.1} s, indexed in {:.1} s",
            load.name(),
            relayed.as_secs_f64(),
            embedded.as_secs_f64()
        );
        json!({ "load": load.name(), "rows": self.rows, "calls": total, "send": send, "receive": receive, "delete": delete,
                "extend": extend, "count": other, "billed": billed, "indexed_s": embedded.as_secs_f64() })
    }

    /// Applies all messages of the queue to a test double of an index. Returns the duration.
    async fn index(&self) -> Duration {
        let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
        let found = generation::find(&self.postgres, &self.settings.source, &shape()).await.unwrap();
        let index = Pinecone::new(pinecone::PineconeOptions {
            host: double.url(),
            api_key: Secret::new("bench"),
            namespace: String::new(),
            timeout: Duration::from_secs(5),
            dimensions: DIMENSIONS,
            text: vec!["description".into()],
            metadata: Vec::new(),
        })
        .unwrap();
        let table = Arc::new(found.table.clone());
        let ledger = PgLedger::new(self.postgres.clone(), table, found.id, found.salt.clone());
        let clock: Arc<dyn Clock> = Arc::new(BootClock);
        let lease = Arc::new(Lease::new(Arc::clone(&clock), self.settings.indexer.lease));
        let metrics = Arc::new(Metrics::default());
        let worker =
            WorkerRegistration::join(self.postgres.clone(), "embed", 2, Arc::clone(&metrics)).await.unwrap();
        let indexer = Arc::new(Indexer::new(
            self.queue.clone(),
            Arc::new(ledger),
            Arc::new(index),
            EmbedScheduler::new(Arc::new(ConstantEmbedder), Duration::from_millis(50), Arc::clone(&clock)),
            metrics,
            Arc::clone(&lease),
            indexer::IndexerOptions {
                source: "products".into(),
                worker: worker.id.clone(),
                workers: 2,
                prefetch: self.settings.indexer.hold,
                poll: self.settings.indexer.poll,
                max_receives: self.settings.queue.max_receives,
                settle: self.settings.indexer.attempt(),
                freshness_poll: Duration::from_secs(1),
                start_timeout: Duration::ZERO,
            },
        ));
        let (stop, over) = (CancellationToken::new(), CancellationToken::new());
        let started = Instant::now();
        let work = async {
            indexer.run(&stop, &CancellationToken::new(), true).await.unwrap();
            over.cancel();
        };
        let kept = worker_lock::keep(&self.postgres, &worker.id, &lease, &over);
        let beating = worker.run(&over);
        let ((), kept, ()) = tokio::join!(work, kept, beating);
        kept.unwrap();
        started.elapsed()
    }
}

fn shape() -> IndexShape {
    IndexShape {
        kind: "pinecone".into(),
        model: "constant".into(),
        dimensions: DIMENSIONS,
        former_model: None,
        location: IndexLocation::default(),
    }
}

#[tokio::main]
async fn main() {
    let Arguments { rows, runs, json } = arguments();
    let runtime = PathBuf::from(std::env::var("REFARCH_RUNTIME_DIR").unwrap_or_else(|_| ".refarch".into()));
    let runtime = std::path::absolute(runtime).unwrap();
    let dir = runtime.join(format!("bench-{}", std::process::id()));
    let options = ClusterOptions { dir: dir.join("postgres"), ..ClusterOptions::in_runtime_dir(&runtime) };
    let cluster = Cluster::join(options).await.unwrap();
    let bench = Bench::new(&cluster, rows).await;
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!("{rows} rows, {runs} runs, {cores} cores");
    let mut relayed = Vec::new();
    for load in [Load::Bulk, Load::Single] {
        for latency_ms in LATENCIES_MS {
            relayed.push(bench.throughput(load, latency_ms, runs).await);
        }
    }
    let insert = format!(
        "INSERT INTO products_with_increment (id, description) SELECT n, 'thing ' || n FROM generate_series(1, {rows}) n"
    );
    bench.sql(&insert).await;
    let mut counted = Vec::new();
    for load in [Load::Bulk, Load::Single] {
        counted.push(bench.calls(load).await);
    }
    bench.postgres.pool.close();
    cluster.destroy().await.unwrap();
    let _ = std::fs::remove_dir_all(&dir);
    if let Some(path) = json {
        let report = json!({ "machine": { "cores": cores }, "benches": { "queue_throughput": relayed, "queue_calls": counted } });
        std::fs::write(&path, report.to_string() + "\n").unwrap();
    }
}
