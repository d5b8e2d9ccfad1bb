//! Access control: which requests are answered, and which may write.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use super::caller_trust;
use super::error::ApiError;
use super::throttle::{Throttle, Verdict};
use crate::role::http_server::Peer;
use crate::role::http_server::hosts::{self, Hosts};
use crate::secret::Secret;

/// Headers that proxies add. A request with one of them came through a proxy: it is not from this machine,
/// even if the connection is.
const FORWARDING: [&str; 6] =
    ["forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via"];

/// The access rules of one server address.
#[derive(Debug)]
pub struct AccessControl {
    loopback: bool,
    edit_token: Secret,
    hosts: Hosts,
    throttle: Throttle,
}

/// Where a request comes from.
struct Origin<'a> {
    host: &'a str,
    /// The client's own address, as far as it can be known.
    client: IpAddr,
    /// Whether the client is a program on this machine.
    on_this_machine: bool,
    /// Why the client counts as remote although the connection comes from this machine.
    forwarded: Option<String>,
}

impl AccessControl {
    /// Rules for a server at this address. On loopback it answers to loopback's names only, elsewhere to any
    /// name.
    #[must_use]
    pub fn new(address: SocketAddr, edit_token: Secret) -> Self {
        let loopback = address.ip().is_loopback();
        Self { loopback, edit_token, hosts: Hosts::new(loopback, &[]), throttle: Throttle::default() }
    }

    /// The same rules, with more names that the server answers to.
    #[must_use]
    pub fn with_hosts(mut self, hosts: &[String]) -> Self {
        self.hosts = Hosts::new(self.loopback, hosts);
        self
    }

    /// Checks whether the request may be answered. Returns whether its client may see everything.
    fn check(
        &self,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
    ) -> Result<bool, ApiError> {
        let origin = self.origin(headers, peer)?;
        // The reference architecture searches by POST.
        if matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS) || path == "/api/products" {
            return Ok(origin.on_this_machine || self.token(headers, &origin) == Some(Verdict::Right));
        }
        self.may_write(headers, &origin).map(|()| true)
    }

    fn origin<'a>(&self, headers: &'a HeaderMap, peer: Option<IpAddr>) -> Result<Origin<'a>, ApiError> {
        let mut given = headers.get_all(header::HOST).iter();
        let host = given.next().and_then(|host| host.to_str().ok()).unwrap_or_default();
        if given.next().is_some() {
            return Err(ApiError::bad_request("the request has two Host headers"));
        }
        // Against DNS rebinding: another site may point its own name at this machine, and its requests then
        // arrive with that name.
        if !self.hosts.allow(host) {
            let message = format!(
                "this server does not answer to the name {host:?}: use http://localhost or http://127.0.0.1, \
                 or add the name to serve.allowed_hosts"
            );
            return Err(ApiError::new(StatusCode::FORBIDDEN, "forbidden_host", message));
        }
        // Without a known address the client counts as remote.
        let peer = peer.map_or(IpAddr::from([0, 0, 0, 0]), |peer| peer.to_canonical());
        let by = FORWARDING.iter().find(|name| headers.contains_key(**name));
        let forwarded = match by {
            Some(name) => Some(format!("the header {name} shows that it came through a proxy")),
            None if hosts::is_local(host) => None,
            None => Some(format!("its Host header is {host:?}, which is no name of this machine's loopback")),
        };
        let client =
            if peer.is_loopback() && by.is_some() { last_hop(headers).unwrap_or(peer) } else { peer };
        Ok(Origin { host, client, on_this_machine: peer.is_loopback() && forwarded.is_none(), forwarded })
    }

    /// The verdict on the request's token; none if the request has no token, or no token is set.
    fn token(&self, headers: &HeaderMap, origin: &Origin<'_>) -> Option<Verdict> {
        let given = header(headers, header::AUTHORIZATION)?.strip_prefix("Bearer ")?;
        if self.edit_token.is_empty() {
            return None;
        }
        // Comparing hashes of equal length keeps the time independent of the token.
        let digest = |text: &str| Sha256::digest(text.as_bytes());
        let right = digest(given) == digest(self.edit_token.expose());
        Some(self.throttle.check_token(origin.client, right))
    }

    fn may_write(&self, headers: &HeaderMap, origin: &Origin<'_>) -> Result<(), ApiError> {
        let foreign =
            || ApiError::new(StatusCode::FORBIDDEN, "cross_origin", "edits from another site are refused");
        if let Some(site) = header(headers, header::ORIGIN)
            && !self.hosts.is_own(site, origin.host)
        {
            return Err(foreign());
        }
        // Another port of this machine is "same-site".
        if headers.get("sec-fetch-site").is_some_and(|site| site != "same-origin" && site != "none") {
            return Err(foreign());
        }
        if self.edit_token.is_empty() {
            return self.without_token(origin);
        }
        match self.token(headers, origin) {
            Some(Verdict::Right) => Ok(()),
            Some(Verdict::Wait(pause)) => {
                let seconds = pause.as_secs() + 1;
                let message = format!("too many wrong tokens; try again in {seconds} s");
                Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too_many_tokens", message).after(seconds))
            }
            Some(Verdict::Wrong) | None => {
                let message =
                    "edits need the header Authorization: Bearer with the value of serve.edit_token";
                Err(ApiError::new(StatusCode::UNAUTHORIZED, "unauthorized", message))
            }
        }
    }

    /// If no token is set, only programs on this machine may edit.
    fn without_token(&self, origin: &Origin<'_>) -> Result<(), ApiError> {
        let why = match &origin.forwarded {
            _ if !self.loopback => "this server is not on loopback".to_owned(),
            Some(reason) => format!("this request is not from this machine ({reason})"),
            None if origin.on_this_machine => return Ok(()),
            None => "this request is not from this machine".to_owned(),
        };
        let message = format!(
            "edits are off: {why}, and serve.edit_token is not set; set it, and send it as Authorization: Bearer"
        );
        Err(ApiError::new(StatusCode::FORBIDDEN, "edits_off", message))
    }
}

fn header(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// The client of a proxy on this machine: the last address in the header, which the proxy itself added. A
/// proxy may pass on another header as the client wrote it, so the most common header counts if it is there.
fn last_hop(headers: &HeaderMap) -> Option<IpAddr> {
    let last = |name: &str| headers.get_all(name).iter().next_back()?.to_str().ok()?.rsplit(',').next();
    if let Some(hop) = last("x-forwarded-for") {
        return address(hop);
    }
    if let Some(hop) = last("forwarded") {
        let pairs = hop.split(';').filter_map(|pair| pair.split_once('='));
        return pairs
            .filter(|(name, _)| name.trim().eq_ignore_ascii_case("for"))
            .find_map(|(_, hop)| address(hop));
    }
    address(last("x-real-ip")?)
}

/// An address as proxies write it: in quotes or brackets, with a port.
fn address(text: &str) -> Option<IpAddr> {
    let text = text.trim().trim_matches('"');
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    bare.parse().ok().or_else(|| text.parse::<SocketAddr>().ok().map(|address| address.ip()))
}

/// Checks every request, and sets the security headers of every response.
pub async fn check_request(
    State(access): State<Arc<AccessControl>>,
    request: Request,
    next: Next,
) -> Response {
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0.ip());
    let checked = access.check(request.method(), request.uri().path(), request.headers(), peer);
    match checked {
        Ok(trusted) => caller_trust::with_trust(trusted, next.run(request)).await,
        Err(refusal) => refusal.into_response(),
    }
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
        let access = AccessControl::new(address.parse().unwrap(), Secret::new(token));
        judge(&access, method, headers)
    }

    /// The result for a request over loopback.
    fn judge(
        access: &AccessControl,
        method: &Method,
        headers: &[(&'static str, &str)],
    ) -> Result<(), &'static str> {
        let peer = Some(IpAddr::from([127, 0, 0, 1]));
        let headers =
            headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        access.check(method, "/api/v1/products", &headers, peer).map(drop).map_err(|refusal| {
            match refusal.into_response().status().as_u16() {
                401 => "unauthorized",
                403 => "forbidden",
                429 => "throttled",
                _ => "other",
            }
        })
    }

    #[test]
    fn on_loopback_only_loopback_host_names_are_accepted() {
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
    fn edits_need_the_token_when_bound_beyond_loopback() {
        let of = |token, headers: &[(&'static str, &str)]| {
            verdict("0.0.0.0:3000", token, &Method::DELETE, headers)
        };
        assert_eq!(of("", &[]), Err("forbidden"));
        assert_eq!(of("s", &[]), Err("unauthorized"));
        assert_eq!(of("s", &[("authorization", "Bearer t")]), Err("unauthorized"));
        assert_eq!(of("s", &[("authorization", "Bearer s")]), Ok(()));
        assert_eq!(verdict("0.0.0.0:3000", "", &Method::GET, &[("host", "shop.example")]), Ok(()));
    }

    #[test]
    fn a_configured_token_is_required_on_loopback_too() {
        let of = |headers: &[(&'static str, &str)]| {
            let headers = [&[("host", "localhost:3000")], headers].concat();
            verdict("127.0.0.1:3000", "s", &Method::DELETE, &headers)
        };
        assert_eq!(of(&[]), Err("unauthorized"));
        assert_eq!(of(&[("authorization", "Bearer t")]), Err("unauthorized"));
        assert_eq!(of(&[("authorization", "Bearer s")]), Ok(()));
        assert_eq!(of(&[("authorization", "Bearer s"), ("x-forwarded-for", "203.0.113.9")]), Ok(()));
    }

    #[test]
    fn requests_through_a_proxy_may_not_edit_without_a_token() {
        let access = AccessControl::new("127.0.0.1:3000".parse().unwrap(), Secret::new(""))
            .with_hosts(&["shop.example.com".into()]);
        for name in FORWARDING {
            let headers = [("host", "localhost:3000"), (name, "203.0.113.9")];
            assert_eq!(judge(&access, &Method::DELETE, &headers), Err("forbidden"), "{name}");
            assert_eq!(judge(&access, &Method::GET, &headers), Ok(()), "{name}");
        }
        let named = [("host", "shop.example.com")];
        assert_eq!(judge(&access, &Method::GET, &named), Ok(()));
        assert_eq!(judge(&access, &Method::DELETE, &named), Err("forbidden"));
        assert_eq!(judge(&access, &Method::DELETE, &[("host", "localhost:3000")]), Ok(()));
    }

    #[test]
    fn the_page_behind_a_tls_proxy_may_edit_with_the_token() {
        let access = AccessControl::new("127.0.0.1:3000".parse().unwrap(), Secret::new("s"))
            .with_hosts(&["shop.example.com".into()]);
        let of = |host: &str, origin: &str| {
            let headers = [("host", host), ("origin", origin), ("authorization", "Bearer s")];
            judge(&access, &Method::PATCH, &headers)
        };
        assert_eq!(of("shop.example.com", "https://shop.example.com"), Ok(()));
        assert_eq!(of("shop.example.com:443", "https://shop.example.com"), Ok(()));
        // A proxy may send its own name for this server.
        assert_eq!(of("127.0.0.1:3000", "https://shop.example.com"), Ok(()));
        assert_eq!(of("shop.example.com", "https://evil.example"), Err("forbidden"));
        assert_eq!(of("127.0.0.1:3000", "https://evil.example"), Err("forbidden"));
        assert_eq!(of("evil.example", "https://evil.example"), Err("forbidden"));
    }

    #[test]
    fn repeated_wrong_tokens_are_rejected_without_a_check() {
        let access = AccessControl::new("127.0.0.1:3000".parse().unwrap(), Secret::new("s"));
        let of = |client: &str, token: &str| {
            let token = format!("Bearer {token}");
            let headers =
                [("host", "localhost"), ("x-forwarded-for", client), ("authorization", token.as_str())];
            judge(&access, &Method::DELETE, &headers)
        };
        let answers: Vec<_> = (0..20).map(|guess| of("1.2.3.4, 203.0.113.9", &guess.to_string())).collect();
        assert_eq!(answers[0], Err("unauthorized"));
        assert_eq!(answers[19], Err("throttled"));
        assert_eq!(of("5.6.7.8, 203.0.113.9", "s"), Err("throttled"), "a client can't choose its address");
        assert_eq!(of("203.0.113.10", "s"), Ok(()));
    }

    #[test]
    fn each_kind_of_proxy_identifies_clients_by_its_own_header() {
        for (name, value, hop) in [
            ("x-forwarded-for", "1.2.3.4, 203.0.113.1", Some("203.0.113.1")),
            ("x-forwarded-for", "203.0.113.1:5000", Some("203.0.113.1")),
            ("x-real-ip", "203.0.113.2", Some("203.0.113.2")),
            ("forwarded", "for=1.2.3.4, proto=https;For=203.0.113.3;by=x", Some("203.0.113.3")),
            ("forwarded", "for=\"[2001:db8::1]:4711\"", Some("2001:db8::1")),
            ("forwarded", "for=\"[2001:db8::1]\"", Some("2001:db8::1")),
            ("forwarded", "for=1.2.3.4, for=unknown", None),
            ("via", "1.1 proxy", None),
        ] {
            let headers = HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())]);
            assert_eq!(last_hop(&headers), hop.map(|hop| hop.parse().unwrap()), "{name}: {value}");
        }
        // The client's own value in another header does not count.
        let both =
            [("x-real-ip", "1.2.3.4"), ("forwarded", "for=1.2.3.4"), ("x-forwarded-for", "203.0.113.1")];
        let headers =
            both.into_iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        assert_eq!(last_hop(&headers), Some(IpAddr::from([203, 0, 113, 1])));
    }
}
