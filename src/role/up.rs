//! `refarch up`: every role in one process, or all but embed, which then has processes of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::generate;
use super::harness::Process;
use super::progress::Progress;
use crate::backend::postgres;
use crate::backend::postgres::status::{Freshness, Status};
use crate::backend::{Backends, Database, LoadedModel};
use crate::cli;
use crate::config::Settings;
use crate::pipeline::clock::BootClock;
use crate::pipeline::failure::{Class, Result};
use crate::pipeline::metrics::Metrics;
use crate::pipeline::retry::{Backoff, FatalPolicy};
use crate::telemetry;

/// Time between two reads of the status for the progress line.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// How often the first products are loaded if that fails: a database that restarts is soon back.
const LOADS: u32 = 3;

/// Seed of the products for an empty table, so that the products are always the same.
const SEED: u64 = 1;

/// The output of `--until-synced`.
#[derive(Debug, Serialize)]
struct Summary {
    /// Rows in the table, all of them searchable.
    rows: u64,
    /// Time from the start of the load until the last row is searchable.
    seconds: f64,
    /// Texts that the model embedded.
    embedded: u64,
    /// Embedded texts per second.
    docs_per_s: f64,
    /// Time from statement to searchable.
    freshness_ms: Freshness,
    /// Largest resident set of the process.
    peak_memory_mib: u64,
}

/// Runs all roles until a stop signal, or with `--until-synced` until every row is searchable.
pub async fn run(args: &cli::Up, global: &cli::Global, settings: &Settings) -> anyhow::Result<()> {
    anyhow::ensure!(
        !args.until_synced || settings.up.process_range().is_none(),
        "--until-synced measures this process, so it cannot be used with up.processes"
    );
    let process = Process::start("up", settings).await?;
    // Both can fail because of a setting. That error should come before a database is started.
    let listener = super::serve::bind(settings).await?;
    let model = LoadedModel::load(settings).await?;
    super::harness::with_database(settings, async |database: &Database| {
        let report = crate::backend::migrate(&database.postgres, settings).await?;
        for warning in report.warnings {
            tracing::warn!(warning, "migrated");
        }
        let open = async || Backends::open_for(&database.postgres, settings, Some(&model)).await;
        let backends = crate::backend::with_start_retry(settings, open).await?;
        process.observed.watch_backends(&backends);
        let roles = run_roles(args, global, settings, &backends, model, listener, &process);
        process.exporting(Box::pin(roles)).await
    })
    .await
}

async fn run_roles(
    args: &cli::Up,
    global: &cli::Global,
    settings: &Settings,
    backends: &Backends,
    model: LoadedModel,
    listener: TcpListener,
    process: &Process,
) -> anyhow::Result<()> {
    let address = listener.local_addr()?;
    let model = Arc::new(model);
    let mut roles: JoinSet<anyhow::Result<()>> = JoinSet::new();
    // A token of its own, so that this function can stop all roles if one role fails.
    let stop = process.stop.child_token();
    {
        let (backends, settings, stop) = (backends.clone(), settings.clone(), stop.clone());
        let observed = Arc::clone(&process.observed);
        roles.spawn(async move {
            super::listen::work(&backends, &settings, &observed, &stop, false).await.context("listen")
        });
    }
    {
        let (backends, settings, stop) = (backends.clone(), settings.clone(), stop.clone());
        let (model, observed) = (Arc::clone(&model), Arc::clone(&process.observed));
        match settings.up.process_range() {
            None => roles.spawn(async move {
                super::embed::work(&backends, &settings, &model, &observed, &stop, false)
                    .await
                    .context("embed")
            }),
            Some(range) => {
                let global = global.clone();
                roles.spawn(async move {
                    let work =
                        super::fleet::work(&backends, &settings, &global, range, &observed.indexer, &stop);
                    work.await.context("embed processes")
                })
            }
        };
    }
    {
        let (backends, settings, stop) = (backends.clone(), settings.clone(), stop.clone());
        let (model, observed) = (Arc::clone(&model), Arc::clone(&process.observed));
        roles.spawn(async move {
            super::serve::work(listener, &backends, &settings, &model, &observed, &stop)
                .await
                .context("serve")
        });
    }
    let foreground = async {
        let started = Instant::now();
        let mut reader = Reader { fatal: fatal_policy(settings), stop: &stop };
        load_if_empty(settings, backends, &mut reader).await?;
        wait_until_synced(backends, &mut reader).await?;
        if stop.is_cancelled() {
            return Ok(());
        }
        if args.until_synced {
            let Some(status) = reader.status(backends).await? else { return Ok(()) };
            return summarize(args, &status, &process.observed.indexer, started.elapsed());
        }
        super::output::print(format!("refarch is up: http://{address}  (Ctrl-C stops it)\n").as_bytes())?;
        stop.cancelled().await;
        Ok(())
    };
    let mut result = tokio::select! {
        result = foreground => result,
        Some(ended) = roles.join_next() => match ended {
            Ok(Ok(())) if stop.is_cancelled() => Ok(()),
            Ok(Ok(())) => Err(anyhow!("a role (listen, embed or serve) ended without a stop signal")),
            Ok(Err(error)) => Err(error),
            Err(error) => Err(error.into()),
        },
    };
    stop.cancel();
    while let Some(ended) = roles.join_next().await {
        result = result.and(ended?);
    }
    result
}

fn fatal_policy(settings: &Settings) -> FatalPolicy {
    FatalPolicy::new(&BootClock, settings.database.connect_timeout, false)
}

/// Reads from the database, and goes on when a read fails: the roles beside it go on too, and a database that
/// restarts is soon back.
struct Reader<'a> {
    fatal: FatalPolicy,
    stop: &'a CancellationToken,
}

impl Reader<'_> {
    /// The result of a read that succeeds; none on `stop`.
    async fn read<T>(&mut self, work: impl AsyncFn() -> Result<T>) -> Result<Option<T>> {
        let mut backoff = Backoff::default();
        loop {
            let Some(result) = self.stop.run_until_cancelled(work()).await else { return Ok(None) };
            let error = match result {
                Ok(value) => {
                    self.fatal.worked();
                    return Ok(Some(value));
                }
                Err(error) if error.class() == Class::Permanent || self.fatal.ends(&error, &BootClock) => {
                    return Err(error);
                }
                Err(error) => error,
            };
            let pause = backoff.next(&BootClock);
            if backoff.failures() == 1 {
                tracing::warn!(%error, "cannot read the status: trying again until a read succeeds");
            }
            if self.stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return Ok(None);
            }
        }
    }

    async fn status(&mut self, backends: &Backends) -> Result<Option<Status>> {
        self.read(async || backends.status().await).await
    }
}

/// Loads products if the table is empty.
async fn load_if_empty(
    settings: &Settings,
    backends: &Backends,
    reader: &mut Reader<'_>,
) -> anyhow::Result<()> {
    let table = &backends.generation.table.relation;
    let sql = format!("SELECT NOT EXISTS (SELECT FROM {table})");
    let is_empty = async || {
        let client = backends.postgres.client().await?;
        let row = client.query_one(&sql, &[]).await;
        Ok(row.map_err(postgres::fail("check whether the table is empty"))?.get(0))
    };
    let load = async || {
        let client = backends.postgres.client().await?;
        let progress = Progress::new("loading products", settings.up.products);
        generate::load(&client, table, settings.up.products, SEED, &progress).await?;
        progress.finish();
        anyhow::Ok(())
    };
    for tried in 1.. {
        let is_empty: Option<bool> = reader.read(&is_empty).await?;
        if is_empty != Some(true) || settings.up.products == 0 {
            break;
        }
        // One statement, so that a load that failed has left nothing.
        match reader.stop.run_until_cancelled(load()).await {
            Some(Err(error)) if tried < LOADS => {
                let error = format!("{error:#}");
                tracing::warn!(error, "cannot load the first products: trying again");
            }
            Some(Err(error)) => return Err(error),
            Some(Ok(())) | None => break,
        }
    }
    Ok(())
}

/// Shows progress until every row is searchable, or only dead letters are left.
async fn wait_until_synced(backends: &Backends, reader: &mut Reader<'_>) -> anyhow::Result<()> {
    let Some(mut status) = reader.status(backends).await? else { return Ok(()) };
    if status.is_synced() {
        return Ok(());
    }
    let progress = Progress::new("making rows searchable", status.source_rows);
    while !status.is_synced() {
        // Waiting does not help: a dead letter becomes searchable only after a redrive.
        if status.dead_letters > 0 && status.outstanding() == 0 {
            progress.finish();
            let message = format!(
                "{} of {} rows are searchable; {} changes are dead letters: refarch redrive lists them",
                status.in_sync, status.source_rows, status.dead_letters
            );
            telemetry::notice("WARN", message);
            return Ok(());
        }
        progress.set_total(status.source_rows);
        progress.set(status.in_sync);
        if reader.stop.run_until_cancelled(tokio::time::sleep(POLL_INTERVAL)).await.is_none() {
            return Ok(());
        }
        match reader.status(backends).await? {
            Some(read) => status = read,
            None => return Ok(()),
        }
    }
    progress.set(status.in_sync);
    progress.finish();
    Ok(())
}

fn summarize(args: &cli::Up, status: &Status, metrics: &Metrics, took: Duration) -> anyhow::Result<()> {
    let (_, embedded) = metrics.totals();
    let freshness = metrics.freshness();
    let summary = Summary {
        rows: status.source_rows,
        seconds: took.as_secs_f64(),
        embedded,
        docs_per_s: embedded as f64 / took.as_secs_f64(),
        freshness_ms: (&freshness).into(),
        peak_memory_mib: peak_memory_mib()?,
    };
    anyhow::ensure!(
        status.is_synced(),
        "{} of {} rows are in sync; {} changes are dead letters: refarch redrive lists them",
        status.in_sync,
        status.source_rows,
        status.dead_letters
    );
    let ms = |value: Option<u64>| value.map_or_else(|| "-".into(), |ms| format!("{ms} ms"));
    let text = if args.json {
        serde_json::to_string(&summary)? + "\n"
    } else {
        format!(
            "rows in sync  {}\nseconds       {:.1}\nembedded      {} ({:.0} docs/s)\nfreshness     p50 {}, p99 {}\npeak memory   {} MiB\n",
            summary.rows,
            summary.seconds,
            summary.embedded,
            summary.docs_per_s,
            ms(summary.freshness_ms.p50),
            ms(summary.freshness_ms.p99),
            summary.peak_memory_mib
        )
    };
    super::output::print(text.as_bytes())
}

fn peak_memory_mib() -> anyhow::Result<u64> {
    use nix::sys::resource::{UsageWho, getrusage};
    let peak = getrusage(UsageWho::RUSAGE_SELF).context("read the peak memory")?.max_rss();
    // Linux counts in KiB, macOS in bytes.
    let per_mib = if cfg!(target_os = "macos") { 1024 * 1024 } else { 1024 };
    Ok(u64::try_from(peak).unwrap_or_default() / per_mib)
}
