//! `refarch embed`: applies changes from the queue to the index.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;

use super::admin::Observed;
use super::harness::Process;
use super::retention;
use super::scaling::{self, Threads};
use crate::backend::postgres::freshness_turns::SharedTurns;
use crate::backend::postgres::worker_registry::WorkerRegistration;
use crate::backend::postgres::{event, ownership, worker_lock};
use crate::backend::{Backends, Database, LoadedModel};
use crate::cli;
use crate::config::Settings;
use crate::otlp::Otlp;
use crate::pipeline::clock::{BootClock, Clock};
use crate::pipeline::embed_scheduler::EmbedScheduler;
use crate::pipeline::failure::Class;
use crate::pipeline::fault;
use crate::pipeline::indexer::{Indexer, IndexerOptions};
use crate::pipeline::lease::Lease;
use crate::pipeline::retry::{Backoff, FatalPolicy};
use crate::shutdown;

/// Runs the role in its own process.
pub async fn run(args: &cli::Embed, settings: &Settings) -> anyhow::Result<()> {
    let process = Process::start("embed", settings).await?;
    if args.stop_with_stdin {
        shutdown::on_closed_stdin(&process.stop);
    }
    super::harness::with_model(settings, async |database: &Database, model: &LoadedModel| {
        let backends = process.open_backends(database, settings, Some(model)).await?;
        tracing::info!(workers = settings.indexer.worker_count(), "embedding");
        let work = work(&backends, settings, model, &process.observed, &process.stop, args.until_idle);
        process.exporting(Box::pin(work)).await
    })
    .await
}

/// Applies changes until `stop`, then finishes the held messages within the grace period.
///
/// With `until_idle`, ends as soon as the queue is empty.
pub async fn work(
    backends: &Backends,
    settings: &Settings,
    model: &LoadedModel,
    observed: &Observed,
    stop: &CancellationToken,
    until_idle: bool,
) -> anyhow::Result<()> {
    let workers = settings.indexer.worker_count();
    let worker = super::harness::register(backends, settings, "embed", workers, &observed.indexer).await?;
    // Before the first heartbeat, so that none is missed.
    let lost = worker.lost.subscribe();
    let clock: Arc<dyn Clock> = Arc::new(BootClock);
    let lease = Arc::new(Lease::new(Arc::clone(&clock), settings.indexer.lease));
    let otlp = Otlp::open(&settings.otlp, "embed", &worker.id)?;
    let pinecone = settings.index.pinecone();
    let indexer = Indexer::new(
        backends.queue.clone(),
        Arc::clone(&backends.ledger) as _,
        Arc::clone(&backends.index),
        EmbedScheduler::new(model.start(workers), settings.indexer.slice, Arc::clone(&clock)),
        Arc::clone(&observed.indexer),
        Arc::clone(&lease),
        IndexerOptions {
            source: settings.source.name.clone(),
            worker: worker.id.clone(),
            workers,
            prefetch: settings.indexer.hold,
            poll: settings.indexer.poll,
            max_receives: settings.queue.max_receives,
            settle: settings.indexer.attempt(),
            freshness_poll: pinecone.map_or(Duration::ZERO, |index| index.freshness),
            start_timeout: settings.database.connect_timeout,
        },
    )
    .reporting(Arc::clone(&worker.faults))
    .tracing(otlp.clone().map(|otlp| otlp as _));
    let indexer = match pinecone.map(|index| index.freshness_sample) {
        None => indexer,
        Some(every) => indexer.sampling(Arc::new(SharedTurns::new(
            backends.postgres.clone(),
            backends.generation.id,
            every,
        ))),
    };
    let indexer = Arc::new(indexer);
    let abort = shutdown::after_grace(stop, settings.runtime.grace);
    let work_ended = CancellationToken::new();
    if !backends.index_is_transactional() {
        observed.watch_lease(&lease);
    }
    let worker_lock = async {
        if backends.index_is_transactional() {
            return Ok(());
        }
        let kept = worker_lock::keep(&backends.postgres, &worker.id, &lease, &work_ended).await;
        stop.cancel();
        kept
    };
    let work = async {
        let result = indexer.run(stop, &abort, until_idle).await;
        work_ended.cancel();
        result
    };
    let scaling = async {
        let most = settings.indexer.max_worker_count();
        if most > workers {
            let metrics = &observed.indexer;
            let mut threads = Threads { indexer: &indexer, worker: &worker, metrics, current: workers };
            let policy = scaling::policy(&settings.scaling, workers, most);
            scaling::run_until(&mut threads, policy, backends, &worker.id, metrics, &work_ended).await;
        }
    };
    let proof = async {
        // The continuous proof needs a process that keeps running.
        if !until_idle {
            super::continuous_proof::run_until(backends, settings, &worker.id, &work_ended).await;
        }
    };
    let ownership = async {
        let kept = ownership::keep(
            &backends.postgres,
            backends.generation.id,
            &*backends.index,
            settings.indexer.attempt(),
            lost,
            &work_ended,
        )
        .await;
        stop.cancel();
        kept
    };
    // On the heap, because the futures of the roles are nested.
    let both = Box::pin(async {
        claim_ownership(backends, settings, &worker, &*clock, stop).await?;
        let retention = retention::run_until(backends, &work_ended);
        let panics = record_panics(backends, &worker.id, indexer.panics(), &work_ended);
        let aside = Box::pin(async { tokio::join!(proof, scaling, retention, panics) });
        let (done, alive, ours, _) = tokio::join!(work, worker_lock, ownership, aside);
        Ok(done.and(alive).and(ours)?)
    });
    let result = super::harness::with_heartbeat(&worker, observed, both).await;
    abort.cancel();
    if let Some(otlp) = otlp {
        otlp.close().await;
    }
    result
}

/// Records panics as events until `stop`, those before it included.
async fn record_panics(
    backends: &Backends,
    worker: &str,
    mut panics: broadcast::Receiver<String>,
    stop: &CancellationToken,
) {
    loop {
        let text = match stop.run_until_cancelled(panics.recv()).await {
            Some(Ok(text)) => text,
            Some(Err(RecvError::Lagged(_))) => continue,
            Some(Err(RecvError::Closed)) => return,
            None => match panics.try_recv() {
                Ok(text) => text,
                Err(_) => return,
            },
        };
        if let Err(error) = event::record_panic(&backends.postgres, worker, &text).await {
            tracing::warn!(%error, "cannot record a panic");
        }
    }
}

/// Claims the ownership of the index for this database. Retries until the index answers or `stop`, which also ends
/// the waiting for late writes.
async fn claim_ownership(
    backends: &Backends,
    settings: &Settings,
    worker: &WorkerRegistration,
    clock: &dyn Clock,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let settle = settings.indexer.attempt();
    let fatal = FatalPolicy::new(clock, settings.database.connect_timeout, false);
    let mut backoff = Backoff::default();
    let report = |why: &str| worker.faults.report(fault::INDEXING_BLOCKED, why);
    loop {
        let claim =
            ownership::claim(&backends.postgres, backends.generation.id, &*backends.index, settle, &report);
        let Some(claimed) = stop.run_until_cancelled(claim).await else { break };
        match claimed {
            Ok(()) => break,
            Err(error) if error.class() == Class::Permanent || fatal.ends(&error, clock) => {
                return Err(error.into());
            }
            Err(error) => {
                let pause = backoff.next(clock);
                worker
                    .faults
                    .report(fault::INDEXING_BLOCKED, format_args!("the index cannot be reached: {error}"));
                if backoff.failures() == 1 {
                    tracing::warn!(%error, "cannot reach the index; retrying until it answers");
                }
                stop.run_until_cancelled(clock.sleep(pause)).await;
            }
        }
    }
    worker.faults.clear(fault::INDEXING_BLOCKED);
    Ok(())
}
