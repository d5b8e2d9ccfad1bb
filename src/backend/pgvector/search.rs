//! A search for the nearest vectors, in one round trip to the database.

use async_trait::async_trait;
use pgvector::HalfVector;

use super::table::{Extension, PgVector, Version, is_about_names};
use crate::backend::postgres::products::{VectorSource, VectorTable};
use crate::backend::postgres::search_index::DEFAULT_PROBES;
use crate::pipeline::failure::Result;
use crate::pipeline::index::Match;

/// The oldest pgvector that continues a search if the first candidates were too few.
const MIN_ITERATIVE_VERSION: Version = (0, 8, 0);

impl PgVector {
    /// The settings of a search, as statements at the beginning of its transaction. The probes are read from the
    /// record of the lists, so that all processes search alike.
    pub(super) fn search_settings(&self, version: Version, top: usize) -> String {
        let candidates = (self.options.ef_search as usize).max(top);
        let continued = if version >= MIN_ITERATIVE_VERSION {
            ", set_config('hnsw.iterative_scan', 'strict_order', true), \
               set_config('ivfflat.iterative_scan', 'relaxed_order', true)"
        } else {
            ""
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
        let Extension { schema, version } = self.extension().await?;
        let distance = format!("embedding OPERATOR({schema}.<=>) $1");
        let sql = format!("SELECT id, 1 - ({distance}) FROM {} ORDER BY {distance} LIMIT $2", self.table);
        let rows = self
            .postgres
            .client()
            .await?
            .query_with(
                &self.search_settings(version, top),
                &sql,
                &[&HalfVector::from_f32_slice(embedding), &(top as i64)],
            )
            .await
            .map_err(|error| self.failed("search", error))?;
        let mut found: Vec<Match> =
            rows.iter().map(|row| Match { id: row.get(0), score: row.get::<_, f64>(1) as f32 }).collect();
        // A search that continues in further lists returns the results of each list in turn, so they are sorted
        // again.
        found.sort_by(|a, b| b.score.total_cmp(&a.score));
        Ok(found)
    }
}

#[async_trait]
impl VectorSource for PgVector {
    async fn vector_table(&self, top: usize) -> Result<VectorTable> {
        let Extension { schema, version } = self.extension().await?;
        Ok(VectorTable {
            table: self.table.clone(),
            distance: format!("OPERATOR({schema}.<=>)"),
            settings: self.search_settings(version, top),
            exact_settings: "SET LOCAL enable_indexscan = off".into(),
            is_listed: format!(
                "EXISTS (SELECT FROM refarch.search_index WHERE target = {})",
                self.generation
            ),
            exact_below: self.options.exact_below,
        })
    }

    fn may_have_moved(&self, error: &tokio_postgres::Error) -> bool {
        let is_moved = is_about_names(error);
        if is_moved {
            *self.known_extension() = None;
        }
        is_moved
    }
}
