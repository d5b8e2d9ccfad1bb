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
    /// Rows whose texts are unlike all others, which searches with a weak best match read too; none while they are
    /// looked for.
    pub outliers: Option<i64>,
    /// A best match with a lower score is weak.
    pub weak_below: Option<f32>,
    #[serde(skip)]
    pub(crate) probes_at_build: i32,
    #[serde(skip)]
    pub(crate) skew_at_build: Option<f32>,
    /// Rows written since the build.
    #[serde(skip)]
    pub(crate) written: i64,
}

const COLUMNS: &str = "s.lists, s.probes, s.rows, s.build_ms, s.recall, \
    extract(epoch FROM now() - s.checked_at)::bigint, s.skew, s.degraded, s.outliers, s.weak_below, \
    s.probes_at_build, s.skew_at_build";

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
        outliers: row.get(8),
        weak_below: row.get(9),
        probes_at_build: row.get(10),
        skew_at_build: row.get(11),
        written: row.get(12),
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

/// Whether a check is due: after an hour, after a tenth of the rows was written, or to look for outliers.
pub(crate) async fn is_check_due(postgres: &Postgres, generation: i32) -> Result<bool> {
    let sql = format!(
        "SELECT EXISTS (SELECT FROM refarch.search_index s WHERE s.target = $1 \
           AND (s.checked_at IS NULL OR s.outliers IS NULL OR s.checked_at < now() - interval '1 hour' \
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
           skew = NULL, skew_at_build = NULL, degraded = false, outliers = NULL",
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

/// Stored vectors with which all others are compared, and what was learnt from them.
#[derive(Debug)]
pub(crate) struct Landmarks {
    /// The landmarks.
    pub(crate) vectors: Vec<Vec<f32>>,
    /// A vector is an outlier if its similarity to each landmark is below this.
    pub(crate) outlier_below: f32,
    /// The best match of a search is weak below this.
    pub(crate) weak_below: f32,
}

/// Records landmarks in the place of earlier ones.
pub(crate) async fn put_landmarks(postgres: &Postgres, generation: i32, landmarks: &Landmarks) -> Result<()> {
    let sql = "WITH gone AS (DELETE FROM refarch.landmark WHERE target = $1 AND number > $2), \
        put AS ( \
          INSERT INTO refarch.landmark (target, number, embedding) \
          SELECT i.target, n, ($3::real[])[(n - 1) * $4 + 1 : n * $4] \
          FROM refarch.search_index i, generate_series(1, $2) n WHERE i.target = $1 \
          ON CONFLICT (target, number) DO UPDATE SET embedding = excluded.embedding) \
        UPDATE refarch.search_index SET outlier_below = $5, weak_below = $6 WHERE target = $1";
    let count = landmarks.vectors.len() as i32;
    let dimensions = landmarks.vectors.first().map_or(0, Vec::len) as i32;
    let client = postgres.client().await?;
    let done = client
        .execute(
            sql,
            &[
                &generation,
                &count,
                &landmarks.vectors.concat(),
                &dimensions,
                &landmarks.outlier_below,
                &landmarks.weak_below,
            ],
        )
        .await;
    done.map(drop).map_err(|error| failure("record landmarks", error))
}

/// Records the number of outliers.
pub(crate) async fn counted_outliers(postgres: &Postgres, generation: i32, outliers: i64) -> Result<()> {
    let client = postgres.client().await?;
    let sql = "UPDATE refarch.search_index SET outliers = $2 WHERE target = $1";
    let done = client.execute(sql, &[&generation, &outliers]).await;
    done.map(drop).map_err(|error| failure("record the outliers", error))
}

/// Removes the record, with landmarks and outliers.
pub(crate) async fn dropped(postgres: &Postgres, generation: i32) -> Result<()> {
    let client = postgres.client().await?;
    let done = client.execute("DELETE FROM refarch.search_index WHERE target = $1", &[&generation]).await;
    done.map(drop).map_err(|error| failure("remove the record of the lists", error))
}
