//! The vector index on pgvector, in the source's database, so that every write can be part of a transaction.
//!
//! Each generation has a table: `refarch.vector_N (id, embedding halfvec(d), content_hash)`. A search reads all
//! vectors, or goes through an index on them: lists (IVFFlat) or a graph (HNSW). [`method`] chooses the
//! way, and [`maintenance`] builds and checks the index. [`outliers`] are rows that lists may miss.

mod build;
mod index;
mod maintenance;
mod method;
mod observations;
mod outliers;
mod quality;
mod search;
mod table;
mod write;

pub use super::postgres::search_index::vector_table as table_name;
pub use table::{MIN_GRAPH_VERSION, MIN_VERSION, PgVector, PgVectorOptions, Version, parse_version};
