//! Finds outliers: rows whose texts are unlike all others.
//!
//! An outlier is far from the centre of its list, as from all centres. A question about it in other words is also far
//! from all centres, and the lists that are nearest to the question need not have the outlier's list among them. So
//! outliers are noted in a table of their own, and a search whose best match is weak reads them too. Both bounds are
//! learnt from stored vectors, so they suit any model.
//!
//! Vectors are compared with landmarks, which are stored vectors at random. Measured with a million products and 256
//! landmarks: of 1,000 products one resembles no landmark by more than 0.48, and of 200 texts on other subjects none
//! resembles one by more than 0.37.

use super::table::{Extension, PgVector};
use crate::backend::postgres::failure;
use crate::backend::postgres::search_index::{self, Landmarks, SearchIndex};
use crate::pipeline::failure::{Error, FailureKind, Result};

/// The most landmarks. Each write of a vector is compared with them until one is similar.
const MOST_LANDMARKS: u64 = 256;
const LEAST_LANDMARKS: u64 = 32;

/// Rows for each landmark, at least.
const ROWS_PER_LANDMARK: u64 = 50;

/// Vectors from which the bound of outliers is learnt.
const SAMPLE: usize = 4_096;

/// The part of the rows that are outliers: the least similar ones. Reading 1,000 outliers takes 4 ms.
const OUTLIERS: f64 = 0.001;

/// In a small table there are more: about this many rows, but no more than the other part.
const FEW: f64 = 100.0;
const MOST_OUTLIERS: f64 = 0.02;

/// Landmarks are chosen again if there are this many times as many outliers as expected, which happens after a load of
/// rows on new subjects.
const OUTGROWN: f64 = 4.0;

/// A best match is weak if its similarity to the question is that of two rows on different subjects. This part of the
/// pairs of rows is taken to be on different subjects.
const UNRELATED: f64 = 0.98;

/// A similarity that is smaller by this much is smaller, whatever the rounding.
const ROUNDING: f32 = 1e-3;

/// Vectors that one statement compares.
const PAGE: i64 = 5_000;

/// The part of so many rows that are outliers.
fn share(rows: u64) -> f64 {
    (FEW / rows.max(1) as f64).clamp(OUTLIERS, MOST_OUTLIERS)
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn unit(mut vector: Vec<f32>) -> Vec<f32> {
    let length = dot(&vector, &vector).sqrt();
    if length > 0.0 {
        for number in &mut vector {
            *number /= length;
        }
    }
    vector
}

/// The number that this part of the numbers does not reach.
fn quantile(numbers: &mut [f32], part: f64) -> Option<f32> {
    numbers.sort_unstable_by(f32::total_cmp);
    let at = (numbers.len() as f64 * part) as usize;
    numbers.get(at.min(numbers.len().saturating_sub(1))).copied()
}

/// The greatest similarity of a vector to landmarks.
fn best(vector: &[f32], landmarks: &[Vec<f32>]) -> f32 {
    landmarks.iter().map(|landmark| dot(vector, landmark)).fold(f32::NEG_INFINITY, f32::max)
}

/// Makes landmarks of the first `count` vectors, and learns the bounds. `outliers` is the part of outliers among the
/// vectors. None if there are too few vectors.
fn learn(vectors: Vec<Vec<f32>>, count: usize, outliers: f64) -> Option<Landmarks> {
    let vectors: Vec<Vec<f32>> = vectors.into_iter().map(unit).collect();
    let (landmarks, sample) = vectors.split_at_checked(count)?;
    let pairs = landmarks.iter().enumerate();
    let mut pairs: Vec<f32> =
        pairs.flat_map(|(n, one)| landmarks[..n].iter().map(|other| dot(one, other))).collect();
    let weak_below = quantile(&mut pairs, UNRELATED)?;
    let mut similar: Vec<f32> = sample.iter().map(|vector| best(vector, landmarks)).collect();
    let outlier_below = quantile(&mut similar, outliers)? - ROUNDING;
    // A landmark to which no vector is similar is an outlier itself.
    let has_similar = |one: &&Vec<f32>| best(one, sample) >= outlier_below;
    let vectors = landmarks.iter().filter(has_similar).cloned().collect();
    Some(Landmarks { vectors, outlier_below, weak_below })
}

impl PgVector {
    /// A common table expression with the landmarks, and the condition that the vector `w.embedding` is an outlier by the
    /// record `i` of the lists. Without lists there is no record, and no outlier.
    pub(super) async fn outlier_test(&self) -> Result<(String, String)> {
        let Extension { schema, .. } = self.extension().await?;
        let generation = self.generation;
        let landmarks = format!(
            "landmark AS MATERIALIZED (SELECT l.embedding::{schema}.halfvec AS embedding FROM refarch.landmark l \
               WHERE l.target = {generation})"
        );
        let is_outlier = format!(
            "i.target = {generation} AND i.outlier_below IS NOT NULL AND NOT EXISTS ( \
               SELECT FROM landmark l WHERE 1 - (w.embedding OPERATOR({schema}.<=>) l.embedding) >= i.outlier_below)"
        );
        Ok((landmarks, is_outlier))
    }

    /// After a build: learns the bounds, and compares all vectors. Later: removes what is no outlier any more.
    pub(super) async fn check_outliers(&self, rows: u64, seen: &SearchIndex) -> Result<()> {
        if seen.outliers.is_none() {
            self.learn_anew(rows).await?;
        }
        let mut outliers = self.keep_outliers().await?;
        if outliers as f64 > OUTGROWN * share(rows) * rows as f64 {
            self.learn_anew(rows).await?;
            outliers = self.keep_outliers().await?;
        }
        search_index::counted_outliers(&self.postgres, self.generation, outliers).await?;
        tracing::info!(table = self.table, outliers, "looked for texts unlike all others");
        Ok(())
    }

    /// Chooses landmarks, and compares all vectors with them.
    async fn learn_anew(&self, rows: u64) -> Result<()> {
        let count = (rows / ROWS_PER_LANDMARK).clamp(LEAST_LANDMARKS, MOST_LANDMARKS) as usize;
        let sample = self.stored(rows, count + SAMPLE).await?;
        let learnt = tokio::task::spawn_blocking(move || learn(sample, count, share(rows))).await;
        let stopped = |error| Error::caused(FailureKind::ProcessBroken, "choose landmarks", error);
        let Some(landmarks) = learnt.map_err(stopped)? else { return Ok(()) };
        search_index::put_landmarks(&self.postgres, self.generation, &landmarks).await?;
        self.compare_all().await
    }

    /// Notes the outliers among all vectors.
    async fn compare_all(&self) -> Result<()> {
        let (landmarks, is_outlier) = self.outlier_test().await?;
        let sql = format!(
            "WITH {landmarks}, page AS MATERIALIZED ( \
               SELECT v.id, v.embedding FROM {} v WHERE v.id > $1 ORDER BY v.id LIMIT {PAGE}), \
             noted AS ( \
               INSERT INTO refarch.outlier (target, id) SELECT i.target, w.id FROM refarch.search_index i, page w \
               WHERE {is_outlier} ON CONFLICT DO NOTHING) \
             SELECT max(id) FROM page",
            self.table
        );
        // No id is empty.
        let mut last = String::new();
        loop {
            let client = self.postgres.client().await?;
            let row = client.query_one(&sql, &[&last]).await;
            let row = row.map_err(|error| self.failed("compare vectors with landmarks", error))?;
            let Some(id) = row.get(0) else { return Ok(()) };
            last = id;
        }
    }

    /// Removes rows that are gone or are no outliers. Returns how many outliers are left.
    async fn keep_outliers(&self) -> Result<i64> {
        let (landmarks, is_outlier) = self.outlier_test().await?;
        let sql = format!(
            "WITH {landmarks} DELETE FROM refarch.outlier o USING refarch.search_index i \
             WHERE o.target = i.target AND i.target = {} \
               AND NOT EXISTS (SELECT FROM {} w WHERE w.id = o.id AND {is_outlier})",
            self.generation, self.table
        );
        let client = self.postgres.client().await?;
        client.execute(&sql, &[]).await.map_err(|error| self.failed("look through the outliers", error))?;
        let count = client
            .query_one("SELECT count(*) FROM refarch.outlier WHERE target = $1", &[&self.generation])
            .await;
        Ok(count.map_err(|error| failure("count the outliers", error))?.get(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Vectors around four axes, each of which has as many as another.
    fn catalogue(count: usize) -> Vec<Vec<f32>> {
        let near =
            |n: usize| (0..8).map(|axis| if axis == n % 4 { 2.0 } else { (n % 7) as f32 / 50.0 }).collect();
        (0..count).map(near).collect()
    }

    #[test]
    fn bounds_part_texts_on_the_subjects_from_others() {
        let mut vectors = catalogue(1_000);
        // A sample may have outliers too, also among the landmarks.
        let other = vec![0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0];
        vectors[3] = other.clone();
        let learnt = learn(vectors, 40, 0.01).unwrap();
        assert_eq!(learnt.vectors.len(), 39, "the outlier is no landmark");
        let is_outlier = |vector: &[f32]| best(vector, &learnt.vectors) < learnt.outlier_below;
        assert!(is_outlier(&other));
        assert!(catalogue(100).into_iter().map(unit).all(|vector| !is_outlier(&vector)), "{learnt:?}");
        // A pair on one subject has 1, a pair on two subjects hardly more than 0.
        assert!(learnt.weak_below > 0.9, "a quarter of the pairs have one subject: {learnt:?}");
    }

    #[test]
    fn two_rows_at_random_are_mostly_unrelated() {
        // A hundred subjects, one axis each.
        let row = |n: usize| (0..100).map(|axis| if axis == n * 37 % 100 { 1.0 } else { 0.01 }).collect();
        let learnt = learn((0..400).map(row).collect(), 200, 0.01).unwrap();
        assert!((0.0..0.1).contains(&learnt.weak_below), "{}", learnt.weak_below);
    }

    #[test]
    fn equal_vectors_are_no_outliers() {
        let learnt = learn(vec![vec![3.0, 4.0]; 100], 40, 0.01).unwrap();
        assert!(best(&unit(vec![3.0, 4.0]), &learnt.vectors) >= learnt.outlier_below);
        assert!(learn(vec![vec![3.0, 4.0]; 40], 40, 0.01).is_none(), "there is nothing to learn from");
        assert!(learn(Vec::new(), 40, 0.01).is_none());
    }

    #[test]
    fn a_small_table_has_a_greater_part_of_outliers() {
        assert!((share(1_000_000) - 0.001).abs() < 1e-9);
        assert!((share(10_000) - 0.01).abs() < 1e-9);
        assert!((share(1_000) - 0.02).abs() < 1e-9 && (share(0) - 0.02).abs() < 1e-9);
    }
}
