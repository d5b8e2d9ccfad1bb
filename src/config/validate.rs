//! Checks the values of settings.

use std::collections::BTreeMap;
use std::fmt;

use super::load::shown;
use super::{ConfigError, EmbedderKind, IndexKind, QueueKind, Settings};

/// Arguments: whether the value is good, its key, the value, and which values are right.
type Check<'a> = dyn Fn(bool, &str, &dyn fmt::Display, &str) -> Result<(), ConfigError> + 'a;

/// Whether a text is a host name, optionally with a port and a leading `*.`.
fn is_host(text: &str) -> bool {
    let name = match text.rsplit_once(':') {
        Some((name, port)) if !text.ends_with(']') => {
            if port.parse::<u16>().is_err() {
                return false;
            }
            name
        }
        _ => text,
    };
    let name = name.strip_prefix("*.").unwrap_or(name);
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
    if let Some(address) = address {
        return address.parse::<std::net::Ipv6Addr>().is_ok();
    }
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

impl Settings {
    /// Checks every value. An error names the value's origin.
    pub(super) fn validate(&self, origins: &BTreeMap<String, String>) -> Result<(), ConfigError> {
        let check = |good: bool, key: &str, value: &dyn fmt::Display, reason: &str| {
            if good {
                return Ok(());
            }
            Err(ConfigError::Invalid {
                origin: origins.get(key).cloned().unwrap_or_else(|| "configuration".into()),
                key: key.into(),
                value: shown(key, &value.to_string()),
                reason: reason.into(),
            })
        };
        let name_fits = |name: &str| {
            !name.is_empty()
                && name.len() <= 40
                && name.starts_with(|c: char| c.is_ascii_lowercase())
                && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        };
        let name_rule = "use 1 to 40 lower-case letters, digits and _, beginning with a letter";
        check(
            self.database.pool_size >= 4,
            "database.pool_size",
            &self.database.pool_size,
            "use at least 4: the roles need that many connections at once",
        )?;
        check(name_fits(&self.source.name), "source.name", &self.source.name, name_rule)?;
        check(!self.source.text.is_empty(), "source.text", &"[]", "name at least one column to embed")?;
        check(name_fits(&self.queue.name), "queue.name", &self.queue.name, name_rule)?;
        check(
            (1..=43_200).contains(&self.queue.visibility_s),
            "queue.visibility_s",
            &self.queue.visibility_s,
            "use 1 to 43200 seconds",
        )?;
        check(
            self.queue.max_receives >= 1,
            "queue.max_receives",
            &self.queue.max_receives,
            "use at least 1",
        )?;
        self.validate_services(&check)?;
        check(
            self.index.timeout_ms >= 1 && self.index.timeout_ms * 2 <= self.indexer.lease_ms,
            "index.timeout_ms",
            &self.index.timeout_ms,
            "use at least 1, and at most half of indexer.lease_ms: a request must end within the lease",
        )?;
        check(
            (1..=1000).contains(&self.index.ef_search),
            "index.ef_search",
            &self.index.ef_search,
            "use 1 to 1000",
        )?;
        check((1..=500).contains(&self.relay.pack), "relay.pack", &self.relay.pack, "use 1 to 500")?;
        check(self.relay.poll_ms >= 1, "relay.poll_ms", &self.relay.poll_ms, "use at least 1")?;
        check(
            self.indexer.workers <= 1024,
            "indexer.workers",
            &self.indexer.workers,
            "use 1 to 1024, or 0 for one for each core",
        )?;
        check(self.indexer.slice_ms >= 1, "indexer.slice_ms", &self.indexer.slice_ms, "use at least 1")?;
        check(self.indexer.hold_ms >= 1, "indexer.hold_ms", &self.indexer.hold_ms, "use at least 1")?;
        check(self.indexer.poll_ms >= 1, "indexer.poll_ms", &self.indexer.poll_ms, "use at least 1")?;
        check(
            (0.0..=8_760.0).contains(&self.audit.period_h),
            "audit.period_h",
            &self.audit.period_h,
            "use up to 8760 hours; 0 for no proof",
        )?;
        check(
            (1..=100).contains(&self.serve.page_size),
            "serve.page_size",
            &self.serve.page_size,
            "use 1 to 100",
        )?;
        check(
            (4..=200).contains(&self.serve.pool_size),
            "serve.pool_size",
            &self.serve.pool_size,
            "use 4 to 200",
        )?;
        for host in &self.serve.allowed_hosts {
            check(
                is_host(host),
                "serve.allowed_hosts",
                host,
                "use names as browsers ask for them, without http:// and path: shop.example.com, \
                 shop.example.com:8443 or *.example.com",
            )?;
        }
        check(
            matches!(self.log.format.as_str(), "" | "text" | "json"),
            "log.format",
            &self.log.format,
            "use text or json",
        )
    }
    /// Checks the settings that the chosen services need.
    fn validate_services(&self, check: &Check<'_>) -> Result<(), ConfigError> {
        let is_url = |url: &str| url.starts_with("https://") || url.starts_with("http://");
        let modes = ["", "disable", "prefer", "require", "verify-ca", "verify-full"];
        check(
            modes.contains(&self.database.sslmode.as_str()),
            "database.sslmode",
            &self.database.sslmode,
            "use disable, prefer, require, verify-ca or verify-full; empty: verify-full, or disable for a local host",
        )?;
        check(
            (1..=20).contains(&self.queue.wait_s),
            "queue.wait_s",
            &self.queue.wait_s,
            "use 1 to 20 seconds",
        )?;
        check(
            self.queue.shared_bound >= 1,
            "queue.shared_bound",
            &self.queue.shared_bound,
            "use at least 1",
        )?;
        if self.queue.kind == QueueKind::Sqs {
            let url_rule = "use the queue's URL, as https://sqs.REGION.amazonaws.com/ACCOUNT/NAME";
            check(is_url(&self.queue.url), "queue.url", &self.queue.url, url_rule)?;
            for (key, url) in [
                ("queue.url", &self.queue.url),
                ("queue.bulk_url", &self.queue.bulk_url),
                ("queue.dead_url", &self.queue.dead_url),
            ] {
                check(
                    !url.contains(['@', '?', '#']),
                    key,
                    url,
                    "use the queue's URL alone: credentials come from AWS_ACCESS_KEY_ID, AWS_PROFILE or the machine's role",
                )?;
            }
            for (key, url) in
                [("queue.bulk_url", &self.queue.bulk_url), ("queue.dead_url", &self.queue.dead_url)]
            {
                check(url.is_empty() || is_url(url), key, url, url_rule)?;
                check(
                    *url != self.queue.url,
                    key,
                    url,
                    "use another queue than queue.url, or leave it empty",
                )?;
            }
        }
        if self.index.kind == IndexKind::Pinecone {
            check(
                !self.index.host.trim().is_empty() || !self.index.name.is_empty(),
                "index.name",
                &self.index.name,
                "name the index, or set index.host to its host",
            )?;
            check(
                !self.index.api_key.is_empty(),
                "index.api_key",
                &self.index.api_key,
                "set PINECONE_API_KEY to the key that Pinecone's console shows",
            )?;
            check(
                self.index.freshness_ms >= 10,
                "index.freshness_ms",
                &self.index.freshness_ms,
                "use at least 10",
            )?;
            check(
                self.index.namespace != super::NOTES_NAMESPACE,
                "index.namespace",
                &self.index.namespace,
                "use another namespace: refarch keeps its index ownership records in this one",
            )?;
            let taken = |column: &&String| column.starts_with(super::OWN_KEYS) || column.starts_with('$');
            if let Some(column) = self.source.metadata.iter().find(taken) {
                let rule = "use other columns: in Pinecone's metadata, refarch reserves names that begin with _refarch_, and Pinecone those that begin with $";
                check(false, "source.metadata", column, rule)?;
            }
            check(is_url(&self.index.controller), "index.controller", &self.index.controller, "use a URL")?;
        }
        let needs_url = matches!(self.embedder.kind, EmbedderKind::Openai | EmbedderKind::Tei);
        let url = self.embedder.url.trim();
        let has_url = self.embedder.kind != EmbedderKind::Minilm && !url.is_empty();
        if needs_url || has_url {
            let fault = address_fault(url);
            // The fault may be that the address contains a secret.
            let shown = if url.is_empty() { "" } else { "[not shown]" };
            check(fault.is_none(), "embedder.url", &shown, fault.unwrap_or_default())?;
        }
        if matches!(self.embedder.kind, EmbedderKind::Openai | EmbedderKind::Pinecone) {
            check(
                !self.embedder.model.is_empty(),
                "embedder.model",
                &self.embedder.model,
                "set the name of the server's model",
            )?;
        }
        check(
            self.embedder.timeout_ms >= 1,
            "embedder.timeout_ms",
            &self.embedder.timeout_ms,
            "use at least 1",
        )
    }
}

/// What is wrong with the address of an embedding server; none if the address is right.
fn address_fault(address: &str) -> Option<&'static str> {
    let Ok(url) = reqwest::Url::parse(address) else {
        return Some("use the server's address, such as http://127.0.0.1:8080");
    };
    if !matches!(url.scheme(), "http" | "https") {
        return Some("use an address that begins with http:// or https://");
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Some("leave user and password out of the address, and set embedder.api_key");
    }
    url.fragment()
        .is_some()
        .then_some("leave out the # and the rest: HTTP does not send that part to the server")
}
