//! `refarch embed`: applies changes from the queue to the index.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::backend::postgres::registry::Worker;
use crate::backend::postgres::{lineage, session};
use crate::backend::{Backends, Database, LoadedModel};
use crate::cli;
use crate::config::Settings;
use crate::pipeline::clock::{BootClock, Clock};
use crate::pipeline::failure::Class;
use crate::pipeline::fault;
use crate::pipeline::indexer::{Indexer, Options};
use crate::pipeline::lease::Lease;
use crate::pipeline::meter::Meter;
use crate::pipeline::retry::Backoff;
use crate::pipeline::schedule::Scheduler;
use crate::shutdown;

/// Runs the role in its own process.
pub async fn run(args: &cli::Embed, settings: &Settings) -> anyhow::Result<()> {
    let stop = shutdown::on_signal()?;
    super::with_model(settings, async |database: &Database, model: &LoadedModel| {
        let backends = super::open(database, settings, Some(model)).await?;
        tracing::info!(workers = settings.indexer.worker_count(), "embedding");
        work(&backends, settings, model, &Arc::default(), &stop, args.until_idle).await
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
    meter: &Arc<Meter>,
    stop: &CancellationToken,
    until_idle: bool,
) -> anyhow::Result<()> {
    let workers = settings.indexer.worker_count();
    let worker = Worker::join(backends.postgres.clone(), "embed", workers, Arc::clone(meter)).await?;
    let clock: Arc<dyn Clock> = Arc::new(BootClock);
    let lease = Arc::new(Lease::new(Arc::clone(&clock), settings.indexer.lease));
    let indexer = Indexer::new(
        backends.queue.clone(),
        Arc::clone(&backends.ledger) as _,
        Arc::clone(&backends.index),
        Scheduler::new(model.start(workers), settings.indexer.slice, Arc::clone(&clock)),
        Arc::clone(meter),
        Arc::clone(&lease),
        Options {
            source: settings.source.name.clone(),
            worker: worker.id.clone(),
            workers,
            hold: settings.indexer.hold,
            poll: settings.indexer.poll,
            max_receives: settings.queue.max_receives,
            settle: settings.indexer.attempt(),
            look: settings.index.pinecone().map_or(Duration::ZERO, |index| index.freshness),
        },
    )
    .reporting(Arc::clone(&worker.faults));
    let indexer = Arc::new(indexer);
    let abort = shutdown::after_grace(stop, settings.runtime.grace);
    let over = CancellationToken::new();
    let session = async {
        if backends.index_is_fenced() {
            return Ok(());
        }
        let kept = session::keep(&backends.postgres, &worker.id, &lease, &over).await;
        stop.cancel();
        kept
    };
    let work = async {
        let result = indexer.run(stop, &abort, until_idle).await;
        over.cancel();
        result
    };
    let proof = async {
        // The continuous proof needs a process that keeps running.
        if !until_idle {
            super::prove::keep(backends, settings, &worker.id, &over).await;
        }
    };
    let marks = async {
        let kept = lineage::keep(
            &backends.postgres,
            backends.target.id,
            &*backends.index,
            settings.indexer.attempt(),
            &over,
        )
        .await;
        stop.cancel();
        kept
    };
    // On the heap, because the futures of the roles are nested.
    let both = Box::pin(async {
        claim(backends, settings.indexer.attempt(), &worker, &*clock, stop).await?;
        let (done, alive, ours, ()) = tokio::join!(work, session, marks, Box::pin(proof));
        Ok(done.and(alive).and(ours)?)
    });
    let result = super::while_beating(&worker, both).await;
    abort.cancel();
    result
}

/// Claims the ownership of the index for this database. Retries until the index answers or `stop`, which also ends
/// the waiting for late writes.
async fn claim(
    backends: &Backends,
    settle: Duration,
    worker: &Worker,
    clock: &dyn Clock,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let mut backoff = Backoff::default();
    let report = |why: &str| worker.faults.report(fault::HELD, why);
    loop {
        let claim = lineage::claim(&backends.postgres, backends.target.id, &*backends.index, settle, &report);
        let Some(claimed) = stop.run_until_cancelled(claim).await else { break };
        match claimed {
            Ok(()) => break,
            Err(error) if error.class() != Class::Retryable => return Err(error.into()),
            Err(error) => {
                let pause = backoff.next(clock);
                worker.faults.report(fault::HELD, format_args!("the index cannot be reached: {error}"));
                if backoff.failures() == 1 {
                    tracing::warn!(%error, "cannot reach the index; retrying until it answers");
                }
                stop.run_until_cancelled(clock.sleep(pause)).await;
            }
        }
    }
    worker.faults.clear(fault::HELD);
    Ok(())
}
