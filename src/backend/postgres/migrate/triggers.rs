//! Installs and removes triggers, one table in a transaction, and queues the rows that existed before.

use std::time::{Duration, Instant};

use tokio_postgres::Transaction;

use super::adopt;
use super::lock_retry::LockRetrySession;
use super::report::Report;
use crate::backend::postgres::source::SourceTable;
use crate::backend::postgres::{Postgres, capture, failure};
use crate::pipeline::failure::Result;

/// Pages of 500 rows that one transaction queues, in about 50 ms.
const PAGES: i32 = 20;

/// How long to wait for rows that cannot be queued yet. The relay queues them later.
const BLOCKED_BACKFILL_TIMEOUT: Duration = Duration::from_secs(10);

/// How often progress is logged.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// Installs missing triggers. Each table gets its own transaction, so that none is locked while another is
/// waited for. `expand`: the index may hold rows whose changes were not captured.
pub(super) async fn install_triggers(
    session: &mut LockRetrySession,
    table: &SourceTable,
    expand: bool,
    report: &mut Report,
) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("install the capture triggers", error);
    let (unarmed, taken_over) = session
        .with_lock_retry(None, true, async |transaction| {
            let found = adopt::find(transaction, table).await?;
            Ok((capture::tables_without_triggers_in(transaction, table).await?, found))
        })
        .await?;
    let mut tables = unarmed;
    tables.extend(taken_over.triggers.iter().map(|trigger| trigger.relation.clone()));
    tables.sort();
    tables.dedup();
    for leaf in tables {
        let installed: bool = session
            .with_lock_retry(Some(&leaf), false, async |transaction| {
                adopt::take_over(transaction, &taken_over, &leaf).await?;
                transaction
                    .query_one(
                        "SELECT refarch.arm_leaf($1, $2::text::regclass, $3::text::regclass, $4)",
                        &[&table.name, &table.relation, &leaf, &expand],
                    )
                    .await
                    .map(|row| row.get(0))
                    .map_err(fail)
            })
            .await?;
        if installed {
            report.armed.push(leaf);
        }
    }
    adopt::report(&taken_over, report);
    Ok(())
}

/// Tables that are no longer indexed and still have our triggers: qualified and quoted. They are found by the
/// functions that the triggers call, since a migration that was interrupted recorded nothing about them.
pub(super) async fn stray_triggers(
    transaction: &Transaction<'_>,
    table: &SourceTable,
) -> Result<Vec<String>> {
    let rows = transaction
        .query(
            "SELECT s::text FROM refarch.strays($1, $2::text::regclass) s",
            &[&table.name, &table.relation],
        )
        .await
        .map_err(|error| failure("look for capture triggers on other tables", error))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Removes the triggers of tables that are no longer indexed, one table in a transaction.
pub(super) async fn remove_stray_triggers(
    session: &mut LockRetrySession,
    table: &SourceTable,
    report: &mut Report,
) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("remove the capture triggers", error);
    let found = session
        .with_lock_retry(None, true, async |transaction| stray_triggers(transaction, table).await)
        .await?;
    for leaf in found {
        session
            .with_lock_retry(Some(&leaf), false, async |transaction| {
                let disarm = "SELECT refarch.disarm($1, to_regclass($2)) WHERE to_regclass($2) IS NOT NULL";
                transaction.execute(disarm, &[&table.name, &leaf]).await.map(drop).map_err(fail)
            })
            .await?;
        report.removed.push(format!("capture triggers on {leaf}"));
    }
    Ok(())
}

/// Queues the rows of all backfill requests, in short transactions.
pub(super) async fn backfill(postgres: &Postgres, table: &SourceTable, report: &mut Report) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("queue the existing rows", error);
    let mut moved = Instant::now();
    let mut logged_at = Instant::now();
    loop {
        let client = postgres.client().await?;
        let step: i64 = client
            .query_one("SELECT refarch.backfill_step($1, $2)", &[&table.name, &PAGES])
            .await
            .map_err(fail)?
            .get(0);
        report.queued += u64::try_from(step).unwrap_or_default();
        let left = client
            .query_opt(
                "SELECT held FROM refarch.backfill WHERE source = $1 ORDER BY held IS NULL, leaf LIMIT 1",
                &[&table.name],
            )
            .await
            .map_err(fail)?;
        drop(client);
        let Some(left) = left else { return Ok(()) };
        if step != 0 {
            moved = Instant::now();
        } else if moved.elapsed() > BLOCKED_BACKFILL_TIMEOUT {
            let why =
                left.get::<_, Option<String>>(0).unwrap_or_else(|| "another process is queueing them".into());
            report.warnings.push(format!(
                "existing rows are not all queued yet: {why}; refarch listen queues the rest as soon as possible"
            ));
            return Ok(());
        } else {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        if logged_at.elapsed() > LOG_EVERY {
            logged_at = Instant::now();
            tracing::info!(rows = report.queued, "queueing the existing rows");
        }
    }
}
