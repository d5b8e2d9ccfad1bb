//! The indexer: the parts that apply messages, and one step of their work.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::batch::{Batch, StepOutcome};
use super::health::Health;
use super::misdirected::Misdirected;
use super::panic_reports::PanicReports;
use super::poison::Isolation;
use super::throughput::Throughput;
use super::worker_count::Workers;
use super::writer::{Parts, Writer};
use crate::pipeline::change::Lane;
use crate::pipeline::clock::Clock;
use crate::pipeline::embed_scheduler::EmbedScheduler;
use crate::pipeline::failure::Result;
use crate::pipeline::fault::FaultBoard;
use crate::pipeline::index::{FreshnessTurns, VectorIndex};
use crate::pipeline::lease::Lease;
use crate::pipeline::ledger::{Ledger, Swept};
use crate::pipeline::metrics::Metrics;
use crate::pipeline::queue::{JobQueue, Message, Queue, QueueStats};
use crate::pipeline::trace::{BatchTrace, SpanSink};

/// The options of the indexer.
#[derive(Clone, Debug)]
pub struct IndexerOptions {
    /// The source's name: this worker does not apply messages of another source.
    pub source: String,
    /// This worker's name, which no other worker ever had. The ledger records tracked writes under this name.
    pub worker: String,
    /// Embedding threads at the start; [`Indexer::set_workers`] changes their number.
    pub workers: usize,
    /// A lane holds at most the work of this time.
    pub prefetch: Duration,
    /// How often a lane is polled when no wake-up comes.
    pub poll: Duration,
    /// If a message was received more often, none of its rows is read before its change is counted: the last
    /// resort against a change that takes the process down.
    pub max_receives: u32,
    /// After this long an accepted write has been applied, or never will be; the lease included.
    pub settle: Duration,
    /// How often an index whose queries are behind its writes is asked at most how far queries are.
    pub freshness_poll: Duration,
    /// How long the first receive is tried again while it fails with a fatal error that may pass by itself.
    pub start_timeout: Duration,
}

/// Applies jobs to an index.
pub struct Indexer {
    pub(super) queue: Arc<dyn JobQueue>,
    /// For the end of the work when nothing is left.
    pub(super) stats: Arc<dyn QueueStats>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) options: IndexerOptions,
    /// Whether changes succeed at all; decides whether more is received.
    pub(super) health: Arc<Health>,
    /// Sizes groups and receives.
    pub(super) throughput: Throughput,
    pub(super) workers: Workers,
    pub(super) panics: PanicReports,
    pub(super) writer: Arc<Writer>,
    pub(super) isolation: Isolation,
    pub(super) misdirected: Misdirected,
    /// Where the traces of messages go on; none if nothing is traced.
    spans: Option<Arc<dyn SpanSink>>,
}

impl Indexer {
    /// An indexer over these backends.
    #[must_use]
    pub fn new(
        queue: Queue,
        ledger: Arc<dyn Ledger>,
        index: Arc<dyn VectorIndex>,
        scheduler: EmbedScheduler,
        metrics: Arc<Metrics>,
        lease: Arc<Lease>,
        options: IndexerOptions,
    ) -> Self {
        let Queue { jobs, dead_letters, stats } = queue;
        let health: Arc<Health> = Arc::default();
        let clock = Arc::clone(lease.clock());
        let writer = Arc::new(Writer::new(Parts {
            ledger: Arc::clone(&ledger),
            index,
            scheduler,
            metrics,
            lease,
            health: Arc::clone(&health),
            worker: options.worker.clone(),
            settle: options.settle,
            freshness_poll: options.freshness_poll,
        }));
        Self {
            isolation: Isolation::new(
                ledger,
                Arc::clone(&dead_letters),
                Arc::clone(&writer),
                Arc::clone(&health),
                options.max_receives,
            ),
            misdirected: Misdirected::new(
                options.source.clone(),
                Arc::clone(&jobs),
                dead_letters,
                Arc::clone(&clock),
                Arc::clone(&health),
                Arc::clone(&writer.metrics),
            ),
            queue: jobs,
            stats,
            clock,
            workers: Workers::new(options.workers),
            panics: PanicReports::default(),
            options,
            health,
            throughput: Throughput::default(),
            writer,
            spans: None,
        }
    }

    /// The same indexer, which reports faults to this board. Call it before any work.
    #[must_use]
    pub fn reporting(self, faults: Arc<FaultBoard>) -> Self {
        self.health.report_to(faults);
        self
    }

    /// The same indexer, which measures the freshness of an index whose queries are behind its writes only when
    /// it is its turn. Call it before any work.
    #[must_use]
    pub fn sampling(self, turns: Arc<dyn FreshnessTurns>) -> Self {
        self.writer.freshness.take_turns(turns);
        self
    }

    /// The same indexer, which continues the traces of messages if there is a sink.
    #[must_use]
    pub fn tracing(self, spans: Option<Arc<dyn SpanSink>>) -> Self {
        Self { spans, ..self }
    }

    /// Applies messages of one lane and acknowledges them. On an error, unfinished messages stay
    /// unacknowledged.
    pub async fn step(&self, lane: Lane, messages: &[Message]) -> Result<StepOutcome> {
        let mut batch = self.batch(messages);
        self.work(lane, &mut batch).await?;
        Ok(batch.done)
    }

    /// Embeds slices, one at a time, for as long as the future is polled.
    ///
    /// # Errors
    ///
    /// If the embedder panicked.
    pub async fn embed_slices(&self) -> Result<()> {
        self.writer.scheduler.work(&CancellationToken::new()).await
    }

    /// Closes leftover writes, sweeps writes that no worker will close, and abandons writes that the ledger
    /// has under this worker's name but this worker does not know.
    pub async fn sweep(&self) -> Result<Swept> {
        self.writer.sweep().await
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.writer.metrics
    }

    /// A batch of these messages.
    pub(super) fn batch(&self, messages: &[Message]) -> Batch {
        let mut batch = Batch::new(&self.options.source, messages, self.throughput.group_size());
        if self.spans.is_some() {
            let jobs = messages.iter().filter_map(|message| message.body.as_ref().ok());
            let ours = jobs.filter(|job| job.source == self.options.source);
            batch.trace = BatchTrace::of(self.spans.as_ref(), ours);
        }
        batch
    }
}
