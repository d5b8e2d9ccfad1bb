//! The embedder's contract.

use std::sync::Arc;

use async_trait::async_trait;

use super::failure::{Error, Result};

/// A unit vector of [`Embedder::dimensions`] values.
pub type Embedding = Arc<[f32]>;

/// Turns texts into unit vectors.
#[async_trait]
pub trait Embedder: Send + Sync {
    /// Length of every vector.
    fn dimensions(&self) -> usize;

    /// Names model and precision, such as `all-MiniLM-L6-v2/f32`. Part of the content hash, so that
    /// a vector of another model never passes for one of this model.
    fn model(&self) -> &str;

    /// How many tokens the model would read of a text; what slices are sized by.
    fn count_tokens(&self, text: &str) -> usize;

    /// How many texts are best handed over together; none for as many as a slice's time holds.
    fn texts_at_once(&self) -> Option<usize> {
        None
    }

    /// Embeds what somebody searches for, which some models embed otherwise than what is searched.
    async fn embed_query(&self, text: &Arc<str>) -> Result<Embedding> {
        let mut vectors = self.embed(std::slice::from_ref(text)).await?;
        vectors.pop().ok_or_else(|| Error::retryable("embed a query", "no vector came"))
    }

    /// Embeds texts, one vector a text in the same order. A text's vector does not depend on the
    /// others in the call beyond rounding. Text past the model's maximal length is not read.
    async fn embed(&self, texts: &[Arc<str>]) -> Result<Vec<Embedding>>;
}
