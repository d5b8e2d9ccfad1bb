//! The worker registry: heartbeats, samples and events of each process.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Connection, Postgres, failure};
use crate::pipeline::change::Lane;
use crate::pipeline::clock::{BootClock, Clock as _};
use crate::pipeline::failure::{Class, Result};
use crate::pipeline::fault::{Fault, FaultBoard};
use crate::pipeline::metrics::{Counter, Metrics};

/// How often a worker writes a heartbeat, and a sample if it did anything.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(1);

/// A fault that lasts is written again after this many heartbeats.
const REFRESH_BEATS: u32 = 10;

/// A worker whose last heartbeat is older is not shown. Seconds.
pub const WORKER_GONE_S: i32 = 15;

/// How long samples are kept, and entries of workers that ended without leaving.
pub(super) const KEEP: &str = "1 hour";

/// A process's entry in the worker registry.
pub struct WorkerRegistration {
    postgres: Postgres,
    /// Unique among all workers, past ones included.
    pub id: String,
    /// Faults that parts of this worker report. Each heartbeat writes them.
    pub faults: Arc<FaultBoard>,
    /// When the database last had a heartbeat of this worker.
    pub heartbeat: Arc<Heartbeat>,
    /// The last heartbeat that this worker wrote and the database does not hold: the database went back to an
    /// earlier state.
    pub lost: watch::Sender<Option<SystemTime>>,
    metrics: Arc<Metrics>,
    role: String,
    host: String,
    pid: i32,
    threads: AtomicI32,
}

/// Whether the heartbeats of a worker reach the database.
#[derive(Debug, Default)]
pub struct Heartbeat {
    /// By [`BootClock`].
    last: Mutex<Option<Duration>>,
    /// Heartbeats that did not.
    pub failures: Counter,
}

impl Heartbeat {
    /// Time since the last one; none before the first.
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.map(|at| BootClock.now().saturating_sub(at))
    }

    fn ended(&self, result: &Result<()>) {
        match result {
            Ok(()) => *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(BootClock.now()),
            Err(_) => self.failures.add(1),
        }
    }
}

/// What the last heartbeat wrote, to see what is new.
#[derive(Default)]
struct Last {
    /// When, by the database's clock.
    at: Option<SystemTime>,
    totals: (u64, u64),
    faults: WrittenFaults,
}

impl WorkerRegistration {
    /// Registers a worker. Its heartbeats wait for the disk, so a crash of the server loses none.
    pub async fn join(postgres: Postgres, role: &str, threads: usize, metrics: Arc<Metrics>) -> Result<Self> {
        let host = host_name();
        let pid = std::process::id() as i32;
        let postgres = postgres.waiting_for_the_disk();
        let id = format!("{role}-{host}-{pid}-{:04x}", rand::random::<u16>());
        let joined = async {
            let client = postgres.client().await?;
            client
                .execute(
                    "WITH joined AS (INSERT INTO refarch.worker (worker_id, role, host, pid, threads) VALUES ($1, $2, $3, $4, $5)) \
                     INSERT INTO refarch.event (worker_id, kind) VALUES ($1, 'joined')",
                    &[&id, &role, &host, &pid, &(threads as i32)],
                )
                .await
                .map_err(|error| failure("register this worker", error))
        };
        // A database that restarts just now does not end the role. The first heartbeat makes the row.
        match joined.await {
            Err(error) if error.class() != Class::Retryable => return Err(error),
            Err(error) => tracing::debug!(worker.id = id, %error, "cannot register this worker yet"),
            Ok(_) => {}
        }
        let (role, threads) = (role.to_owned(), AtomicI32::new(threads as i32));
        Ok(Self {
            postgres,
            id,
            faults: Arc::default(),
            heartbeat: Arc::default(),
            lost: watch::Sender::new(None),
            metrics,
            role,
            host,
            pid,
            threads,
        })
    }

    /// The worker's role.
    #[must_use]
    pub fn role(&self) -> &str {
        &self.role
    }

    /// Sets the number of threads that the next heartbeat writes.
    pub fn set_threads(&self, threads: usize) {
        self.threads.store(threads as i32, Ordering::Relaxed);
    }

    /// Writes heartbeats until `stop`, then removes the entry.
    pub async fn run(&self, stop: &CancellationToken) {
        let mut tick = tokio::time::interval(HEARTBEAT_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last = Last::default();
        while stop.run_until_cancelled(tick.tick()).await.is_some() {
            let result = self.beat(&mut last).await;
            self.heartbeat.ended(&result);
            if let Err(error) = result {
                tracing::debug!(worker.id = self.id, %error, "cannot write a heartbeat");
            }
        }
        if let Err(error) = self.leave(&mut last).await {
            tracing::debug!(worker.id = self.id, %error, "could not leave the worker registry");
        }
    }

    async fn beat(&self, last: &mut Last) -> Result<()> {
        let fail = |error: tokio_postgres::Error| failure("write a heartbeat", error);
        let (applied, embedded) = self.metrics.totals();
        let client = self.postgres.client().await?;
        // INSERT, since a database that was restored to an earlier state may not have this worker's row. Without a
        // restore, only a row that was not written for long is removed.
        let sql = format!(
            "WITH before AS (SELECT heartbeat_at FROM refarch.worker WHERE worker_id = $1) \
                 INSERT INTO refarch.worker \
                   (worker_id, role, host, pid, threads, heartbeat_at, applied, embedded, held) \
                 VALUES ($1, $4, $5, $6, $7, clock_timestamp(), $2, $3, $9) \
                 ON CONFLICT (worker_id) DO UPDATE SET heartbeat_at = excluded.heartbeat_at, applied = excluded.applied, \
                   embedded = excluded.embedded, threads = excluded.threads, held = excluded.held \
                 RETURNING heartbeat_at, coalesce((SELECT heartbeat_at FROM before) < $8::timestamptz, \
                   $8 > clock_timestamp() - interval '{KEEP}', false)"
        );
        let row = client
            .query_one(
                &sql,
                &[
                    &self.id,
                    &(applied as i64),
                    &(embedded as i64),
                    &self.role,
                    &self.host,
                    &self.pid,
                    &self.threads.load(Ordering::Relaxed),
                    &last.at,
                    &(self.metrics.in_flight.sum() as i64),
                ],
            )
            .await
            .map_err(fail)?;
        let previous = last.at.replace(row.get(0));
        if row.get(1) {
            tracing::warn!(
                worker.id = self.id,
                "the database went back: it has lost this worker's last heartbeat"
            );
            self.lost.send_replace(previous);
        }
        last.faults.keep(&client, &self.id, self.faults.current()).await?;
        let recent = |lane| -> (Vec<i16>, Vec<i64>) {
            let recent = self.metrics.take_recent(lane);
            recent.buckets().map(|(bucket, count)| (bucket as i16, count as i64)).unzip()
        };
        let (live, bulk) = (recent(Lane::Live), recent(Lane::Bulk));
        // Freshness may arrive after the last write, if queries of the index lag behind its writes.
        let is_fresh = !live.0.is_empty() || !bulk.0.is_empty();
        if is_fresh || (applied, embedded) != last.totals {
            client
                .execute(
                    "INSERT INTO refarch.sample \
                       (worker_id, at, applied, embedded, freshness_buckets, freshness_counts, bulk_buckets, bulk_counts) \
                     VALUES ($1, clock_timestamp(), $2, $3, $4, $5, $6, $7)",
                    &[
                        &self.id,
                        &((applied - last.totals.0) as i64),
                        &((embedded - last.totals.1) as i64),
                        &live.0,
                        &live.1,
                        &bulk.0,
                        &bulk.1,
                    ],
                )
                .await
                .map_err(fail)?;
            last.totals = (applied, embedded);
        }
        Ok(())
    }

    async fn leave(&self, last: &mut Last) -> Result<()> {
        self.beat(last).await?;
        let client = self.postgres.client().await?;
        client
            .execute(
                "WITH gone AS (DELETE FROM refarch.worker WHERE worker_id = $1), \
                      faults AS (DELETE FROM refarch.fault WHERE worker_id = $1) \
                 INSERT INTO refarch.event (worker_id, kind) VALUES ($1, 'left')",
                &[&self.id],
            )
            .await
            .map_err(|error| failure("leave the worker registry", error))?;
        Ok(())
    }
}

/// An embed process with a recent heartbeat, as its last heartbeat tells it.
#[derive(Clone, Debug)]
pub struct EmbedWorker {
    /// The worker's name.
    pub id: String,
    /// Where it runs.
    pub host: String,
    /// Its process there.
    pub pid: i32,
    /// Its embedding threads.
    pub threads: usize,
    /// Changes that it has applied since its start.
    pub applied: u64,
    /// Changes that it holds.
    pub held: u64,
}

/// The embed processes with a recent heartbeat.
pub async fn embed_workers(postgres: &Postgres) -> Result<Vec<EmbedWorker>> {
    let client = postgres.client().await?;
    let rows = client
        .query(
            "SELECT worker_id, host, pid, threads, applied, held FROM refarch.worker \
             WHERE role = 'embed' AND heartbeat_at > now() - make_interval(secs => $1)",
            &[&f64::from(WORKER_GONE_S)],
        )
        .await
        .map_err(|error| failure("read the workers", error))?;
    let number = |row: &tokio_postgres::Row, at| u64::try_from(row.get::<_, i64>(at)).unwrap_or_default();
    let worker = |row: &tokio_postgres::Row| EmbedWorker {
        id: row.get(0),
        host: row.get(1),
        pid: row.get(2),
        threads: usize::try_from(row.get::<_, i32>(3)).unwrap_or_default(),
        applied: number(row, 4),
        held: number(row, 5),
    };
    Ok(rows.iter().map(worker).collect())
}

/// The name of this machine.
#[must_use]
pub fn host_name() -> String {
    nix::unistd::gethostname().map_or_else(|_| "localhost".into(), |name| name.to_string_lossy().into_owned())
}

/// A worker's faults as they were last written to the database.
#[derive(Debug, Default)]
struct WrittenFaults {
    faults: Vec<Fault>,
    beats: u32,
}

impl WrittenFaults {
    /// Writes a worker's faults if they changed, and once in a while that they go on. Kinds that others
    /// write under the worker's name are left alone.
    async fn keep(&mut self, client: &Connection, worker: &str, current: Vec<Fault>) -> Result<()> {
        self.beats += 1;
        if current == self.faults && (current.is_empty() || self.beats < REFRESH_BEATS) {
            return Ok(());
        }
        let ended: Vec<&str> = self
            .faults
            .iter()
            .map(|fault| fault.kind)
            .filter(|kind| current.iter().all(|fault| fault.kind != *kind))
            .collect();
        let kinds: Vec<&str> = current.iter().map(|fault| fault.kind).collect();
        let messages: Vec<&str> = current.iter().map(|fault| fault.message.as_str()).collect();
        client
            .execute(
                "WITH ended AS (DELETE FROM refarch.fault WHERE worker_id = $1 AND kind = ANY ($2)) \
                 INSERT INTO refarch.fault AS f (worker_id, kind, message) \
                 SELECT $1, u.kind, u.message FROM unnest($3::text[], $4::text[]) AS u(kind, message) \
                 ON CONFLICT (worker_id, kind) DO UPDATE SET message = excluded.message, seen_at = clock_timestamp()",
                &[&worker, &ended, &kinds, &messages],
            )
            .await
            .map_err(|error| failure("write a fault", error))?;
        (self.faults, self.beats) = (current, 0);
        Ok(())
    }
}
