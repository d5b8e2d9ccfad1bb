//! Requests to one host of Pinecone: headers, rate limit, time limits and retries.

use std::time::{Duration, Instant};

use reqwest::{Method, RequestBuilder, StatusCode, Url, header};
use serde::de::DeserializeOwned;

use super::response::{accepted, ask, failure};
use crate::backend::http::client::client;
use crate::backend::http::rate_limit::RateLimit;
use crate::backend::http::retry::Retry;
use crate::backend::http::status;
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::secret::{Secret, address_without_secrets};

/// The version of the API. A request without a version gets the oldest supported one.
pub(super) const API_VERSION: &str = "2026-04";

/// A client for one host.
pub(super) struct Http {
    client: reqwest::Client,
    base: Url,
    timeout: Duration,
    limit: RateLimit,
    /// For requests that change nothing.
    retry: Retry,
}

/// Parses an address. Without a scheme it is HTTPS.
fn address(setting: &str, host: &str) -> Result<Url> {
    let wrong = |message: String| Error::new(FailureKind::WrongSetting, "use the Pinecone index", message);
    let host = host.trim();
    let shown = address_without_secrets(host);
    if host.is_empty() {
        return Err(wrong(format!(
            "{setting} is not set: set it to the index's host, which Pinecone's console shows"
        )));
    }
    let url = if host.contains("://") { host.to_owned() } else { format!("https://{host}") };
    let base = Url::parse(&url).map_err(|error| wrong(format!("{setting} = {shown:?}: {error}")))?;
    if !matches!(base.scheme(), "http" | "https") || base.host().is_none() {
        return Err(wrong(format!("{setting} = {shown:?}: use a host name, or https:// and a host name")));
    }
    Ok(base)
}

impl Http {
    /// A client for the host in the setting `setting`. Sends no request yet.
    pub(super) fn new(setting: &str, host: &str, api_key: &Secret, timeout: Duration) -> Result<Self> {
        let wrong =
            |message: String| Error::new(FailureKind::WrongSetting, "use the Pinecone index", message);
        let base = address(setting, host)?;
        let mut key = header::HeaderValue::from_str(api_key.expose()).map_err(|_| {
            wrong("index.api_key contains characters that are not allowed in a header".into())
        })?;
        key.set_sensitive(true);
        let mut headers = header::HeaderMap::new();
        headers.insert("Api-Key", key);
        headers.insert("X-Pinecone-Api-Version", header::HeaderValue::from_static(API_VERSION));
        let client = client(headers, timeout).map_err(|error| wrong(error.to_string()))?;
        let retry = Retry::within(timeout).with_budget();
        Ok(Self { client, base, timeout, limit: RateLimit::adaptive(), retry })
    }

    /// Waits until the pause that the host asked for is over. Returns at once if there is none.
    pub(super) async fn ready(&self) {
        self.limit.ready().await;
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

    /// Sends a request once. `timeout` includes the wait for the rate limit, because the caller relies on the
    /// request being over by then.
    async fn once(&self, request: RequestBuilder, what: &str) -> Result<reqwest::Response> {
        let started = Instant::now();
        let turn = tokio::time::timeout(self.timeout, self.limit.turn(0)).await;
        let throttled = |_| {
            Error::new(FailureKind::RateLimited, what, "the rate limit left no turn within the time limit")
        };
        let _turn = turn.map_err(throttled)?;
        let left = self.timeout.saturating_sub(started.elapsed()).max(Duration::from_millis(1));
        let response = ask(request.timeout(left), what).await?;
        self.limit.answered(response.status(), status::retry_after(response.headers()));
        if response.status().is_success() {
            self.retry.succeeded();
        }
        Ok(response)
    }

    /// Sends a request that changes something, once: only the caller knows whether it may be repeated. The
    /// status `also` counts as a success too.
    pub(super) async fn write(
        &self,
        request: RequestBuilder,
        what: &str,
        also: Option<StatusCode>,
    ) -> Result<reqwest::Response> {
        let response = self.once(request, what).await?;
        if Some(response.status()) == also { Ok(response) } else { accepted(response, what).await }
    }

    /// Sends a request that changes nothing, with a few retries if necessary.
    pub(super) async fn ask(&self, request: RequestBuilder, what: &str) -> Result<reqwest::Response> {
        let once = || async {
            let unbuilt = || Error::new(FailureKind::Malformed, what, "the request cannot be built");
            let request = request.try_clone().ok_or_else(unbuilt)?;
            self.write(request, what, None).await
        };
        self.retry.run(&self.limit, once).await
    }

    /// Like [`Self::ask`], and parses the answer.
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
