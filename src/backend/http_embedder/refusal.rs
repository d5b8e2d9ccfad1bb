//! What an answer that is no success means, and what the operator does about it: one table for all servers.

use std::fmt::Write as _;
use std::ops::RangeInclusive;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use jiff::fmt::rfc2822;
use reqwest::header::{HeaderMap, LOCATION, RETRY_AFTER};
use reqwest::{StatusCode, Url};
use serde_json::Value;

use super::address::place;
use crate::pipeline::failure::{Class, Error};

/// Characters of an error's body that are told.
const MAX_ERROR: usize = 500;

/// Statuses, the class of such an answer, and what to do.
type Rule = (RangeInclusive<u16>, Class, &'static str);

/// The first rule that fits holds.
///
/// Permanent is what may be the texts' own fault. Fatal is what a setting must mend. All else passes, or is
/// mended at the server or between: the work is held meanwhile, and tried again with pauses.
const TABLE: &[Rule] = &[
    (300..=399, Class::Retryable, "set embedder.url to the address that the server itself has"),
    (400..=400, Class::Permanent, ""),
    (401..=401, Class::Fatal, "is embedder.api_key right?"),
    (402..=402, Class::Retryable, "is there credit left for the key in embedder.api_key?"),
    (403..=403, Class::Fatal, "is embedder.api_key right, and may it use embedder.model?"),
    (404..=404, Class::Fatal, "are embedder.url and embedder.model right?"),
    (405..=405, Class::Fatal, "is embedder.url right, and embedder.kind?"),
    (406..=406, Class::Fatal, "is embedder.kind right?"),
    (407..=407, Class::Fatal, "a proxy asks who this is: is embedder.url right?"),
    (408..=409, Class::Retryable, ""),
    (410..=410, Class::Fatal, "are embedder.url and embedder.model right?"),
    (411..=411, Class::Fatal, "is embedder.url right, and embedder.kind?"),
    (413..=413, Class::Permanent, ""),
    (414..=415, Class::Fatal, "is embedder.url right, and embedder.kind?"),
    (422..=422, Class::Permanent, ""),
    // What its back end could not do, such as for want of memory.
    (424..=424, Class::Retryable, "see the server's own log if this lasts"),
    (
        429..=429,
        Class::Retryable,
        "embedder.requests_per_minute and embedder.tokens_per_minute keep below a limit",
    ),
    (431..=431, Class::Fatal, "is embedder.api_key right?"),
    (500..=599, Class::Retryable, "see the server's own log if this lasts"),
    (0..=u16::MAX, Class::Retryable, "is embedder.url right?"),
];

/// The class of a status, and what to do about it.
pub(super) fn rule(status: StatusCode) -> (Class, &'static str) {
    let status = status.as_u16();
    let rule = TABLE.iter().find(|(statuses, ..)| statuses.contains(&status));
    rule.map_or((Class::Retryable, ""), |(_, class, remedy)| (*class, remedy))
}

/// An answer that is no success, as an error.
pub(super) fn refusal(url: &Url, key: &str, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Error {
    let (class, remedy) = rule(status);
    let mut message = format!("{} answered {status}", place(url));
    if let Some(target) = target(url, headers).filter(|_| status.is_redirection()) {
        let _ = write!(message, " and points to {target}, which is not followed");
    }
    for part in [said(body, key).as_str(), remedy] {
        if !part.is_empty() {
            let _ = write!(message, "{} {part}", if part == remedy { ";" } else { ":" });
        }
    }
    let retry_after = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    let retry_after = retry_after.and_then(|value| pause(value, SystemTime::now()));
    Error { retry_after, ..Error::new(class, "embed texts", message) }
}

/// Where a redirect points to.
fn target(url: &Url, headers: &HeaderMap) -> Option<String> {
    let target = headers.get(LOCATION)?.to_str().ok()?;
    url.join(target).ok().map(|target| place(&target))
}

/// The server's own words, without the key that some repeat.
fn said(body: &[u8], key: &str) -> String {
    let text = String::from_utf8_lossy(body);
    let parsed: Value = serde_json::from_str(&text).unwrap_or_default();
    let said = [parsed.pointer("/error/message"), parsed.get("error"), parsed.get("message")];
    let said = said.into_iter().flatten().find_map(Value::as_str).unwrap_or(text.trim());
    let said = if key.is_empty() { said.to_owned() } else { said.replace(key, "[redacted]") };
    said.chars().take(MAX_ERROR).collect()
}

/// How long `Retry-After` asks for: seconds, or until a date.
fn pause(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let then = rfc2822::parse(value).ok()?.timestamp();
    let now = Timestamp::try_from(now).ok()?;
    Some(Duration::try_from(then.duration_since(now)).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_one_class_and_what_asks_for_a_deed_says_which() {
        let class = |status: u16| rule(StatusCode::from_u16(status).unwrap()).0;
        for status in 100..=999 {
            let wanted = match status {
                400 | 413 | 422 => Class::Permanent,
                401 | 403..=407 | 410 | 411 | 414 | 415 | 431 => Class::Fatal,
                _ => Class::Retryable,
            };
            assert_eq!(class(status), wanted, "{status}");
            let remedy = rule(StatusCode::from_u16(status).unwrap()).1;
            assert!(wanted != Class::Fatal || remedy.contains("embedder."), "{status}: {remedy}");
        }
        // Each rule is reached.
        for (statuses, class, remedy) in TABLE {
            let reached = statuses.clone().any(|status| {
                let status = StatusCode::from_u16(status);
                status.is_ok_and(|status| rule(status) == (*class, *remedy))
            });
            assert!(reached, "{statuses:?}");
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

    #[test]
    fn a_pause_is_asked_for_in_seconds_or_by_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_445_412_400);
        let seconds = |value: &str| pause(value, now).map(|pause| pause.as_secs());
        assert_eq!([seconds("7"), seconds(" 0 "), seconds("1.5")], [Some(7), Some(0), Some(1)]);
        assert_eq!(seconds("Wed, 21 Oct 2015 07:28:00 GMT"), Some(80));
        assert_eq!(seconds("Wed, 21 Oct 2015 07:26:00 GMT"), Some(0), "it has passed");
        for nonsense in ["", "-1", "soon", "NaN", "1e300"] {
            assert_eq!(seconds(nonsense), None, "{nonsense}");
        }
    }
}
