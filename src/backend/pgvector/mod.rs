//! The vector index on pgvector, in the source's database, so that every write can be part of a transaction.
//!
//! Each target has a table: `refarch.vector_N (id, embedding halfvec(d), content_hash)`. Without a graph a
//! search is exact. The submodule says when an HNSW graph is built.

mod hnsw;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use pgvector::HalfVector;
use tokio_postgres::Transaction;

use hnsw::BuildHistory;

use super::postgres::counts;
use super::postgres::ledger::{Entries, source_row};
use super::postgres::source::{MAX_REREADS, SourceRead, SourceReader, SourceTable, altered_too_often};
use super::postgres::{Postgres, failure};
use crate::pipeline::clock::{BootClock, Clock};
use crate::pipeline::embedder::Embedding;
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::index::{
    Applied, Desired, Listing, Match, OwnershipStore, Planned, Stored, TransactionalWrite, VectorIndex,
    Writes,
};
use crate::pipeline::source_row::{ContentSalt, Hash, SourceRow};

/// A version of pgvector.
pub type Version = (u32, u32, u32);

/// The oldest pgvector that has `halfvec`.
pub const MIN_VERSION: Version = (0, 7, 0);

/// The oldest pgvector whose graphs are known to be sound (its changelog, 0.8.2 to 0.8.4). With an older one,
/// no graph is built, and searches read all vectors.
pub const MIN_GRAPH_VERSION: Version = (0, 8, 4);

/// The oldest pgvector that continues a search if the first candidates were too few.
const MIN_ITERATIVE_VERSION: Version = (0, 8, 0);

/// pgvector's own limit for `hnsw.ef_search`, which also limits the results of a search.
const MAX_TOP: usize = 1_000;

/// How long a write waits for a lock on the table of vectors, in milliseconds. After that it fails and is
/// retried.
const LOCK_WAIT_MS: u32 = 1_000;

/// The id of a canary: it is written and rolled back, to see whether writes succeed. No row has this id.
const CANARY_ID: &str = "\u{1}probe";

/// Settings of the index.
#[derive(Clone, Copy, Debug)]
pub struct PgVectorOptions {
    /// From this many vectors on, a graph is built.
    pub graph_min_rows: u64,
    /// A graph is built if at most this many changes wait.
    pub graph_max_backlog: u64,
    /// Candidates that a search keeps.
    pub ef_search: u32,
    /// Whether a write is acknowledged in the same database after the write, so that a crash that loses the
    /// write loses the acknowledgement too.
    pub acknowledged_in_same_log: bool,
}

/// The installed pgvector.
#[derive(Clone, Debug)]
struct Extension {
    /// The schema of its types and operators, quoted.
    schema: String,
    version: Version,
}

/// The vectors of one target.
pub struct PgVector {
    postgres: Postgres,
    source: SourceReader,
    salt: ContentSalt,
    generation: i32,
    table: String,
    options: PgVectorOptions,
    extension: Mutex<Option<Extension>>,
    clock: Arc<dyn Clock>,
    builds: Mutex<BuildHistory>,
}

/// Reads a version such as `0.8.4`.
#[must_use]
pub fn parse_version(text: &str) -> Version {
    let mut parts = text.split('.').map(|part| part.parse::<u32>().unwrap_or_default());
    let mut next = || parts.next().unwrap_or_default();
    (next(), next(), next())
}

/// The table that holds a target's vectors.
#[must_use]
pub fn table_name(generation: i32) -> String {
    format!("refarch.vector_{generation}")
}

impl PgVector {
    /// The index of a target. Its table must exist.
    #[must_use]
    pub fn new(
        postgres: Postgres,
        source: Arc<SourceTable>,
        salt: ContentSalt,
        generation: i32,
        options: PgVectorOptions,
    ) -> Self {
        let table = table_name(generation);
        let source = SourceReader::new(postgres.clone(), source);
        Self {
            postgres,
            source,
            salt,
            generation,
            table,
            options,
            extension: Mutex::default(),
            clock: Arc::new(BootClock),
            builds: Mutex::default(),
        }
    }

    /// Measures the pauses between builds of the graph by this clock.
    #[must_use]
    pub fn with_clock(self, clock: Arc<dyn Clock>) -> Self {
        Self { clock, ..self }
    }

    fn known_extension(&self) -> MutexGuard<'_, Option<Extension>> {
        self.extension.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The installed pgvector. It is looked up once, and again after [`Self::failed`].
    async fn extension(&self) -> Result<Extension> {
        let known = self.known_extension().clone();
        if let Some(known) = known {
            return Ok(known);
        }
        let installed = self.installed().await?;
        *self.known_extension() = Some(installed.clone());
        Ok(installed)
    }

    /// An error of SQL that names pgvector's schema. If the extension may have moved to another schema, it is
    /// looked up again at the next attempt, and no change is blamed.
    fn failed(&self, what: &str, error: tokio_postgres::Error) -> Error {
        if !is_about_names(&error) {
            return failure(what, error);
        }
        *self.known_extension() = None;
        failure(what, error).of_kind(FailureKind::Conflict)
    }

    async fn installed(&self) -> Result<Extension> {
        let client = self.postgres.client().await?;
        let sql = "SELECT quote_ident(n.nspname), e.extversion FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace \
                   WHERE e.extname = 'vector'";
        let row = client
            .query_opt(sql, &[])
            .await
            .map_err(|error| failure("look for pgvector", error))?
            .ok_or_else(|| {
                Error::new(
                    FailureKind::MissingResource,
                    "look for pgvector",
                    "the database has no extension vector: run refarch migrate",
                )
            })?;
        Ok(Extension { schema: row.get(0), version: parse_version(row.get(1)) })
    }

    async fn search(&self, embedding: &[f32], top: usize) -> Result<Vec<Match>> {
        let fail = |error: tokio_postgres::Error| self.failed("search", error);
        let candidates = (self.options.ef_search as usize).max(top).to_string();
        let Extension { schema, version } = self.extension().await?;
        let distance = format!("embedding OPERATOR({schema}.<=>) $1");
        let sql = format!("SELECT id, 1 - ({distance}) FROM {} ORDER BY {distance} LIMIT $2", self.table);
        let mut client = self.postgres.client().await?;
        let statement = client.prepare_cached(&sql).await.map_err(fail)?;
        let transaction = client.transaction().await.map_err(fail)?;
        transaction
            .execute(
                "SELECT set_config('hnsw.ef_search', $1, true), \
                        CASE WHEN $2 THEN set_config('hnsw.iterative_scan', 'strict_order', true) END",
                &[&candidates, &(version >= MIN_ITERATIVE_VERSION)],
            )
            .await
            .map_err(fail)?;
        let rows = transaction
            .query(&statement, &[&HalfVector::from_f32_slice(embedding), &(top as i64)])
            .await
            .map_err(fail)?;
        transaction.commit().await.map_err(fail)?;
        Ok(rows.iter().map(|row| Match { id: row.get(0), score: row.get::<_, f64>(1) as f32 }).collect())
    }

    /// Locks the table of vectors for writing, before anything else is locked. A build of the graph may hold
    /// its lock for minutes. A write that waited for that lock while it held a lock on the source's table
    /// would make the application wait too.
    async fn lock(&self, transaction: &Transaction<'_>) -> Result<()> {
        let sql = format!(
            "SET LOCAL lock_timeout = '{LOCK_WAIT_MS}ms'; LOCK TABLE {} IN ROW EXCLUSIVE MODE; \
             SET LOCAL lock_timeout = 0",
            self.table
        );
        transaction.batch_execute(&sql).await.map_err(|error| failure("lock the vectors", error))
    }
}

/// Whether an error says that a type, an operator or a schema does not exist.
fn is_about_names(error: &tokio_postgres::Error) -> bool {
    use tokio_postgres::error::SqlState;
    let missing = [SqlState::UNDEFINED_OBJECT, SqlState::UNDEFINED_FUNCTION, SqlState::INVALID_SCHEMA_NAME];
    error.code().is_some_and(|code| missing.contains(code))
}

#[async_trait]
impl VectorIndex for PgVector {
    async fn query(&self, embedding: &[f32], top: usize) -> Result<Vec<Match>> {
        let top = top.clamp(1, MAX_TOP);
        let found = self.search(embedding, top).await;
        // The failed search cleared the extension, since it may have moved to another schema.
        if found.is_err() && self.known_extension().is_none() {
            return self.search(embedding, top).await;
        }
        found
    }

    async fn count(&self) -> Result<u64> {
        let records = counts::read(&self.postgres, self.generation).await?.records;
        // The table itself says whether it has any.
        let client = self.postgres.client().await?;
        let row = client
            .query_one(&format!("SELECT EXISTS (SELECT FROM {})", self.table), &[])
            .await
            .map_err(|error| failure("count vectors", error))?;
        Ok(if row.get(0) { records } else { 0 })
    }

    async fn list(&self, cursor: Option<&str>, limit: usize) -> Result<Listing> {
        let client = self.postgres.client().await?;
        let sql =
            format!("SELECT id FROM {} WHERE $1::text IS NULL OR id > $1 ORDER BY id LIMIT $2", self.table);
        let rows = client
            .query(&sql, &[&cursor, &(limit as i64)])
            .await
            .map_err(|error| failure("list vectors", error))?;
        let ids: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        let next = ids.last().filter(|_| ids.len() == limit).cloned();
        Ok(Listing { ids, next })
    }

    async fn fetch(&self, ids: &[String]) -> Result<Vec<Stored>> {
        let client = self.postgres.client().await?;
        let sql = format!("SELECT id, content_hash, embedding FROM {} WHERE id = ANY ($1)", self.table);
        let rows = client.query(&sql, &[&ids]).await.map_err(|error| failure("fetch vectors", error))?;
        Ok(rows
            .iter()
            .map(|row| Stored {
                id: row.get(0),
                content_hash: Hash::from_bytes(row.get(1)),
                metadata_hash: None,
                embedding: row.get::<_, HalfVector>(2).to_vec().into_iter().map(f32::from).collect(),
            })
            .collect())
    }

    fn ownership_store(&self) -> Option<&dyn OwnershipStore> {
        // The vectors are restored together with rows and ledger and cannot be ahead of them. `ownership` says
        // more.
        None
    }

    async fn check_writable(&self) -> Result<()> {
        let what = "try a write";
        // Writes ledger and index as for a change, so that whatever stops all changes stops the canary too.
        let schema = self.extension().await?.schema;
        let mut client = self.postgres.client().await?;
        let transaction = client.transaction().await.map_err(|error| failure(what, error))?;
        self.lock(&transaction).await?;
        transaction
            .execute(
                "INSERT INTO refarch.ledger (target, id) VALUES ($1, $2) ON CONFLICT DO NOTHING",
                &[&self.generation, &CANARY_ID],
            )
            .await
            .map_err(|error| failure(what, error))?;
        let sql = format!(
            "INSERT INTO {table} (id, embedding, content_hash) \
             SELECT $1, array_fill(1 / sqrt(a.atttypmod), ARRAY[a.atttypmod])::real[]::{schema}.halfvec, sha256('probe') \
             FROM pg_attribute a WHERE a.attrelid = to_regclass('{table}') AND a.attname = 'embedding' \
             ON CONFLICT (id) DO UPDATE SET embedding = excluded.embedding, content_hash = excluded.content_hash",
            table = self.table
        );
        transaction.execute(&sql, &[&CANARY_ID]).await.map_err(|error| self.failed(what, error))?;
        transaction.rollback().await.map_err(|error| failure(what, error))?;
        Ok(())
    }

    fn writes(&self) -> Writes<'_> {
        Writes::Transactional(self)
    }

    async fn maintain(&self, backlog: u64) -> Result<()> {
        self.maintain_graph(backlog).await
    }
}

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
            // The commit need not wait for the disk: a crash loses the end of the log, and the
            // acknowledgement comes after this commit in the same log.
            transaction
                .batch_execute("SET LOCAL synchronous_commit = off")
                .await
                .map_err(fail("begin a write"))?;
        }
        self.lock(&transaction).await?;

        let mut ids: Vec<&str> = planned.iter().map(|write| write.id.as_str()).collect();
        ids.sort_unstable();
        let new: Vec<&str> = planned.iter().filter(|w| w.epoch.is_none()).map(|w| w.id.as_str()).collect();
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
            let sql = format!(
                "INSERT INTO {table} (id, embedding, content_hash) \
                 SELECT * FROM unnest($1::text[], $2::{schema}.halfvec[], $3::bytea[]) \
                 ON CONFLICT (id) DO UPDATE SET embedding = excluded.embedding, content_hash = excluded.content_hash"
            );
            transaction
                .execute(&sql, &[&write.upsert_ids, &write.vectors, &write.hashes])
                .await
                .map_err(|error| self.failed("upsert vectors", error))?;
        }
        Ok(())
    }
}
