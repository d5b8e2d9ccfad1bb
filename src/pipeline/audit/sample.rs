//! A sample of the vectors. Each text is embedded again, and the new vector is compared with the stored one.

use std::sync::Arc;

use super::report::{Difference, DifferenceKind, MAX_EXAMPLES, Report};
use crate::pipeline::clock::Clock;
use crate::pipeline::embedder::{Embedder, Embedding};
use crate::pipeline::failure::{Error, FailureKind};
use crate::pipeline::fault::redacted;
use crate::pipeline::index::Stored;
use crate::pipeline::ledger::Peeked;

/// The least cosine similarity of two vectors that one model made of one text. Rounding a vector for storage
/// lowers the similarity by at most 0.0001.
const SAME_VECTOR: f32 = 0.999;

/// A row of the sample: its text, and its vector in the index.
pub(super) struct Sample {
    text: Arc<str>,
    id: String,
    embedding: Embedding,
}

/// Puts a row into the sample, so that each row has the same chance (Vitter's algorithm R). `wanted` is the size
/// of the sample, and `seen` the number of rows so far, this row included.
pub(super) fn choose(
    sample: &mut Vec<Sample>,
    wanted: usize,
    seen: u64,
    clock: &dyn Clock,
    peeked: &Peeked,
    record: Stored,
) {
    let Some(row) = peeked.row.as_ref().filter(|_| wanted > 0) else { return };
    let one = Sample { text: row.text.clone(), id: record.id, embedding: record.embedding };
    if sample.len() < wanted {
        sample.push(one);
        return;
    }
    let index = (clock.chance() * seen as f64) as usize;
    if let Some(old) = sample.get_mut(index) {
        *old = one;
    }
}

/// Embeds the texts of the sample again. Counts and returns the ids whose new vector differs from the stored
/// vector. If the embedder fails, the report names the error, and keeps the other results of the audit.
pub(super) async fn compare(sample: &[Sample], embedder: &dyn Embedder, report: &mut Report) -> Vec<String> {
    let mut differ = Vec::new();
    for part in sample.chunks(32) {
        let texts: Vec<Arc<str>> = part.iter().map(|one| one.text.clone()).collect();
        let vectors = match embedder.embed_texts(&texts).await {
            Ok(vectors) if vectors.len() == part.len() => vectors,
            failed => {
                let few = || {
                    Error::new(
                        FailureKind::UnexpectedAnswer,
                        "embed a sample",
                        "the embedder returned another number of vectors than texts",
                    )
                };
                let error = failed.err().unwrap_or_else(few);
                report.unsampled = sample.len() as u64 - report.sampled;
                report.unsampled_error = Some(redacted(&error.to_string()));
                break;
            }
        };
        for (one, vector) in part.iter().zip(vectors) {
            report.sampled += 1;
            if cosine(&one.embedding, &vector) < SAME_VECTOR {
                differ.push(one.id.clone());
            }
        }
    }
    report.vector_mismatch += differ.len() as u64;
    let room = MAX_EXAMPLES.saturating_sub(report.examples.len());
    let named = differ.iter().take(room).map(|id| Difference { id: id.clone(), kind: DifferenceKind::Stale });
    report.examples.extend(named);
    differ
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    if a.len() != b.len() {
        return 0.0;
    }
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
    let length = (dot(a, a) * dot(b, b)).sqrt();
    if length > 0.0 { dot(a, b) / length } else { 0.0 }
}
