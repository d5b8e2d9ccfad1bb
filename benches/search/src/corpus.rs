//! The stored vectors, and the exact answers to queries.

use std::collections::{HashMap, HashSet};

use rayon::prelude::*;

/// Scores that differ by no more than this count as equal.
pub const TOLERANCE: f32 = 1e-5;

/// Rows that a thread compares with all queries at a time.
const BLOCK: usize = 4_096;

/// A row with its cosine similarity to a query.
pub type Scored = (i64, f32);

/// Vectors of length 1, by the ids of their rows.
pub struct Corpus {
    pub dimensions: usize,
    ids: Vec<i64>,
    vectors: Vec<f32>,
    places: HashMap<i64, usize>,
}

impl Corpus {
    pub fn new(dimensions: usize) -> Self {
        Self { dimensions, ids: Vec::new(), vectors: Vec::new(), places: HashMap::new() }
    }

    /// Adds a row's vector, or replaces it. Returns the replaced one.
    pub fn put(&mut self, id: i64, vector: &[f32]) -> Option<Vec<f32>> {
        assert_eq!(vector.len(), self.dimensions, "the dimensions of the vectors differ");
        let vector = unit(vector);
        if let Some(&place) = self.places.get(&id) {
            let there = &mut self.vectors[place * self.dimensions..][..self.dimensions];
            let replaced = there.to_vec();
            there.copy_from_slice(&vector);
            return Some(replaced);
        }
        self.places.insert(id, self.ids.len());
        self.ids.push(id);
        self.vectors.extend(vector);
        None
    }

    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// All ids, by place.
    pub fn ids(&self) -> &[i64] {
        &self.ids
    }

    /// All vectors, one after the other.
    pub fn vectors(&self) -> &[f32] {
        &self.vectors
    }

    /// The `count` nearest rows of each query, best first.
    pub fn nearest(&self, queries: &[Vec<f32>], count: usize) -> Vec<Vec<Scored>> {
        let queries: Vec<Vec<f32>> = queries.iter().map(|query| unit(query)).collect();
        let nothing = || vec![Vec::new(); queries.len()];
        let blocks = self.ids.par_chunks(BLOCK).zip(self.vectors.par_chunks(BLOCK * self.dimensions));
        blocks
            .map(|(ids, vectors)| {
                let each = queries.iter().map(|query| {
                    let scores = vectors.chunks_exact(self.dimensions).map(|vector| dot(query, vector));
                    best(ids.iter().copied().zip(scores).collect(), count)
                });
                each.collect::<Vec<_>>()
            })
            .reduce(nothing, |one, other| {
                one.into_iter().zip(other).map(|(one, other)| best([one, other].concat(), count)).collect()
            })
    }

    /// Scores of rows for a query. A row that the corpus does not have is left out.
    pub fn scores(&self, query: &[f32], ids: &[i64]) -> Vec<Scored> {
        let query = unit(query);
        let vector = |id: &i64| {
            let place = *self.places.get(id)?;
            Some((*id, dot(&query, &self.vectors[place * self.dimensions..][..self.dimensions])))
        };
        ids.iter().filter_map(vector).collect()
    }

    /// The share of right rows among the first `exact.len()` rows that were found, for one query. A row is
    /// right if its score reaches that of the last exact row, so that equal texts count alike.
    pub fn recall(&self, query: &[f32], exact: &[Scored], found: &[i64]) -> f64 {
        let Some((_, least)) = exact.last() else { return 1.0 };
        let mut seen = HashSet::new();
        let found: Vec<i64> = found.iter().copied().filter(|id| seen.insert(*id)).take(exact.len()).collect();
        let right =
            self.scores(query, &found).iter().filter(|(_, score)| *score >= least - TOLERANCE).count();
        right as f64 / exact.len() as f64
    }
}

/// The highest scores, best first; equal scores by id.
fn best(mut scored: Vec<Scored>, count: usize) -> Vec<Scored> {
    let order = |(a_id, a): &Scored, (b_id, b): &Scored| b.total_cmp(a).then(a_id.cmp(b_id));
    if scored.len() > count {
        scored.select_nth_unstable_by(count, order);
        scored.truncate(count);
    }
    scored.sort_by(order);
    scored
}

fn unit(vector: &[f32]) -> Vec<f32> {
    let length = dot(vector, vector).sqrt().max(f32::MIN_POSITIVE);
    vector.iter().map(|number| number / length).collect()
}

/// Several sums side by side, so that the compiler can use wide instructions.
fn dot(one: &[f32], other: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (ones, others) = (one.as_chunks::<16>(), other.as_chunks::<16>());
    for (a, b) in ones.0.iter().zip(others.0) {
        for at in 0..16 {
            sums[at] += a[at] * b[at];
        }
    }
    let rest: f32 = ones.1.iter().zip(others.1).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "these numbers are exact")]
mod tests {
    use super::*;

    fn corpus() -> Corpus {
        let mut corpus = Corpus::new(2);
        // Rows 2 and 3 are equal, and row 5 is nearly as near.
        for (id, angle) in [(1, 0.1f32), (2, 0.5), (3, 0.5), (4, 1.5), (5, 0.51)] {
            corpus.put(id, &[angle.cos() * 3.0, angle.sin() * 3.0]);
        }
        corpus
    }

    fn ids(scored: &[Scored]) -> Vec<i64> {
        scored.iter().map(|(id, _)| *id).collect()
    }

    #[test]
    fn the_nearest_rows_come_best_first() {
        let nearest = corpus().nearest(&[vec![5.0, 0.0], vec![0.0, 1.0]], 2);
        assert_eq!(nearest.iter().map(|scored| ids(scored)).collect::<Vec<_>>(), [[1, 2], [4, 5]]);
        assert!((nearest[0][0].1 - 0.1f32.cos()).abs() < 1e-6);
    }

    #[test]
    fn many_blocks_give_the_same_as_one_sort() {
        let mut corpus = Corpus::new(3);
        for id in 0..3 * BLOCK as i64 + 5 {
            let number = id as f32;
            corpus.put(id, &[(number * 0.37).sin(), (number * 0.73).cos(), 0.1]);
        }
        let query = vec![0.3, -0.4, 0.5];
        let all = corpus.scores(&query, corpus.ids());
        assert_eq!(corpus.nearest(std::slice::from_ref(&query), 10)[0], best(all, 10));
    }

    #[test]
    fn equal_scores_count_alike_and_lesser_ones_do_not() {
        let (corpus, query) = (corpus(), [1.0, 0.0]);
        let exact = corpus.nearest(&[query.to_vec()], 2).remove(0);
        assert_eq!(ids(&exact), [1, 2]);
        let recall = |found: &[i64]| corpus.recall(&query, &exact, found);
        assert_eq!([recall(&[1, 2]), recall(&[3, 1]), recall(&[2, 3])], [1.0, 1.0, 1.0]);
        assert_eq!([recall(&[1, 5]), recall(&[4, 5]), recall(&[1]), recall(&[])], [0.5, 0.0, 0.5, 0.0]);
        // A row counts once. A row that is not in the corpus is wrong. Rows after the second do not count.
        assert_eq!([recall(&[1, 1]), recall(&[9, 1]), recall(&[4, 5, 1, 2])], [0.5, 0.5, 0.0]);
    }

    #[test]
    fn a_replaced_vector_can_be_put_back() {
        let mut corpus = corpus();
        let before = corpus.nearest(&[vec![1.0, 0.0]], 5);
        let replaced = corpus.put(1, &[0.0, 1.0]).unwrap();
        assert_eq!(corpus.nearest(&[vec![0.0, 1.0]], 1)[0], [(1, 1.0)]);
        corpus.put(1, &replaced);
        let after = corpus.nearest(&[vec![1.0, 0.0]], 5);
        assert_eq!(ids(&after[0]), ids(&before[0]));
        // A vector's length may round to another last digit.
        assert!((after[0][0].1 - before[0][0].1).abs() < TOLERANCE);
        assert_eq!(corpus.len(), 5);
    }
}
