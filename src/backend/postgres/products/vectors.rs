//! The vectors of the table's rows, if they are in the same database, and the ranking of them.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use async_trait::async_trait;

use crate::pipeline::failure::Result;
use crate::pipeline::metrics::SecondLooks;

/// A ranking is read to one of these depths: the first that holds the page. A page further down reads more.
///
/// A search that reads on in further lists finds some rows late that are nearer than earlier ones. So rows are ordered
/// by score within each step only, and the ranking of a greater depth begins with the ranking of a smaller one: no row is
/// on two pages, and none is left out. For the same reason, a search of all vectors orders equal scores by id. An index
/// has an order of its own, which a sort that goes by the id too would mix up.
pub const DEPTHS: [usize; 3] = [50, 250, 1_000];

/// The most outliers that a search reads: some 20 ms.
const MOST_OUTLIERS: usize = 5_000;

/// Where the vectors of the table's rows are, in the same database.
#[derive(Clone, Debug)]
pub struct VectorTable {
    /// The table, quoted. Its indexes are named after it. It has columns `id` (text) and `embedding` (halfvec).
    pub table: String,
    /// The operator of cosine distance, with its schema.
    pub distance: String,
    /// The generation of the vectors.
    pub generation: i32,
    /// Settings of a search, as SQL.
    pub settings: String,
}

/// The look at the outliers, as the statement reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecondLook {
    /// There was none: the best match was not weak.
    None,
    /// No outlier was nearer than the best match.
    Nothing,
    /// An outlier was the nearest.
    Found,
}

impl VectorTable {
    /// Common table expressions that end with `ranked (id, distance, step)`: the `$2` vectors that are nearest to `$1`.
    /// If the best match through lists is weak, the outliers are among them, unless `unless` is true. The order of the
    /// ranking is by step, distance and id.
    #[must_use]
    pub fn ranking(&self, unless: &str) -> String {
        let Self { table, distance, generation, .. } = self;
        let [first, second, _] = DEPTHS;
        // The outliers are put in order in a query of their own, which cannot go through the lists.
        // The first step alone decides about the second look, so that each depth decides alike.
        format!(
            "indexed AS MATERIALIZED ( \
               SELECT EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indisvalid \
                 AND i.indexrelid IN (to_regclass('{table}_lists'), to_regclass('{table}_graph'))) AS is_so), \
             near AS MATERIALIZED ( \
               SELECT n.id, n.distance, row_number() OVER () AS place FROM (( \
                 SELECT v.id, v.embedding {distance} $1 AS distance FROM {table} v WHERE (SELECT i.is_so FROM indexed i) \
                 ORDER BY v.embedding {distance} $1 LIMIT $2) \
               UNION ALL ( \
                 SELECT v.id, v.embedding {distance} $1 AS distance FROM {table} v WHERE (SELECT NOT i.is_so FROM indexed i) \
                 ORDER BY v.embedding {distance} $1, v.id LIMIT $2)) n), \
             look AS MATERIALIZED ( \
               SELECT coalesce(1 - (SELECT min(n.distance) FROM near n WHERE n.place <= {first}) < (SELECT s.weak_below \
                 FROM refarch.search_index s WHERE s.target = {generation}) AND NOT {unless}, false) AS is_due), \
             beside AS MATERIALIZED ( \
               SELECT v.id, v.embedding {distance} $1 AS distance FROM ( \
                 SELECT o.id FROM refarch.outlier o WHERE o.target = {generation} LIMIT {MOST_OUTLIERS}) o \
               JOIN {table} v ON v.id = o.id WHERE (SELECT l.is_due FROM look l)), \
             outliers AS MATERIALIZED ( \
               SELECT n.id, n.distance, row_number() OVER () AS place FROM ( \
                 SELECT b.id, b.distance FROM beside b ORDER BY b.distance, b.id LIMIT $2) n), \
             second_look AS ( \
               SELECT CASE WHEN NOT l.is_due THEN 0 WHEN (SELECT min(o.distance) FROM outliers o) \
                 < (SELECT min(n.distance) FROM near n) THEN 2 ELSE 1 END AS outcome FROM look l), \
             ranked AS ( \
               SELECT r.id, min(r.distance) AS distance, min(r.step) AS step FROM ( \
                 SELECT p.id, p.distance, CASE WHEN p.place <= {first} THEN 1 WHEN p.place <= {second} THEN 2 ELSE 3 END AS step \
                 FROM (SELECT * FROM near UNION ALL SELECT * FROM outliers) p) r GROUP BY r.id)"
        )
    }
}

impl SecondLook {
    /// SQL for a column beside [`VectorTable::ranking`].
    pub const COLUMN: &str = "(SELECT s.outcome FROM second_look s)";

    /// The value of the column.
    #[must_use]
    pub fn of(outcome: i32) -> Self {
        match outcome {
            1 => Self::Nothing,
            2 => Self::Found,
            _ => Self::None,
        }
    }

    /// Counts it.
    pub fn count(self, in_all: &SecondLooks) {
        match self {
            Self::None => {}
            Self::Nothing => in_all.nothing.add(1),
            Self::Found => in_all.found.add(1),
        }
    }
}

/// Knows the table of vectors.
#[async_trait]
pub trait VectorSource: Send + Sync {
    /// The table, for a search for this many vectors.
    async fn vector_table(&self, top: usize) -> Result<VectorTable>;

    /// Looks the extension up again, if the error says that it may have moved. Returns whether to try once more.
    fn may_have_moved(&self, error: &tokio_postgres::Error) -> bool;

    /// The searches that looked at the outliers too.
    fn second_looks(&self) -> &Arc<SecondLooks>;
}

/// Vectors in the same database, and what is known of the table's indexes.
#[derive(Clone)]
pub(super) struct InDatabase {
    pub(super) vectors: Arc<dyn VectorSource>,
    pub(super) indexed: Arc<Mutex<Option<(Instant, bool)>>>,
}
