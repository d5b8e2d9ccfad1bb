//! One module for each backend. This module alone chooses the backends by the settings; no role does.

pub mod embedded;
mod http;
pub mod http_embedder;
pub mod minilm;
mod model;
pub mod pgmq;
pub mod pgvector;
pub mod pinecone;
pub mod postgres;
pub mod sqs;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::{Index, PineconeIndex, QueueKind, Settings, SqsQueue};
use crate::pipeline::clock::BootClock;
use crate::pipeline::failure::{Class, Result};
use crate::pipeline::index::{VectorIndex, Writes};
use crate::pipeline::outbox::Outbox;
use crate::pipeline::queue::Queue;
use crate::pipeline::retry::Backoff;
use embedded::Cluster;
use model::known_shape;
pub use model::{LoadedModel, index_shape, model_dir};
use pgmq::Pgmq;
use pgvector::PgVector;
use pinecone::Pinecone;
use postgres::Postgres;
use postgres::generation::{self, Generation, IndexLocation, IndexShape};
use postgres::ledger::PgLedger;
use postgres::migrate::uninstall::{self, UninstallOptions, Uninstalled};
use postgres::migrate::{self, Report};
use postgres::outbox::PgOutbox;
use postgres::ownership;
use sqs::Sqs;

/// How long a migration waits for a check of the queues. The migration does not need the check.
const QUEUE_CHECK_TIMEOUT: Duration = Duration::from_secs(15);

/// The database in use, and the private cluster if the settings name no database.
pub struct Database {
    /// The connections.
    pub postgres: Postgres,
    cluster: Option<Cluster>,
}

impl Database {
    /// Connects to the configured database. Without one, joins the private cluster and starts it if needed.
    pub async fn open(settings: &Settings) -> anyhow::Result<Self> {
        let (url, cluster) = embedded::database_url(settings).await?;
        let opened = async {
            let postgres = Postgres::new(&url, &settings.database)?;
            with_connect_retry(settings, async || postgres.check().await).await?;
            Ok(postgres)
        };
        match opened.await {
            Ok(postgres) => Ok(Self { postgres, cluster }),
            Err(error) => {
                if let Some(cluster) = cluster {
                    cluster.leave().await?;
                }
                Err(error)
            }
        }
    }

    /// Whether this is the private cluster, which is set up without a request.
    #[must_use]
    pub fn is_private(&self) -> bool {
        self.cluster.is_some()
    }

    /// Closes the connections. The last process that leaves the private cluster stops it.
    pub async fn close(self) -> anyhow::Result<()> {
        self.postgres.pool.close();
        match self.cluster {
            Some(cluster) => cluster.leave().await,
            None => Ok(()),
        }
    }
}

/// Repeats the work on retryable errors for at most `database.connect_timeout_s`: a database that restarts is
/// soon back.
pub async fn with_connect_retry<T>(settings: &Settings, work: impl AsyncFn() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let timeout = settings.database.connect_timeout;
    let mut backoff = Backoff::default();
    loop {
        match work().await {
            Err(error) if error.class() == Class::Retryable && started.elapsed() < timeout => {
                tokio::time::sleep(backoff.next(&BootClock)).await;
            }
            result => return result,
        }
    }
}

/// Where the index is by the settings. `host` is the host that was found by the index's name, if there is
/// one.
fn configured_location(settings: &Settings, host: Option<String>) -> IndexLocation {
    let Index::Pinecone(index) = &settings.index else { return IndexLocation::default() };
    let (name, host) = match index.host() {
        "" => (index.name.clone(), host.unwrap_or_default()),
        given => (String::new(), given.to_owned()),
    };
    let namespace = pinecone::location::normalize_namespace(&index.namespace).to_owned();
    IndexLocation { name, host: pinecone::location::normalize_host(&host), namespace, is_same_index: false }
}

/// Where the index is by the settings. If the recorded address differs, the ownership record decides whether
/// this is the index that was written to.
async fn compared_location(
    postgres: &Postgres,
    settings: &Settings,
    shape: &IndexShape,
) -> Result<IndexLocation> {
    let host = match named_index(settings, shape.dimensions) {
        Some(options) if pinecone::control::exists(&options).await? => {
            Some(pinecone::control::host(&options).await?)
        }
        _ => None,
    };
    let mut location = configured_location(settings, host.clone());
    let source = &settings.source.name;
    if let Index::Pinecone(index) = &settings.index
        && let Some(recorded) = generation::recorded_location(postgres, source).await?
        && !recorded.is(&location)
        && !location.host.is_empty()
    {
        let host = host.unwrap_or_else(|| index.host().to_owned());
        let index = pinecone_at(settings, index, host, shape.dimensions)?;
        location.is_same_index = ownership::is_owned_by(postgres, source, &index).await?;
    }
    Ok(location)
}

fn pinecone_at(
    settings: &Settings,
    index: &PineconeIndex,
    host: String,
    dimensions: usize,
) -> Result<Pinecone> {
    Pinecone::new(pinecone::PineconeOptions {
        host,
        api_key: index.api_key.clone(),
        namespace: index.namespace.clone(),
        timeout: index.timeout,
        dimensions,
        text: settings.source.text.clone(),
        metadata: settings.source.metadata.clone(),
    })
}

/// Brings the database up to date with these settings, and makes a missing index.
pub async fn migrate(postgres: &Postgres, settings: &Settings) -> Result<Report> {
    migrate_with(postgres, settings, &migrate::MigrateOptions::default()).await
}

/// The same with options.
pub async fn migrate_with(
    postgres: &Postgres,
    settings: &Settings,
    options: &migrate::MigrateOptions,
) -> Result<Report> {
    migrate_to(postgres, settings, index_shape(settings).await?, options).await
}

/// The same where no other model is to be looked for: an embedding server is only asked for what the database does
/// not know of its model.
pub async fn migrate_as_known(postgres: &Postgres, settings: &Settings) -> Result<Report> {
    let shape = known_shape(postgres, settings).await?;
    migrate_to(postgres, settings, shape, &migrate::MigrateOptions::default()).await
}

async fn migrate_to(
    postgres: &Postgres,
    settings: &Settings,
    mut shape: IndexShape,
    options: &migrate::MigrateOptions,
) -> Result<Report> {
    shape.location = compared_location(postgres, settings, &shape).await?;
    // The index comes before the database, so that an index of the wrong shape does not cost the rows that
    // are indexed so far. A rehearsal comes before the index, so that a migration that is refused makes no
    // index.
    let created = match named_index(settings, shape.dimensions) {
        Some(named) => {
            migrate::rehearse(postgres, &settings.source, &settings.queue, &shape, options).await?;
            let created = pinecone::control::ensure(&named).await?;
            shape.location.host = pinecone::location::normalize_host(&pinecone::control::host(&named).await?);
            created
        }
        None => false,
    };
    let report = migrate::migrate_with(postgres, &settings.source, &settings.queue, &shape, options).await?;
    Ok(with_queues(with_index(report, settings, created), settings).await)
}

/// Reports what [`migrate_with`] would do. Nothing is changed.
pub async fn plan_migration(
    postgres: &Postgres,
    settings: &Settings,
    options: &migrate::MigrateOptions,
) -> Result<Report> {
    let mut shape = index_shape(settings).await?;
    shape.location = compared_location(postgres, settings, &shape).await?;
    let missing = match named_index(settings, shape.dimensions) {
        Some(options) => !pinecone::control::exists(&options).await?,
        None => false,
    };
    let report = migrate::plan(postgres, &settings.source, &settings.queue, &shape, options).await?;
    Ok(with_queues(with_index(report, settings, missing), settings).await)
}

fn with_index(mut report: Report, settings: &Settings, created: bool) -> Report {
    if created {
        let name = settings.index.pinecone().map_or("", |index| &index.name);
        report.created.push(format!("index {name}"));
    }
    report
}

/// Adds warnings about the queues' own configuration. The role that migrates need not have access to the
/// queues.
async fn with_queues(mut report: Report, settings: &Settings) -> Report {
    if let QueueKind::Sqs(queue) = &settings.queue.kind {
        let options = sqs_options(settings, queue);
        let remarks = async { sqs::configuration_warnings(&sqs::connect(&options).await?, &options).await };
        match tokio::time::timeout(QUEUE_CHECK_TIMEOUT, remarks).await {
            Ok(Ok((warnings, notes))) => {
                report.warnings.extend(warnings);
                report.notes.extend(notes);
            }
            Ok(Err(error)) => report.warnings.push(format!("cannot check the queues: {error}")),
            Err(_) => report.warnings.push("cannot check the queues: no answer in time".into()),
        }
    }
    report
}

/// Removes everything of ours from the database, except for the user's table.
pub async fn uninstall(
    postgres: &Postgres,
    settings: &Settings,
    options: UninstallOptions,
) -> Result<Uninstalled> {
    let mut done = uninstall::uninstall(postgres, &settings.queue, options).await?;
    if settings.index.pinecone().is_some() && !done.removed.is_empty() {
        done.notes.push("records in Pinecone stay: delete the index or its namespaces there".into());
    }
    Ok(done)
}

/// The index to find or make by its name. `None` for pgvector, or if the settings give the host.
fn named_index(settings: &Settings, dimensions: usize) -> Option<pinecone::control::ControlPlaneOptions> {
    let index = settings.index.pinecone().filter(|index| index.host().is_empty())?;
    Some(pinecone::control::ControlPlaneOptions {
        controller: index.controller.clone(),
        api_key: index.api_key.clone(),
        name: index.name.clone(),
        dimensions,
        cloud: index.cloud.clone(),
        region: index.region.clone(),
    })
}

async fn open_queue(postgres: &Postgres, settings: &Settings) -> Result<Queue> {
    let set = &settings.queue;
    Ok(match &set.kind {
        QueueKind::Pgmq => Queue::new(Arc::new(Pgmq::new(postgres.clone(), &set.name, set.visibility))),
        QueueKind::Sqs(queue) => {
            let options = sqs_options(settings, queue);
            let client = sqs::connect(&options).await?;
            Queue::new(Arc::new(Sqs::open(client, postgres.clone(), options).await?))
        }
    })
}

/// The settings of the queue on SQS.
#[must_use]
pub fn sqs_options(settings: &Settings, queue: &SqsQueue) -> sqs::SqsOptions {
    let named = |url: &str| (!url.is_empty()).then(|| url.to_owned());
    sqs::SqsOptions {
        url: queue.url.clone(),
        bulk_url: named(&queue.bulk_url),
        dead_url: named(&queue.dead_url),
        visibility: settings.queue.visibility,
        wait: queue.wait,
        shared_bound: queue.shared_bound,
        max_receives: settings.queue.max_receives,
        source: settings.source.name.clone(),
    }
}

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
    /// The prefix of pgmq's queues, if the queue is pgmq.
    pgmq: Option<String>,
    /// The source in the settings.
    pub source: Arc<crate::config::Source>,
    /// The last count of a large table's rows, for the status.
    counted: Arc<postgres::source_rows::Counted>,
    /// How long a round of the proof takes; `None`: the proof is off.
    proof_period: Option<Duration>,
}

impl Backends {
    /// Finds the active target and opens its backends. No embedding server is asked for what the database knows of
    /// its model.
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
            None => known_shape(postgres, settings).await?,
        };
        Self::build(postgres, settings, queue, shape, false).await
    }

    /// The same, for reading only. If the index's host cannot be found, the recorded place is used.
    pub async fn open_read_only(postgres: &Postgres, settings: &Settings) -> Result<Self> {
        let queue = open_queue(postgres, settings).await?;
        let shape = known_shape(postgres, settings).await?;
        Self::build(postgres, settings, queue, shape, true).await
    }

    /// Opens the backends around an open queue.
    pub async fn with_queue(postgres: &Postgres, settings: &Settings, queue: Queue) -> Result<Self> {
        let shape = known_shape(postgres, settings).await?;
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
        let index: Arc<dyn VectorIndex> = match &settings.index {
            Index::Pgvector(index) => Arc::new(PgVector::new(
                postgres.clone(),
                Arc::clone(&table),
                generation.salt.clone(),
                generation.id,
                pgvector::PgVectorOptions {
                    graph_min_rows: index.graph_min_rows,
                    graph_max_backlog: index.graph_max_backlog,
                    ef_search: index.ef_search,
                    acknowledged_in_same_log: settings.queue.is_pgmq(),
                },
            )),
            Index::Pinecone(index) => Arc::new(pinecone_at(settings, index, host, generation.dimensions)?),
        };
        let ledger = Arc::new(PgLedger::new(postgres.clone(), table, generation.id, generation.salt.clone()));
        Ok(Self {
            postgres: postgres.clone(),
            generation: Arc::new(generation),
            ledger,
            queue,
            index,
            pgmq: settings.queue.is_pgmq().then(|| settings.queue.name.clone()),
            source: Arc::new(settings.source.clone()),
            counted: Arc::default(),
            proof_period: settings.audit.period,
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
        let Self { postgres, source, generation, queue, index, counted, proof_period, .. } = self;
        postgres::status::read(postgres, source, generation, queue, &**index, counted, *proof_period).await
    }

    /// The state of the proof.
    pub async fn proof(&self) -> Result<postgres::proof::Proof> {
        postgres::proof::Proof::read(&self.postgres, self.generation.id, self.proof_period).await
    }

    /// Whether dead letters can be read without hiding them from other readers for a while.
    #[must_use]
    pub fn dead_letters_are_open(&self) -> bool {
        self.pgmq.is_some()
    }
}
