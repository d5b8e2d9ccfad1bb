//! The ledger. It is read together with the source, in one snapshot.
//!
//! Every transaction locks in the same order: an attempt, then its ledger entries by id, byte by byte.

mod abandoned;
mod entry;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use sha2::{Digest, Sha256};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Row, Transaction};

use abandoned::Abandoned;
pub(crate) use entry::Entries;
use entry::{ENTRY, hash, read_entry};

use super::connection::Connection;
use super::source::{MAX_REREADS, SourceRead, SourceReader, SourceTable, altered_too_often};
use super::worker_lock::WORKER_LOCKS;
use super::{Postgres, counts, failure};
use crate::pipeline::clock::{BootClock, Clock};
use crate::pipeline::failure::{Class, Error, FailureKind, Result};
use crate::pipeline::ledger::{CloseResult, Closed, Entry, Ledger, Opened, Outcome, Peeked, Pending, Swept};
use crate::pipeline::source_row::{ContentSalt, Hash, SourceRow};

/// A worker whose heartbeat is older counts as dead, even if its session seems to live: the connection of a
/// host that lost its power or its network stays open for as long as the kernel keeps it.
const SILENT_FOR: &str = "10 minutes";

/// Rows of the outbox that are counted at most, where the caller only tells few from many.
const MANY_ROWS: i64 = 2_000;

/// Abandoned attempts that a process watches. The rest is swept later.
const MAX_WATCHED: i64 = 10_000;

/// Source and ledger of one target.
#[derive(Clone)]
pub struct PgLedger {
    postgres: Postgres,
    source: Arc<SourceReader>,
    /// The source's name.
    name: String,
    generation: i32,
    salt: ContentSalt,
    clock: Arc<dyn Clock>,
    abandoned: Arc<Mutex<Abandoned>>,
}

impl PgLedger {
    /// The ledger of a target over its source's table.
    #[must_use]
    pub fn new(postgres: Postgres, table: Arc<SourceTable>, generation: i32, salt: ContentSalt) -> Self {
        let name = table.name.clone();
        let source = Arc::new(SourceReader::new(postgres.clone(), table));
        Self {
            postgres,
            source,
            name,
            generation,
            salt,
            clock: Arc::new(BootClock),
            abandoned: Arc::default(),
        }
    }

    /// Measures the settling time by this clock too.
    #[must_use]
    pub fn with_clock(self, clock: Arc<dyn Clock>) -> Self {
        Self { clock, ..self }
    }

    fn abandoned(&self) -> MutexGuard<'_, Abandoned> {
        self.abandoned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Rows and entries of the ids in `$1`; the ledger's target is `$2`.
fn peek_sql(table: &SourceTable) -> String {
    format!(
        "SELECT k.id, s.id IS NOT NULL, s.text, s.metadata, l.id IS NOT NULL, {ENTRY} \
         FROM unnest($1::text[]) WITH ORDINALITY AS k(id, ordinal) \
         LEFT JOIN ({rows}) s ON s.id = k.id \
         LEFT JOIN refarch.ledger l ON l.target = $2 AND l.id = k.id \
         ORDER BY k.ordinal",
        rows = table.select_by_ids(),
    )
}

/// The next rows with their entries; the ledger's target is `$3`. The outer ORDER BY is needed: a join need
/// not keep the order of the rows, and the next page begins after the last row.
fn page_sql(table: &SourceTable) -> String {
    format!(
        "SELECT s.id, true, s.text, s.metadata, l.id IS NOT NULL, {ENTRY} \
         FROM ({rows}) s LEFT JOIN refarch.ledger l ON l.target = $3 AND l.id = s.id ORDER BY s.key",
        rows = table.select_after(),
    )
}

/// When an attempt was abandoned, in microseconds.
const SINCE: &str = "(extract(epoch FROM abandoned_at) * 1000000)::bigint";

/// A row of the source from its text and metadata as selected by [`SourceTable::select_by_ids`].
pub(crate) fn source_row(salt: &ContentSalt, id: String, text: &str, metadata: &str) -> SourceRow {
    SourceRow {
        id,
        content_hash: salt.hash(text),
        text: text.into(),
        metadata_hash: Hash(Sha256::digest(metadata.as_bytes()).into()),
        metadata: metadata.into(),
    }
}

fn fail(what: &'static str) -> impl Fn(tokio_postgres::Error) -> Error {
    move |error| failure(what, error)
}

#[async_trait]
impl Ledger for PgLedger {
    async fn peek(&self, ids: &[String]) -> Result<Vec<Peeked>> {
        let what = "read rows and ledger";
        // Ids that no row can have. The index may hold such a record all the same, if another program wrote
        // it.
        let mut impossible: HashSet<String> = HashSet::new();
        for _ in 0..MAX_REREADS {
            let table = self.source.table();
            let possible: Vec<&str> = ids
                .iter()
                .map(String::as_str)
                .filter(|id| table.can_hold(id) && !impossible.contains(*id))
                .collect();
            let client = self.postgres.client().await?;
            let read = client.read_source(&table, &peek_sql(&table), &[&possible, &self.generation]).await;
            drop(client);
            match self.source.check_read(what, &table, read).await? {
                SourceRead::Rows(rows) => {
                    let peeked = rows.iter().map(|row| self.read(row)).collect::<Result<Vec<_>>>()?;
                    return if possible.len() == ids.len() {
                        Ok(peeked)
                    } else {
                        self.with_impossible(ids, peeked).await
                    };
                }
                SourceRead::Retry => impossible.clear(),
                SourceRead::BadValue(error) => {
                    let more = self.source.impossible(&table, &possible).await?;
                    if more.is_empty() {
                        return Err(error);
                    }
                    impossible.extend(more);
                }
            }
        }
        Err(altered_too_often(what, &self.source.table()))
    }

    async fn fits(&self, ids: &[String], bytes: u64) -> Result<usize> {
        let table = self.source.table();
        let possible: Vec<&String> = ids.iter().filter(|id| table.can_hold(id)).collect();
        // Sizes come from the query that reads the rows, so that its expressions decide.
        let sql = format!(
            "SELECT p.id, coalesce(octet_length(p.text)::bigint + octet_length(p.metadata), 0) FROM ({}) p",
            table.select_by_ids()
        );
        let client = self.postgres.client().await?;
        let (rows, _) = match client.read_source(&table, &sql, &[&possible]).await {
            Ok(read) => read,
            Err(error) => {
                let error = failure("read the sizes of rows", error);
                // Reading the rows gives any other error again, with a better message.
                return if error.class() == Class::Retryable { Err(error) } else { Ok(ids.len()) };
            }
        };
        let sizes: HashMap<&str, i64> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let mut sum = 0_u64;
        let fitting = ids.iter().take_while(|id| {
            let size = sizes.get(id.as_str()).copied().unwrap_or_default();
            sum = sum.saturating_add(size.try_into().unwrap_or_default());
            sum <= bytes
        });
        Ok(fitting.count().max(1))
    }

    async fn rows_after(&self, id: Option<&str>, limit: usize) -> Result<Vec<Peeked>> {
        let what = "read a page of rows";
        for _ in 0..MAX_REREADS {
            let table = self.source.table();
            let client = self.postgres.client().await?;
            let parameters: [&(dyn ToSql + Sync); 3] = [&id, &(limit as i64), &self.generation];
            let read = client.read_source(&table, &page_sql(&table), &parameters).await;
            drop(client);
            match self.source.check_read(what, &table, read).await? {
                SourceRead::Rows(rows) => return rows.iter().map(|row| self.read(row)).collect(),
                SourceRead::Retry => {}
                SourceRead::BadValue(error) => return Err(error),
            }
        }
        Err(altered_too_often(what, &self.source.table()))
    }

    async fn ids_after(&self, id: Option<&str>, limit: usize) -> Result<Vec<String>> {
        let what = "read a page of ids";
        for _ in 0..MAX_REREADS {
            let table = self.source.table();
            // The query selects only ids. So it computes no text, and a row that cannot be read does no harm.
            let sql = format!("SELECT s.id FROM ({rows}) s ORDER BY s.key", rows = table.select_after());
            let client = self.postgres.client().await?;
            let read = client.read_source(&table, &sql, &[&id, &(limit as i64)]).await;
            drop(client);
            match self.source.check_read(what, &table, read).await? {
                SourceRead::Rows(rows) => return Ok(rows.iter().map(|row| row.get(0)).collect()),
                SourceRead::Retry => {}
                SourceRead::BadValue(error) => return Err(error),
            }
        }
        Err(altered_too_often(what, &self.source.table()))
    }

    async fn entries_after(&self, id: Option<&str>, limit: usize) -> Result<Vec<String>> {
        let client = self.postgres.client().await?;
        let rows = client
            .query(
                "SELECT l.id FROM refarch.ledger l WHERE l.target = $1 AND ($2::text IS NULL OR l.id > $2) \
                 ORDER BY l.id LIMIT $3",
                &[&self.generation, &id, &(limit as i64)],
            )
            .await
            .map_err(fail("read a page of entries"))?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    async fn open(&self, write_id: &str, worker: &str, ids: &[String]) -> Result<Vec<Opened>> {
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
                epoch: row.get(1),
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

    async fn close(&self, write_id: &str, worker: &str, closing: &[(Opened, Outcome)]) -> Result<Closed> {
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
            // A call whose answer was lost closed the ids that the attempt no longer names.
            let closing: Vec<_> = closing.iter().filter(|(opened, _)| named.contains(&opened.id)).collect();
            let ids: Vec<&str> = closing.iter().map(|(opened, _)| opened.id.as_str()).collect();
            let mut entries = self.lock(&transaction, &ids).await?;
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
            self.put(&transaction, &entries, &versions).await?;
            self.queue(&transaction, &requeue).await?;
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
            let mut entries = self.lock(&transaction, &ids).await?;
            entries.values_mut().for_each(Entry::reopen);
            self.put(&transaction, &entries, &HashMap::new()).await?;
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

    async fn abandon_orphans(&self, worker: &str, open_writes: &[String]) -> Result<u64> {
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

    async fn sweep(&self, settle: Duration, limit: usize) -> Result<Swept> {
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
            let mut entries = self.lock(&transaction, &ids).await?;
            let requeue: Vec<String> = entries
                .iter_mut()
                .filter_map(|(id, entry)| (entry.sweep() == CloseResult::Requeue).then(|| id.clone()))
                .collect();
            self.put(&transaction, &entries, &HashMap::new()).await?;
            self.queue(&transaction, &requeue).await?;
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

    async fn requeue(&self, ids: &[String]) -> Result<()> {
        let fail = fail("queue ids again");
        let mut client = self.postgres.client().await?;
        let transaction = client.transaction().await.map_err(&fail)?;
        // DO UPDATE locks existing entries in id order. With DO NOTHING, the new entries would be locked
        // first, whatever their ids, and could deadlock with a transaction that opens both kinds.
        transaction
            .execute(
                "INSERT INTO refarch.ledger AS l (target, id) \
                 SELECT $1, k FROM (SELECT DISTINCT unnest($2::text[]) COLLATE \"C\") u(k) ORDER BY k \
                 ON CONFLICT (target, id) DO UPDATE SET epoch = l.epoch WHERE false",
                &[&self.generation, &ids],
            )
            .await
            .map_err(&fail)?;
        let refs: Vec<&str> = ids.iter().map(String::as_str).collect();
        let mut entries = self.lock(&transaction, &refs).await?;
        entries.values_mut().for_each(Entry::invalidate);
        self.put(&transaction, &entries, &HashMap::new()).await?;
        self.queue(&transaction, ids).await?;
        transaction.commit().await.map_err(&fail)
    }

    async fn pending(&self) -> Result<Pending> {
        let client = self.postgres.client().await?;
        let row = client
            .query_one(
                "SELECT clock_timestamp(), least((SELECT min(changed_at) FROM refarch.outbox WHERE source = $1), \
                   (SELECT min(oldest) FROM refarch.shipment WHERE source = $1)), \
                 EXISTS (SELECT FROM refarch.backfill WHERE source = $1) OR EXISTS (SELECT FROM refarch.mark WHERE source = $1)",
                &[&self.name],
            )
            .await
            .map_err(fail("read the age of the oldest change"))?;
        Ok(Pending { now: row.get(0), oldest: row.get(1), rereads: row.get(2) })
    }

    async fn waiting(&self) -> Result<u64> {
        let client = self.postgres.client().await?;
        // A row of the outbox has at least one id, so many rows are many changes.
        let row = client
            .query_one(
                "SELECT (SELECT coalesce(sum(greatest(cardinality(o.ids), 1)), 0) FROM \
                     (SELECT ids FROM refarch.outbox WHERE source = $1 LIMIT $2) o)::bigint \
                   + (SELECT coalesce(sum(changes), 0) FROM refarch.shipment WHERE source = $1)::bigint",
                &[&self.name, &MANY_ROWS],
            )
            .await
            .map_err(fail("count the outbox"))?;
        Ok(row.get::<_, i64>(0).try_into().unwrap_or_default())
    }

    async fn tidy(&self) -> Result<()> {
        counts::fold(&self.postgres, self.generation).await
    }

    async fn count_try(&self, id: &str, by: i32) -> Result<u32> {
        let client = self.postgres.client().await?;
        let row = client
            .query_one(
                "INSERT INTO refarch.ledger AS l (target, id, tries) VALUES ($1, $2, greatest($3, 0)) \
                 ON CONFLICT (target, id) DO UPDATE SET tries = greatest(l.tries::bigint + $3, 0)::integer RETURNING tries",
                &[&self.generation, &id, &by],
            )
            .await
            .map_err(fail("count an attempt at a change"))?;
        Ok(row.get::<_, i32>(0).try_into().unwrap_or_default())
    }

    async fn park(&self, id: &str) -> Result<()> {
        let client = self.postgres.client().await?;
        client
            .execute(
                "INSERT INTO refarch.ledger AS l (target, id, parked) VALUES ($1, $2, true) \
                 ON CONFLICT (target, id) DO UPDATE SET parked = true, tries = 0",
                &[&self.generation, &id],
            )
            .await
            .map_err(fail("park a change"))?;
        Ok(())
    }
}

impl PgLedger {
    /// Adds the entries of ids that no row can have, in the order of `ids`.
    async fn with_impossible(&self, ids: &[String], peeked: Vec<Peeked>) -> Result<Vec<Peeked>> {
        let mut by_id: HashMap<String, Peeked> = peeked.into_iter().map(|p| (p.id.clone(), p)).collect();
        // Text in PostgreSQL cannot hold a NUL.
        let held: Vec<&String> =
            ids.iter().filter(|id| !by_id.contains_key(*id) && !id.contains('\0')).collect();
        let sql =
            format!("SELECT l.id, {ENTRY} FROM refarch.ledger l WHERE l.target = $1 AND l.id = ANY ($2)");
        let client = self.postgres.client().await?;
        let entries =
            client.query(&sql, &[&self.generation, &held]).await.map_err(fail("read rows and ledger"))?;
        for row in &entries {
            let id: String = row.get(0);
            let entry = Some(read_entry(row, 1, &id)?);
            by_id.insert(id.clone(), Peeked { id, row: None, entry });
        }
        let nothing = |id: &String| Peeked { id: id.clone(), row: None, entry: None };
        // `ids` may hold an id twice.
        Ok(ids.iter().map(|id| by_id.get(id).cloned().unwrap_or_else(|| nothing(id))).collect())
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

    /// Puts ids into the outbox. Without a wake-up, the relay finds them at its next poll.
    async fn queue(&self, transaction: &Transaction<'_>, ids: &[String]) -> Result<()> {
        for ids in ids.chunks(crate::pipeline::change::MAX_CHANGES_PER_JOB) {
            transaction
                .execute(
                    "INSERT INTO refarch.outbox (source, op, ids) VALUES ($1, 'u', $2)",
                    &[&self.name, &ids],
                )
                .await
                .map_err(fail("put ids into the outbox"))?;
        }
        Ok(())
    }

    fn read(&self, row: &Row) -> Result<Peeked> {
        let id: String = row.get(0);
        let source = row.get::<_, bool>(1).then(|| {
            source_row(&self.salt, id.clone(), row.get(2), row.get::<_, Option<&str>>(3).unwrap_or("{}"))
        });
        let entry = if row.get(4) { Some(read_entry(row, 5, &id)?) } else { None };
        Ok(Peeked { id, row: source, entry })
    }
}
