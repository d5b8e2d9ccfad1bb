//! Answers, and what they mean.

use std::time::Duration;

use reqwest::{Method, RequestBuilder, StatusCode, header};
use serde_json::Value;

use crate::pipeline::failure::{Class, Error, Result};

/// Bytes of an error's body that are read.
const MAX_ERROR_BODY: usize = 4_096;

/// Adds query parameters, percent-encoded.
pub(super) fn with_query(request: RequestBuilder, query: &[(&str, &str)]) -> RequestBuilder {
    let (client, built) = request.build_split();
    match built {
        Ok(mut built) => {
            built.url_mut().query_pairs_mut().extend_pairs(query);
            RequestBuilder::from_parts(client, built)
        }
        // A request that can't be built fails in the same way without its query.
        Err(_) => client.request(Method::GET, "invalid:"),
    }
}

/// Sends a request; any answer is one.
pub(super) async fn ask(request: RequestBuilder, what: &str) -> Result<reqwest::Response> {
    request.send().await.map_err(|error| failure(what, &error))
}

/// An answer, if it is a success.
pub(super) async fn accepted(response: reqwest::Response, what: &str) -> Result<reqwest::Response> {
    if response.status().is_success() { Ok(response) } else { Err(refusal(what, response).await) }
}

/// Classes a request that got no answer.
pub(super) fn failure(what: &str, error: &reqwest::Error) -> Error {
    let message = describe(error);
    if error.is_builder() {
        return Error::permanent(what, message);
    }
    // Nobody took the request, so nobody will apply it.
    if error.is_connect() {
        return Error::retryable(what, message);
    }
    Error::doubtful(what, message)
}

/// An error with what lies under it, and without the URL, which carries ids.
fn describe(error: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(inner) = cause {
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    if error.is_timeout() {
        text = "no answer in time".into();
    }
    if text.is_empty() { "no usable answer".into() } else { text }
}

/// Classes an answer that is no success.
pub(super) async fn refusal(what: &str, response: reqwest::Response) -> Error {
    let status = response.status();
    let retry_after = response
        .headers()
        .get(header::RETRY_AFTER)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.trim().parse().ok())
        .map(Duration::from_secs);
    let message = format!("{status}: {}", message(response).await);
    let (class, doubtful) = class_of(status);
    Error { retry_after, doubtful, ..Error::new(class, what, message) }
}

/// What an answer's status means, and whether the request may have been done all the same. Only what
/// is said of the request itself can be a change's own fault: an index that is gone, or a key that is
/// refused, is everybody's.
pub(super) fn class_of(status: StatusCode) -> (Class, bool) {
    match status {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::CONFLICT => (Class::Retryable, false),
        StatusCode::REQUEST_TIMEOUT => (Class::Retryable, true),
        StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNPROCESSABLE_ENTITY => {
            (Class::Permanent, false)
        }
        status if status.is_server_error() => (Class::Retryable, true),
        _ => (Class::Fatal, false),
    }
}

/// The message of an error's body: the data plane's, the control plane's, or the text as it is.
async fn message(mut response: reqwest::Response) -> String {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        body.extend_from_slice(&chunk);
        if body.len() >= MAX_ERROR_BODY {
            break;
        }
    }
    body.truncate(MAX_ERROR_BODY);
    let text = String::from_utf8_lossy(&body).trim().to_owned();
    let parsed: Value = serde_json::from_str(&text).unwrap_or_default();
    let inner = parsed.get("message").or_else(|| parsed.pointer("/error/message"));
    inner.and_then(Value::as_str).map_or(text, str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_said_of_the_request_is_the_changes_fault() {
        let class = |status: u16| class_of(StatusCode::from_u16(status).unwrap());
        for status in [400, 413, 422] {
            assert_eq!(class(status), (Class::Permanent, false), "{status}");
        }
        for (status, doubtful) in
            [(429, false), (409, false), (408, true), (500, true), (503, true), (504, true)]
        {
            assert_eq!(class(status), (Class::Retryable, doubtful), "{status}");
        }
        for status in [301, 401, 402, 403, 404, 405, 410, 412] {
            assert_eq!(class(status), (Class::Fatal, false), "{status}");
        }
    }
}
