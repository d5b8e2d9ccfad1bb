//! The embedder's contract: texts become tokens once, and tokens become vectors.

use std::sync::Arc;

use async_trait::async_trait;

use super::failure::{Error, FailureKind, Result};

/// A unit vector of [`Embedder::dimensions`] values.
pub type Embedding = Arc<[f32]>;

/// A text as its embedder reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tokens {
    /// The ids of the tokens that the model reads, special ones included.
    Ids(Vec<u32>),
    /// The text itself, for an embedder that takes texts.
    Text {
        /// The text.
        text: Arc<str>,
        /// How many tokens the model reads of it, estimated.
        count: usize,
    },
}

impl Tokens {
    /// How many tokens the model reads; what batches are sized by.
    #[must_use]
    pub fn count(&self) -> usize {
        match self {
            Self::Ids(ids) => ids.len(),
            Self::Text { count, .. } => *count,
        }
    }

    /// The ids, for an embedder that takes ids.
    pub fn ids(&self) -> Result<&[u32]> {
        match self {
            Self::Ids(ids) => Ok(ids),
            Self::Text { .. } => Err(of_another()),
        }
    }

    /// The text, for an embedder that takes texts.
    pub fn text(&self) -> Result<&str> {
        match self {
            Self::Text { text, .. } => Ok(text),
            Self::Ids(_) => Err(of_another()),
        }
    }
}

fn of_another() -> Error {
    Error::new(FailureKind::ProcessBroken, "embed texts", "another embedder has read them")
}

/// How much an embedder takes in one call of [`Embedder::embed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchSize {
    /// As much as is embedded in the time that a live change may wait. For an embedder whose time grows with
    /// the tokens, such as a CPU.
    Timed,
    /// So much at most. For an embedder that takes about as long for a full batch as for a small one, such as
    /// a server or a GPU.
    Bounded {
        /// Texts at most.
        texts: usize,
        /// Tokens of all texts at most; a text that has more goes alone.
        tokens: usize,
    },
}

/// Turns texts into unit vectors.
#[async_trait]
pub trait Embedder: Send + Sync {
    /// Length of every vector.
    fn dimensions(&self) -> usize;

    /// Names model and precision, such as `all-MiniLM-L6-v2/f32`. Part of the content hash, so that
    /// a vector of another model never passes for one of this model.
    fn model(&self) -> &str;

    /// How much is best handed to [`Self::embed`] at once.
    fn batch_size(&self) -> BatchSize;

    /// Returns when the embedder may be asked: at once, unless it asked to be left alone for a while.
    async fn ready(&self) {}

    /// From now on so many [`Self::embed`] are asked for at once. An embedder with threads of its own starts or ends
    /// some. Nothing that was asked for is lost.
    async fn resize(&self, _at_once: usize) {}

    /// Reads texts as the model does, in their order. Text past the model's maximal length is not read. Work
    /// that takes long is done on no thread of the async runtime.
    async fn tokenize(&self, texts: Vec<Arc<str>>) -> Result<Vec<Tokens>>;

    /// Embeds what this embedder's [`Self::tokenize`] made, one vector a text in the same order. A text's
    /// vector does not depend on the others in the call beyond rounding.
    async fn embed(&self, batch: Vec<Tokens>) -> Result<Vec<Embedding>>;

    /// Embeds texts, one vector a text in the same order.
    async fn embed_texts(&self, texts: &[Arc<str>]) -> Result<Vec<Embedding>> {
        let batch = self.tokenize(texts.to_vec()).await?;
        self.embed(batch).await
    }

    /// Embeds what somebody searches for, which some models embed otherwise than what is searched.
    async fn embed_query(&self, text: &Arc<str>) -> Result<Embedding> {
        let mut vectors = self.embed_texts(std::slice::from_ref(text)).await?;
        vectors
            .pop()
            .ok_or_else(|| Error::new(FailureKind::UnexpectedAnswer, "embed a query", "no vector came"))
    }
}
