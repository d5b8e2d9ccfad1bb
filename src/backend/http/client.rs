//! The HTTP client.

use std::time::Duration;

use reqwest::header::HeaderMap;

/// A client that sends these headers with each request. `timeout` bounds one request. Redirects are not
/// followed, because the credentials would be sent to the new address.
pub(in crate::backend) fn client(headers: HeaderMap, timeout: Duration) -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder()
        .default_headers(headers)
        .user_agent(concat!("refarch/", env!("CARGO_PKG_VERSION")))
        .timeout(timeout)
        .redirect(reqwest::redirect::Policy::none())
        .build()
}
