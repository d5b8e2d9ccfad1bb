//! Embedding by a server: `OpenAI`'s protocol, text-embeddings-inference, and Pinecone's hosted models.
//!
//! Texts go in batches within the provider's limits, several requests at a time, no faster than allowed.
//! What a server says of a request may be one text's fault, and is told so that the indexer can find which;
//! what it says of the key or the model is everybody's.

mod provider;
mod rate;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::future::try_join_all;
use reqwest::{StatusCode, Url, header};
use serde_json::Value;
use tokio::sync::Semaphore;

use crate::config::Settings;
use crate::pipeline::clock::BootClock;
use crate::pipeline::embedder::{Embedder, Embedding};
use crate::pipeline::failure::{Class, Error, Result};
use crate::pipeline::retry::Backoff;
use crate::secret::{Secret, without_secrets};
use provider::{Info, Limits, Provider, Purpose};
use rate::Rate;

/// Bytes that are taken for a token: more than languages have on average, so that limits hold.
const BYTES_A_TOKEN: usize = 3;

/// Tries of one request; the indexer sits out what lasts longer.
const TRIES: u32 = 4;

/// The longest that a provider may ask to be left alone within one request's tries.
const MAX_PAUSE: Duration = Duration::from_secs(20);

/// Bytes of an answer at most: of 2,048 vectors of 4,096 numbers.
const MAX_ANSWER: usize = 256 * 1024 * 1024;

/// Characters of an error's body that are told.
const MAX_ERROR: usize = 500;

/// What the server is asked when its vectors' length is not known.
const PROBE: &str = "refarch";

/// A server and a model of it, from which embedders are started.
#[derive(Clone)]
pub struct Server {
    client: reqwest::Client,
    provider: Provider,
    url: Url,
    api_key: Secret,
    /// The model's name for the server.
    model: String,
    /// Its name for the content hash, such as `openai:text-embedding-3-small@512`.
    signature: String,
    /// Length that is asked for; none for the model's own.
    asked: Option<usize>,
    dimensions: usize,
    limits: Limits,
    rate: Arc<Rate>,
}

impl Server {
    /// Looks at the server that the settings name: what it can take, and how long its vectors are.
    pub async fn open(settings: &Settings) -> Result<Self> {
        let set = &settings.embedder;
        let wrong = |message: String| Error::fatal("use the embedder", message);
        let provider =
            Provider::of(set.kind).ok_or_else(|| wrong("a model on this machine has no server".into()))?;
        let address = match (provider, set.url.trim()) {
            (Provider::Pinecone, "") => &settings.index.controller,
            (_, address) => address,
        };
        let base = Url::parse(address)
            .map_err(|error| wrong(without_secrets(&format!("embedder.url = {address:?}: {error}"))))?;
        let url = base.join(provider.path()).map_err(|error| wrong(error.to_string()))?;
        let client = reqwest::Client::builder()
            .timeout(Duration::from_millis(set.timeout_ms))
            .user_agent(concat!("refarch/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| wrong(error.to_string()))?;
        let api_key = match provider {
            Provider::Pinecone if set.api_key.is_empty() => settings.index.api_key.clone(),
            _ => set.api_key.clone(),
        };
        let mut server = Self {
            client,
            provider,
            url,
            api_key,
            model: set.model.clone(),
            signature: String::new(),
            asked: (set.dimensions > 0 && provider != Provider::Tei).then_some(set.dimensions),
            dimensions: set.dimensions,
            limits: provider.limits(),
            rate: Arc::new(Rate::new(set.requests_per_minute, set.tokens_per_minute)),
        };
        if provider == Provider::Tei {
            server.learn(&base).await?;
        }
        let given = |value: usize, default: usize| if value > 0 { value } else { default };
        server.limits = Limits {
            texts: given(set.batch_texts, server.limits.texts),
            tokens: given(set.batch_tokens, server.limits.tokens),
            text_tokens: given(set.text_tokens, server.limits.text_tokens),
        };
        if server.dimensions == 0 {
            server.dimensions = server.send(&[PROBE], Purpose::Passage).await?[0].len();
        }
        server.signature = format!("{}:{}@{}", provider.name(), server.model, server.dimensions);
        Ok(server)
    }

    /// Takes the model's name and limits from a text-embeddings-inference server.
    async fn learn(&mut self, base: &Url) -> Result<()> {
        let url = base.join("/info").map_err(|error| Error::fatal("use the embedder", error))?;
        let request = self.provider.sign(self.client.get(url), self.api_key.expose());
        let answer = request.send().await.map_err(|error| unanswered(&error))?;
        // Servers that speak its protocol without this are as good.
        let info: Info = if answer.status().is_success() {
            answer.json().await.unwrap_or_default()
        } else {
            Info::default()
        };
        if self.model.is_empty() {
            self.model = if info.model_id.is_empty() { "unnamed".into() } else { info.model_id };
        }
        self.limits = Limits {
            texts: info.max_client_batch_size.unwrap_or(self.limits.texts),
            tokens: info.max_batch_tokens.unwrap_or(self.limits.tokens),
            text_tokens: info.max_input_length.unwrap_or(self.limits.text_tokens),
        };
        Ok(())
    }

    /// The model's name for the content hash.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.signature
    }

    /// Length of a vector.
    #[must_use]
    pub fn dimensions(&self) -> usize {
        self.dimensions
    }

    /// An embedder that has so many requests under way at most.
    #[must_use]
    pub fn start(&self, at_once: usize) -> HttpEmbedder {
        HttpEmbedder { server: self.clone(), requests: Semaphore::new(at_once.max(1)) }
    }

    /// One request, a few times if need be.
    async fn send(&self, texts: &[&str], purpose: Purpose) -> Result<Vec<Vec<f32>>> {
        let tokens: usize = texts.iter().map(|text| tokens(text)).sum();
        let mut backoff = Backoff::default();
        loop {
            let wait = self.rate.reserve(tokens as u64, Instant::now());
            tokio::time::sleep(wait).await;
            let error = match self.once(texts, purpose).await {
                Ok(vectors) => return Ok(vectors),
                Err(error) => error,
            };
            let pause = backoff.next(&error, &BootClock);
            if error.class != Class::Retryable || backoff.failures() >= TRIES || pause > MAX_PAUSE {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn once(&self, texts: &[&str], purpose: Purpose) -> Result<Vec<Vec<f32>>> {
        let body = self.provider.body(&self.model, texts, self.asked, purpose);
        let request = self.provider.sign(self.client.post(self.url.clone()), self.api_key.expose());
        let mut answer = request.json(&body).send().await.map_err(|error| unanswered(&error))?;
        let status = answer.status();
        let retry_after = answer.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
        let retry_after = retry_after.and_then(|text| text.trim().parse().ok()).map(Duration::from_secs);
        let mut read = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(|error| unanswered(&error))? {
            read.extend_from_slice(&chunk);
            if read.len() > MAX_ANSWER {
                return Err(Error::permanent("embed texts", "the answer is too long"));
            }
        }
        if !status.is_success() {
            return Err(Error { retry_after, ..refusal(status, &read) });
        }
        let vectors = self.provider.read(&read).map_err(|error| {
            Error::retryable(
                "embed texts",
                format!("the answer is not what {} has: {error}", self.provider.name()),
            )
        })?;
        if vectors.len() != texts.len() {
            let message = format!("{} vectors came for {} texts", vectors.len(), texts.len());
            return Err(Error::retryable("embed texts", message));
        }
        vectors.into_iter().map(|vector| self.checked(vector)).collect()
    }

    /// A vector of the right length, made a unit vector.
    fn checked(&self, mut vector: Vec<f32>) -> Result<Vec<f32>> {
        if self.dimensions > 0 && vector.len() != self.dimensions {
            let message = format!(
                "the server's vectors have length {}, and {} is wanted: set embedder.dimensions to what the model gives, and run refarch migrate",
                vector.len(),
                self.dimensions
            );
            return Err(Error::fatal("embed texts", message));
        }
        let norm = vector.iter().map(|value| f64::from(*value) * f64::from(*value)).sum::<f64>().sqrt();
        if !norm.is_finite() || norm == 0.0 {
            return Err(Error::permanent("embed texts", "the server made a vector that has no direction"));
        }
        for value in &mut vector {
            *value = (f64::from(*value) / norm) as f32;
        }
        Ok(vector)
    }
}

/// Classes a request that got no answer.
fn unanswered(error: &reqwest::Error) -> Error {
    if error.is_builder() {
        return Error::fatal("embed texts", without_secrets(&error.to_string()));
    }
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    Error::retryable("embed texts", without_secrets(&text))
}

/// Classes an answer that is no success.
fn refusal(status: StatusCode, body: &[u8]) -> Error {
    let text = String::from_utf8_lossy(body);
    let parsed: Value = serde_json::from_str(&text).unwrap_or_default();
    let said = [parsed.pointer("/error/message"), parsed.get("error"), parsed.get("message")];
    let said = said.into_iter().flatten().find_map(Value::as_str).unwrap_or(text.trim());
    let said: String = said.chars().take(MAX_ERROR).collect();
    let (class, fix) = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => (Class::Fatal, "; is embedder.api_key right?"),
        StatusCode::NOT_FOUND => (Class::Fatal, "; are embedder.url and embedder.model right?"),
        StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNPROCESSABLE_ENTITY => {
            (Class::Permanent, "")
        }
        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => (Class::Retryable, ""),
        status if status.is_server_error() => (Class::Retryable, ""),
        _ => (Class::Fatal, ""),
    };
    Error::new(class, "embed texts", format!("{status}: {said}{fix}"))
}

/// Tokens of a text, estimated.
fn tokens(text: &str) -> usize {
    text.len().div_ceil(BYTES_A_TOKEN).max(1)
}

/// As much of a text as a model reads.
fn cut(text: &str, tokens: usize) -> &str {
    let mut end = text.len().min(tokens.saturating_mul(BYTES_A_TOKEN));
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Texts in batches within the limits; one that is beyond them by itself goes alone.
fn batches<'a>(texts: &[&'a str], limits: Limits) -> Vec<Vec<&'a str>> {
    let mut batches: Vec<Vec<&str>> = Vec::new();
    let mut sum = 0;
    for text in texts {
        let more = tokens(text);
        let fits =
            batches.last().is_some_and(|batch| batch.len() < limits.texts && sum + more <= limits.tokens);
        if !fits {
            batches.push(Vec::new());
            sum = 0;
        }
        sum += more;
        if let Some(batch) = batches.last_mut() {
            batch.push(text);
        }
    }
    batches
}

/// Embeds texts by a server.
pub struct HttpEmbedder {
    server: Server,
    requests: Semaphore,
}

impl HttpEmbedder {
    /// One request, when it is its turn.
    async fn one(&self, texts: Vec<&str>, purpose: Purpose) -> Result<Vec<Vec<f32>>> {
        // The semaphore is never closed.
        let _permit = self.requests.acquire().await;
        self.server.send(&texts, purpose).await
    }

    async fn all(&self, texts: &[Arc<str>], purpose: Purpose) -> Result<Vec<Embedding>> {
        let limits = self.server.limits;
        let texts: Vec<&str> = texts.iter().map(|text| cut(text, limits.text_tokens)).collect();
        let mut requests = Vec::new();
        for batch in batches(&texts, limits) {
            requests.push(self.one(batch, purpose));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_keep_to_the_limits_and_lose_nothing() {
        let limits = Limits { texts: 3, tokens: 10, text_tokens: 100 };
        let long = "x".repeat(60);
        let texts = ["a", "b", "c", "d", &long, "e", "ffffffffffff", "gggggggggggggggggg"];
        let made = batches(&texts, limits);
        assert_eq!(made.concat(), texts);
        assert_eq!(made.iter().map(Vec::len).collect::<Vec<_>>(), [3, 1, 1, 2, 1]);
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        assert_eq!(cut("abcdef", 1), "abc");
        assert_eq!(cut("ab\u{e9}d", 1), "ab");
        assert_eq!(cut("ab", usize::MAX), "ab");
    }

    #[test]
    fn only_what_is_said_of_the_request_can_be_a_texts_fault() {
        let class = |status: u16| refusal(StatusCode::from_u16(status).unwrap(), b"{}").class;
        assert!([400, 413, 422].into_iter().all(|status| class(status) == Class::Permanent));
        assert!([408, 429, 500, 503].into_iter().all(|status| class(status) == Class::Retryable));
        assert!([301, 401, 403, 404, 410].into_iter().all(|status| class(status) == Class::Fatal));
        let said = refusal(StatusCode::BAD_REQUEST, br#"{"error":{"message":"too long"}}"#).to_string();
        assert!(said.ends_with("400 Bad Request: too long"), "{said}");
    }
}
