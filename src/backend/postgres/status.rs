//! Counts, backlog, freshness and workers, as `refarch status` shows them.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::event::{self, ScalingEvent};
use super::fault::{self, FaultStatus};
use super::generation::Generation;
use super::proof::Proof;
use super::search_index::{self, SearchIndex};
use super::source_rows::{self, Counted};
use super::worker_registry::WORKER_GONE_S;
use super::{Postgres, capture, counts, failure, outbox};
use crate::config;
use crate::pipeline::change::Lane;
use crate::pipeline::failure::Result;
use crate::pipeline::fault::redacted;
use crate::pipeline::histogram::Histogram;
use crate::pipeline::index::{VectorIndex, Writes};
use crate::pipeline::queue::{Backlog, Queue};

/// The period over which freshness is measured.
const FRESHNESS_WINDOW: &str = "5 minutes";

/// The state of one target. All counts are changes or rows, never messages.
#[allow(clippy::struct_excessive_bools)] // The keys of the JSON output.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Rows of the source's table.
    pub source_rows: u64,
    /// Whether that is the planner's estimate, the ledger's count, or an earlier count.
    pub source_rows_estimated: bool,
    /// Changes in the outbox.
    pub pending: u64,
    /// Whether `pending` is an estimate, since so many changes wait.
    pub pending_estimated: bool,
    /// Changes in the queue.
    pub queue: Lanes,
    /// Changes in the dead-letter queue.
    pub dead_letters: u64,
    /// Vectors in the index; `None` while the index cannot be asked.
    pub indexed: Option<u64>,
    /// Why the index cannot be asked.
    pub indexed_error: Option<String>,
    /// Records that the index must hold by the ledger: one for each settled row with a text.
    pub expected: u64,
    /// Entries of the ledger that are not settled: their changes are on their way, or lost.
    pub unsettled: u64,
    /// Whether every row is searchable in its current state, by the ledger and by all counts.
    pub synced: bool,
    /// Result of the continuous proof, which checks that the ledger is right.
    pub proof: Proof,
    /// Why changes of the table are not captured. A process that saw no reason looks again after some seconds.
    pub capture_faults: Vec<String>,
    /// Rows whose current state the index holds, by the ledger.
    pub in_sync: u64,
    /// Whether `in_sync` is an upper bound, because changes are on their way.
    pub in_sync_estimated: bool,
    /// The lists through which searches go; none if searches read all vectors, go through a graph, or are made
    /// elsewhere.
    pub search: Option<SearchIndex>,
    /// Time from statement to searchable over the last five minutes, in milliseconds.
    pub freshness_ms: LaneFreshness,
    /// Processes with a recent heartbeat.
    pub workers: Vec<WorkerStatus>,
    /// The last decisions about the number of workers, newest last.
    pub scaling: Vec<ScalingEvent>,
    /// What these processes cannot do, and why.
    pub faults: Vec<FaultStatus>,
}

/// A backlog for each lane.
#[derive(Clone, Copy, Debug, Serialize)]
#[allow(missing_docs)]
pub struct Lanes {
    pub live: Backlog,
    pub bulk: Backlog,
}

/// Quantiles in milliseconds; `None` if nothing was measured lately.
#[derive(Clone, Copy, Debug, Serialize)]
#[allow(missing_docs)]
pub struct Freshness {
    pub p50: Option<u64>,
    pub p99: Option<u64>,
    /// Changes that were measured: all, or samples if each question to the index is paid for.
    pub changes: u64,
}

impl From<&Histogram> for Freshness {
    fn from(histogram: &Histogram) -> Self {
        Self { p50: histogram.quantile(0.5), p99: histogram.quantile(0.99), changes: histogram.total() }
    }
}

/// Freshness of each lane. The top level repeats the live lane, since users wait for live changes.
#[derive(Clone, Copy, Debug, Serialize)]
#[allow(missing_docs)]
pub struct LaneFreshness {
    #[serde(flatten)]
    pub top: Freshness,
    pub live: Freshness,
    pub bulk: Freshness,
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
    /// Changes that are not in the index yet, without dead letters.
    #[must_use]
    pub fn outstanding(&self) -> u64 {
        let lanes = [self.queue.live, self.queue.bulk];
        self.pending + lanes.iter().map(|lane| lane.visible + lane.in_flight).sum::<u64>()
    }

    /// Whether every row is searchable in its current state, by the ledger and by all counts.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// Records that the index lacks, by its own count.
    #[must_use]
    pub fn lacking(&self) -> u64 {
        self.indexed.map_or(0, |indexed| self.expected.saturating_sub(indexed))
    }
}

/// What a process remembers from one status to the next.
#[derive(Debug, Default)]
pub struct Remembered {
    /// The last count of a large table's rows.
    counted: Arc<Counted>,
    /// The last look at capture.
    capture: capture::LastLook,
}

/// Whether rows that existed before capture, or changed without capture, are still to be queued.
async fn is_backfilling(postgres: &Postgres, source: &str) -> Result<bool> {
    let fail = |error: tokio_postgres::Error| failure("look for rows that must be queued", error);
    let client = postgres.client().await?;
    let there: bool = client
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_class WHERE oid = to_regclass('refarch.backfill') AND relkind IN ('r', 'p'))",
            &[],
        )
        .await
        .map_err(fail)?
        .get(0);
    if !there {
        return Ok(false);
    }
    let sql = "SELECT EXISTS (SELECT FROM refarch.backfill b WHERE b.source = $1)";
    Ok(client.query_one(sql, &[&source]).await.map_err(fail)?.get(0))
}

/// Reads the status of one target. A round of its proof takes `period`.
pub async fn read(
    postgres: &Postgres,
    source: &config::Source,
    generation: &Generation,
    queue: &Queue,
    index: &dyn VectorIndex,
    remembered: &Remembered,
    period: Option<Duration>,
) -> Result<Status> {
    let fail = |error: tokio_postgres::Error| failure("read the status", error);
    let table = &generation.table;
    // The places are read in the order in which changes travel. A change that moves on while this counts is
    // counted twice rather than never, so that an outstanding change cannot look synced.
    let backfilling = is_backfilling(postgres, &table.name).await?;
    let pending = outbox::pending(postgres, &table.name).await?;
    let Queue { stats, dead_letters, .. } = queue;
    let lanes = Lanes { live: stats.backlog(Lane::Live).await?, bulk: stats.backlog(Lane::Bulk).await? };
    let dead_letters = dead_letters.count().await?;
    let counts = counts::read(postgres, generation.id).await?;
    let freshness = freshness(postgres).await?;
    let client = postgres.client().await?;
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
    let rows = source_rows::read(postgres, generation, &counts, &remembered.counted).await?;
    let faults = fault::read(postgres).await?;
    // During an outage of the index, the other numbers are still useful.
    let (indexed, indexed_error) = match index.count().await {
        Ok(count) => (Some(count), None),
        Err(error) => {
            // Shown in the status, which may be read every few seconds.
            tracing::debug!(%error, "cannot count the records of the index");
            (None, Some(redacted(&error.to_string())))
        }
    };
    let mut status = Status {
        source_rows: rows.rows,
        source_rows_estimated: rows.estimated,
        pending: pending.changes,
        pending_estimated: pending.estimated,
        queue: lanes,
        dead_letters,
        indexed,
        indexed_error,
        expected: counts.with_text,
        unsettled: counts.unsettled,
        synced: false,
        proof: Proof::read(postgres, generation.id, period).await?,
        capture_faults: remembered.capture.faults(postgres, source).await?,
        in_sync: 0,
        in_sync_estimated: false,
        search: search_index::read(postgres, generation.id).await?,
        freshness_ms: freshness,
        workers,
        scaling: event::last_decisions(postgres).await?,
        faults,
    };
    // If no change is on its way, a settled entry equals its row. Otherwise at most the settled rows are in
    // sync, and at most the rows without an outstanding change.
    let outstanding = status.outstanding();
    status.in_sync = counts.settled.min(rows.rows.saturating_sub(outstanding));
    status.in_sync_estimated = outstanding > 0 || (rows.estimated && counts.unsettled > 0);
    // The count of an index outside of the database lags. But an empty index cannot be in sync with rows.
    let is_late = !matches!(index.writes(), Writes::Transactional(_));
    let counts_agree = match indexed {
        Some(indexed) if is_late => indexed > 0 || counts.with_text == 0,
        Some(indexed) => indexed >= counts.with_text,
        None => false,
    };
    status.synced = outstanding == 0
        && !backfilling
        && dead_letters == 0
        && counts.unsettled == 0
        && status.capture_faults.is_empty()
        && counts_agree
        // An estimate is no count to compare with; the last count of a large table is.
        && if rows.estimated { !rows.differs } else { status.in_sync == rows.rows };
    Ok(status)
}

/// Freshness of each lane over [`FRESHNESS_WINDOW`].
async fn freshness(postgres: &Postgres) -> Result<LaneFreshness> {
    let client = postgres.client().await?;
    let sql = format!(
        "SELECT b.is_bulk, b.bucket, sum(b.count)::bigint FROM refarch.sample s, LATERAL ( \
           SELECT false, * FROM unnest(s.freshness_buckets, s.freshness_counts) UNION ALL \
           SELECT true, * FROM unnest(s.bulk_buckets, s.bulk_counts)) AS b(is_bulk, bucket, count) \
         WHERE s.at > now() - interval '{FRESHNESS_WINDOW}' GROUP BY 1, 2"
    );
    let rows = client.query(&sql, &[]).await.map_err(|error| failure("read the freshness", error))?;
    let mut lanes = [Histogram::default(), Histogram::default()];
    for row in rows {
        let lane = usize::from(row.get::<_, bool>(0));
        lanes[lane].add(row.get::<_, i16>(1) as usize, row.get::<_, i64>(2) as u64);
    }
    let [live, bulk] = lanes.each_ref().map(Freshness::from);
    Ok(LaneFreshness { top: live, live, bulk })
}
