//! Embedding by a server: `OpenAI`'s protocol, text-embeddings-inference, and Pinecone's hosted models.
//!
//! Texts go in batches within the provider's limits, several requests at a time, no faster than allowed.
//! What a server says of a request may be one text's fault, and is told so that the indexer can find which;
//! what it says of the key or the model is everybody's ([`FailureKind`] has the table). A text that the server
//! finds too long is cut until the server takes it.

mod address;
mod embedder;
mod error_policy;
mod known;
mod provider;
mod texts;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::Url;
use reqwest::header::HeaderMap;
use tokio::sync::Semaphore;

use crate::backend::http::client::client;
use crate::backend::http::rate_limit::RateLimit;
use crate::backend::http::retry::Retry;
use crate::backend::http::{status, unanswered};
use crate::config;
use crate::pipeline::failure::{Class, Error, FailureKind, Result};
use crate::secret::{Secret, without_secrets};
pub use embedder::HttpEmbedder;
use error_policy::refusal;
pub use known::Known;
use known::signature;
use provider::{Info, Limits, Provider, Purpose};
use texts::tokens;

/// The longest that a request waits for a server that asks to be left alone. What holds work back waits for
/// longer before it sends one.
const MAX_PAUSE: Duration = Duration::from_secs(20);

/// Bytes of an answer at most: of 2,048 vectors of 4,096 numbers.
const MAX_ANSWER: usize = 256 * 1024 * 1024;

/// A text that is no server's business to refuse: what it is greeted with.
const GREETING_TEXT: &str = "refarch";

/// How long the greeting may take; a server that is slower is not waited for at the start.
const GREETING: Duration = Duration::from_secs(5);

/// A server and a model of it, from which embedders are started.
#[derive(Clone)]
pub struct Server {
    client: reqwest::Client,
    provider: Provider,
    /// The address of the settings, and the one that embeds.
    base: Url,
    url: Url,
    api_key: Secret,
    /// The model's name for the server.
    model: String,
    /// Its name for the content hash, such as `openai:text-embedding-3-small@512`.
    signature: String,
    /// Length that is asked for; none for the model's own.
    asked: Option<usize>,
    dimensions: usize,
    /// Whether it has embedded a text since it was opened.
    has_answered: bool,
    /// Whether the model's name is the index's, and the server has yet to say that it has this model.
    is_assumed: Arc<AtomicBool>,
    limits: Limits,
    rate_limit: Arc<RateLimit>,
    retry: Arc<Retry>,
}

impl Server {
    /// Looks at the server that the settings name: what it can take, and how long its vectors are. What is known
    /// of its model it need not tell now.
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

    /// Asks the server to embed a harmless text, unless it has done so, so that a wrong key is told before any
    /// work is taken. A server that is not up yet is not waited for here: the work is held for as long as it
    /// is away.
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
            // It may be mended as it stands, without this process: the work is held as one fault meanwhile.
            Class::Permanent => {
                tracing::warn!(%error, "the embedding server refuses a harmless text; work is held until it takes one");
                Ok(())
            }
            Class::Fatal => Err(error),
        }
    }

    /// What a text-embeddings-inference server tells of itself.
    async fn info(&self) -> Result<Info> {
        let url = address::info(&self.base, self.provider);
        let request = self.provider.sign(self.client.get(url.clone()), self.api_key.expose());
        let answer = request.send().await.map_err(|error| unanswered(error, &url))?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        self.rate_limit.answered(status, status::retry_after(&headers));
        let body = answer.bytes().await.map_err(|error| unanswered(error, &url))?;
        // Servers that speak its protocol without this are as good. One that can't tell just now is not: by
        // another name its model would be another model.
        match status.as_u16() {
            200..=299 if body.trim_ascii_start().starts_with(b"{") => {
                serde_json::from_slice(&body).map_err(|error| {
                    let message = format!("what {} says is cut or no JSON: {error}", address::redacted(&url));
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

    /// Takes the model's name and limits from a text-embeddings-inference server.
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

    /// Takes the model for the known one, if the settings name none, until the server tells.
    fn assume(&mut self, known: &Known) {
        if self.model.is_empty() {
            self.model.clone_from(&known.model);
            self.is_assumed = Arc::new(AtomicBool::new(true));
        }
    }

    /// Asks which model the server has, if that was assumed: vectors of two models must not come into one index.
    async fn confirm(&self) -> Result<()> {
        if !self.is_assumed.load(Ordering::Relaxed) {
            return Ok(());
        }
        let info = self.info().await?;
        if info.name() != self.model {
            let message = format!(
                "{} has the model {}, and the index was made with {}: run refarch migrate",
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

    /// Returns when the server may be asked: at once, unless it asked to be left alone.
    async fn ready(&self) {
        self.rate_limit.ready().await;
    }

    /// One request, a few times if need be.
    async fn send(&self, texts: &[&str], purpose: Purpose) -> Result<Vec<Vec<f32>>> {
        let tokens: usize = texts.iter().map(|text| tokens(text)).sum();
        let once = || async {
            let pause = self.rate_limit.pause();
            if pause > self.retry.longest_pause() {
                let url = address::redacted(&self.url);
                let said = format!("{url} asks to be left alone for {} s more", pause.as_secs());
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
                let message = format!("the answer of {} is too long", address::redacted(&self.url));
                return Err(Error::new(FailureKind::RefusedData, "embed texts", message));
            }
        }
        if !status.is_success() {
            return Err(refusal(&self.url, self.api_key.expose(), status, &headers, &read));
        }
        let vectors = self.provider.read(&read).map_err(|error| {
            let message = format!(
                "the answer of {} is not what {} has: {error}; are embedder.url and embedder.kind right?",
                address::redacted(&self.url),
                self.provider.name()
            );
            Error::new(FailureKind::UnexpectedAnswer, "embed texts", message).because(error)
        })?;
        if vectors.len() != texts.len() {
            let url = address::redacted(&self.url);
            let message = format!("{} vectors came from {url} for {} texts", vectors.len(), texts.len());
            return Err(Error::new(FailureKind::UnexpectedAnswer, "embed texts", message));
        }
        vectors.into_iter().map(|vector| self.checked(vector)).collect()
    }

    /// A vector of the right length, made a unit vector.
    fn checked(&self, mut vector: Vec<f32>) -> Result<Vec<f32>> {
        if self.dimensions > 0 && vector.len() != self.dimensions {
            let message = format!(
                "vectors from {} have length {}, and {} is wanted: set embedder.dimensions to what the model gives, or to 0, and run refarch migrate",
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
                "the server made a vector that has no direction",
            ));
        }
        for value in &mut vector {
            *value = (f64::from(*value) / norm) as f32;
        }
        Ok(vector)
    }
}

/// What goes wrong before any work was taken ends the role, unless it passes: a harmless text is no reason to
/// refuse a request.
fn at_the_start(error: Error) -> Error {
    match error {
        error if error.class() == Class::Permanent => {
            let said = format!("{}; it was asked to embed the word {GREETING_TEXT:?}", error.message());
            Error::new(FailureKind::RefusesAll, error.what().to_owned(), said).because(error)
        }
        error => error,
    }
}

/// A request that got no answer.
fn unanswered(error: reqwest::Error, url: &Url) -> Error {
    let url = address::redacted(url);
    let reason = unanswered::reason(&error).unwrap_or_else(|| {
        if error.is_timeout() { "it took too long".into() } else { "the answer broke off".into() }
    });
    let said = without_secrets(&format!("no answer from {url}: {reason}"));
    let kind = if error.is_builder() { FailureKind::WrongSetting } else { unanswered::kind(&error) };
    Error::new(kind, "embed texts", said).because(error.without_url())
}
