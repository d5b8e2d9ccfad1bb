//! Tracked writes: attempts, and the entries that they open, close and sweep.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::abandoned::Abandoned;
use super::entry::{Entries, hash};
use super::requeue::put_into_outbox;
use crate::backend::postgres::connection::Connection;
use crate::backend::postgres::worker_lock::WORKER_LOCKS;
use crate::backend::postgres::{Postgres, fail};
use crate::pipeline::clock::{BootClock, Clock};
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::ledger::{CloseResult, Closed, Entry, Opened, Outcome, Swept};

/// A worker whose heartbeat is older counts as dead, even if its session is open. If a host loses its power or its
/// network, the kernel keeps the connection open for some time.
const SILENT_FOR: &str = "10 minutes";

/// Abandoned attempts that a process watches. The rest is swept later.
const MAX_WATCHED: i64 = 10_000;

/// When an attempt was abandoned, in microseconds.
const SINCE: &str = "(extract(epoch FROM abandoned_at) * 1000000)::bigint";

/// The attempts of one target.
#[derive(Clone)]
pub(super) struct TrackedWrites {
    postgres: Postgres,
    /// The source's name.
    source: String,
    generation: i32,
    clock: Arc<dyn Clock>,
    abandoned: Arc<Mutex<Abandoned>>,
}

impl TrackedWrites {
    pub(super) fn new(postgres: Postgres, source: &str, generation: i32) -> Self {
        Self {
            postgres,
            source: source.into(),
            generation,
            clock: Arc::new(BootClock),
            abandoned: Arc::default(),
        }
    }

    pub(super) fn with_clock(self, clock: Arc<dyn Clock>) -> Self {
        Self { clock, ..self }
    }

    fn abandoned(&self) -> MutexGuard<'_, Abandoned> {
        self.abandoned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entries(&self) -> Entries {
        Entries(self.generation)
    }

    pub(super) async fn open(&self, write_id: &str, worker: &str, ids: &[String]) -> Result<Vec<Opened>> {
        let fail = fail("open an attempt");
        let mut client = self.postgres.client().await?;
        let open = client
            .prepare_cached(
                "INSERT INTO refarch.ledger AS l (target, id, open, epoch) \
                 SELECT $1, k, 1, 1 FROM unnest($2::text[]) k ORDER BY k COLLATE \"C\" \
                 ON CONFLICT (target, id) DO UPDATE SET open = l.open + 1, epoch = l.epoch + 1, parked = false \
                 RETURNING id, epoch, open > 1, dirty, CASE WHEN deleted THEN NULL ELSE content_hash END",
            )
            .await
            .map_err(&fail)?;
        let transaction = client.transaction().await.map_err(&fail)?;
        let rows = transaction.query(&open, &[&self.generation, &ids]).await.map_err(&fail)?;
        transaction
            .execute(
                "INSERT INTO refarch.attempt (attempt_id, target, worker_id, ids) VALUES ($1, $2, $3, $4)",
                &[&write_id, &self.generation, &worker, &ids],
            )
            .await
            .map_err(&fail)?;
        transaction.commit().await.map_err(&fail)?;
        let mut opened = HashMap::new();
        for row in &rows {
            let id: String = row.get(0);
            let content_hash = hash(row, 4, &id)?;
            let one = Opened {
                id: id.clone(),
                revision: row.get(1),
                shared: row.get(2),
                dirty: row.get(3),
                content_hash,
            };
            opened.insert(id, one);
        }
        ids.iter()
            .map(|id| {
                opened.remove(id).ok_or_else(|| {
                    Error::new(FailureKind::Conflict, "open an attempt", format!("no entry for {id}"))
                })
            })
            .collect()
    }

    pub(super) async fn close(
        &self,
        write_id: &str,
        worker: &str,
        closing: &[(Opened, Outcome)],
    ) -> Result<Closed> {
        let fail = fail("close an attempt");
        let mut client = self.postgres.client().await?;
        let transaction = client.transaction().await.map_err(&fail)?;
        let stands = transaction
            .query_opt("SELECT ids FROM refarch.attempt WHERE attempt_id = $1 FOR UPDATE", &[&write_id])
            .await
            .map_err(&fail)?
            .map(|row| row.get::<_, Vec<String>>(0).into_iter().collect::<HashSet<_>>());
        let mut closed = Closed::default();
        let mut open = Vec::new();
        let mut requeue = Vec::new();
        if let Some(named) = stands {
            // Ids that the attempt no longer has were closed by an earlier call, whose answer was lost.
            let closing: Vec<_> = closing.iter().filter(|(opened, _)| named.contains(&opened.id)).collect();
            let ids: Vec<&str> = closing.iter().map(|(opened, _)| opened.id.as_str()).collect();
            let mut entries = self.entries().lock(&transaction, &ids).await?;
            let mut versions = HashMap::new();
            for (opened, outcome) in closing {
                let Some(entry) = entries.get_mut(&opened.id) else { continue };
                match entry.close(opened, outcome) {
                    CloseResult::Settled => {
                        closed.settled.push(opened.id.clone());
                        if let Outcome::Settled { version, .. } = outcome {
                            versions.insert(opened.id.as_str(), *version);
                        }
                    }
                    CloseResult::Open => open.push(opened.id.clone()),
                    CloseResult::Requeue => requeue.push(opened.id.clone()),
                    CloseResult::Dirty | CloseResult::Unchanged => {}
                }
                closed.overlapped += u64::from(matches!(outcome, Outcome::Settled { .. }) && entry.dirty);
            }
            self.entries().put(&transaction, &entries, &versions).await?;
            put_into_outbox(&transaction, &self.source, &requeue).await?;
            if open.is_empty() {
                transaction
                    .execute("DELETE FROM refarch.attempt WHERE attempt_id = $1", &[&write_id])
                    .await
                    .map_err(&fail)?;
            }
        } else {
            // The attempt was swept while this worker lived. Ids that were not written need no second sweep.
            open = closing
                .iter()
                .filter(|(_, outcome)| *outcome != Outcome::Unwritten)
                .map(|(opened, _)| opened.id.clone())
                .collect();
            let ids: Vec<&str> = open.iter().map(String::as_str).collect();
            let mut entries = self.entries().lock(&transaction, &ids).await?;
            entries.values_mut().for_each(Entry::reopen);
            self.entries().put(&transaction, &entries, &HashMap::new()).await?;
        }
        if !open.is_empty() {
            transaction
                .execute(
                    "INSERT INTO refarch.attempt AS a (attempt_id, target, worker_id, ids, abandoned_at) \
                     VALUES ($1, $2, $3, $4, clock_timestamp()) \
                     ON CONFLICT (attempt_id) DO UPDATE SET ids = excluded.ids, abandoned_at = excluded.abandoned_at",
                    &[&write_id, &self.generation, &worker, &open],
                )
                .await
                .map_err(&fail)?;
        }
        closed.abandoned = open.len() as u64;
        let clock = transaction
            .query_one("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint", &[])
            .await
            .map_err(&fail)?;
        closed.clock_us = clock.get(0);
        transaction.commit().await.map_err(&fail)?;
        if closed.abandoned > 0 {
            self.abandoned().record(write_id, self.clock.now());
        }
        Ok(closed)
    }

    pub(super) async fn abandon_orphans(&self, worker: &str, open_writes: &[String]) -> Result<u64> {
        let client = self.postgres.client().await?;
        let orphans = client
            .query(
                "UPDATE refarch.attempt SET abandoned_at = clock_timestamp() \
                 WHERE target = $1 AND worker_id = $2 AND abandoned_at IS NULL AND attempt_id <> ALL ($3) RETURNING attempt_id",
                &[&self.generation, &worker, &open_writes],
            )
            .await
            .map_err(fail("abandon attempts"))?;
        let now = self.clock.now();
        let mut abandoned = self.abandoned();
        for row in &orphans {
            abandoned.record(row.get(0), now);
        }
        drop(abandoned);
        Ok(orphans.len() as u64)
    }

    pub(super) async fn sweep(&self, settle: Duration, limit: usize) -> Result<Swept> {
        let fail = fail("sweep attempts");
        let mut client = self.postgres.client().await?;
        let sql = format!(
            "UPDATE refarch.attempt a SET abandoned_at = clock_timestamp() \
             WHERE a.target = $1 AND a.abandoned_at IS NULL AND ( \
               NOT EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2 \
                           AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
                           AND l.classid::bigint = hashtext($2)::bigint & 4294967295 \
                           AND l.objid::bigint = hashtext(a.worker_id)::bigint & 4294967295) \
               OR EXISTS (SELECT FROM refarch.worker w WHERE w.worker_id = a.worker_id \
                          AND w.heartbeat_at < now() - interval '{SILENT_FOR}'))"
        );
        let abandoned = client.execute(&sql, &[&self.generation, &WORKER_LOCKS]).await.map_err(&fail)?;
        let mut swept = Swept { abandoned, ..Swept::default() };
        let due = self.due(&client, settle).await?;
        // One attempt in a transaction, so that entries are locked in order.
        for (write_id, since) in due.into_iter().take(limit) {
            let transaction = client.transaction().await.map_err(&fail)?;
            let due = transaction
                .query_opt(
                    &format!("SELECT ids FROM refarch.attempt WHERE attempt_id = $1 AND {SINCE} = $2 FOR UPDATE SKIP LOCKED"),
                    &[&write_id, &since],
                )
                .await
                .map_err(&fail)?;
            // Another worker swept the attempt or is sweeping it, or the attempt was abandoned again.
            let Some(due) = due else { continue };
            let ids: Vec<&str> = due.get(0);
            let mut entries = self.entries().lock(&transaction, &ids).await?;
            let requeue: Vec<String> = entries
                .iter_mut()
                .filter_map(|(id, entry)| (entry.sweep() == CloseResult::Requeue).then(|| id.clone()))
                .collect();
            self.entries().put(&transaction, &entries, &HashMap::new()).await?;
            put_into_outbox(&transaction, &self.source, &requeue).await?;
            transaction
                .execute("DELETE FROM refarch.attempt WHERE attempt_id = $1", &[&write_id])
                .await
                .map_err(&fail)?;
            transaction.commit().await.map_err(&fail)?;
            swept.writes += 1;
            swept.requeued += requeue.len() as u64;
        }
        Ok(swept)
    }

    /// Attempts that were abandoned at least the settling time ago, by the database's clock and by this
    /// process's clock: the clock of the database's host may jump.
    async fn due(&self, client: &Connection, settle: Duration) -> Result<Vec<(String, i64)>> {
        let rows = client
            .query(
                &format!(
                    "SELECT attempt_id, {SINCE}, abandoned_at < clock_timestamp() - make_interval(secs => $2) FROM refarch.attempt \
                     WHERE target = $1 AND abandoned_at IS NOT NULL ORDER BY abandoned_at LIMIT {MAX_WATCHED}"
                ),
                &[&self.generation, &settle.as_secs_f64()],
            )
            .await
            .map_err(fail("look for abandoned attempts"))?;
        let (now, mut watched) = (self.clock.now(), self.abandoned());
        let there: HashMap<String, i64> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        watched.keep(&there, now);
        Ok(rows
            .iter()
            .map(|row| (row.get::<_, String>(0), row.get(1), row.get(2)))
            .filter(|(write_id, _, due)| *due && watched.seen_for(write_id, now) >= settle)
            .map(|(write_id, since, _)| (write_id, since))
            .collect())
    }
}
