//! `refarch listen`: relays committed changes from the outbox to the queue.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::backend::postgres::registry::Worker;
use crate::backend::{Backends, Database};
use crate::cli;
use crate::config::Settings;
use crate::pipeline::clock::BootClock;
use crate::pipeline::meter::Meter;
use crate::pipeline::relay::{Options, Relay};
use crate::shutdown;

/// Runs the role in its own process.
pub async fn run(args: &cli::Listen, settings: &Settings) -> anyhow::Result<()> {
    let stop = shutdown::on_signal()?;
    super::with_database(settings, async |database: &Database| {
        let backends = super::open(database, settings, None).await?;
        tracing::info!(source = settings.source.name, table = settings.source.table, "capturing changes");
        work(&backends, settings, &stop, args.until_idle).await
    })
    .await
}

/// Relays changes until `stop`. With `until_idle`, ends as soon as nothing is pending.
pub async fn work(
    backends: &Backends,
    settings: &Settings,
    stop: &CancellationToken,
    until_idle: bool,
) -> anyhow::Result<()> {
    let worker = Worker::join(backends.postgres.clone(), "listen", 1, Arc::new(Meter::default())).await?;
    let mut relay = Relay::new(
        backends.outbox(),
        Arc::clone(&backends.queue.stats),
        Arc::new(BootClock),
        Options {
            source: settings.source.name.clone(),
            pack: settings.relay.pack,
            bulk_threshold: settings.relay.bulk_threshold,
            live_bound: settings.relay.live_bound,
            poll: settings.relay.poll,
        },
    )
    .reporting(Arc::clone(&worker.faults));
    super::while_beating(&worker, async { Ok(relay.run(stop, until_idle).await?) }).await
}
