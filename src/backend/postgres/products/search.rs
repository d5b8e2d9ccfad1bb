//! A page of search results in one round trip: the nearest vectors, exact matches and their rows.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use deadpool_postgres::Object;
use pgvector::HalfVector;
use tokio::sync::Semaphore;

use super::columns::{COLUMNS, INDEXES_LOWER_CASE};
use super::table::{EXACT_LIMIT, Exact, Products, STATEMENT_TIMEOUT, failed, product, time_limits};
use super::vectors::{InDatabase, VectorSource, VectorTable};
use crate::backend::postgres::client;
use crate::backend::postgres::connection::Connection;
use crate::pipeline::failure::Result;
use crate::product::Product;

/// How long it is taken for granted that the table has its indexes, or lacks them.
const INDEXES_KNOWN_FOR: Duration = Duration::from_mins(1);

/// A table of at most this many bytes is searched for exact matches without an index: some 2 ms.
const SMALL_TABLE: i64 = 2 << 20;

/// How many of the nearest a ranking takes: the first of these that holds the page. A page further down reads more.
const DEPTHS: [usize; 3] = [50, 250, 1_000];

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
        Self {
            in_database: Some(InDatabase {
                vectors,
                exact_searches: Arc::new(Semaphore::new(1)),
                indexed: Arc::default(),
            }),
            ..self
        }
    }

    /// Rows `offset` to `offset + count` of the ranking: exact matches first, then by cosine similarity to `embedding`,
    /// equal scores by id. `None` if that takes several statements: the vectors are elsewhere, or the table has no
    /// indexes for exact matches.
    pub async fn search(
        &self,
        term: &str,
        embedding: &[f32],
        offset: usize,
        count: usize,
    ) -> Result<Option<Vec<Found>>> {
        let Some(InDatabase { vectors, exact_searches, .. }) = &self.in_database else { return Ok(None) };
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
            match self.page_of(client(&self.pool).await?, &there, &there.settings, &query).await {
                Err(error) if !is_repeated && vectors.may_have_moved(&error) => is_repeated = true,
                page => {
                    let page = page.map_err(failed)?;
                    if page.may_miss_a_text(there.exact_below)
                        && let Ok(_permit) = exact_searches.try_acquire()
                    {
                        match self
                            .page_of(client(&self.pool).await?, &there, &there.exact_settings, &query)
                            .await
                        {
                            Ok(exact) => return Ok(Some(exact.rows)),
                            Err(error) => tracing::debug!(%error, "cannot search all vectors"),
                        }
                    }
                    return Ok(Some(page.rows));
                }
            }
        }
    }

    /// Runs the one statement of a search.
    async fn page_of(
        &self,
        client: Object,
        there: &VectorTable,
        settings: &str,
        query: &Query<'_>,
    ) -> std::result::Result<FoundPage, tokio_postgres::Error> {
        let VectorTable { table, distance, is_listed, .. } = there;
        let sql = format!(
            "WITH near AS MATERIALIZED ( \
               SELECT CASE WHEN v.id ~ '^-?[0-9]{{1,18}}$' THEN v.id::bigint END AS id, 1 - (v.embedding {distance} $1) AS score \
               FROM {table} v ORDER BY v.embedding {distance} $1 LIMIT $2), \
             exact AS MATERIALIZED ( \
               SELECT p.id::bigint AS id, CASE WHEN lower(p.sku) = lower($3) THEN 0 ELSE 1 END AS rank FROM {relation} p \
               WHERE lower(p.sku) = lower($3) OR lower(p.name) = lower($3) ORDER BY 2, 1 LIMIT {EXACT_LIMIT}), \
             hits AS ( \
               SELECT coalesce(e.id, n.id) AS id, e.rank, n.score FROM near n FULL JOIN exact e ON e.id = n.id) \
             SELECT {COLUMNS}, h.rank, h.score::real, (SELECT max(score) FROM near), \
               {is_listed} AND NOT EXISTS (SELECT FROM exact) \
             FROM hits h JOIN {relation} p ON p.id = h.id \
             ORDER BY h.rank NULLS LAST, h.score DESC NULLS LAST, p.id OFFSET $4 LIMIT $5",
            relation = self.relation
        );
        let limits =
            format!("SET LOCAL search_path = pg_catalog, pg_temp; {}", time_limits(STATEMENT_TIMEOUT));
        let connection = Connection::new(client, limits.into());
        let Query { term, embedding, depth, offset, count } = query;
        let rows = connection.query_with(settings, &sql, &[embedding, depth, term, offset, count]).await?;
        Ok(FoundPage {
            best: rows.first().and_then(|row| row.get(9)),
            is_approximate: rows.first().is_some_and(|row| row.get(10)),
            rows: rows.iter().map(found).collect(),
        })
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

/// A page of the ranking.
struct FoundPage {
    rows: Vec<Found>,
    /// The score of the nearest vector.
    best: Option<f64>,
    /// Whether the search went through lists and no SKU or name is the term.
    is_approximate: bool,
}

impl FoundPage {
    /// Whether the lists may hold no text like the term while another list does: a text unlike all others lies far from
    /// every centre of a list, so that the list that holds it need not be among those that are near to a paraphrase.
    fn may_miss_a_text(&self, exact_below: f64) -> bool {
        self.is_approximate && self.best.is_some_and(|best| best < exact_below)
    }
}

fn found(row: &tokio_postgres::Row) -> Found {
    let exact = row.get::<_, Option<i32>>(7).map(|rank| if rank == 0 { Exact::Sku } else { Exact::Name });
    Found { product: product(row), exact, score: row.get(8) }
}
