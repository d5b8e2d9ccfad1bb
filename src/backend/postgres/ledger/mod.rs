//! The ledger, and its reading together with the source in one snapshot.
//!
//! Locks are taken in one order everywhere: an attempt, then its ledger entries by id, byte by byte.

mod entry;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sha2::{Digest, Sha256};
use tokio_postgres::{Row, Transaction};

pub(crate) use entry::Entries;
use entry::{ENTRY, hash, read_entry};

use super::session::WORKER_LOCKS;
use super::source::SourceTable;
use super::{Postgres, failure};
use crate::pipeline::catalog::{ContentSalt, Hash, SourceRow};
use crate::pipeline::failure::{Error, Result};
use crate::pipeline::ledger::{Closed, Entry, Ledger, Left, Opened, Outcome, Peeked, Pending, Swept};

/// A worker whose heartbeat is older is taken for dead even if its session seems to live: a host that
/// vanished without a word keeps its connection for as long as the kernel does.
const SILENT_FOR: &str = "10 minutes";

/// Source and ledger of one target.
#[derive(Clone)]
pub struct PgLedger {
    postgres: Postgres,
    table: Arc<SourceTable>,
    target: i32,
    salt: ContentSalt,
    peek: Arc<str>,
    page: Arc<str>,
}

impl PgLedger {
    /// The ledger of a target over its source's table.
    #[must_use]
    pub fn new(postgres: Postgres, table: Arc<SourceTable>, target: i32, salt: ContentSalt) -> Self {
        let peek = format!(
            "SELECT k.id, s.id IS NOT NULL, s.text, s.metadata, l.id IS NOT NULL, {ENTRY} \
             FROM unnest($1::text[]) WITH ORDINALITY AS k(id, place) \
             LEFT JOIN ({rows}) s ON s.id = k.id \
             LEFT JOIN refarch.ledger l ON l.target = $2 AND l.id = k.id \
             ORDER BY k.place",
            rows = table.select_by_ids(),
        );
        // A join need not keep the order of the rows, and the last one tells where the next page begins.
        let page = format!(
            "SELECT s.id, true, s.text, s.metadata, l.id IS NOT NULL, {ENTRY} \
             FROM ({rows}) s LEFT JOIN refarch.ledger l ON l.target = $3 AND l.id = s.id \
             ORDER BY s.id::{id_type}",
            rows = table.select_after(),
            id_type = table.id_type,
        );
        Self { postgres, table, target, salt, peek: peek.into(), page: page.into() }
    }
}

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
    move |error| failure(what, &error)
}

#[async_trait]
impl Ledger for PgLedger {
    async fn peek(&self, ids: &[String]) -> Result<Vec<Peeked>> {
        let fail = fail("read rows and ledger");
        let (possible, impossible): (Vec<&String>, Vec<&String>) =
            ids.iter().partition(|id| self.table.can_hold(id));
        let client = self.postgres.client().await?;
        let statement = client.prepare_cached(&self.peek).await.map_err(&fail)?;
        let rows = client.query(&statement, &[&possible, &self.target]).await.map_err(&fail)?;
        let peeked = rows.iter().map(|row| self.read(row)).collect::<Result<Vec<_>>>()?;
        if impossible.is_empty() {
            return Ok(peeked);
        }
        // No row can have such an id, but the index may: somebody else put it there.
        let sql =
            format!("SELECT l.id, {ENTRY} FROM refarch.ledger l WHERE l.target = $1 AND l.id = ANY ($2)");
        // No text of the database can hold a NUL.
        let held: Vec<&String> = impossible.iter().copied().filter(|id| !id.contains('\0')).collect();
        let entries = client.query(&sql, &[&self.target, &held]).await.map_err(&fail)?;
        let mut by_id: HashMap<String, Peeked> = peeked.into_iter().map(|p| (p.id.clone(), p)).collect();
        for row in &entries {
            let id: String = row.get(0);
            let entry = Some(read_entry(row, 1, &id)?);
            by_id.insert(id.clone(), Peeked { id, row: None, entry });
        }
        let nothing = |id: &String| Peeked { id: id.clone(), row: None, entry: None };
        Ok(ids.iter().map(|id| by_id.remove(id).unwrap_or_else(|| nothing(id))).collect())
    }

    async fn rows_after(&self, id: Option<&str>, limit: usize) -> Result<Vec<Peeked>> {
        let fail = fail("read a page of rows");
        let client = self.postgres.client().await?;
        let statement = client.prepare_cached(&self.page).await.map_err(&fail)?;
        let rows = client.query(&statement, &[&id, &(limit as i64), &self.target]).await.map_err(&fail)?;
        rows.iter().map(|row| self.read(row)).collect()
    }

    async fn open(&self, attempt: &str, worker: &str, ids: &[String]) -> Result<Vec<Opened>> {
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
        let rows = transaction.query(&open, &[&self.target, &ids]).await.map_err(&fail)?;
        transaction
            .execute(
                "INSERT INTO refarch.attempt (attempt_id, target, worker_id, ids) VALUES ($1, $2, $3, $4)",
                &[&attempt, &self.target, &worker, &ids],
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
                opened
                    .remove(id)
                    .ok_or_else(|| Error::retryable("open an attempt", format!("no entry for {id}")))
            })
            .collect()
    }

    async fn close(&self, attempt: &str, worker: &str, closing: &[(Opened, Outcome)]) -> Result<Closed> {
        let fail = fail("close an attempt");
        let mut client = self.postgres.client().await?;
        let transaction = client.transaction().await.map_err(&fail)?;
        let stands = transaction
            .query_opt("SELECT ids FROM refarch.attempt WHERE attempt_id = $1 FOR UPDATE", &[&attempt])
            .await
            .map_err(&fail)?
            .map(|row| row.get::<_, Vec<String>>(0).into_iter().collect::<HashSet<_>>());
        let mut closed = Closed::default();
        let mut open = Vec::new();
        let mut requeue = Vec::new();
        if let Some(named) = stands {
            // What it does not name any more was closed by a call whose answer was lost.
            let closing: Vec<_> = closing.iter().filter(|(opened, _)| named.contains(&opened.id)).collect();
            let ids: Vec<&str> = closing.iter().map(|(opened, _)| opened.id.as_str()).collect();
            let mut entries = self.lock(&transaction, &ids).await?;
            let mut versions = HashMap::new();
            for (opened, outcome) in closing {
                let Some(entry) = entries.get_mut(&opened.id) else { continue };
                match entry.close(opened, outcome) {
                    Left::Settled => {
                        closed.settled.push(opened.id.clone());
                        if let Outcome::Settled { version, .. } = outcome {
                            versions.insert(opened.id.as_str(), *version);
                        }
                    }
                    Left::Open => open.push(opened.id.clone()),
                    Left::Requeue => requeue.push(opened.id.clone()),
                    Left::Dirty | Left::Unchanged => {}
                }
                closed.overlapped += u64::from(matches!(outcome, Outcome::Settled { .. }) && entry.dirty);
            }
            self.put(&transaction, &entries, &versions).await?;
            self.queue(&transaction, &requeue).await?;
            if open.is_empty() {
                transaction
                    .execute("DELETE FROM refarch.attempt WHERE attempt_id = $1", &[&attempt])
                    .await
                    .map_err(&fail)?;
            }
        } else {
            // Swept while this worker lived. What it did not write needs no more sweeping.
            open = closing
                .iter()
                .filter(|(_, outcome)| *outcome != Outcome::Unwritten)
                .map(|(opened, _)| opened.id.clone())
                .collect();
            let ids: Vec<&str> = open.iter().map(String::as_str).collect();
            let mut entries = self.lock(&transaction, &ids).await?;
            entries.values_mut().for_each(Entry::put_back);
            self.put(&transaction, &entries, &HashMap::new()).await?;
        }
        if !open.is_empty() {
            transaction
                .execute(
                    "INSERT INTO refarch.attempt AS a (attempt_id, target, worker_id, ids, abandoned_at) \
                     VALUES ($1, $2, $3, $4, clock_timestamp()) \
                     ON CONFLICT (attempt_id) DO UPDATE SET ids = excluded.ids, abandoned_at = excluded.abandoned_at",
                    &[&attempt, &self.target, &worker, &open],
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
        Ok(closed)
    }

    async fn disown(&self, worker: &str, in_hand: &[String]) -> Result<u64> {
        let client = self.postgres.client().await?;
        client
            .execute(
                "UPDATE refarch.attempt SET abandoned_at = clock_timestamp() \
                 WHERE target = $1 AND worker_id = $2 AND abandoned_at IS NULL AND attempt_id <> ALL ($3)",
                &[&self.target, &worker, &in_hand],
            )
            .await
            .map_err(fail("disown attempts"))
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
        let abandoned = client.execute(&sql, &[&self.target, &WORKER_LOCKS]).await.map_err(&fail)?;
        let mut swept = Swept { abandoned, ..Swept::default() };
        // An attempt a transaction, so that entries are locked in order.
        for _ in 0..limit {
            let transaction = client.transaction().await.map_err(&fail)?;
            let due = transaction
                .query_opt(
                    "SELECT attempt_id, ids FROM refarch.attempt \
                     WHERE target = $1 AND abandoned_at < clock_timestamp() - make_interval(secs => $2) \
                     ORDER BY abandoned_at LIMIT 1 FOR UPDATE SKIP LOCKED",
                    &[&self.target, &settle.as_secs_f64()],
                )
                .await
                .map_err(&fail)?;
            let Some(due) = due else { break };
            let (attempt, ids): (&str, Vec<&str>) = (due.get(0), due.get(1));
            let mut entries = self.lock(&transaction, &ids).await?;
            let requeue: Vec<String> = entries
                .iter_mut()
                .filter_map(|(id, entry)| (entry.sweep() == Left::Requeue).then(|| id.clone()))
                .collect();
            self.put(&transaction, &entries, &HashMap::new()).await?;
            self.queue(&transaction, &requeue).await?;
            transaction
                .execute("DELETE FROM refarch.attempt WHERE attempt_id = $1", &[&attempt])
                .await
                .map_err(&fail)?;
            transaction.commit().await.map_err(&fail)?;
            swept.attempts += 1;
            swept.requeued += requeue.len() as u64;
        }
        Ok(swept)
    }

    async fn requeue(&self, ids: &[String]) -> Result<()> {
        let fail = fail("queue ids again");
        let mut client = self.postgres.client().await?;
        let transaction = client.transaction().await.map_err(&fail)?;
        // Locks the entries that are there as it comes to them: with DO NOTHING the new ones would be
        // locked first, whatever their ids, and an opening of both could deadlock with it.
        transaction
            .execute(
                "INSERT INTO refarch.ledger AS l (target, id) \
                 SELECT $1, k FROM (SELECT DISTINCT unnest($2::text[]) COLLATE \"C\") u(k) ORDER BY k \
                 ON CONFLICT (target, id) DO UPDATE SET epoch = l.epoch WHERE false",
                &[&self.target, &ids],
            )
            .await
            .map_err(&fail)?;
        let refs: Vec<&str> = ids.iter().map(String::as_str).collect();
        let mut entries = self.lock(&transaction, &refs).await?;
        entries.values_mut().for_each(Entry::distrust);
        self.put(&transaction, &entries, &HashMap::new()).await?;
        self.queue(&transaction, ids).await?;
        transaction.commit().await.map_err(&fail)
    }

    async fn pending(&self) -> Result<Pending> {
        let client = self.postgres.client().await?;
        let row = client
            .query_one(
                "SELECT clock_timestamp(), least((SELECT min(changed_at) FROM refarch.outbox WHERE source = $1), \
                   (SELECT min(oldest) FROM refarch.shipment WHERE source = $1))",
                &[&self.table.name],
            )
            .await
            .map_err(fail("look for the oldest change"))?;
        Ok(Pending { now: row.get(0), oldest: row.get(1) })
    }

    async fn count_try(&self, id: &str, by: i32) -> Result<u32> {
        let client = self.postgres.client().await?;
        let row = client
            .query_one(
                "INSERT INTO refarch.ledger AS l (target, id, tries) VALUES ($1, $2, greatest($3, 0)) \
                 ON CONFLICT (target, id) DO UPDATE SET tries = greatest(l.tries::bigint + $3, 0)::integer RETURNING tries",
                &[&self.target, &id, &by],
            )
            .await
            .map_err(fail("count a try"))?;
        Ok(row.get::<_, i32>(0).try_into().unwrap_or_default())
    }

    async fn park(&self, id: &str) -> Result<()> {
        let client = self.postgres.client().await?;
        client
            .execute(
                "INSERT INTO refarch.ledger AS l (target, id, parked) VALUES ($1, $2, true) \
                 ON CONFLICT (target, id) DO UPDATE SET parked = true, tries = 0",
                &[&self.target, &id],
            )
            .await
            .map_err(fail("park a change"))?;
        Ok(())
    }
}

impl PgLedger {
    /// Puts ids into the outbox; the relay finds them at its next poll, if nobody rings.
    async fn queue(&self, transaction: &Transaction<'_>, ids: &[String]) -> Result<()> {
        for ids in ids.chunks(crate::pipeline::change::MAX_CHANGES_PER_JOB) {
            transaction
                .execute(
                    "INSERT INTO refarch.outbox (source, op, ids) VALUES ($1, 'u', $2)",
                    &[&self.table.name, &ids],
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
