//! A search for the nearest vectors, in one round trip to the database.

use std::sync::Arc;

use async_trait::async_trait;
use pgvector::HalfVector;

use super::table::{Extension, PgVector, Version, is_about_names};
use crate::backend::postgres::products::{SecondLook, VectorSource, VectorTable};
use crate::backend::postgres::search_index::DEFAULT_PROBES;
use crate::pipeline::failure::Result;
use crate::pipeline::index::Match;
use crate::pipeline::metrics::SecondLooks;

/// The oldest pgvector that continues a search if the first candidates were too few.
const MIN_ITERATIVE_VERSION: Version = (0, 8, 0);

impl PgVector {
    /// The settings of a search, as statements at the beginning of its transaction. The probes are read from the
    /// record of the lists, so that all processes search alike. A search for more vectors begins as a search for
    /// fewer ones if it can be continued.
    fn search_settings(&self, version: Version, top: usize) -> String {
        let kept = self.options.ef_search as usize;
        let (candidates, continued) = if version >= MIN_ITERATIVE_VERSION {
            let continued = ", set_config('hnsw.iterative_scan', 'strict_order', true), \
               set_config('ivfflat.iterative_scan', 'relaxed_order', true)";
            (kept, continued)
        } else {
            (kept.max(top), "")
        };
        format!(
            "SELECT set_config('ivfflat.probes', coalesce((SELECT s.probes FROM refarch.search_index s \
               WHERE s.target = {}), {DEFAULT_PROBES})::text, true), \
               set_config('hnsw.ef_search', '{candidates}', true){continued}",
            self.generation
        )
    }

    /// The nearest `top` vectors.
    pub(super) async fn search(&self, embedding: &[f32], top: usize) -> Result<Vec<Match>> {
        let there = self.vector_table(top).await?;
        let sql = format!(
            "WITH {} SELECT r.id, 1 - r.distance, {} FROM ranked r ORDER BY r.step, r.distance, r.id LIMIT $2",
            there.ranking("false"),
            SecondLook::COLUMN
        );
        let rows = self
            .postgres
            .client()
            .await?
            .query_with(&there.settings, &sql, &[&HalfVector::from_f32_slice(embedding), &(top as i64)])
            .await
            .map_err(|error| self.failed("search", error))?;
        let second_look = rows.first().map_or(SecondLook::None, |row| SecondLook::of(row.get(2)));
        second_look.count(&self.second_looks);
        Ok(rows.iter().map(|row| Match { id: row.get(0), score: row.get::<_, f64>(1) as f32 }).collect())
    }
}

#[async_trait]
impl VectorSource for PgVector {
    async fn vector_table(&self, top: usize) -> Result<VectorTable> {
        let Extension { schema, version } = self.extension().await?;
        Ok(VectorTable {
            table: self.table.clone(),
            distance: format!("OPERATOR({schema}.<=>)"),
            generation: self.generation,
            settings: self.search_settings(version, top),
        })
    }

    fn may_have_moved(&self, error: &tokio_postgres::Error) -> bool {
        let is_moved = is_about_names(error);
        if is_moved {
            *self.known_extension() = None;
        }
        is_moved
    }

    fn second_looks(&self) -> &Arc<SecondLooks> {
        &self.second_looks
    }
}
