//! Measures how many of the nearest vectors a search through the lists finds, by comparison with an exact search.
//!
//! Each query is the mean of two stored vectors. So queries are similar to the stored texts, but no query is stored. A
//! result is judged by its score, so that two rows with equal texts are interchangeable.

use pgvector::HalfVector;

use super::table::{Extension, PgVector};
use crate::backend::postgres::failure;
use crate::pipeline::failure::Result;

/// The number of queries of a check.
const QUERIES: usize = 32;

/// The number of results that are compared for each query.
const TOP: usize = 10;

/// Two scores that differ by less are equal: the difference comes from rounding.
const SAME_SCORE: f64 = 1e-6;

/// The part of the lists that a search reads at least. Texts that are unlike all others lie far from every centre, and
/// the nearest centre of a paraphrase may be another one.
const LEAST_SHARE: i32 = 60;

/// The part of the lists that a search reads at most. A search that reads more lists is hardly faster
/// than an exact one.
const MOST_SHARE: i32 = 8;

/// Queries, each with the scores of its nearest vectors.
pub(super) struct Sample {
    queries: Vec<HalfVector>,
    exact: Vec<Vec<f64>>,
}

/// The least and the most probes for this many lists.
pub(super) fn probes_range(lists: i32) -> (i32, i32) {
    let least = (lists / LEAST_SHARE).max(1);
    (least, (lists / MOST_SHARE).max(least))
}

/// The part of the nearest vectors, by score, that a search found.
fn recall(exact: &[Vec<f64>], found: &[Vec<f64>]) -> f64 {
    let total: usize = exact.iter().map(Vec::len).sum();
    let hits: usize = exact
        .iter()
        .zip(found)
        .map(|(exact, found)| {
            let last = exact.last().copied().unwrap_or(f64::INFINITY);
            found.iter().filter(|score| **score >= last - SAME_SCORE).count().min(exact.len())
        })
        .sum();
    if total == 0 { 1.0 } else { hits as f64 / total as f64 }
}

/// The mean of two vectors, normalised.
fn mixture(a: &[f32], b: &[f32]) -> Vec<f32> {
    let mixed: Vec<f32> = a.iter().zip(b).map(|(a, b)| a + b).collect();
    let length = mixed.iter().map(|x| x * x).sum::<f32>().sqrt();
    if length > 0.0 { mixed.iter().map(|x| x / length).collect() } else { a.to_vec() }
}

impl PgVector {
    /// Stored vectors, at random.
    pub(super) async fn stored(&self, rows: u64, count: usize) -> Result<Vec<Vec<f32>>> {
        // Twenty times as many rows are read, because rows of one page were often written together.
        let percent = (2_000.0 * count as f64 / rows.max(1) as f64).clamp(0.000_1, 100.0);
        let sql = format!(
            "SELECT embedding FROM (SELECT embedding FROM {} TABLESAMPLE SYSTEM ({percent})) v ORDER BY random() LIMIT $1",
            self.table
        );
        let client = self.postgres.client().await?;
        let rows = client.query(&sql, &[&(count as i64)]).await;
        let rows = rows.map_err(|error| failure("sample vectors", error))?;
        Ok(rows
            .iter()
            .map(|row| row.get::<_, HalfVector>(0).to_vec().into_iter().map(f32::from).collect())
            .collect())
    }

    /// Runs one query with these settings, and returns the scores of its results, best first.
    async fn scores(&self, settings: &str, query: &HalfVector) -> Result<Vec<f64>> {
        let Extension { schema, .. } = self.extension().await?;
        let distance = format!("embedding OPERATOR({schema}.<=>) $1");
        let sql = format!("SELECT 1 - ({distance}) FROM {} ORDER BY {distance} LIMIT {TOP}", self.table);
        let client = self.postgres.client().await?;
        let rows = client.query_with(settings, &sql, &[query]).await;
        let rows = rows.map_err(|error| self.failed("check the search index", error))?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// The scores of the nearest vectors, from an exact search.
    async fn exact_scores(&self, query: &HalfVector) -> Result<Vec<f64>> {
        self.scores("SET LOCAL enable_indexscan = off", query).await
    }

    /// How long an exact search takes: the fastest of three.
    pub(super) async fn time_exact(&self, rows: u64) -> Result<Option<std::time::Duration>> {
        let mut fastest = None;
        for query in self.stored(rows, 3).await? {
            let started = std::time::Instant::now();
            self.exact_scores(&HalfVector::from_f32_slice(&query)).await?;
            let took = started.elapsed();
            fastest = Some(fastest.map_or(took, |fastest| took.min(fastest)));
        }
        Ok(fastest)
    }

    /// Draws queries, and finds their nearest vectors by exact searches.
    pub(super) async fn draw_sample(&self, rows: u64) -> Result<Sample> {
        let stored = self.stored(rows, 2 * QUERIES).await?;
        let mut sample = Sample { queries: Vec::new(), exact: Vec::new() };
        for pair in stored.chunks_exact(2) {
            let query = HalfVector::from_f32_slice(&mixture(&pair[0], &pair[1]));
            sample.exact.push(self.exact_scores(&query).await?);
            sample.queries.push(query);
        }
        Ok(sample)
    }

    /// The part of the nearest vectors that searches find if each reads this many lists.
    pub(super) async fn recall_with(&self, sample: &Sample, probes: i32) -> Result<f64> {
        let settings =
            format!("SELECT set_config('ivfflat.probes', '{probes}', true); SET LOCAL enable_seqscan = off");
        let mut found = Vec::new();
        for query in &sample.queries {
            found.push(self.scores(&settings, query).await?);
        }
        Ok(recall(&sample.exact, &found))
    }

    /// The smallest number of probes in the range that finds the wanted part, and the part that it finds.
    pub(super) async fn choose_probes(&self, sample: &Sample, lists: i32) -> Result<(i32, f64)> {
        let (least, most) = probes_range(lists);
        let mut probes = least;
        loop {
            let found = self.recall_with(sample, probes).await?;
            if found >= self.options.recall || probes >= most {
                return Ok((probes, found));
            }
            probes = (probes + probes / 2 + 1).min(most);
        }
    }

    /// The size of the list that a query reads first, divided by the average size of a list.
    pub(super) async fn list_skew(&self, sample: &Sample, rows: u64, lists: i32) -> Result<f32> {
        let Extension { schema, .. } = self.extension().await?;
        // A limit above the number of rows reads the one list to its end.
        let sql = format!(
            "SELECT count(*) FROM (SELECT FROM {} ORDER BY embedding OPERATOR({schema}.<=>) $1 LIMIT 1000000000) v",
            self.table
        );
        let settings = "SELECT set_config('ivfflat.probes', '1', true); SET LOCAL enable_seqscan = off";
        let mut sum = 0_i64;
        for query in &sample.queries {
            let client = self.postgres.client().await?;
            let rows = client.query_with(settings, &sql, &[query]).await;
            let rows = rows.map_err(|error| self.failed("measure the lists", error))?;
            sum += rows.first().map_or(0, |row| row.get::<_, i64>(0));
        }
        let mean = sum as f64 / sample.queries.len().max(1) as f64;
        Ok((mean * f64::from(lists) / rows.max(1) as f64) as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_count_by_score() {
        let exact = [vec![0.9, 0.8, 0.8]];
        assert!((recall(&exact, &[vec![0.9, 0.8, 0.8]]) - 1.0).abs() < 1e-9);
        // Another row with the same score counts as found. Results beyond the wanted number do not count.
        assert!((recall(&exact, &[vec![0.9, 0.8, 0.8, 0.8]]) - 1.0).abs() < 1e-9);
        assert!((recall(&exact, &[vec![0.9, 0.7]]) - 1.0 / 3.0).abs() < 1e-9);
        assert!((recall(&[Vec::new()], &[Vec::new()]) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn probes_stay_a_small_part_of_the_lists() {
        assert_eq!(probes_range(1_000), (16, 125));
        assert_eq!(probes_range(10), (1, 1));
    }

    #[test]
    fn a_mixture_lies_between_its_vectors_and_has_length_one() {
        let mixed = mixture(&[1.0, 0.0], &[0.0, 1.0]);
        assert!((mixed[0] - mixed[1]).abs() < 1e-6 && (mixed[0] - 0.5_f32.sqrt()).abs() < 1e-6);
        assert_eq!(mixture(&[1.0, 0.0], &[-1.0, 0.0]), [1.0, 0.0]);
    }
}
