//! Embedding by a server: `OpenAI`'s protocol, text-embeddings-inference, and Pinecone's hosted models.
//!
//! Texts go in batches within the provider's limits, several requests at a time, no faster than allowed.
//! What a server says of a request may be one text's fault, and is told so that the indexer can find which;
//! what it says of the key or the model is everybody's ([`mod@refusal`] has the table). A text that the server
//! finds too long is cut until the server takes it.

mod address;
mod embedder;
mod known;
mod provider;
mod rate;
mod refusal;
mod texts;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reqwest::Url;
use tokio::sync::Semaphore;

use crate::config::Settings;
use crate::pipeline::clock::BootClock;
use crate::pipeline::failure::{Class, Error, Result};
use crate::pipeline::retry::Backoff;
use crate::secret::{Secret, without_secrets};
pub use embedder::HttpEmbedder;
pub use known::Known;
use known::signature;
use provider::{Info, Limits, Provider, Purpose};
use rate::Rate;
use refusal::refusal;
use texts::tokens;

/// Tries of one request; the indexer sits out what lasts longer.
const TRIES: u32 = 4;

/// The longest that a provider may ask to be left alone within one request's tries.
const MAX_PAUSE: Duration = Duration::from_secs(20);

/// Bytes of an answer at most: of 2,048 vectors of 4,096 numbers.
const MAX_ANSWER: usize = 256 * 1024 * 1024;

/// A text that is no server's business to refuse: what it is greeted with.
const PROBE: &str = "refarch";

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
    rate: Arc<Rate>,
}

/// Why a request came to nothing.
struct Failure {
    error: Error,
    /// Whether the server refused what was sent, so that less of it may go through.
    is_refusal: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, is_refusal: false }
    }
}

impl Server {
    /// Looks at the server that the settings name: what it can take, and how long its vectors are. What is known
    /// of its model it need not tell now.
    pub async fn open(settings: &Settings, known: Option<&Known>) -> Result<Self> {
        let set = &settings.embedder;
        let wrong = |message: String| Error::fatal("use the embedder", message);
        let provider =
            Provider::of(set.kind).ok_or_else(|| wrong("a model on this machine has no server".into()))?;
        let address = match (provider, set.url.trim()) {
            (Provider::Pinecone, "") => &settings.index.controller,
            (_, address) => address,
        };
        let base = Url::parse(address).map_err(|error| wrong(format!("embedder.url: {error}")))?;
        let url = address::embedding(&base, provider);
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
            base,
            url,
            api_key,
            model: set.model.clone(),
            signature: String::new(),
            asked: (set.dimensions > 0 && provider != Provider::Tei).then_some(set.dimensions),
            dimensions: set.dimensions,
            has_answered: false,
            is_assumed: Arc::default(),
            limits: provider.limits(),
            rate: Arc::new(Rate::new(set.requests_per_minute, set.tokens_per_minute)),
        };
        if provider == Provider::Tei
            && let Err(error) = server.learn().await
        {
            let known = known.filter(|_| error.class == Class::Retryable).ok_or(error)?;
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
            let made = server.send(&[PROBE], Purpose::Passage).await.map_err(at_the_start)?;
            server.dimensions = made[0].len();
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
        tokio::time::sleep(self.rate.reserve(tokens(PROBE) as u64, Instant::now())).await;
        let greeted = tokio::time::timeout(GREETING, self.once(&[PROBE], Purpose::Passage)).await;
        let place = address::place(&self.url);
        let slow = || {
            let message = format!("{place} gave no answer within {} s", GREETING.as_secs());
            Failure::from(Error::retryable("embed texts", message))
        };
        match greeted.unwrap_or_else(|_| Err(slow())) {
            Ok(_) => Ok(()),
            Err(Failure { error, .. }) if error.class == Class::Retryable => {
                tracing::warn!(%error, "the embedding server does not answer yet; work is held until it does");
                Ok(())
            }
            // It may be mended as it stands, without this process: the work is held as one fault meanwhile.
            Err(Failure { error, .. }) if error.class == Class::Permanent => {
                tracing::warn!(%error, "the embedding server refuses a harmless text; work is held until it takes one");
                Ok(())
            }
            Err(Failure { error, .. }) => Err(error),
        }
    }

    /// What a text-embeddings-inference server tells of itself.
    async fn info(&self) -> Result<Info> {
        let url = address::info(&self.base, self.provider);
        let request = self.provider.sign(self.client.get(url.clone()), self.api_key.expose());
        let answer = request.send().await.map_err(|error| unanswered(&error, &url))?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        let body = answer.bytes().await.map_err(|error| unanswered(&error, &url))?;
        // Servers that speak its protocol without this are as good. One that can't tell just now is not: by
        // another name its model would be another model.
        match status.as_u16() {
            200..=299 if body.trim_ascii_start().starts_with(b"{") => {
                serde_json::from_slice(&body).map_err(|error| {
                    let message = format!("what {} says is cut or no JSON: {error}", address::place(&url));
                    Error::retryable("ask the embedding server for its model", message)
                })
            }
            200..=299 | 400 | 404 | 405 | 410 | 422 | 501 => Ok(Info::default()),
            _ => {
                let error = refusal(&url, self.api_key.expose(), status, &headers, &body);
                Err(Error { what: "ask the embedding server for its model".into(), ..error })
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
                address::place(&self.base),
                info.name(),
                self.model
            );
            return Err(Error::fatal("ask the embedding server for its model", message));
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

    /// One request, a few times if need be.
    async fn send(&self, texts: &[&str], purpose: Purpose) -> Result<Vec<Vec<f32>>, Failure> {
        let tokens: usize = texts.iter().map(|text| tokens(text)).sum();
        let mut backoff = Backoff::default();
        loop {
            let wait = self.rate.reserve(tokens as u64, Instant::now());
            tokio::time::sleep(wait).await;
            let failure = match self.once(texts, purpose).await {
                Ok(vectors) => return Ok(vectors),
                Err(failure) => failure,
            };
            let pause = backoff.next(&failure.error, &BootClock);
            let is_over = backoff.failures() >= TRIES || pause > MAX_PAUSE;
            if failure.error.class != Class::Retryable || is_over {
                return Err(failure);
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn once(&self, texts: &[&str], purpose: Purpose) -> Result<Vec<Vec<f32>>, Failure> {
        self.confirm().await?;
        let lost = |error: reqwest::Error| unanswered(&error, &self.url);
        let body = self.provider.body(&self.model, texts, self.asked, purpose);
        let request = self.provider.sign(self.client.post(self.url.clone()), self.api_key.expose());
        let mut answer = request.json(&body).send().await.map_err(lost)?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        let mut read = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(lost)? {
            read.extend_from_slice(&chunk);
            if read.len() > MAX_ANSWER {
                let message = format!("the answer of {} is too long", address::place(&self.url));
                return Err(Failure { error: Error::permanent("embed texts", message), is_refusal: true });
            }
        }
        if !status.is_success() {
            let error = refusal(&self.url, self.api_key.expose(), status, &headers, &read);
            return Err(Failure { is_refusal: error.class == Class::Permanent, error });
        }
        let vectors = self.provider.read(&read).map_err(|error| {
            let message = format!(
                "the answer of {} is not what {} has: {error}; are embedder.url and embedder.kind right?",
                address::place(&self.url),
                self.provider.name()
            );
            Error::retryable("embed texts", message)
        })?;
        if vectors.len() != texts.len() {
            let place = address::place(&self.url);
            let message = format!("{} vectors came from {place} for {} texts", vectors.len(), texts.len());
            return Err(Error::retryable("embed texts", message).into());
        }
        Ok(vectors.into_iter().map(|vector| self.checked(vector)).collect::<Result<_>>()?)
    }

    /// A vector of the right length, made a unit vector.
    fn checked(&self, mut vector: Vec<f32>) -> Result<Vec<f32>> {
        if self.dimensions > 0 && vector.len() != self.dimensions {
            let message = format!(
                "vectors from {} have length {}, and {} is wanted: set embedder.dimensions to what the model gives, or to 0, and run refarch migrate",
                address::place(&self.url),
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

/// What goes wrong before any work was taken ends the role, unless it passes: a harmless text is no reason to
/// refuse a request.
fn at_the_start(failure: Failure) -> Error {
    match failure.error {
        error if error.class == Class::Permanent => Error {
            class: Class::Fatal,
            message: format!("{}; it was asked to embed the word {PROBE:?}", error.message),
            ..error
        },
        error => error,
    }
}

/// Classes a request that got no answer.
fn unanswered(error: &reqwest::Error, url: &Url) -> Error {
    // The error's own text has the address with its query.
    let mut text = format!("no answer from {}", address::place(url));
    let mut cause = std::error::Error::source(error);
    if cause.is_none() {
        text = format!(
            "{text}: {}",
            if error.is_timeout() { "it took too long" } else { "the answer broke off" }
        );
    }
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    let text = without_secrets(&text);
    if error.is_builder() {
        return Error::fatal("embed texts", text);
    }
    Error::retryable("embed texts", text)
}
