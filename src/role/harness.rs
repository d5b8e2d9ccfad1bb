//! The parts that the roles share: database, model, backends and heartbeat.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::backend::postgres::generation;
use crate::backend::postgres::worker_registry::WorkerRegistration;
use crate::backend::{self, Backends, Database, LoadedModel};
use crate::config::{EmbedderKind, Settings};
use crate::pipeline::clock::BootClock;
use crate::pipeline::failure::Result;
use crate::pipeline::metrics::Metrics;
use crate::pipeline::retry::{Backoff, FatalPolicy};

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

/// Sends heartbeats during the work. After the work, the worker leaves the worker registry.
pub(super) async fn with_heartbeat<T>(
    worker: &WorkerRegistration,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let done = CancellationToken::new();
    let work = async {
        let result = work.await;
        done.cancel();
        result
    };
    let (result, ()) = tokio::join!(work, worker.run(&done));
    result
}
