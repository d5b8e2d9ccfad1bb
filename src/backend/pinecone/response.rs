//! Answers, and the errors that they mean.

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::Value;

use crate::backend::http::{status, unanswered};
use crate::pipeline::failure::{Error, FailureKind, Result};

/// The most bytes of an error's body that are read.
const MAX_ERROR_BODY: usize = 4_096;

/// Adds query parameters, percent-encoded.
pub(super) fn with_query(request: RequestBuilder, query: &[(&str, &str)]) -> RequestBuilder {
    let (client, built) = request.build_split();
    match built {
        Ok(mut built) => {
            built.url_mut().query_pairs_mut().extend_pairs(query);
            RequestBuilder::from_parts(client, built)
        }
        // A request that cannot be built fails in the same way without its query.
        Err(_) => client.request(Method::GET, "invalid:"),
    }
}

/// Sends a request. Returns any answer, also with a status that is not a success.
pub(super) async fn ask(request: RequestBuilder, what: &str) -> Result<reqwest::Response> {
    request.send().await.map_err(|error| failure(what, error))
}

/// The answer if its status is a success, otherwise the error.
pub(super) async fn accepted(response: reqwest::Response, what: &str) -> Result<reqwest::Response> {
    if response.status().is_success() { Ok(response) } else { Err(refusal(what, response).await) }
}

/// The error for a request without an answer.
pub(super) fn failure(what: &str, error: reqwest::Error) -> Error {
    let kind = if error.is_builder() { FailureKind::RefusedData } else { unanswered::kind(&error) };
    let said = match kind {
        FailureKind::TimedOut => "no answer within the time limit".into(),
        _ => unanswered::reason(&error).unwrap_or_else(|| "the answer cannot be used".into()),
    };
    Error::new(kind, what, said).because(error.without_url())
}

/// The error for an answer that is not a success.
pub(super) async fn refusal(what: &str, response: reqwest::Response) -> Error {
    let status = response.status();
    let retry_after = status::retry_after(response.headers());
    let message = format!("{status}: {}", message(response).await);
    Error::new(kind_of(status), what, message).with_pause(retry_after)
}

/// The kind of failure for a status. Only statuses about the request itself can be the fault of one change. A
/// missing index or a refused key is a fault for all changes. A status that Pinecone never sends comes from
/// another server, so the address is wrong.
fn kind_of(status: StatusCode) -> FailureKind {
    match status::kind(status) {
        FailureKind::NoCredit | FailureKind::UnexpectedAnswer => FailureKind::WrongSetting,
        kind => kind,
    }
}

/// The message in an error's body: the data plane's format, the control plane's format, or else the body as
/// text.
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
    use crate::pipeline::failure::Class;

    #[test]
    fn only_what_is_said_of_the_request_is_the_changes_fault() {
        let class = |status: u16| {
            let kind = kind_of(StatusCode::from_u16(status).unwrap());
            (kind.class(), kind.is_doubtful())
        };
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
