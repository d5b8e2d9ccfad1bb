//! One module for each backend. Which of them the settings choose is decided here, and nowhere else by a role.

pub mod embedded;
pub mod http_embedder;
pub mod minilm;
pub mod model;
pub mod pgmq;
pub mod pgvector;
pub mod pinecone;
pub mod postgres;
pub mod sqs;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::{IndexKind, QueueKind, Settings};
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
use postgres::ledger::PgLedger;
use postgres::lineage;
use postgres::migrate::uninstall::{self, How, Uninstalled};
use postgres::migrate::{self, Report};
use postgres::outbox::PgOutbox;
use postgres::target::{self, IndexShape, Place, Target};
use sqs::Sqs;

/// How long a migration waits for a look at the queues, which it can do without.
const LOOK_AT_QUEUES: Duration = Duration::from_secs(15);

/// The database in use, and the private cluster when it is ours.
pub struct Database {
    /// Its connections.
    pub postgres: Postgres,
    cluster: Option<Cluster>,
}

impl Database {
    /// Connects to the configured database, or joins (and starts, when nobody has) the private one.
    pub async fn open(settings: &Settings) -> anyhow::Result<Self> {
        let (url, cluster) = embedded::database_url(settings).await?;
        let opened = async {
            let postgres = Postgres::new(&url, &settings.database)?;
            patiently(settings, async || postgres.check().await).await?;
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

    /// Whether this is the private cluster, which is ours to set up unasked.
    #[must_use]
    pub fn is_private(&self) -> bool {
        self.cluster.is_some()
    }

    /// Closes the connections; the last to leave the private cluster stops it.
    pub async fn close(self) -> anyhow::Result<()> {
        self.postgres.pool.close();
        match self.cluster {
            Some(cluster) => cluster.leave().await,
            None => Ok(()),
        }
    }
}

/// Tries for as long as `database.connect_timeout_s` allows: a database that is restarted is back in
/// a moment.
pub async fn patiently<T>(settings: &Settings, work: impl AsyncFn() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let patience = Duration::from_secs(settings.database.connect_timeout_s);
    let mut backoff = Backoff::default();
    loop {
        match work().await {
            Err(error) if error.class == Class::Retryable && started.elapsed() < patience => {
                tokio::time::sleep(backoff.next(&error, &BootClock)).await;
            }
            result => return result,
        }
    }
}

/// Where the settings have the index; `host` is where it was found by its name, if it is there.
fn place(settings: &Settings, host: Option<String>) -> Place {
    let index = &settings.index;
    if index.kind != IndexKind::Pinecone {
        return Place::default();
    }
    let (name, host) = match index.host.trim() {
        "" => (index.name.clone(), host.unwrap_or_default()),
        given => (String::new(), given.to_owned()),
    };
    let namespace = pinecone::place::spelled(&index.namespace).to_owned();
    Place { name, host: pinecone::place::host(&host), namespace, is_known: false }
}

/// The place in the settings, and whether the index there is the one that was written to, by its note, if its
/// address is another.
async fn compared_place(postgres: &Postgres, settings: &Settings, shape: &IndexShape) -> Result<Place> {
    let host = match named_index(settings, shape.dimensions) {
        Some(options) if pinecone::control::exists(&options).await? => {
            Some(pinecone::control::host(&options).await?)
        }
        _ => None,
    };
    let mut place = place(settings, host.clone());
    let source = &settings.source.name;
    if let Some(recorded) = target::recorded_place(postgres, source).await?
        && !recorded.is(&place)
        && !place.host.is_empty()
    {
        let host = host.unwrap_or_else(|| settings.index.host.trim().to_owned());
        let index = pinecone_at(settings, host, shape.dimensions)?;
        place.is_known = lineage::is_known(postgres, source, &index).await?;
    }
    Ok(place)
}

fn pinecone_at(settings: &Settings, host: String, dimensions: usize) -> Result<Pinecone> {
    Pinecone::new(pinecone::Options {
        host,
        api_key: settings.index.api_key.clone(),
        namespace: settings.index.namespace.clone(),
        timeout: Duration::from_millis(settings.index.timeout_ms),
        dimensions,
        text: settings.source.text.clone(),
        metadata: settings.source.metadata.clone(),
    })
}

/// Brings the database up to date with these settings, and makes an index that is missing.
pub async fn migrate(postgres: &Postgres, settings: &Settings) -> Result<Report> {
    migrate_with(postgres, settings, &migrate::Options::default()).await
}

/// The same, with what it may do besides.
pub async fn migrate_with(
    postgres: &Postgres,
    settings: &Settings,
    options: &migrate::Options,
) -> Result<Report> {
    migrate_to(postgres, settings, index_shape(settings).await?, options).await
}

/// The same where no other model is to be looked for: an embedding server is only asked for what the database does
/// not know of its model.
pub async fn migrate_as_known(postgres: &Postgres, settings: &Settings) -> Result<Report> {
    let shape = known_shape(postgres, settings).await?;
    migrate_to(postgres, settings, shape, &migrate::Options::default()).await
}

async fn migrate_to(
    postgres: &Postgres,
    settings: &Settings,
    mut shape: IndexShape,
    options: &migrate::Options,
) -> Result<Report> {
    shape.place = compared_place(postgres, settings, &shape).await?;
    // The index first: one of the wrong shape must not cost the rows that are indexed so far. And before it, what
    // is refused.
    let made = match named_index(settings, shape.dimensions) {
        Some(named) => {
            migrate::rehearse(postgres, &settings.source, &settings.queue, &shape, options).await?;
            let made = pinecone::control::ensure(&named).await?;
            shape.place.host = pinecone::place::host(&pinecone::control::host(&named).await?);
            made
        }
        None => false,
    };
    let report = migrate::migrate_with(postgres, &settings.source, &settings.queue, &shape, options).await?;
    Ok(with_queues(with_index(report, settings, made), settings).await)
}

/// What [`migrate_with`] would do; nothing is changed.
pub async fn plan_migration(
    postgres: &Postgres,
    settings: &Settings,
    options: &migrate::Options,
) -> Result<Report> {
    let mut shape = index_shape(settings).await?;
    shape.place = compared_place(postgres, settings, &shape).await?;
    let missing = match named_index(settings, shape.dimensions) {
        Some(options) => !pinecone::control::exists(&options).await?,
        None => false,
    };
    let report = migrate::plan(postgres, &settings.source, &settings.queue, &shape, options).await?;
    Ok(with_queues(with_index(report, settings, missing), settings).await)
}

fn with_index(mut report: Report, settings: &Settings, made: bool) -> Report {
    if made {
        report.created.push(format!("index {}", settings.index.name));
    }
    report
}

/// Adds what the queues' own settings may lose. Who migrates need not be allowed to see the queues.
async fn with_queues(mut report: Report, settings: &Settings) -> Report {
    if settings.queue.kind == QueueKind::Sqs {
        let options = sqs_options(settings);
        let remarks = async { sqs::remarks(&sqs::connect(&options).await?, &options).await };
        match tokio::time::timeout(LOOK_AT_QUEUES, remarks).await {
            Ok(Ok((warnings, notes))) => {
                report.warnings.extend(warnings);
                report.notes.extend(notes);
            }
            Ok(Err(error)) => report.warnings.push(format!("cannot look at the queues: {error}")),
            Err(_) => report.warnings.push("cannot look at the queues: no answer in time".into()),
        }
    }
    report
}

/// Takes everything of ours out of the database, but for the user's table.
pub async fn uninstall(postgres: &Postgres, settings: &Settings, how: How) -> Result<Uninstalled> {
    let mut done = uninstall::uninstall(postgres, &settings.queue, how).await?;
    if settings.index.kind == IndexKind::Pinecone && !done.removed.is_empty() {
        done.notes.push("records in Pinecone stay: delete the index or its namespaces there".into());
    }
    Ok(done)
}

/// The index to find or make by its name; none if it is not a service's or is given by its host.
fn named_index(settings: &Settings, dimensions: usize) -> Option<pinecone::control::Options> {
    let is_named = settings.index.kind == IndexKind::Pinecone && settings.index.host.trim().is_empty();
    is_named.then(|| control_options(settings, dimensions))
}

fn control_options(settings: &Settings, dimensions: usize) -> pinecone::control::Options {
    pinecone::control::Options {
        controller: settings.index.controller.clone(),
        api_key: settings.index.api_key.clone(),
        name: settings.index.name.clone(),
        dimensions,
        cloud: settings.index.cloud.clone(),
        region: settings.index.region.clone(),
    }
}

async fn open_queue(postgres: &Postgres, settings: &Settings) -> Result<Queue> {
    Ok(match settings.queue.kind {
        QueueKind::Pgmq => Queue::new(Arc::new(Pgmq::new(
            postgres.clone(),
            &settings.queue.name,
            Duration::from_secs(settings.queue.visibility_s),
        ))),
        QueueKind::Sqs => {
            let options = sqs_options(settings);
            let client = sqs::connect(&options).await?;
            Queue::new(Arc::new(Sqs::open(client, postgres.clone(), options).await?))
        }
    })
}

/// What the queue on SQS needs of the settings.
#[must_use]
pub fn sqs_options(settings: &Settings) -> sqs::Options {
    let named = |url: &str| (!url.is_empty()).then(|| url.to_owned());
    let queue = &settings.queue;
    sqs::Options {
        url: queue.url.clone(),
        bulk_url: named(&queue.bulk_url),
        dead_url: named(&queue.dead_url),
        visibility: Duration::from_secs(queue.visibility_s),
        wait: Duration::from_secs(queue.wait_s),
        shared_bound: queue.shared_bound,
        max_receives: queue.max_receives,
        source: settings.source.name.clone(),
    }
}

/// The backends of one source and its active target.
#[derive(Clone)]
pub struct Backends {
    /// Connections.
    pub postgres: Postgres,
    /// Source, target and salt.
    pub target: Arc<Target>,
    /// Source and ledger, read together.
    pub ledger: Arc<PgLedger>,
    /// The queue: its messages, its dead letters, and how full it is.
    pub queue: Queue,
    /// The vector index.
    pub index: Arc<dyn VectorIndex>,
    /// Prefix of pgmq's queues, if that is the queue.
    pgmq: Option<String>,
    /// The source as the settings have it.
    pub source: Arc<crate::config::Source>,
    /// The rows of a large table, for the status.
    counted: Arc<postgres::status::Counted>,
    /// How long a round of the proof takes.
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
        Self::around(postgres, settings, queue, shape, false).await
    }

    /// The same, to look at: an index that nobody says the place of is taken to be where it was.
    pub async fn open_to_look(postgres: &Postgres, settings: &Settings) -> Result<Self> {
        let queue = open_queue(postgres, settings).await?;
        let shape = known_shape(postgres, settings).await?;
        Self::around(postgres, settings, queue, shape, true).await
    }

    /// Opens the backends around a queue that is open already.
    pub async fn with_queue(postgres: &Postgres, settings: &Settings, queue: Queue) -> Result<Self> {
        let shape = known_shape(postgres, settings).await?;
        Self::around(postgres, settings, queue, shape, false).await
    }

    async fn around(
        postgres: &Postgres,
        settings: &Settings,
        queue: Queue,
        mut shape: IndexShape,
        to_look: bool,
    ) -> Result<Self> {
        // A message of another service stays deleted when the database forgets what it did for it.
        let waiting = (settings.queue.kind != QueueKind::Pgmq).then(|| postgres.waiting_for_the_disk());
        let postgres = waiting.as_ref().unwrap_or(postgres);
        let host = match named_index(settings, shape.dimensions) {
            Some(options) => match pinecone::control::host(&options).await {
                Err(error) if to_look => {
                    let recorded = target::recorded_place(postgres, &settings.source.name).await?;
                    let recorded =
                        recorded.filter(|place| place.name == options.name && !place.host.is_empty());
                    tracing::warn!(%error, "cannot look for the index");
                    recorded.ok_or(error)?.host
                }
                found => found?,
            },
            None => settings.index.host.trim().to_owned(),
        };
        shape.place = place(settings, Some(host.clone()));
        let target = target::find(postgres, &settings.source, &shape).await?;
        let table = Arc::new(target.table.clone());
        let index: Arc<dyn VectorIndex> = match settings.index.kind {
            IndexKind::Pgvector => Arc::new(PgVector::new(
                postgres.clone(),
                Arc::clone(&table),
                target.salt.clone(),
                target.id,
                pgvector::Options {
                    graph_min_rows: settings.index.graph_min_rows,
                    graph_max_backlog: settings.index.graph_max_backlog,
                    ef_search: settings.index.ef_search,
                    acknowledged_in_same_log: settings.queue.kind == QueueKind::Pgmq,
                },
            )),
            IndexKind::Pinecone => Arc::new(pinecone_at(settings, host, target.dimensions)?),
        };
        let ledger = Arc::new(PgLedger::new(postgres.clone(), table, target.id, target.salt.clone()));
        Ok(Self {
            postgres: postgres.clone(),
            target: Arc::new(target),
            ledger,
            queue,
            index,
            pgmq: (settings.queue.kind == QueueKind::Pgmq).then(|| settings.queue.name.clone()),
            source: Arc::new(settings.source.clone()),
            counted: Arc::default(),
            proof_period: settings.audit.period(),
        })
    }

    /// The outbox, feeding the queue. Listens for wake-ups for as long as it lives.
    #[must_use]
    pub fn outbox(&self) -> Box<dyn Outbox> {
        let (postgres, source) = (self.postgres.clone(), &self.target.table.name);
        Box::new(match &self.pgmq {
            Some(prefix) => PgOutbox::new(postgres, source, prefix),
            None => PgOutbox::shipping(postgres, source, Arc::clone(&self.queue.jobs)),
        })
    }

    /// Whether the index is written to under a fence, so that no attempts are needed.
    #[must_use]
    pub fn index_is_fenced(&self) -> bool {
        matches!(self.index.writes(), Writes::Fenced(_))
    }

    /// Counts, backlog, freshness and workers.
    pub async fn status(&self) -> Result<postgres::status::Status> {
        let Self { postgres, source, target, queue, index, counted, proof_period, .. } = self;
        postgres::status::read(postgres, source, target, queue, &**index, counted, *proof_period).await
    }

    /// How the proof stands.
    pub async fn proof(&self) -> Result<postgres::proof::Proof> {
        postgres::proof::Proof::read(&self.postgres, self.target.id, self.proof_period).await
    }

    /// Whether dead letters can be read without keeping them from others for a while.
    #[must_use]
    pub fn dead_letters_are_open(&self) -> bool {
        self.pgmq.is_some()
    }
}
