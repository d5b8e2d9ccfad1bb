//! The parts that the roles share: stop signals, admin endpoint, database, model, backends and heartbeat.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::activity;
use super::admin::{self, Observed};

use crate::backend::postgres::generation;
use crate::backend::postgres::worker_registry::WorkerRegistration;
use crate::backend::{self, Backends, Database, LoadedModel};
use crate::config::{self, EmbedderKind, Settings};
use crate::otlp::MetricsSender;
use crate::pipeline::clock::BootClock;
use crate::pipeline::failure::Result;
use crate::pipeline::metrics::Metrics;
use crate::pipeline::retry::{Backoff, FatalPolicy};
use crate::{shutdown, telemetry};

/// A process that runs until it is told to stop: its stop signal, and what is watched of it. The admin endpoint is
/// served for as long as this lives, also while the process drains.
pub(super) struct Process {
    /// Cancelled by the first stop signal.
    pub(super) stop: CancellationToken,
    /// What is watched.
    pub(super) observed: Arc<Observed>,
    otlp: config::Otlp,
    _admin: Option<AbortOnDropHandle<()>>,
}

impl Process {
    /// Installs the stop signals, and serves the admin endpoint if the settings name an address.
    pub(super) async fn start(role: &'static str, settings: &Settings) -> anyhow::Result<Self> {
        Self::with_stop(role, settings, shutdown::on_signal()?).await
    }

    /// The same without stop signals, for a role that needs none: a signal ends it at once.
    pub(super) async fn with_stop(
        role: &'static str,
        settings: &Settings,
        stop: CancellationToken,
    ) -> anyhow::Result<Self> {
        let observed = Arc::new(Observed::new(role, &settings.source.name, stop.clone()));
        let admin = match settings.admin.listen {
            Some(address) => Some(admin::start(address, &observed).await?.1),
            None => None,
        };
        Ok(Self { stop, observed, otlp: settings.otlp.clone(), _admin: admin })
    }

    /// Does the work, and sends metrics to the collector of the settings meanwhile, the last ones after the work.
    pub(super) async fn exporting<T>(
        &self,
        work: impl Future<Output = anyhow::Result<T>>,
    ) -> anyhow::Result<T> {
        let Some(sender) = MetricsSender::open(&self.otlp)? else { return work.await };
        let done = CancellationToken::new();
        let work = async {
            let result = work.await;
            done.cancel();
            result
        };
        let (result, ()) =
            tokio::join!(work, Box::pin(admin::export_until(&self.observed, &self.otlp, &sender, &done)));
        result
    }

    /// Opens the backends, and watches them.
    pub(super) async fn open_backends(
        &self,
        database: &Database,
        settings: &Settings,
        model: Option<&LoadedModel>,
    ) -> anyhow::Result<Backends> {
        let backends = open_backends(database, settings, model).await?;
        self.observed.watch_backends(&backends);
        Ok(backends)
    }
}

/// Opens the database, does the work, and closes the database, even if the work fails.
pub(super) async fn with_database<T>(
    settings: &Settings,
    work: impl AsyncFnOnce(&Database) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let database = Database::open(settings).await?;
    let result = work(&database).await;
    let closed = database.close().await;
    result.and_then(|value| closed.map(|()| value))
}

/// Like [`with_database`], with the model beside the database. A missing local model is reported before a
/// database is started. A server's model needs the database first, because the database records facts about
/// it.
pub(super) async fn with_model<T>(
    settings: &Settings,
    work: impl AsyncFnOnce(&Database, &LoadedModel) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let local = match settings.embedder.kind {
        EmbedderKind::Minilm(_) => Some(LoadedModel::load(settings).await?),
        EmbedderKind::Openai(_) | EmbedderKind::Tei(_) | EmbedderKind::Pinecone(_) => None,
    };
    with_database(settings, async |database: &Database| {
        let load = async || LoadedModel::load_known(&database.postgres, settings).await;
        let model = match local {
            Some(model) => model,
            None => backend::with_connect_retry(settings, load).await?,
        };
        work(database, &model).await
    })
    .await
}

/// Opens the backends, with a model if the role has one. A private cluster is migrated automatically. Only
/// `refarch migrate` changes the schema of a configured database.
pub(super) async fn open_backends(
    database: &Database,
    settings: &Settings,
    model: Option<&LoadedModel>,
) -> anyhow::Result<Backends> {
    if database.is_private() {
        let report = backend::migrate_as_known(&database.postgres, settings).await?;
        for warning in report.warnings {
            tracing::warn!(warning, "migrated");
        }
    }
    let opened = backend::with_start_retry(settings, async || {
        generation::follow_swap(&database.postgres, &settings.source.name).await;
        Backends::open_for(&database.postgres, settings, model).await
    });
    Ok(opened.await?)
}

/// Registers a worker for a role. Waits for what may be missing only just now.
pub(super) async fn register(
    backends: &Backends,
    settings: &Settings,
    role: &str,
    threads: usize,
    metrics: &Arc<Metrics>,
) -> Result<WorkerRegistration> {
    let fatal = FatalPolicy::new(&BootClock, settings.database.connect_timeout, false);
    let mut backoff = Backoff::default();
    loop {
        let (postgres, metrics) = (backends.postgres.clone(), Arc::clone(metrics));
        match WorkerRegistration::join(postgres, role, threads, metrics).await {
            Err(error) if error.may_pass() && !fatal.ends(&error, &BootClock) => {
                tokio::time::sleep(backoff.next(&BootClock)).await;
            }
            result => return result,
        }
    }
}

/// Sends heartbeats and logs counts during the work. After the work, the worker leaves the worker registry.
pub(super) async fn with_heartbeat<T>(
    worker: &WorkerRegistration,
    observed: &Observed,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    // Of several workers in one process, each names itself.
    if worker.role() == observed.role {
        telemetry::identify(&worker.id);
    }
    let _watched = observed.watch(worker);
    let done = CancellationToken::new();
    let work = async {
        let result = work.await;
        done.cancel();
        result
    };
    let (result, (), ()) =
        tokio::join!(work, worker.run(&done), activity::log_until(&done, worker, observed));
    result
}
