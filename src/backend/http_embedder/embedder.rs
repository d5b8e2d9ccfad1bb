//! Batches of texts, and what becomes of those that a server refuses.

use std::sync::{Arc, Once};

use async_trait::async_trait;
use futures::future::try_join_all;
use tokio::sync::Semaphore;

use super::provider::Purpose;
use super::texts::{HALVINGS, SHORT, batches, cut, half, tokens};
use super::{Failure, PROBE, Server};
use crate::pipeline::embedder::{Embedder, Embedding};
use crate::pipeline::failure::{Error, Result};

/// Embeds texts by a server.
pub struct HttpEmbedder {
    pub(super) server: Server,
    pub(super) requests: Semaphore,
}

impl HttpEmbedder {
    /// One request, when it is its turn.
    async fn one(&self, texts: &[&str], purpose: Purpose) -> Result<Vec<Vec<f32>>, Failure> {
        // The semaphore is never closed.
        let _permit = self.requests.acquire().await;
        self.server.send(texts, purpose).await
    }

    /// One batch. One that is refused, and has a text that may be too long, goes in parts.
    async fn batch(&self, texts: Vec<&str>, purpose: Purpose) -> Result<Vec<Vec<f32>>> {
        match self.one(&texts, purpose).await {
            Ok(vectors) => Ok(vectors),
            Err(failure) if failure.is_refusal && texts.iter().any(|text| text.len() > SHORT) => {
                self.in_parts(&texts, purpose, failure.error).await
            }
            Err(failure) => Err(failure.error),
        }
    }

    /// Halves of what was refused, and halves of those, until each text is embedded: by itself and shorter if
    /// need be.
    async fn in_parts(&self, texts: &[&str], purpose: Purpose, refused: Error) -> Result<Vec<Vec<f32>>> {
        // A server that refuses everything is not asked for each text.
        if let Err(failure) = self.one(&[PROBE], purpose).await {
            return Err(if failure.is_refusal { refused } else { failure.error });
        }
        let mut vectors = Vec::with_capacity(texts.len());
        let mut parts = vec![(texts, Some(refused))];
        while let Some((part, refused)) = parts.pop() {
            let refused = match refused {
                Some(error) => error,
                None => match self.one(part, purpose).await {
                    Ok(made) => {
                        vectors.extend(made);
                        continue;
                    }
                    Err(failure) if failure.is_refusal => failure.error,
                    Err(failure) => return Err(failure.error),
                },
            };
            if let [text] = part {
                vectors.push(self.shortened(text, purpose, refused).await?);
            } else {
                // The first half is worked first, so that vectors stay in the order of the texts.
                let (first, second) = part.split_at(part.len() / 2);
                parts.extend([(second, None), (first, None)]);
            }
        }
        Ok(vectors)
    }

    /// A text that was refused by itself, halved until the server takes it.
    async fn shortened(&self, text: &str, purpose: Purpose, refused: Error) -> Result<Vec<f32>> {
        static TOLD: Once = Once::new();
        let mut left = text;
        for _ in 0..HALVINGS {
            let Some(shorter) = half(left) else { break };
            left = shorter;
            match self.one(&[left], purpose).await {
                Ok(mut made) => {
                    TOLD.call_once(|| {
                        tracing::warn!(
                            refused = %refused.message,
                            text.bytes = text.len(),
                            sent.bytes = left.len(),
                            "a text that the embedding server finds too long is cut, as are others from now on \
                             without a warning; a lower embedder.text_tokens saves the requests that are refused"
                        );
                    });
                    if let Some(vector) = made.pop() {
                        return Ok(vector);
                    }
                }
                Err(failure) if failure.is_refusal => {}
                Err(failure) => return Err(failure.error),
            }
        }
        Err(refused)
    }

    async fn all(&self, texts: &[Arc<str>], purpose: Purpose) -> Result<Vec<Embedding>> {
        let limits = self.server.limits;
        let texts: Vec<&str> = texts.iter().map(|text| cut(text, limits.text_tokens)).collect();
        let mut requests = Vec::new();
        for batch in batches(&texts, limits) {
            requests.push(self.batch(batch, purpose));
        }
        let vectors = try_join_all(requests).await?;
        Ok(vectors.into_iter().flatten().map(Embedding::from).collect())
    }
}

#[async_trait]
impl Embedder for HttpEmbedder {
    fn dimensions(&self) -> usize {
        self.server.dimensions
    }

    fn model(&self) -> &str {
        self.server.name()
    }

    fn count_tokens(&self, text: &str) -> usize {
        tokens(text).min(self.server.limits.text_tokens)
    }

    fn texts_at_once(&self) -> Option<usize> {
        Some(self.server.limits.texts.min(256))
    }

    async fn embed(&self, texts: &[Arc<str>]) -> Result<Vec<Embedding>> {
        self.all(texts, Purpose::Passage).await
    }

    async fn embed_query(&self, text: &Arc<str>) -> Result<Embedding> {
        let mut vectors = self.all(std::slice::from_ref(text), Purpose::Query).await?;
        vectors.pop().ok_or_else(|| Error::retryable("embed a query", "no vector came"))
    }
}
