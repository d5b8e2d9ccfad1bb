//! Batches of texts, and the handling of refused texts.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Once};

use async_trait::async_trait;
use futures::future::try_join_all;
use tokio::sync::Semaphore;

use super::provider::Purpose;
use super::server::{GREETING_TEXT, Server};
use super::texts::{HALVINGS, SHORT, batches, cut, half, tokens};
use crate::pipeline::embedder::{BatchSize, Embedder, Embedding, Tokens};
use crate::pipeline::failure::{Error, FailureKind, Result};

/// The most texts in one call of the embedder, even if a request may hold more: the texts of one call fail
/// together.
const MOST_TEXTS: usize = 256;

/// Embeds texts on a server.
pub struct HttpEmbedder {
    server: Server,
    /// One permit a request that may be in flight, and how many permits there are.
    requests: Semaphore,
    at_once: AtomicUsize,
}

impl HttpEmbedder {
    /// Starts an embedder with at most this many requests in flight.
    #[must_use]
    pub fn start(server: Server, at_once: usize) -> Self {
        let at_once = at_once.max(1);
        Self { server, requests: Semaphore::new(at_once), at_once: AtomicUsize::new(at_once) }
    }

    /// Sends one request, once a permit is free.
    async fn one(&self, texts: &[&str], purpose: Purpose) -> Result<Vec<Vec<f32>>> {
        // The semaphore is never closed.
        let _permit = self.requests.acquire().await;
        self.server.send(texts, purpose).await
    }

    /// Embeds one batch. If the server refuses the batch and a text may be too long, the batch is split.
    async fn batch(&self, texts: Vec<&str>, purpose: Purpose) -> Result<Vec<Vec<f32>>> {
        match self.one(&texts, purpose).await {
            Ok(vectors) => Ok(vectors),
            Err(error) if is_refusal(&error) && texts.iter().any(|text| text.len() > SHORT) => {
                self.in_parts(&texts, purpose, error).await
            }
            Err(error) => Err(error),
        }
    }

    /// Splits a refused batch into halves, again and again, until each text is embedded. A text that is
    /// refused alone is shortened.
    async fn in_parts(&self, texts: &[&str], purpose: Purpose, refused: Error) -> Result<Vec<Vec<f32>>> {
        // A server that refuses every text is not asked again for each of them.
        if let Err(error) = self.one(&[GREETING_TEXT], purpose).await {
            return Err(if is_refusal(&error) { refused } else { error });
        }
        let mut vectors = Vec::with_capacity(texts.len());
        let mut parts = vec![(texts, Some(refused))];
        while let Some((part, refused)) = parts.pop() {
            let refused = match refused {
                Some(error) => error,
                None => match self.one(part, purpose).await {
                    Ok(embedded) => {
                        vectors.extend(embedded);
                        continue;
                    }
                    Err(error) if is_refusal(&error) => error,
                    Err(error) => return Err(error),
                },
            };
            if let [text] = part {
                vectors.push(self.shortened(text, purpose, refused).await?);
            } else {
                // The first half is taken first, so that the vectors stay in the order of the texts.
                let (first, second) = part.split_at(part.len() / 2);
                parts.extend([(second, None), (first, None)]);
            }
        }
        Ok(vectors)
    }

    /// Embeds a text that was refused alone: halves it until the server accepts it.
    async fn shortened(&self, text: &str, purpose: Purpose, refused: Error) -> Result<Vec<f32>> {
        static LOGGED: Once = Once::new();
        let mut left = text;
        for _ in 0..HALVINGS {
            let Some(shorter) = half(left) else { break };
            left = shorter;
            match self.one(&[left], purpose).await {
                Ok(mut embedded) => {
                    LOGGED.call_once(|| {
                        tracing::warn!(
                            refused = %refused.message(),
                            text.bytes = text.len(),
                            sent.bytes = left.len(),
                            "a text is too long for the embedding server and is cut; later ones are cut without \
                             a warning; lower embedder.text_tokens to avoid the refused requests"
                        );
                    });
                    if let Some(vector) = embedded.pop() {
                        return Ok(vector);
                    }
                }
                Err(error) if is_refusal(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Err(refused)
    }

    async fn all(&self, texts: &[&str], purpose: Purpose) -> Result<Vec<Embedding>> {
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

/// Whether the server refused the data, so that a smaller request may succeed.
fn is_refusal(error: &Error) -> bool {
    error.kind() == FailureKind::RefusedData
}

#[async_trait]
impl Embedder for HttpEmbedder {
    fn dimensions(&self) -> usize {
        self.server.dimensions()
    }

    fn model(&self) -> &str {
        self.server.name()
    }

    fn batch_size(&self) -> BatchSize {
        let limits = self.server.limits;
        BatchSize::Bounded { texts: limits.texts.min(MOST_TEXTS), tokens: limits.tokens }
    }

    async fn ready(&self) {
        self.server.ready().await;
    }

    async fn resize(&self, at_once: usize) {
        let wanted = at_once.max(1);
        let before = self.at_once.swap(wanted, Ordering::Relaxed);
        self.requests.add_permits(wanted.saturating_sub(before));
        let surplus = u32::try_from(before.saturating_sub(wanted)).unwrap_or(u32::MAX);
        // Waits for requests that are in flight. The semaphore is never closed.
        if let Ok(permits) = self.requests.acquire_many(surplus).await {
            permits.forget();
        }
    }

    async fn tokenize(&self, texts: Vec<Arc<str>>) -> Result<Vec<Tokens>> {
        let most = self.server.limits.text_tokens;
        Ok(texts.into_iter().map(|text| Tokens::Text { count: tokens(&text).min(most), text }).collect())
    }

    async fn embed(&self, batch: Vec<Tokens>) -> Result<Vec<Embedding>> {
        self.all(&batch.iter().map(Tokens::text).collect::<Result<Vec<_>>>()?, Purpose::Passage).await
    }

    async fn embed_query(&self, text: &Arc<str>) -> Result<Embedding> {
        let mut vectors = self.all(&[text], Purpose::Query).await?;
        vectors
            .pop()
            .ok_or_else(|| Error::new(FailureKind::UnexpectedAnswer, "embed a query", "no vector came"))
    }
}
