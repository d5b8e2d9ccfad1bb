//! Counts, backlog, freshness and workers, as `refarch status` shows them.

use serde::Serialize;

use super::fault::{self, FaultStatus};
use super::registry::WORKER_GONE_S;
use super::source::SourceTable;
use super::{Postgres, failure, outbox};
use crate::pipeline::change::Lane;
use crate::pipeline::failure::{Class, Result};
use crate::pipeline::freshness::Histogram;
use crate::pipeline::index::VectorIndex;
use crate::pipeline::queue::{Backlog, JobQueue};

/// Tables with more rows than this, by the planner's estimate, are not counted one by one.
const COUNT_UP_TO: f32 = 2_000_000.0;

/// Over how long freshness is taken.
const FRESHNESS_WINDOW: &str = "5 minutes";

/// All counts are changes or rows, never messages.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Rows of the source's table.
    pub source_rows: u64,
    /// Whether that is the planner's estimate.
    pub source_rows_estimated: bool,
    /// Changes in the outbox.
    pub pending: u64,
    /// Changes in the queue.
    pub queue: Lanes,
    /// Changes in the dead-letter queue.
    pub dead_letters: u64,
    /// Vectors in the index; none while it can't be asked.
    pub indexed: Option<u64>,
    /// Rows whose current state the index holds.
    pub in_sync: u64,
    /// Whether that is a bound, because changes are under way.
    pub in_sync_estimated: bool,
    /// From statement to searchable, over the last five minutes.
    pub freshness_ms: Freshness,
    /// Processes that live.
    pub workers: Vec<WorkerStatus>,
    /// What they cannot do, and why.
    pub faults: Vec<FaultStatus>,
}

/// A backlog for each lane.
#[derive(Clone, Copy, Debug, Serialize)]
#[allow(missing_docs)]
pub struct Lanes {
    pub live: Backlog,
    pub bulk: Backlog,
}

/// Quantiles in milliseconds; none when nothing was applied lately.
#[derive(Clone, Copy, Debug, Serialize)]
#[allow(missing_docs)]
pub struct Freshness {
    pub p50: Option<u64>,
    pub p99: Option<u64>,
}

/// One process.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs)]
pub struct WorkerStatus {
    pub worker_id: String,
    pub role: String,
    pub host: String,
    pub pid: i32,
    pub threads: i32,
    pub uptime_s: i64,
    pub heartbeat_age_ms: i64,
    pub applied: i64,
    pub embedded: i64,
}

impl Status {
    /// Changes that are not in the index yet, dead letters aside.
    #[must_use]
    pub fn outstanding(&self) -> u64 {
        let lanes = [self.queue.live, self.queue.bulk];
        self.pending + lanes.iter().map(|lane| lane.visible + lane.in_flight).sum::<u64>()
    }

    /// Whether every row is searchable as it is.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.outstanding() == 0 && self.dead_letters == 0 && self.in_sync == self.source_rows
    }
}

/// Reads the status of one target.
pub async fn read(
    postgres: &Postgres,
    table: &SourceTable,
    target: i32,
    queue: &dyn JobQueue,
    index: &dyn VectorIndex,
) -> Result<Status> {
    let fail = |error: tokio_postgres::Error| failure("read the status", &error);
    // What leaves one place for the next while we count must be seen twice rather than missed, so
    // that nothing outstanding passes for synced: places are read in the order that changes travel.
    let pending = outbox::pending(postgres, &table.name).await?;
    let lanes = Lanes { live: queue.backlog(Lane::Live).await?, bulk: queue.backlog(Lane::Bulk).await? };
    let dead_letters = queue.dead_letters().await?;
    let client = postgres.client().await?;
    let estimate: f32 = client
        .query_one("SELECT reltuples FROM pg_class WHERE oid = $1::text::regclass", &[&table.relation])
        .await
        .map_err(fail)?
        .get(0);
    let source_rows_estimated = estimate > COUNT_UP_TO;
    let source_rows = if source_rows_estimated {
        estimate as u64
    } else {
        let sql = format!("SELECT count(*) FROM {}", table.relation);
        client.query_one(&sql, &[]).await.map_err(fail)?.get::<_, i64>(0).try_into().unwrap_or_default()
    };
    let settled: i64 = client
        .query_one(
            "SELECT count(*) FROM refarch.ledger WHERE target = $1 AND open = 0 AND NOT dirty AND NOT deleted",
            &[&target],
        )
        .await
        .map_err(fail)?
        .get(0);
    let settled = u64::try_from(settled).unwrap_or_default();
    let buckets = client
        .query(
            &format!(
                "SELECT b.bucket, sum(b.count)::bigint FROM refarch.sample s, \
                 unnest(s.freshness_buckets, s.freshness_counts) AS b(bucket, count) \
                 WHERE s.at > now() - interval '{FRESHNESS_WINDOW}' GROUP BY 1"
            ),
            &[],
        )
        .await
        .map_err(fail)?;
    let mut histogram = Histogram::default();
    for row in buckets {
        histogram.add(row.get::<_, i16>(0) as usize, row.get::<_, i64>(1) as u64);
    }
    let workers = client
        .query(
            "SELECT worker_id, role, host, pid, threads, extract(epoch FROM now() - started_at)::bigint, \
                    (extract(epoch FROM now() - heartbeat_at) * 1000)::bigint, applied, embedded FROM refarch.worker \
             WHERE heartbeat_at > now() - make_interval(secs => $1) ORDER BY role, started_at",
            &[&f64::from(WORKER_GONE_S)],
        )
        .await
        .map_err(fail)?
        .iter()
        .map(|row| WorkerStatus {
            worker_id: row.get(0),
            role: row.get(1),
            host: row.get(2),
            pid: row.get(3),
            threads: row.get(4),
            uptime_s: row.get(5),
            heartbeat_age_ms: row.get::<_, i64>(6).max(0),
            applied: row.get(7),
            embedded: row.get(8),
        })
        .collect();
    drop(client);
    let faults = fault::read(postgres).await?;
    // During an outage of the index the rest is what one wants to see.
    let indexed = match index.count().await {
        Ok(count) => Some(count),
        Err(error) if error.class == Class::Retryable => {
            tracing::warn!(%error, "cannot count the vectors");
            None
        }
        Err(error) => return Err(error),
    };
    let mut status = Status {
        source_rows,
        source_rows_estimated,
        pending,
        queue: lanes,
        dead_letters,
        indexed,
        in_sync: 0,
        in_sync_estimated: false,
        freshness_ms: Freshness { p50: histogram.quantile(0.5), p99: histogram.quantile(0.99) },
        workers,
        faults,
    };
    // With nothing under way, a settled entry equals its row. Else no more rows can be in sync than
    // are settled, nor than have no change outstanding.
    let outstanding = status.outstanding();
    status.in_sync = settled.min(source_rows.saturating_sub(outstanding));
    status.in_sync_estimated = outstanding > 0 || source_rows_estimated;
    Ok(status)
}
