//! Requests to one host of Pinecone's: headers, pace, time limits and tries.

use std::time::{Duration, Instant};

use reqwest::{Method, RequestBuilder, StatusCode, Url, header};
use serde::de::DeserializeOwned;

use super::answer::{accepted, ask, failure};
use super::pace::Pace;
use crate::pipeline::clock::BootClock;
use crate::pipeline::failure::{Class, Error, FailureKind, Result};
use crate::pipeline::retry::Backoff;
use crate::secret::{Secret, address_without_secrets};

/// The version of the API that is spoken: without one, the oldest that is supported answers.
pub(super) const API_VERSION: &str = "2026-04";

/// Tries of a request that changes nothing.
const READ_TRIES: u32 = 4;

/// A host, and how it is spoken to.
pub(super) struct Http {
    client: reqwest::Client,
    base: Url,
    timeout: Duration,
    pace: Pace,
}

/// An address, with or without a scheme; without one it is HTTPS.
fn address(setting: &str, host: &str) -> Result<Url> {
    let wrong = |message: String| Error::new(FailureKind::WrongSetting, "use the Pinecone index", message);
    let host = host.trim();
    let shown = address_without_secrets(host);
    if host.is_empty() {
        return Err(wrong(format!(
            "{setting} is not set: it is the index's host, as Pinecone's console shows it"
        )));
    }
    let url = if host.contains("://") { host.to_owned() } else { format!("https://{host}") };
    let base = Url::parse(&url).map_err(|error| wrong(format!("{setting} = {shown:?}: {error}")))?;
    if !matches!(base.scheme(), "http" | "https") || base.host().is_none() {
        return Err(wrong(format!("{setting} = {shown:?}: use a host name, or https:// before it")));
    }
    Ok(base)
}

impl Http {
    /// A host that `setting` names. Nothing is asked of it yet.
    pub(super) fn new(setting: &str, host: &str, api_key: &Secret, timeout: Duration) -> Result<Self> {
        let wrong =
            |message: String| Error::new(FailureKind::WrongSetting, "use the Pinecone index", message);
        let base = address(setting, host)?;
        let mut key = header::HeaderValue::from_str(api_key.expose())
            .map_err(|_| wrong("index.api_key holds characters that no key has".into()))?;
        key.set_sensitive(true);
        let mut headers = header::HeaderMap::new();
        headers.insert("Api-Key", key);
        headers.insert("X-Pinecone-Api-Version", header::HeaderValue::from_static(API_VERSION));
        let client = reqwest::Client::builder()
            .default_headers(headers)
            .user_agent(concat!("refarch/", env!("CARGO_PKG_VERSION")))
            .timeout(timeout)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| wrong(error.to_string()))?;
        Ok(Self { client, base, timeout, pace: Pace::new() })
    }

    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    pub(super) fn request(&self, method: Method, path: &str) -> Result<RequestBuilder> {
        let url = self.base.join(path).map_err(|error| {
            Error::new(FailureKind::WrongSetting, "use the Pinecone index", error).because(error)
        })?;
        Ok(self.client.request(method, url))
    }

    /// Sends a request once. Waiting for its turn counts into the time that it may take: who asked it
    /// reckons that it is over by then.
    async fn once(&self, request: RequestBuilder, what: &str) -> Result<reqwest::Response> {
        let started = Instant::now();
        let permit = tokio::time::timeout(self.timeout, self.pace.permit()).await;
        let _permit = permit
            .map_err(|_| Error::new(FailureKind::RateLimited, what, "the index asks for fewer requests"))?;
        let left = self.timeout.saturating_sub(started.elapsed()).max(Duration::from_millis(1));
        ask(request.timeout(left), what).await
    }

    fn learn(&self, result: &Result<reqwest::Response>, status: Option<StatusCode>) {
        match (result, status) {
            (Err(error), Some(StatusCode::TOO_MANY_REQUESTS)) => self.pace.too_fast(error.retry_after()),
            (Ok(_), _) => self.pace.succeeded(),
            _ => {}
        }
    }

    /// Sends a request that changes something, once: whether it may be tried again is the caller's to say.
    /// A status in `also` is a success too.
    pub(super) async fn write(
        &self,
        request: RequestBuilder,
        what: &str,
        also: Option<StatusCode>,
    ) -> Result<reqwest::Response> {
        let response = self.once(request, what).await?;
        let status = response.status();
        if Some(status) == also {
            return Ok(response);
        }
        let result = accepted(response, what).await;
        self.learn(&result, Some(status));
        result
    }

    /// Sends a request that changes nothing, a few times if need be.
    pub(super) async fn ask(&self, request: RequestBuilder, what: &str) -> Result<reqwest::Response> {
        let mut backoff = Backoff::default();
        loop {
            let again = request.try_clone();
            let Some(now) = again else { return self.write(request, what, None).await };
            let error = match self.write(now, what, None).await {
                Ok(response) => return Ok(response),
                Err(error) => error,
            };
            let pause = backoff.next(&error, &BootClock);
            let over = backoff.failures() >= READ_TRIES || pause > self.timeout;
            if error.class() != Class::Retryable || over || !self.pace.may_try_again() {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// The same, with the answer read.
    pub(super) async fn read<T: DeserializeOwned>(&self, request: RequestBuilder, what: &str) -> Result<T> {
        self.ask(request, what).await?.json().await.map_err(|error| failure(what, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_a_scheme_is_https() {
        let of = |host| address("index.host", host).map(|url| url.to_string());
        assert_eq!(of("x-1.svc.pinecone.io").unwrap(), "https://x-1.svc.pinecone.io/");
        assert_eq!(of("http://127.0.0.1:5081/").unwrap(), "http://127.0.0.1:5081/");
        for wrong in ["", " ", "ftp://x", "http://", "two words"] {
            assert!(of(wrong).is_err(), "{wrong:?}");
        }
    }
}
