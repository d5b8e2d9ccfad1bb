//! The host names that this server answers to.

/// Names that a request may have in its Host header.
#[derive(Debug)]
pub struct Hosts {
    /// Whether every name is allowed.
    any: bool,
    allowed: Vec<String>,
}

impl Hosts {
    /// This machine's loopback names and `allowed`. Off loopback, every name if `allowed` is empty.
    pub fn new(loopback: bool, allowed: &[String]) -> Self {
        let allowed: Vec<String> = allowed.iter().map(|host| normal(host)).collect();
        Self { any: !loopback && allowed.is_empty(), allowed }
    }

    /// Whether a request with this Host header may be answered.
    pub fn allow(&self, host: &str) -> bool {
        self.any || is_local(host) || self.allowed.iter().any(|allowed| fits(allowed, &normal(host)))
    }

    /// Whether an Origin header names this server: the request's host, or an allowed name, because a proxy
    /// may send another Host than the browser.
    pub fn is_own(&self, origin: &str, host: &str) -> bool {
        let Some((scheme, rest)) = origin.split_once("://") else { return false };
        let standard = match scheme {
            "https" => ":443",
            "http" => ":80",
            _ => return false,
        };
        let bare = |host: &str| {
            let host = normal(host);
            host.strip_suffix(standard).map(str::to_owned).unwrap_or(host)
        };
        let site = bare(rest);
        site == bare(host)
            || self.allowed.iter().any(|allowed| !allowed.starts_with("*.") && fits(allowed, &site))
    }
}

/// Whether a Host header names this machine's loopback.
pub fn is_local(host: &str) -> bool {
    matches!(split(&normal(host)).0, "localhost" | "127.0.0.1" | "[::1]")
}

/// A name in lower case, without the root's dot at its end.
fn normal(host: &str) -> String {
    let host = host.trim().to_ascii_lowercase();
    match split(&host) {
        (name, Some(port)) => format!("{}:{port}", name.trim_end_matches('.')),
        (name, None) => name.trim_end_matches('.').to_owned(),
    }
}

fn split(host: &str) -> (&str, Option<&str>) {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) => {
            (name, Some(port))
        }
        _ => (host, None),
    }
}

/// Whether a host matches an allowed name. Any port matches, unless the allowed name has a port.
fn fits(allowed: &str, host: &str) -> bool {
    let (name, port) = split(allowed);
    let (asked, asked_port) = split(host);
    if port.is_some() && port != asked_port {
        return false;
    }
    match name.strip_prefix('*') {
        Some(end) => asked.len() > end.len() && asked.ends_with(end),
        None => asked == name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allowed_hosts_match_any_port_one_port_or_a_wildcard() {
        let hosts =
            Hosts::new(true, &["Shop.example.com", "a.example:8443", "*.b.example"].map(String::from));
        for host in [
            "localhost",
            "localhost:3000",
            "shop.example.com",
            "SHOP.example.com:443",
            "shop.example.com.",
            "a.example:8443",
            "x.b.example",
            "x.y.b.example:1",
        ] {
            assert!(hosts.allow(host), "{host}");
        }
        for host in [
            "",
            "a.example",
            "a.example:1",
            "b.example",
            "xb.example",
            "evil-shop.example.com",
            "example.com",
        ] {
            assert!(!hosts.allow(host), "{host}");
        }
    }

    #[test]
    fn any_host_name_is_allowed_beyond_loopback_until_one_is_configured() {
        assert!(Hosts::new(false, &[]).allow("any.example"));
        let hosts = Hosts::new(false, &["shop.example.com".into()]);
        assert!(hosts.allow("shop.example.com") && hosts.allow("localhost:3000"));
        assert!(!hosts.allow("any.example"));
    }
}
