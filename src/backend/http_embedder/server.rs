//! The server: its address, its limits, and one request.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::Url;
use reqwest::header::HeaderMap;

use super::address;
use super::error_policy::refusal;
use super::known::{Known, signature};
use super::provider::{Info, Limits, Provider, Purpose};
use super::texts::tokens;
use crate::backend::http::client::client;
use crate::backend::http::rate_limit::RateLimit;
use crate::backend::http::retry::Retry;
use crate::backend::http::{status, unanswered};
use crate::config;
use crate::pipeline::failure::{Class, Error, FailureKind, Result};
use crate::secret::{Secret, without_secrets};

/// The longest time that a request waits for a pause that the server asked for. A longer pause is waited out
/// by the caller, before it takes work.
const MAX_PAUSE: Duration = Duration::from_secs(20);

/// The most bytes of an answer: enough for 2,048 vectors of 4,096 numbers.
const MAX_ANSWER: usize = 256 * 1024 * 1024;

/// The text of the first request. No server has a reason to refuse it.
pub(super) const GREETING_TEXT: &str = "refarch";

/// The time limit of the first request. A start does not wait longer for the server.
const GREETING: Duration = Duration::from_secs(5);

/// A server and one of its models. Embedders are started from it.
#[derive(Clone)]
pub struct Server {
    client: reqwest::Client,
    provider: Provider,
    /// The configured URL, and the URL for embedding.
    base: Url,
    url: Url,
    api_key: Secret,
    /// The model's name on the server.
    model: String,
    /// The model's name in the content hash, such as `openai:text-embedding-3-small@512`.
    signature: String,
    /// The number of dimensions to request; `None` for the model's own.
    asked: Option<usize>,
    dimensions: usize,
    /// Whether the server has embedded a text since it was opened.
    has_answered: bool,
    /// Whether the model's name comes from the index, and the server has not yet confirmed it.
    is_assumed: Arc<AtomicBool>,
    pub(super) limits: Limits,
    rate_limit: Arc<RateLimit>,
    retry: Arc<Retry>,
}

impl Server {
    /// Asks the configured server for its limits and the length of its vectors. What `known` says is not
    /// required from the server.
    pub async fn open(settings: &config::Embedder, known: Option<&Known>) -> Result<Self> {
        let wrong = |message: String| Error::new(FailureKind::WrongSetting, "use the embedder", message);
        let (provider, set) = Provider::of(&settings.kind)
            .ok_or_else(|| wrong("a model on this machine has no server".into()))?;
        let base = Url::parse(&set.url).map_err(|error| wrong(format!("embedder.url: {error}")))?;
        let url = address::embedding(&base, provider);
        let client = client(HeaderMap::new(), set.timeout).map_err(|error| wrong(error.to_string()))?;
        let mut server = Self {
            client,
            provider,
            base,
            url,
            api_key: set.api_key.clone(),
            model: settings.model.clone(),
            signature: String::new(),
            asked: (set.dimensions > 0 && provider != Provider::Tei).then_some(set.dimensions),
            dimensions: set.dimensions,
            has_answered: false,
            is_assumed: Arc::default(),
            limits: provider.limits(),
            rate_limit: Arc::new(RateLimit::by_the_minute(set.requests_per_minute, set.tokens_per_minute)),
            retry: Arc::new(Retry::within(MAX_PAUSE)),
        };
        if provider == Provider::Tei
            && let Err(error) = server.learn().await
        {
            let known = known.filter(|_| error.class() == Class::Retryable).ok_or(error)?;
            server.assume(known);
        }
        let given = |value: usize, default: usize| if value > 0 { value } else { default };
        server.limits = Limits {
            texts: given(set.batch_texts, server.limits.texts),
            tokens: given(set.batch_tokens, server.limits.tokens),
            text_tokens: given(set.text_tokens, server.limits.text_tokens),
        };
        if let Some(known) = known.filter(|known| known.model == server.model) {
            server.dimensions = known.dimensions();
        }
        if server.dimensions == 0 {
            let vectors = server.send(&[GREETING_TEXT], Purpose::Passage).await.map_err(at_the_start)?;
            server.dimensions = vectors[0].len();
            server.has_answered = true;
        }
        server.signature = signature(provider, &server.model, server.dimensions);
        Ok(server)
    }

    /// Asks the server to embed a harmless text, unless it has embedded one already, so that a wrong key is
    /// reported before any work is taken. If the server is down, the start does not wait for it: the work is
    /// held until the server is back.
    pub async fn greet(&self) -> Result<()> {
        if self.has_answered {
            return Ok(());
        }
        let _turn = self.rate_limit.turn(tokens(GREETING_TEXT)).await;
        let greeted = tokio::time::timeout(GREETING, self.once(&[GREETING_TEXT], Purpose::Passage)).await;
        let slow = |_| {
            let url = address::redacted(&self.url);
            let said = format!("{url} gave no answer within {} s", GREETING.as_secs());
            Error::new(FailureKind::TimedOut, "embed texts", said)
        };
        let Err(error) = greeted.map_err(slow).flatten() else { return Ok(()) };
        match error.class() {
            Class::Retryable => {
                tracing::warn!(%error, "the embedding server does not answer yet; work is held until it does");
                Ok(())
            }
            // The server may be repaired without a restart of this process. Until then the work is held as
            // one fault.
            Class::Permanent => {
                tracing::warn!(%error, "the embedding server refuses a harmless text; work is held until the server accepts it");
                Ok(())
            }
            Class::Fatal => Err(error),
        }
    }

    /// What a text-embeddings-inference server says about itself.
    async fn info(&self) -> Result<Info> {
        let url = address::info(&self.base, self.provider);
        let request = self.provider.sign(self.client.get(url.clone()), self.api_key.expose());
        let answer = request.send().await.map_err(|error| unanswered(error, &url))?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        self.rate_limit.answered(status, status::retry_after(&headers));
        let body = answer.bytes().await.map_err(|error| unanswered(error, &url))?;
        // Some servers speak the protocol but lack this endpoint; they are accepted. A server whose endpoint
        // only fails just now is an error: its model would get another name, and so count as another model.
        match status.as_u16() {
            200..=299 if body.trim_ascii_start().starts_with(b"{") => {
                serde_json::from_slice(&body).map_err(|error| {
                    let message =
                        format!("the answer of {} is not complete JSON: {error}", address::redacted(&url));
                    Error::new(
                        FailureKind::UnexpectedAnswer,
                        "ask the embedding server for its model",
                        message,
                    )
                    .because(error)
                })
            }
            200..=299 | 400 | 404 | 405 | 410 | 422 | 501 => Ok(Info::default()),
            _ => {
                let error = refusal(&url, self.api_key.expose(), status, &headers, &body);
                Err(error.amid("ask the embedding server for its model"))
            }
        }
    }

    /// Takes the limits, and the model's name if the settings have none, from a text-embeddings-inference
    /// server.
    async fn learn(&mut self) -> Result<()> {
        let info = self.info().await?;
        if self.model.is_empty() {
            info.name().clone_into(&mut self.model);
        }
        self.limits = Limits {
            texts: info.max_client_batch_size.unwrap_or(self.limits.texts),
            tokens: info.max_batch_tokens.unwrap_or(self.limits.tokens),
            text_tokens: info.max_input_length.unwrap_or(self.limits.text_tokens),
        };
        Ok(())
    }

    /// Assumes the known model until the server confirms it, if the settings name none.
    fn assume(&mut self, known: &Known) {
        if self.model.is_empty() {
            self.model.clone_from(&known.model);
            self.is_assumed = Arc::new(AtomicBool::new(true));
        }
    }

    /// Asks the server for its model if the model was assumed: vectors of two models must not get into one
    /// index.
    async fn confirm(&self) -> Result<()> {
        if !self.is_assumed.load(Ordering::Relaxed) {
            return Ok(());
        }
        let info = self.info().await?;
        if info.name() != self.model {
            let message = format!(
                "{} serves the model {}, but the index was made with {}: run refarch migrate",
                address::redacted(&self.base),
                info.name(),
                self.model
            );
            return Err(Error::new(
                FailureKind::WrongShape,
                "ask the embedding server for its model",
                message,
            ));
        }
        self.is_assumed.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// The model's name in the content hash.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.signature
    }

    /// The number of dimensions of a vector.
    #[must_use]
    pub fn dimensions(&self) -> usize {
        self.dimensions
    }

    /// Waits until the pause that the server asked for is over. Returns at once if there is none.
    pub(super) async fn ready(&self) {
        self.rate_limit.ready().await;
    }

    /// Sends a request, with a few retries if necessary.
    pub(super) async fn send(&self, texts: &[&str], purpose: Purpose) -> Result<Vec<Vec<f32>>> {
        let tokens: usize = texts.iter().map(|text| tokens(text)).sum();
        let once = || async {
            let pause = self.rate_limit.pause();
            if pause > self.retry.longest_pause() {
                let url = address::redacted(&self.url);
                let said = format!("{url} asked for a pause of another {} s", pause.as_secs());
                return Err(Error::new(FailureKind::RateLimited, "embed texts", said).with_pause(Some(pause)));
            }
            let _turn = self.rate_limit.turn(tokens).await;
            self.once(texts, purpose).await
        };
        self.retry.run(&self.rate_limit, once).await
    }

    async fn once(&self, texts: &[&str], purpose: Purpose) -> Result<Vec<Vec<f32>>> {
        self.confirm().await?;
        let lost = |error: reqwest::Error| unanswered(error, &self.url);
        let body = self.provider.body(&self.model, texts, self.asked, purpose);
        let request = self.provider.sign(self.client.post(self.url.clone()), self.api_key.expose());
        let mut answer = request.json(&body).send().await.map_err(lost)?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        self.rate_limit.answered(status, status::retry_after(&headers));
        let mut read = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(lost)? {
            read.extend_from_slice(&chunk);
            if read.len() > MAX_ANSWER {
                let message = format!(
                    "the answer of {} is longer than {MAX_ANSWER} bytes",
                    address::redacted(&self.url)
                );
                return Err(Error::new(FailureKind::RefusedData, "embed texts", message));
            }
        }
        if !status.is_success() {
            return Err(refusal(&self.url, self.api_key.expose(), status, &headers, &read));
        }
        let vectors = self.provider.read(&read).map_err(|error| {
            let message = format!(
                "the answer of {} is not an answer of kind {}: {error}; are embedder.url and embedder.kind right?",
                address::redacted(&self.url),
                self.provider.name()
            );
            Error::new(FailureKind::UnexpectedAnswer, "embed texts", message).because(error)
        })?;
        if vectors.len() != texts.len() {
            let url = address::redacted(&self.url);
            let message = format!("{url} returned {} vectors for {} texts", vectors.len(), texts.len());
            return Err(Error::new(FailureKind::UnexpectedAnswer, "embed texts", message));
        }
        vectors.into_iter().map(|vector| self.checked(vector)).collect()
    }

    /// Checks the length of a vector, and makes it a unit vector.
    fn checked(&self, mut vector: Vec<f32>) -> Result<Vec<f32>> {
        if self.dimensions > 0 && vector.len() != self.dimensions {
            let message = format!(
                "vectors from {} have length {} instead of {}: set embedder.dimensions to the model's length, or to 0, and run refarch migrate",
                address::redacted(&self.url),
                vector.len(),
                self.dimensions
            );
            return Err(Error::new(FailureKind::WrongShape, "embed texts", message));
        }
        let norm = vector.iter().map(|value| f64::from(*value) * f64::from(*value)).sum::<f64>().sqrt();
        if !norm.is_finite() || norm == 0.0 {
            return Err(Error::new(
                FailureKind::Malformed,
                "embed texts",
                "the server returned a vector of zeros, or with a number that is not finite",
            ));
        }
        for value in &mut vector {
            *value = (f64::from(*value) / norm) as f32;
        }
        Ok(vector)
    }
}

/// Turns a permanent failure of the first request into one that refuses all work: a harmless text is no
/// reason to refuse a request. Retryable and fatal failures stay as they are.
fn at_the_start(error: Error) -> Error {
    match error {
        error if error.class() == Class::Permanent => {
            let said = format!("{}; the text was {GREETING_TEXT:?}", error.message());
            Error::new(FailureKind::RefusesAll, error.what().to_owned(), said).because(error)
        }
        error => error,
    }
}

/// The error for a request without an answer.
fn unanswered(error: reqwest::Error, url: &Url) -> Error {
    let url = address::redacted(url);
    let reason = unanswered::reason(&error).unwrap_or_else(|| {
        if error.is_timeout() { "the request timed out".into() } else { "the answer ended early".into() }
    });
    let said = without_secrets(&format!("no answer from {url}: {reason}"));
    let kind = if error.is_builder() { FailureKind::WrongSetting } else { unanswered::kind(&error) };
    Error::new(kind, "embed texts", said).because(error.without_url())
}
