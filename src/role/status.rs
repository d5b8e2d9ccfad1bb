//! `refarch status`: how many rows are pending, in flight and in sync.

use std::fmt::Write as _;
use std::time::Duration;

use crate::backend::postgres::status::{Freshness, Status};
use crate::backend::{Backends, Database};
use crate::cli;
use crate::config::Settings;
use crate::pipeline::failure::Class;
use crate::pipeline::queue::Backlog;
use crate::shutdown;

/// Time between two outputs of `--watch`.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// Prints the status, once or until stopped.
pub async fn run(args: &cli::Status, settings: &Settings) -> anyhow::Result<()> {
    let stop = shutdown::on_signal()?;
    super::harness::with_database(settings, async |database: &Database| {
        let backends = Backends::open_read_only(&database.postgres, settings).await?;
        loop {
            match backends.status().await {
                Ok(status) => {
                    let text = if args.json { serde_json::to_string(&status)? + "\n" } else { text(&status) };
                    super::output::print(text.as_bytes())?;
                }
                // A database that restarts is soon back.
                Err(error) if args.watch && error.class() == Class::Retryable => {
                    tracing::warn!(%error, "cannot read the status yet");
                }
                Err(error) => return Err(error.into()),
            }
            if !args.watch || stop.run_until_cancelled(tokio::time::sleep(WATCH_EVERY)).await.is_none() {
                return Ok(());
            }
        }
    })
    .await
}

/// How far the index confirms the ledger's count of rows in sync.
fn by_the_ledger(status: &Status) -> String {
    if status.lacking() > 0 {
        let (indexed, expected) = (status.indexed.unwrap_or_default(), status.expected);
        return format!(
            " by the ledger, but the index counts {indexed} records for {expected} rows with a text"
        );
    }
    if status.is_synced() { ", all of them by the ledger".into() } else { String::new() }
}

/// The number of vectors in the index, or why it is unknown.
fn indexed(status: &Status) -> String {
    match (status.indexed, &status.indexed_error) {
        (Some(count), _) => format!("{count} vectors"),
        (None, Some(error)) => format!("not known: {error}"),
        (None, None) => "not known".into(),
    }
}

/// The status as text, one value on a line.
#[must_use]
pub fn text(status: &Status) -> String {
    let about = |estimated| if estimated { "about " } else { "" };
    let ms = |value: Option<u64>| value.map_or_else(|| "-".into(), |ms| format!("{ms} ms"));
    let freshness = |lane: Freshness| match lane.changes {
        0 => "p50 -, p99 -".to_owned(),
        changes => format!("p50 {}, p99 {} of {changes} changes", ms(lane.p50), ms(lane.p99)),
    };
    let lane = |lane: Backlog| {
        format!("{}{} visible, {} in flight", about(lane.estimated), lane.visible, lane.in_flight)
    };
    let mut text = format!(
        "source rows    {}{}\n\
         in sync        {}{}{}; {}\n\
         indexed        {}\n\
         pending        {}{} in the outbox\n\
         queue, live    {}\n\
         queue, bulk    {}\n\
         dead letters   {}\n\
         freshness      {} (last 5 minutes)\n\
         bulk freshness {}\n",
        about(status.source_rows_estimated),
        status.source_rows,
        about(status.in_sync_estimated),
        status.in_sync,
        by_the_ledger(status),
        status.proof.describe(),
        indexed(status),
        about(status.pending_estimated),
        status.pending,
        lane(status.queue.live),
        lane(status.queue.bulk),
        status.dead_letters,
        freshness(status.freshness_ms.live),
        freshness(status.freshness_ms.bulk),
    );
    for fault in &status.capture_faults {
        // Writing to a string can't fail.
        let _ = writeln!(text, "not captured   {fault}");
    }
    for fault in &status.faults {
        let _ = writeln!(text, "fault          {}, since {:.0}", fault.message, fault.since);
    }
    for worker in &status.workers {
        // Writing to a string can't fail.
        let _ = writeln!(
            text,
            "worker         {} on {} (pid {}), up {} s, {} applied, {} embedded",
            worker.role, worker.host, worker.pid, worker.uptime_s, worker.applied, worker.embedded
        );
    }
    for step in &status.scaling {
        let _ = writeln!(
            text,
            "scaled         {} -> {} {}, {}, {:.0}",
            step.from, step.to, step.workers, step.reason, step.at
        );
    }
    text
}
