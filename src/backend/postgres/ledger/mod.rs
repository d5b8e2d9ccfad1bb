//! The ledger. It is read together with the source, in one snapshot.
//!
//! Every transaction locks in the same order: an attempt, then its ledger entries by id, byte by byte.

mod abandoned;
mod entry;
mod requeue;
mod rows;
mod tracked_writes;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

pub(crate) use entry::Entries;
pub(crate) use rows::source_row;

use super::source::SourceTable;
use super::{Postgres, counts, fail};
use crate::pipeline::clock::Clock;
use crate::pipeline::failure::Result;
use crate::pipeline::ledger::{Closed, Ledger, Opened, Outcome, Peeked, Pending, Swept};
use crate::pipeline::source_row::ContentSalt;
use rows::RowReader;
use tracked_writes::TrackedWrites;

/// The most rows of the outbox that are counted, if the caller only needs to know whether they are many.
const MANY_ROWS: i64 = 2_000;

/// Source and ledger of one target.
#[derive(Clone)]
pub struct PgLedger {
    postgres: Postgres,
    /// The source's name.
    name: String,
    generation: i32,
    rows: RowReader,
    writes: TrackedWrites,
}

impl PgLedger {
    /// The ledger of a target over its source's table.
    #[must_use]
    pub fn new(postgres: Postgres, table: Arc<SourceTable>, generation: i32, salt: ContentSalt) -> Self {
        let name = table.name.clone();
        let writes = TrackedWrites::new(postgres.clone(), &name, generation);
        let rows = RowReader::new(postgres.clone(), table, generation, salt);
        Self { postgres, name, generation, rows, writes }
    }

    /// Measures the settling time by this clock too.
    #[must_use]
    pub fn with_clock(self, clock: Arc<dyn Clock>) -> Self {
        Self { writes: self.writes.with_clock(clock), ..self }
    }
}

#[async_trait]
impl Ledger for PgLedger {
    async fn peek(&self, ids: &[String]) -> Result<Vec<Peeked>> {
        self.rows.peek(ids).await
    }

    async fn fits(&self, ids: &[String], bytes: u64) -> Result<usize> {
        self.rows.fits(ids, bytes).await
    }

    async fn rows_after(&self, id: Option<&str>, limit: usize) -> Result<Vec<Peeked>> {
        self.rows.rows_after(id, limit).await
    }

    async fn ids_after(&self, id: Option<&str>, limit: usize) -> Result<Vec<String>> {
        self.rows.ids_after(id, limit).await
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
        self.writes.open(write_id, worker, ids).await
    }

    async fn close(&self, write_id: &str, worker: &str, closing: &[(Opened, Outcome)]) -> Result<Closed> {
        self.writes.close(write_id, worker, closing).await
    }

    async fn abandon_orphans(&self, worker: &str, open_writes: &[String]) -> Result<u64> {
        self.writes.abandon_orphans(worker, open_writes).await
    }

    async fn sweep(&self, settle: Duration, limit: usize) -> Result<Swept> {
        self.writes.sweep(settle, limit).await
    }

    async fn requeue(&self, ids: &[String]) -> Result<()> {
        requeue::requeue(&self.postgres, &self.name, self.generation, ids).await
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
