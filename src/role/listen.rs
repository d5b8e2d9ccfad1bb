//! `refarch listen`: relays committed changes from the outbox to the queue.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::admin::Observed;
use super::harness::Process;
use crate::backend::{Backends, Database};
use crate::cli;
use crate::config::Settings;
use crate::otlp::Otlp;
use crate::pipeline::clock::BootClock;
use crate::pipeline::relay::{Relay, RelayOptions};

/// Runs the role in its own process.
pub async fn run(args: &cli::Listen, settings: &Settings) -> anyhow::Result<()> {
    let process = Process::start("listen", settings).await?;
    super::harness::with_database(settings, async |database: &Database| {
        let backends = process.open_backends(database, settings, None).await?;
        tracing::info!(source = settings.source.name, table = settings.source.table, "capturing changes");
        let observed = &process.observed;
        let both = async {
            tokio::select! {
                result = work(&backends, settings, observed, &process.stop, args.until_idle) => result,
                never = super::embedded_metrics::print(observed, &backends, &settings.log.emf) => match never {},
            }
        };
        process.exporting(Box::pin(both)).await
    })
    .await
}

/// Relays changes until `stop`. With `until_idle`, ends as soon as nothing is pending.
pub async fn work(
    backends: &Backends,
    settings: &Settings,
    observed: &Observed,
    stop: &CancellationToken,
    until_idle: bool,
) -> anyhow::Result<()> {
    let worker = super::harness::register(backends, settings, "listen", 1, &Arc::default()).await?;
    let otlp = Otlp::open(&settings.otlp, "listen", &worker.id)?;
    let mut relay = Relay::new(
        backends.outbox(),
        Arc::clone(&backends.queue.stats),
        Arc::new(BootClock),
        RelayOptions {
            source: settings.source.name.clone(),
            changes_per_message: settings.relay.pack,
            bulk_threshold: settings.relay.bulk_threshold,
            live_bound: settings.relay.live_bound,
            poll: settings.relay.poll,
            start_timeout: settings.database.connect_timeout,
        },
    )
    .reporting(Arc::clone(&worker.faults))
    .measuring(Arc::clone(&observed.relay))
    .tracing(otlp.as_ref().map(Otlp::sampler));
    let work = async { Ok(relay.run(stop, until_idle).await?) };
    let result = super::harness::with_heartbeat(&worker, observed, work).await;
    if let Some(otlp) = otlp {
        otlp.close().await;
    }
    result
}
