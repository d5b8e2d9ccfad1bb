//! Writes of vectors, each in one transaction with the ledger and the row that it read.

use std::collections::{HashMap, HashSet};

use async_trait::async_trait;
use pgvector::HalfVector;
use tokio_postgres::Transaction;

use super::table::PgVector;
use crate::backend::postgres::failure;
use crate::backend::postgres::ledger::{Entries, source_row};
use crate::backend::postgres::source::{
    MAX_REREADS, SourceRead, SourceReader, SourceTable, altered_too_often,
};
use crate::pipeline::embedder::Embedding;
use crate::pipeline::failure::Result;
use crate::pipeline::index::{Applied, Desired, Planned, TransactionalWrite};
use crate::pipeline::source_row::SourceRow;

/// How long a write waits for a lock on the table of vectors, in milliseconds. After that it fails and is
/// retried.
const LOCK_WAIT_MS: u32 = 1_000;

#[async_trait]
impl TransactionalWrite for PgVector {
    async fn apply(&self, planned: &[Planned]) -> Result<Applied> {
        let mut impossible: HashSet<String> = HashSet::new();
        for _ in 0..MAX_REREADS {
            let table = self.source.table();
            match self.apply_by(&table, planned, &impossible).await? {
                SourceRead::Rows(applied) => return Ok(applied),
                SourceRead::Retry => impossible.clear(),
                SourceRead::BadValue(error) => {
                    let ids: Vec<&str> = planned
                        .iter()
                        .map(|plan| plan.id.as_str())
                        .filter(|id| table.can_hold(id) && !impossible.contains(*id))
                        .collect();
                    let more = self.source.impossible(&table, &ids).await?;
                    if more.is_empty() {
                        return Err(error);
                    }
                    impossible.extend(more);
                }
            }
        }
        Err(altered_too_often("read rows again", &self.source.table()))
    }
}

impl PgVector {
    /// One attempt with one description of the source. Nothing is written unless the table is as described.
    async fn apply_by(
        &self,
        table: &SourceTable,
        planned: &[Planned],
        impossible: &HashSet<String>,
    ) -> Result<SourceRead<Applied>> {
        let fail = |what: &'static str| move |error: tokio_postgres::Error| failure(what, error);
        let again = "read rows again";
        let mut client = self.postgres.client().await?;
        let prepared = async {
            let select = client.prepare_cached(&table.select_by_ids()).await?;
            Ok((select, client.prepare_cached(&SourceReader::check()).await?))
        };
        let (select, check) = match prepared.await {
            Ok(prepared) => prepared,
            Err(error) => {
                drop(client);
                return Ok(self.source.check_read(again, table, Err(error)).await?.without_rows());
            }
        };
        let transaction = client.transaction().await.map_err(fail("begin a write"))?;
        if self.options.acknowledged_in_same_log {
            // The commit need not wait for the disk. A crash loses the end of the log. The acknowledgement comes
            // later in the same log than this commit, so a crash that loses this commit loses both.
            transaction
                .batch_execute("SET LOCAL synchronous_commit = off")
                .await
                .map_err(fail("begin a write"))?;
        }
        self.lock(&transaction).await?;

        let mut ids: Vec<&str> = planned.iter().map(|write| write.id.as_str()).collect();
        ids.sort_unstable();
        let new: Vec<&str> = planned.iter().filter(|w| w.revision.is_none()).map(|w| w.id.as_str()).collect();
        if !new.is_empty() {
            transaction
                .execute(
                    "INSERT INTO refarch.ledger (target, id) SELECT $1, k FROM unnest($2::text[]) k ORDER BY k COLLATE \"C\" \
                     ON CONFLICT DO NOTHING",
                    &[&self.generation, &new],
                )
                .await
                .map_err(fail("open ledger entries"))?;
        }
        let ledger = Entries(self.generation);
        let mut entries = ledger.lock(&transaction, &ids).await?;
        let possible: Vec<&str> =
            ids.iter().copied().filter(|id| table.can_hold(id) && !impossible.contains(*id)).collect();
        // Read after the locks, in a new snapshot: the newest committed state of each row.
        let read = SourceReader::read(&*transaction, table, &select, &[&possible], &check).await;
        let rows = match read {
            Ok((rows, seen)) if table.is_as_seen(seen.as_ref()) => rows,
            read => {
                // No lock and no connection is held while the table is looked up again.
                let _ = transaction.rollback().await;
                drop(client);
                return Ok(self.source.check_read(again, table, read).await?.without_rows());
            }
        };
        let rows: HashMap<String, SourceRow> = rows
            .iter()
            .map(|row| {
                let id: String = row.get(0);
                let row = source_row(
                    &self.salt,
                    id.clone(),
                    row.get(1),
                    row.get::<_, Option<&str>>(2).unwrap_or("{}"),
                );
                (id, row)
            })
            .collect();

        let mut write = Write::default();
        let mut conflicted = Vec::new();
        for plan in planned {
            let entry = entries.get_mut(&plan.id);
            if entry.is_some_and(|entry| entry.settle_transactional(plan, rows.get(&plan.id))) {
                write.add(plan);
            } else {
                entries.remove(&plan.id);
                conflicted.push(plan.id.clone());
            }
        }
        self.write(&transaction, &write).await?;
        ledger.put(&transaction, &entries, &write.versions).await?;
        let clock = transaction
            .query_one("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint", &[])
            .await
            .map_err(fail("read the clock"))?;
        transaction.commit().await.map_err(fail("commit a write"))?;
        Ok(SourceRead::Rows(Applied { conflicted, clock_us: clock.get(0) }))
    }
}

/// The changes of one write to the table of vectors, by column, and the versions for the ledger.
#[derive(Default)]
struct Write<'a> {
    gone: Vec<&'a str>,
    upsert_ids: Vec<&'a str>,
    vectors: Vec<HalfVector>,
    hashes: Vec<&'a [u8]>,
    versions: HashMap<&'a str, i64>,
}

impl<'a> Write<'a> {
    fn add(&mut self, plan: &'a Planned) {
        match &plan.desired {
            Desired::Present { row, embedding: Some(embedding) } => self.upsert(&plan.id, row, embedding),
            Desired::Present { embedding: None, .. } => {}
            Desired::Textless { .. } | Desired::Absent => self.gone.push(&plan.id),
        }
        self.versions.insert(&plan.id, plan.version);
    }

    fn upsert(&mut self, id: &'a str, row: &'a SourceRow, embedding: &Embedding) {
        self.upsert_ids.push(id);
        self.vectors.push(HalfVector::from_f32_slice(embedding));
        self.hashes.push(&row.content_hash.0);
    }
}

impl PgVector {
    /// Locks the table of vectors for writing, before anything else is locked. A build of the graph may hold
    /// its lock for minutes. A write that waited for that lock while it held a lock on the source's table
    /// would make the application wait too.
    pub(super) async fn lock(&self, transaction: &Transaction<'_>) -> Result<()> {
        let sql = format!(
            "SET LOCAL lock_timeout = '{LOCK_WAIT_MS}ms'; LOCK TABLE {} IN ROW EXCLUSIVE MODE; \
             SET LOCAL lock_timeout = 0",
            self.table
        );
        transaction.batch_execute(&sql).await.map_err(|error| failure("lock the vectors", error))
    }

    async fn write(&self, transaction: &Transaction<'_>, write: &Write<'_>) -> Result<()> {
        let table = &self.table;
        if !write.gone.is_empty() {
            transaction
                .execute(&format!("DELETE FROM {table} WHERE id = ANY ($1)"), &[&write.gone])
                .await
                .map_err(|error| failure("delete vectors", error))?;
        }
        if !write.upsert_ids.is_empty() {
            let schema = self.extension().await?.schema;
            let (landmarks, is_outlier) = self.outlier_test().await?;
            let sql = format!(
                "WITH {landmarks}, written AS ( \
                   INSERT INTO {table} (id, embedding, content_hash) \
                   SELECT * FROM unnest($1::text[], $2::{schema}.halfvec[], $3::bytea[]) \
                   ON CONFLICT (id) DO UPDATE SET embedding = excluded.embedding, content_hash = excluded.content_hash \
                   RETURNING id, embedding) \
                 INSERT INTO refarch.outlier (target, id) SELECT i.target, w.id FROM refarch.search_index i, written w \
                 WHERE {is_outlier} ON CONFLICT DO NOTHING"
            );
            transaction
                .execute(&sql, &[&write.upsert_ids, &write.vectors, &write.hashes])
                .await
                .map_err(|error| self.failed("upsert vectors", error))?;
        }
        Ok(())
    }
}
