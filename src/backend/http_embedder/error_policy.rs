//! The error for an answer that is not a success, with the operator's remedy.

use std::fmt::Write as _;
use std::ops::RangeInclusive;

use reqwest::header::{HeaderMap, LOCATION};
use reqwest::{StatusCode, Url};
use serde_json::Value;

use super::address::redacted;
use crate::backend::http::status;
use crate::pipeline::failure::Error;

/// The most characters of an error's body in a message.
const MAX_ERROR: usize = 500;

/// The operator's remedy for a status; empty where the server's own message is enough. The first matching
/// line counts.
const REMEDIES: &[(RangeInclusive<u16>, &str)] = &[
    (300..=399, "set embedder.url to the address that the redirect points to"),
    (400..=400, ""),
    (401..=401, "is embedder.api_key right?"),
    (402..=402, "the account of embedder.api_key has no credit left"),
    (403..=403, "is embedder.api_key right, and may it use embedder.model?"),
    (404..=404, "are embedder.url and embedder.model right?"),
    (405..=405, "are embedder.url and embedder.kind right?"),
    (406..=406, "is embedder.kind right?"),
    (407..=407, "a proxy asks for credentials: is embedder.url right?"),
    (408..=409, ""),
    (410..=410, "are embedder.url and embedder.model right?"),
    (411..=411, "are embedder.url and embedder.kind right?"),
    (413..=413, ""),
    (414..=415, "are embedder.url and embedder.kind right?"),
    (422..=422, ""),
    // The server's back end failed, for example for lack of memory.
    (424..=424, "if this lasts, see the server's own log"),
    (429..=429, "set embedder.requests_per_minute and embedder.tokens_per_minute to the server's limits"),
    (431..=431, "is embedder.api_key right?"),
    (500..=599, "if this lasts, see the server's own log"),
    (0..=u16::MAX, "is embedder.url right?"),
];

fn remedy(status: StatusCode) -> Option<&'static str> {
    let status = status.as_u16();
    let line = REMEDIES.iter().find(|(statuses, _)| statuses.contains(&status));
    line.map(|(_, remedy)| *remedy).filter(|remedy| !remedy.is_empty())
}

/// The error for an answer that is not a success.
pub(super) fn refusal(url: &Url, key: &str, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Error {
    let mut message = format!("{} answered {status}", redacted(url));
    if let Some(location) = location(url, headers).filter(|_| status.is_redirection()) {
        let _ = write!(message, " and points to {location}, which is not followed");
    }
    let said = said(body, key);
    if !said.is_empty() {
        let _ = write!(message, ": {said}");
    }
    Error::new(status::kind(status), "embed texts", message)
        .with_remedy(remedy(status))
        .with_pause(status::retry_after(headers))
}

/// The address that a redirect points to.
fn location(url: &Url, headers: &HeaderMap) -> Option<String> {
    let location = headers.get(LOCATION)?.to_str().ok()?;
    url.join(location).ok().map(|location| redacted(&location))
}

/// The server's message, with the API key removed, because some servers repeat the key.
fn said(body: &[u8], key: &str) -> String {
    let text = String::from_utf8_lossy(body);
    let parsed: Value = serde_json::from_str(&text).unwrap_or_default();
    let said = [parsed.pointer("/error/message"), parsed.get("error"), parsed.get("message")];
    let said = said.into_iter().flatten().find_map(Value::as_str).unwrap_or(text.trim());
    let said = if key.is_empty() { said.to_owned() } else { said.replace(key, "[redacted]") };
    said.chars().take(MAX_ERROR).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::failure::Class;

    #[test]
    fn what_asks_for_a_deed_says_which() {
        for code in 100..=999 {
            let status = StatusCode::from_u16(code).unwrap();
            let remedy = remedy(status).unwrap_or_default();
            let is_told = status::kind(status).class() != Class::Fatal || remedy.contains("embedder.");
            assert!(is_told, "{status}: {remedy}");
        }
        // Each line is reached.
        for (statuses, text) in REMEDIES {
            let reached = statuses.clone().filter_map(|status| StatusCode::from_u16(status).ok());
            assert!(
                reached.clone().any(|status| remedy(status).unwrap_or_default() == *text),
                "{statuses:?}"
            );
        }
    }

    #[test]
    fn a_refusal_says_where_and_what_and_keeps_secrets() {
        let url = Url::parse("http://host:80/v1/embeddings?code=hidden").unwrap();
        let tell = |status: u16, body: &str, headers: &HeaderMap| {
            refusal(&url, "sk-1", StatusCode::from_u16(status).unwrap(), headers, body.as_bytes()).to_string()
        };
        let none = HeaderMap::new();
        let told = tell(400, r#"{"error":{"message":"too long"}}"#, &none);
        assert_eq!(told, "embed texts: http://host/v1/embeddings answered 400 Bad Request: too long");
        let told = tell(401, r#"{"error":"no such key: sk-1"}"#, &none);
        assert!(
            told.ends_with("401 Unauthorized: no such key: [redacted]; is embedder.api_key right?"),
            "{told}"
        );
        assert!(tell(529, "", &none).contains("529"));
        let to = HeaderMap::from_iter([(LOCATION, "../login?next=hidden".parse().unwrap())]);
        let told = tell(302, "", &to);
        assert!(told.contains("http://host/login,") && !told.contains("hidden"), "{told}");
    }
}
