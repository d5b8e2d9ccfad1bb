//! Opens the backends of one source.

use std::sync::Arc;
use std::time::Duration;

use super::location::{configured_location, named_index, pinecone_at};
use super::model::{LoadedModel, recorded_shape};
use super::pgvector::{self, PgVector};
use super::pinecone;
use super::postgres::generation::{self, Generation, IndexShape};
use super::postgres::ledger::PgLedger;
use super::postgres::outbox::PgOutbox;
use super::postgres::products::VectorSource;
use super::postgres::{self, Postgres};
use super::queue::open_queue;
use crate::config::{Index, PineconeIndex, Settings};
use crate::pipeline::failure::Result;
use crate::pipeline::index::{VectorIndex, Writes};
use crate::pipeline::outbox::Outbox;
use crate::pipeline::queue::{Backlog, Queue};

/// The backends of one source and its active target.
#[derive(Clone)]
pub struct Backends {
    /// Connections.
    pub postgres: Postgres,
    /// Source, target and salt.
    pub generation: Arc<Generation>,
    /// Source and ledger, read together.
    pub ledger: Arc<PgLedger>,
    /// The queue: its messages, its dead letters, and how full it is.
    pub queue: Queue,
    /// The vector index.
    pub index: Arc<dyn VectorIndex>,
    /// The vectors, if they are in the source's database.
    pub vectors: Option<Arc<dyn VectorSource>>,
    /// The prefix of pgmq's queues, if the queue is pgmq.
    pgmq: Option<String>,
    /// The source in the settings.
    pub source: Arc<crate::config::Source>,
    /// What the last status found out, for the next one.
    remembered: Arc<postgres::status::Remembered>,
    /// How long a round of the proof takes; `None`: the proof is off.
    proof_period: Option<Duration>,
    /// How often the worker that runs the proof checks capture; `None`: never.
    capture_check: Option<Duration>,
}

impl Backends {
    /// Finds the active target and opens its backends. No embedding server is asked: the database knows what the
    /// index was made with.
    pub async fn open(postgres: &Postgres, settings: &Settings) -> Result<Self> {
        Self::open_for(postgres, settings, None).await
    }

    /// The same for a model that is loaded, if one is: an index of another model's vectors is refused.
    pub async fn open_for(
        postgres: &Postgres,
        settings: &Settings,
        model: Option<&LoadedModel>,
    ) -> Result<Self> {
        let queue = open_queue(postgres, settings).await?;
        let shape = match model {
            Some(model) => model.shape(settings).await?,
            None => recorded_shape(postgres, settings).await?,
        };
        Self::build(postgres, settings, queue, shape, false).await
    }

    /// The same, for reading only. If the index's host cannot be found, the recorded place is used.
    pub async fn open_read_only(postgres: &Postgres, settings: &Settings) -> Result<Self> {
        let queue = open_queue(postgres, settings).await?;
        let shape = recorded_shape(postgres, settings).await?;
        Self::build(postgres, settings, queue, shape, true).await
    }

    /// Opens the backends around an open queue.
    pub async fn with_queue(postgres: &Postgres, settings: &Settings, queue: Queue) -> Result<Self> {
        let shape = recorded_shape(postgres, settings).await?;
        Self::build(postgres, settings, queue, shape, false).await
    }

    async fn build(
        postgres: &Postgres,
        settings: &Settings,
        queue: Queue,
        mut shape: IndexShape,
        read_only: bool,
    ) -> Result<Self> {
        // A message that was deleted in another service stays deleted, even if a crash of the database loses
        // the work that was done for it. So commits wait for the disk.
        let waiting = (!settings.queue.is_pgmq()).then(|| postgres.waiting_for_the_disk());
        let postgres = waiting.as_ref().unwrap_or(postgres);
        let host = match named_index(settings, shape.dimensions) {
            Some(options) => match pinecone::control::host(&options).await {
                Err(error) if read_only => {
                    let recorded = generation::recorded_location(postgres, &settings.source.name).await?;
                    let recorded = recorded
                        .filter(|location| location.name == options.name && !location.host.is_empty());
                    tracing::warn!(%error, "cannot look up the index: using its recorded host if there is one");
                    recorded.ok_or(error)?.host
                }
                found => found?,
            },
            None => settings.index.pinecone().map_or("", PineconeIndex::host).to_owned(),
        };
        shape.location = configured_location(settings, Some(host.clone()));
        let generation = generation::find(postgres, &settings.source, &shape).await?;
        let table = Arc::new(generation.table.clone());
        let mut vectors: Option<Arc<dyn VectorSource>> = None;
        let index: Arc<dyn VectorIndex> = match &settings.index {
            Index::Pgvector(index) => {
                let index = Arc::new(PgVector::new(
                    postgres.clone(),
                    Arc::clone(&table),
                    generation.salt.clone(),
                    generation.id,
                    pgvector::PgVectorOptions {
                        method: index.search,
                        exact_limit: index.exact_limit,
                        recall: index.recall,
                        build_memory: index.build_memory,
                        graph_min_rows: index.graph_min_rows,
                        graph_max_backlog: index.graph_max_backlog,
                        ef_search: index.ef_search,
                        acknowledged_in_same_log: settings.queue.is_pgmq(),
                    },
                ));
                vectors = Some(Arc::clone(&index) as _);
                index
            }
            Index::Pinecone(index) => Arc::new(pinecone_at(settings, index, host, generation.dimensions)?),
        };
        let ledger = Arc::new(PgLedger::new(postgres.clone(), table, generation.id, generation.salt.clone()));
        Ok(Self {
            postgres: postgres.clone(),
            generation: Arc::new(generation),
            ledger,
            queue,
            index,
            vectors,
            pgmq: settings.queue.is_pgmq().then(|| settings.queue.name.clone()),
            source: Arc::new(settings.source.clone()),
            remembered: Arc::default(),
            proof_period: settings.audit.period,
            capture_check: settings.audit.armed,
        })
    }

    /// The outbox that feeds the queue. Listens for wake-ups for as long as it exists.
    #[must_use]
    pub fn outbox(&self) -> Box<dyn Outbox> {
        let (postgres, source) = (self.postgres.clone(), &self.generation.table.name);
        Box::new(match &self.pgmq {
            Some(prefix) => PgOutbox::new(postgres, source, prefix),
            None => PgOutbox::shipping(postgres, source, Arc::clone(&self.queue.jobs)),
        })
    }

    /// Whether writes to the index are transactional, so that no attempts are recorded.
    #[must_use]
    pub fn index_is_transactional(&self) -> bool {
        matches!(self.index.writes(), Writes::Transactional(_))
    }

    /// Counts, backlog, freshness and workers.
    pub async fn status(&self) -> Result<postgres::status::Status> {
        let Self { postgres, source, generation, queue, index, remembered, proof_period, .. } = self;
        postgres::status::read(postgres, source, generation, queue, &**index, remembered, *proof_period).await
    }

    /// Changes in the outbox, and those in both lanes of the queue. What moves on meanwhile is counted twice rather than
    /// never.
    pub async fn backlog(&self) -> Result<(u64, Backlog)> {
        let pending = postgres::outbox::pending(&self.postgres, &self.generation.table.name).await?.changes;
        Ok((pending, Backlog::of_both_lanes(&*self.queue.stats).await?))
    }

    /// The state of the proof.
    pub async fn proof(&self) -> Result<postgres::proof::Proof> {
        postgres::proof::Proof::read(&self.postgres, self.generation.id, self.proof_period).await
    }

    /// How often a running worker checks capture, and captures new parts of the table; `None`: never.
    #[must_use]
    pub fn capture_check(&self) -> Option<Duration> {
        self.capture_check
    }

    /// Whether dead letters can be read without hiding them from other readers for a while.
    #[must_use]
    pub fn dead_letters_are_open(&self) -> bool {
        self.pgmq.is_some()
    }
}
