//! The vector index's contract, on a table of the source's database.

use async_trait::async_trait;
use pgvector::HalfVector;

use super::table::PgVector;
use crate::backend::postgres::{counts, failure};
use crate::pipeline::failure::Result;
use crate::pipeline::index::{Listing, Match, OwnershipStore, Stored, VectorIndex, Writes};
use crate::pipeline::source_row::Hash;

/// The most results of a search: pgvector's own limit for `hnsw.ef_search`.
const MAX_TOP: usize = 1_000;

/// The id of a canary: it is written and rolled back, to see whether writes succeed. No row has this id.
const CANARY_ID: &str = "\u{1}probe";

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
        // The table itself shows whether it holds vectors.
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
        // A restore brings back vectors, rows and ledger together, so the vectors cannot be ahead. See
        // `ownership`.
        None
    }

    async fn check_writable(&self) -> Result<()> {
        let what = "try a write";
        // The canary writes ledger and index as a change does. So a fault that stops every change also stops the
        // canary.
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

    async fn maintain(&self, backlog: u64) -> Result<bool> {
        self.maintain_search(backlog).await
    }
}
