//! The vectors of the table's rows, if they are in the same database.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use async_trait::async_trait;
use tokio::sync::Semaphore;

use crate::pipeline::failure::Result;

/// Where the vectors of the table's rows are, in the same database.
#[derive(Clone, Debug)]
pub struct VectorTable {
    /// The table, quoted. It has columns `id` (text) and `embedding` (halfvec).
    pub table: String,
    /// The operator of cosine distance, with its schema.
    pub distance: String,
    /// Settings of a search, as SQL.
    pub settings: String,
    /// Settings of a search that reads all vectors, as SQL.
    pub exact_settings: String,
    /// An expression that is true if searches go through lists, which may miss a text unlike all others.
    pub is_listed: String,
    /// Below this score of the best match, such a search is repeated over all vectors.
    pub exact_below: f64,
}

/// Knows the table of vectors.
#[async_trait]
pub trait VectorSource: Send + Sync {
    /// The table, for a search for this many vectors.
    async fn vector_table(&self, top: usize) -> Result<VectorTable>;

    /// Looks the extension up again, if the error says that it may have moved. Returns whether to try once more.
    fn may_have_moved(&self, error: &tokio_postgres::Error) -> bool;
}

/// Vectors in the same database, and what is known of the table's indexes.
#[derive(Clone)]
pub(super) struct InDatabase {
    pub(super) vectors: Arc<dyn VectorSource>,
    /// One search over all vectors at a time: it is many times as dear as another.
    pub(super) exact_searches: Arc<Semaphore>,
    pub(super) indexed: Arc<Mutex<Option<(Instant, bool)>>>,
}
