//! The client.

use std::time::Duration;

use reqwest::header::HeaderMap;

/// A client that sends these headers with each request, which may take so long. No redirect is followed: the
/// credentials would go with it.
pub(in crate::backend) fn client(headers: HeaderMap, timeout: Duration) -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder()
        .default_headers(headers)
        .user_agent(concat!("refarch/", env!("CARGO_PKG_VERSION")))
        .timeout(timeout)
        .redirect(reqwest::redirect::Policy::none())
        .build()
}
