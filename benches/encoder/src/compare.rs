//! Compares an engine's vectors with the vectors of the reference.

/// Number of texts whose neighbours are compared.
const QUERIES: usize = 1_000;

/// Number of neighbours that are compared for each text.
const TOP: usize = 10;

pub struct Fit {
    pub cosine_min: f64,
    pub cosine_mean: f64,
    /// Share of the ten nearest neighbours by the reference that are also among the ten nearest by this
    /// engine, on average over the texts.
    pub overlap_at_10: f64,
}

/// Compares two lists of `count` vectors, stored one after the other.
pub fn compare(reference: &[f32], vectors: &[f32], count: usize) -> Fit {
    assert_eq!(reference.len(), vectors.len(), "as many vectors of the same length");
    let width = vectors.len() / count;
    let cosines: Vec<f64> = reference
        .chunks_exact(width)
        .zip(vectors.chunks_exact(width))
        .map(|(a, b)| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt())
        .collect();
    let (theirs, ours) = (neighbours(reference, width), neighbours(vectors, width));
    let shared: usize =
        theirs.iter().zip(&ours).map(|(a, b)| a.iter().filter(|text| b.contains(text)).count()).sum();
    let all: usize = theirs.iter().map(Vec::len).sum();
    Fit {
        cosine_min: cosines.iter().copied().fold(f64::INFINITY, f64::min),
        cosine_mean: cosines.iter().sum::<f64>() / count as f64,
        overlap_at_10: shared as f64 / all as f64,
    }
}

/// A short digest of the bits of vectors (FNV-1a, 64 bits). Two builds of the encoder with the same digest have
/// computed the same vectors.
pub fn digest(vectors: &[f32]) -> String {
    let bytes = vectors.iter().flat_map(|number| number.to_le_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    format!("{hash:016x}")
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// For each of the first vectors, the numbers of its nearest other vectors.
fn neighbours(vectors: &[f32], width: usize) -> Vec<Vec<usize>> {
    let count = vectors.len() / width;
    vectors
        .chunks_exact(width)
        .take(QUERIES)
        .enumerate()
        .map(|(query, numbers)| {
            let score = |other: &[f32]| numbers.iter().zip(other).map(|(a, b)| a * b).sum::<f32>();
            let mut ranked: Vec<(f32, usize)> =
                vectors.chunks_exact(width).map(score).zip(0..count).collect();
            ranked.swap_remove(query);
            let top = TOP.min(ranked.len());
            ranked.select_nth_unstable_by(top - 1, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            ranked[..top].iter().map(|(_, text)| *text).collect()
        })
        .collect()
}
