//! The record of the index on the vectors (`refarch.search_index`): how it was built, and how much it finds.

use serde::Serialize;
use tokio_postgres::Row;

use super::{Postgres, failure};
use crate::pipeline::failure::Result;

/// Lists that a search reads before the first check has chosen a number.
pub(crate) const DEFAULT_PROBES: i32 = 16;

/// The table that holds a generation's vectors.
#[must_use]
pub fn vector_table(generation: i32) -> String {
    format!("refarch.vector_{generation}")
}

/// The lists of a generation, as they were built and last checked.
#[derive(Clone, Debug, Serialize)]
pub struct SearchIndex {
    /// The number of lists.
    pub lists: i32,
    /// The lists that a search reads.
    pub probes: i32,
    /// Vectors when the lists were built.
    pub rows_at_build: i64,
    /// How long the build took, in milliseconds; 0 if the worker that built them did not record it.
    pub build_ms: i64,
    /// The part of the true ten nearest that sampled searches found; none before the first check.
    #[serde(rename = "recall@10")]
    pub recall: Option<f32>,
    /// Seconds since the last check.
    pub checked_s: Option<i64>,
    /// The size of the list that a search meets first, over the average size.
    pub skew: Option<f32>,
    /// Whether the lists no longer find enough and are to be built again.
    pub is_degraded: bool,
    #[serde(skip)]
    pub(crate) probes_at_build: i32,
    #[serde(skip)]
    pub(crate) skew_at_build: Option<f32>,
    /// Rows written since the build.
    #[serde(skip)]
    pub(crate) written: i64,
}

const COLUMNS: &str = "s.lists, s.probes, s.rows, s.build_ms, s.recall, \
    extract(epoch FROM now() - s.checked_at)::bigint, s.skew, s.degraded, s.probes_at_build, s.skew_at_build";

/// Rows that were written to the table of vectors, as the statistics count them.
fn written(table: &str) -> String {
    // An index outside of the database has no such table.
    format!(
        "coalesce(pg_catalog.pg_stat_get_tuples_inserted(pg_catalog.to_regclass('{table}')) \
           + pg_catalog.pg_stat_get_tuples_updated(pg_catalog.to_regclass('{table}')), 0)"
    )
}

fn from_row(row: &Row) -> SearchIndex {
    SearchIndex {
        lists: row.get(0),
        probes: row.get(1),
        rows_at_build: row.get(2),
        build_ms: row.get(3),
        recall: row.get(4),
        checked_s: row.get(5),
        skew: row.get(6),
        is_degraded: row.get(7),
        probes_at_build: row.get(8),
        skew_at_build: row.get(9),
        written: row.get(10),
    }
}

/// Reads the record; none if the generation has no lists.
pub async fn read(postgres: &Postgres, generation: i32) -> Result<Option<SearchIndex>> {
    let sql = format!(
        "SELECT {COLUMNS}, abs({written} - s.built_writes) FROM refarch.search_index s WHERE s.target = $1",
        written = written(&vector_table(generation))
    );
    let client = postgres.client().await?;
    let row = client.query_opt(&sql, &[&generation]).await;
    Ok(row.map_err(|error| failure("read the record of the lists", error))?.as_ref().map(from_row))
}

/// Whether a check is due: after an hour, or after a tenth of the rows was written.
pub(crate) async fn is_check_due(postgres: &Postgres, generation: i32) -> Result<bool> {
    let sql = format!(
        "SELECT EXISTS (SELECT FROM refarch.search_index s WHERE s.target = $1 \
           AND (s.checked_at IS NULL OR s.checked_at < now() - interval '1 hour' \
             OR abs({written} - s.checked_writes) > greatest(s.rows, 1000) / 10))",
        written = written(&vector_table(generation))
    );
    let client = postgres.client().await?;
    let due = client.query_one(&sql, &[&generation]).await;
    Ok(due.map_err(|error| failure("look for a check of the lists", error))?.get(0))
}

/// Records a build.
pub(crate) async fn built(
    postgres: &Postgres,
    generation: i32,
    lists: i32,
    rows: i64,
    build_ms: i64,
) -> Result<()> {
    let sql = format!(
        "INSERT INTO refarch.search_index AS s (target, lists, probes, probes_at_build, rows, build_ms, built_writes) \
         VALUES ($1, $2::integer, least($2::integer, $5::integer), least($2::integer, $5::integer), $3, $4, {written}) \
         ON CONFLICT (target) DO UPDATE SET lists = excluded.lists, probes = excluded.probes, \
           probes_at_build = excluded.probes_at_build, rows = excluded.rows, build_ms = excluded.build_ms, \
           built_writes = excluded.built_writes, built_at = now(), recall = NULL, checked_at = NULL, \
           skew = NULL, skew_at_build = NULL, degraded = false",
        written = written(&vector_table(generation))
    );
    let client = postgres.client().await?;
    let done = client.execute(&sql, &[&generation, &lists, &rows, &build_ms, &DEFAULT_PROBES]).await;
    done.map(drop).map_err(|error| failure("record the lists", error))
}

/// Records a check.
pub(crate) async fn checked(postgres: &Postgres, generation: i32, seen: &SearchIndex) -> Result<()> {
    let client = postgres.client().await?;
    let sql = format!(
        "UPDATE refarch.search_index SET probes = $2, probes_at_build = $3, recall = $4, skew = $5, \
           skew_at_build = $6, degraded = $7, checked_at = now(), checked_writes = {written} WHERE target = $1",
        written = written(&vector_table(generation))
    );
    let done = client
        .execute(
            &sql,
            &[
                &generation,
                &seen.probes,
                &seen.probes_at_build,
                &seen.recall,
                &seen.skew,
                &seen.skew_at_build,
                &seen.is_degraded,
            ],
        )
        .await;
    done.map(drop).map_err(|error| failure("record a check of the lists", error))
}

/// Removes the record.
pub(crate) async fn dropped(postgres: &Postgres, generation: i32) -> Result<()> {
    let client = postgres.client().await?;
    let done = client.execute("DELETE FROM refarch.search_index WHERE target = $1", &[&generation]).await;
    done.map(drop).map_err(|error| failure("remove the record of the lists", error))
}
