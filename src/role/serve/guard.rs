//! Who may ask, and who may write.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use super::error::Refusal;
use crate::secret::Secret;

/// Everything the page uses is its own; nothing inline.
const CONTENT_SECURITY_POLICY: &str =
    "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'";

/// The rules for one address.
#[derive(Debug)]
pub struct Guard {
    loopback: bool,
    edit_token: Secret,
}

impl Guard {
    /// The rules for a server at this address.
    #[must_use]
    pub fn new(address: SocketAddr, edit_token: Secret) -> Self {
        Self { loopback: address.ip().is_loopback(), edit_token }
    }

    fn check(&self, method: &Method, path: &str, headers: &HeaderMap) -> Result<(), Refusal> {
        // A page elsewhere may point a name of its own at this machine (DNS rebinding): its requests
        // then come here under that name.
        if self.loopback && !header(headers, header::HOST).is_some_and(is_local) {
            return Err(Refusal::new(
                StatusCode::FORBIDDEN,
                "forbidden_host",
                "use http://localhost or http://127.0.0.1",
            ));
        }
        // The reference architecture searches by POST.
        if matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS) || path == "/api/products" {
            return Ok(());
        }
        self.may_write(headers)
    }

    fn may_write(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let foreign =
            || Refusal::new(StatusCode::FORBIDDEN, "cross_origin", "edits from another site are refused");
        let host = header(headers, header::HOST).unwrap_or_default();
        if let Some(origin) = header(headers, header::ORIGIN)
            && origin.split_once("://").map(|(_, rest)| rest) != Some(host)
        {
            return Err(foreign());
        }
        // Another port of this machine is "same-site".
        if headers.get("sec-fetch-site").is_some_and(|site| site != "same-origin" && site != "none") {
            return Err(foreign());
        }
        if self.loopback {
            return Ok(());
        }
        if self.edit_token.is_empty() {
            let message = "edits are off: this server is not on loopback, and serve.edit_token is not set";
            return Err(Refusal::new(StatusCode::FORBIDDEN, "edits_off", message));
        }
        let given = header(headers, header::AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer "));
        // Hashes of equal length are compared, so that time tells nothing of the token.
        let digest = |text: &str| Sha256::digest(text.as_bytes());
        if given.is_some_and(|given| digest(given) == digest(self.edit_token.expose())) {
            return Ok(());
        }
        let message = "edits need the header Authorization: Bearer with the value of serve.edit_token";
        Err(Refusal::new(StatusCode::UNAUTHORIZED, "unauthorized", message))
    }
}

fn header(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// Whether a Host header names this machine's loopback.
fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    matches!(name, "localhost" | "127.0.0.1" | "[::1]")
}

/// Checks every request, and gives every answer its headers.
pub async fn watch(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let checked = guard.check(request.method(), request.uri().path(), request.headers());
    let mut response = match checked {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    };
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(CONTENT_SECURITY_POLICY));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(
        address: &str,
        token: &str,
        method: &Method,
        headers: &[(&'static str, &str)],
    ) -> Result<(), &'static str> {
        let guard = Guard::new(address.parse().unwrap(), Secret::new(token));
        let headers =
            headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        guard.check(method, "/api/v1/products", &headers).map_err(|refusal| {
            match refusal.into_response().status().as_u16() {
                401 => "unauthorized",
                403 => "forbidden",
                _ => "other",
            }
        })
    }

    #[test]
    fn loopback_answers_to_its_own_names_only() {
        for host in ["localhost", "localhost:3000", "127.0.0.1:3000", "[::1]:3000", "[::1]"] {
            assert_eq!(verdict("127.0.0.1:3000", "", &Method::GET, &[("host", host)]), Ok(()), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:3000", "127.0.0.1.nip.example"] {
            assert_eq!(
                verdict("127.0.0.1:3000", "", &Method::GET, &[("host", host)]),
                Err("forbidden"),
                "{host}"
            );
        }
    }

    #[test]
    fn writes_from_other_sites_are_refused() {
        let host = ("host", "localhost:3000");
        let of = |more: &[(&'static str, &str)]| {
            let mut headers = vec![host];
            headers.extend_from_slice(more);
            verdict("127.0.0.1:3000", "", &Method::PATCH, &headers)
        };
        assert_eq!(of(&[]), Ok(()));
        assert_eq!(of(&[("origin", "http://localhost:3000")]), Ok(()));
        assert_eq!(of(&[("origin", "http://localhost:4000")]), Err("forbidden"));
        assert_eq!(of(&[("origin", "null")]), Err("forbidden"));
        assert_eq!(of(&[("sec-fetch-site", "same-origin")]), Ok(()));
        assert_eq!(of(&[("sec-fetch-site", "none")]), Ok(()));
        assert_eq!(of(&[("sec-fetch-site", "same-site")]), Err("forbidden"));
        assert_eq!(of(&[("sec-fetch-site", "cross-site")]), Err("forbidden"));
    }

    #[test]
    fn off_loopback_edits_need_the_token() {
        let of = |token, headers: &[(&'static str, &str)]| {
            verdict("0.0.0.0:3000", token, &Method::DELETE, headers)
        };
        assert_eq!(of("", &[]), Err("forbidden"));
        assert_eq!(of("s", &[]), Err("unauthorized"));
        assert_eq!(of("s", &[("authorization", "Bearer t")]), Err("unauthorized"));
        assert_eq!(of("s", &[("authorization", "Bearer s")]), Ok(()));
        assert_eq!(verdict("0.0.0.0:3000", "", &Method::GET, &[("host", "shop.example")]), Ok(()));
    }
}
