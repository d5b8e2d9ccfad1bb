//! A sample of the vectors, compared with what their texts give now.

use std::sync::Arc;

use super::{Auditor, Difference, DifferenceKind, MAX_EXAMPLES, Peeked, Report, Stored};
use crate::pipeline::embedder::Embedding;
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::fault::redacted;

/// Vectors of one text that are less alike than this are not of the same model. A stored vector's
/// rounding costs a ten-thousandth at most.
const SAME_VECTOR: f32 = 0.999;

/// A row that the sample may embed anew.
pub(super) struct Sample {
    text: Arc<str>,
    id: String,
    embedding: Embedding,
}

impl Auditor<'_> {
    /// Keeps each row with the same chance (Vitter's algorithm R).
    pub(super) fn choose(&self, sample: &mut Vec<Sample>, seen: u64, peeked: &Peeked, record: Stored) {
        let wanted = if self.embedder.is_some() { self.options.sample } else { 0 };
        let Some(row) = peeked.row.as_ref().filter(|_| wanted > 0) else { return };
        let one = Sample { text: row.text.clone(), id: record.id, embedding: record.embedding };
        if sample.len() < wanted {
            sample.push(one);
            return;
        }
        let index = (self.clock.chance() * seen as f64) as usize;
        if let Some(old) = sample.get_mut(index) {
            *old = one;
        }
    }

    /// Embeds the sample anew, and counts what the index has otherwise. An embedder that is away takes nothing from
    /// what was found so far.
    pub(super) async fn compare_vectors(&self, sample: Vec<Sample>, report: &mut Report) -> Result<()> {
        let Some(embedder) = &self.embedder else { return Ok(()) };
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
                            "another number of vectors came back",
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
        let named =
            differ.iter().take(room).map(|id| Difference { id: id.clone(), kind: DifferenceKind::Stale });
        report.examples.extend(named);
        if self.options.repair && !differ.is_empty() {
            self.ledger.requeue(&differ).await?;
            report.repaired += differ.len() as u64;
        }
        Ok(())
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    if a.len() != b.len() {
        return 0.0;
    }
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
    let length = (dot(a, a) * dot(b, b)).sqrt();
    if length > 0.0 { dot(a, b) / length } else { 0.0 }
}
