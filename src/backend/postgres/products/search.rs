//! A page of search results in one round trip: the nearest vectors, exact matches and their rows.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use deadpool_postgres::Object;
use pgvector::HalfVector;
use tokio_postgres::types::ToSql;

use super::columns::{COLUMNS, INDEXES_LOWER_CASE};
use super::table::{EXACT_LIMIT, Exact, Products, STATEMENT_TIMEOUT, failed, product, time_limits};
use super::vectors::{DEPTHS, InDatabase, SecondLook, VectorSource, VectorTable};
use crate::backend::postgres::client;
use crate::backend::postgres::connection::Connection;
use crate::pipeline::failure::Result;
use crate::product::Product;

/// How long it is taken for granted that the table has its indexes, or lacks them.
const INDEXES_KNOWN_FOR: Duration = Duration::from_mins(1);

/// A table of at most this many bytes is searched for exact matches without an index: some 2 ms.
const SMALL_TABLE: i64 = 2 << 20;

/// A row of a page of results.
#[derive(Clone, Debug)]
pub struct Found {
    /// The row.
    pub product: Product,
    /// How its SKU or name is the term, if it is.
    pub exact: Option<Exact>,
    /// Cosine similarity; none for an exact match that is not among the nearest.
    pub score: Option<f32>,
}

impl Products {
    /// Searches these vectors together with the table.
    #[must_use]
    pub fn with_vectors(self, vectors: Arc<dyn VectorSource>) -> Self {
        Self { in_database: Some(InDatabase { vectors, indexed: Arc::default() }), ..self }
    }

    /// Rows `offset` to `offset + count` of the ranking: exact matches first, by id, then by cosine similarity to
    /// `embedding` (see [`DEPTHS`]), equal scores by id. `None` if that takes several statements: the vectors are elsewhere, or the table has no
    /// indexes for exact matches.
    pub async fn search(
        &self,
        term: &str,
        embedding: &[f32],
        offset: usize,
        count: usize,
    ) -> Result<Option<Vec<Found>>> {
        let Some(InDatabase { vectors, .. }) = &self.in_database else { return Ok(None) };
        if !self.finds_exact_matches_fast().await? {
            return Ok(None);
        }
        let needed = offset.saturating_add(count);
        let depth = DEPTHS.into_iter().find(|depth| *depth >= needed).unwrap_or(DEPTHS[2]);
        let query = Query {
            // No column holds such a term.
            term: Some(term).filter(|term| !term.contains('\0')),
            embedding: HalfVector::from_f32_slice(embedding),
            depth: depth as i64,
            offset: offset as i64,
            count: count as i64,
        };
        let mut is_repeated = false;
        loop {
            let there = vectors.vector_table(depth).await?;
            match self.page_of(client(&self.pool).await?, &there, &query).await {
                Err(error) if !is_repeated && vectors.may_have_moved(&error) => is_repeated = true,
                page => {
                    let (rows, second_look) = page.map_err(failed)?;
                    second_look.count(vectors.second_looks());
                    return Ok(Some(rows));
                }
            }
        }
    }

    /// Runs the one statement of a search.
    async fn page_of(
        &self,
        client: Object,
        there: &VectorTable,
        query: &Query<'_>,
    ) -> std::result::Result<(Vec<Found>, SecondLook), tokio_postgres::Error> {
        let sql = format!(
            "WITH exact AS MATERIALIZED ( \
               SELECT p.id::bigint AS id, CASE WHEN lower(p.sku) = lower($3) THEN 0 ELSE 1 END AS rank FROM {relation} p \
               WHERE lower(p.sku) = lower($3) OR lower(p.name) = lower($3) ORDER BY 2, 1 LIMIT {EXACT_LIMIT}), \
             {ranking}, \
             hits AS ( \
               SELECT coalesce(e.id, n.id) AS id, e.rank, n.score, CASE WHEN e.id IS NULL THEN n.step END AS step, \
                 CASE WHEN e.id IS NULL THEN n.score END AS ordered_by \
               FROM ( \
                 SELECT CASE WHEN r.id ~ '^-?[0-9]{{1,18}}$' THEN r.id::bigint END AS id, 1 - r.distance AS score, r.step \
                 FROM ranked r) n \
               FULL JOIN exact e ON e.id = n.id) \
             SELECT {COLUMNS}, h.rank, h.score::real, {second_look} \
             FROM hits h JOIN {relation} p ON p.id = h.id \
             ORDER BY h.rank NULLS LAST, h.step, h.ordered_by DESC, p.id OFFSET $4 LIMIT $5",
            relation = self.relation,
            ranking = there.ranking("EXISTS (SELECT FROM exact)"),
            second_look = SecondLook::COLUMN,
        );
        let limits =
            format!("SET LOCAL search_path = pg_catalog, pg_temp; {}", time_limits(STATEMENT_TIMEOUT));
        let connection = Connection::new(client, limits.into());
        let Query { term, embedding, depth, offset, count } = query;
        let parameters: [&(dyn ToSql + Sync); 5] = [embedding, depth, term, offset, count];
        let rows = connection.query_with(&there.settings, &sql, &parameters).await?;
        let second_look = rows.first().map_or(SecondLook::None, |row| SecondLook::of(row.get(9)));
        Ok((rows.iter().map(found).collect(), second_look))
    }

    /// Whether exact matches are found without reading a large table: it is small, or it has indexes on `lower(sku)` and
    /// `lower(name)`.
    async fn finds_exact_matches_fast(&self) -> Result<bool> {
        let Some(InDatabase { indexed, .. }) = &self.in_database else { return Ok(false) };
        let known = *indexed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, is_indexed)) = known
            && at.elapsed() < INDEXES_KNOWN_FOR
        {
            return Ok(is_indexed);
        }
        let rows = self
            .query(
                &format!("SELECT pg_relation_size(r.oid) <= $2 OR count(DISTINCT x.column_name) = 2 FROM (SELECT $1::text::regclass::oid) r(oid) \
                 LEFT JOIN LATERAL ( \
                   SELECT k.column_name FROM pg_index i, (VALUES ('sku'), ('name')) k(column_name) \
                   WHERE i.indrelid = r.oid AND {INDEXES_LOWER_CASE}) x ON true \
                 GROUP BY r.oid"),
                &[&self.relation, &SMALL_TABLE],
            )
            .await?;
        let is_indexed = rows.first().is_some_and(|row| row.get(0));
        *indexed.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), is_indexed));
        Ok(is_indexed)
    }
}

/// What is asked for.
struct Query<'a> {
    term: Option<&'a str>,
    embedding: HalfVector,
    depth: i64,
    offset: i64,
    count: i64,
}

fn found(row: &tokio_postgres::Row) -> Found {
    let exact = row.get::<_, Option<i32>>(7).map(|rank| if rank == 0 { Exact::Sku } else { Exact::Name });
    Found { product: product(row), exact, score: row.get(8) }
}
