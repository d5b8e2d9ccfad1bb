//! A string that is never printed, and the removal of secrets from addresses in text.

use std::{fmt, io};

use serde::Deserialize;

/// Text that replaces a secret in output.
const REDACTED: &str = "[redacted]";

/// A password, a key or a URL with a password. `Debug` and `Display` show only whether the value is set.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a value.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself. Call this only where the value is used.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether the value is empty, that is, not set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "\"\"" } else { REDACTED })
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "" } else { REDACTED })
    }
}

/// A parameter is secret if its name, in lower case, contains one of these parts.
const SECRET_PARAMETERS: &[&str] = &["key", "token", "secret", "pass", "pwd", "sig", "auth", "cred"];

/// Whether the character ends an address in a text.
fn ends_address(c: char) -> bool {
    c.is_whitespace() || matches!(c, '"' | '\'' | '<' | '>' | '`' | '\\')
}

/// Replaces the user, the password and the secret parameters of every address in a text by `[redacted]`.
#[must_use]
pub fn without_secrets(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut left = text;
    while let Some(at) = left.find("://") {
        let (before, after) = left.split_at(at + "://".len());
        let (address, rest) = after.split_at(after.find(ends_address).unwrap_or(after.len()));
        shown.push_str(before);
        push_address(address, &mut shown);
        left = rest;
    }
    shown.push_str(left);
    shown
}

/// Does the same for a text that is one address, with or without a scheme.
#[must_use]
pub fn address_without_secrets(address: &str) -> String {
    if address.contains("://") {
        return without_secrets(address);
    }
    let mut shown = String::with_capacity(address.len());
    push_address(address, &mut shown);
    shown
}

/// Appends an address, without scheme and without secrets, to `to`.
fn push_address(address: &str, to: &mut String) {
    let authority = address.find(['/', '?', '#']).unwrap_or(address.len());
    let has_port = |host: &str| {
        host.rsplit_once(':').is_none_or(|(_, port)| port.chars().all(|c| c.is_ascii_digit() || c == ']'))
    };
    // A password may contain a slash that is not percent-encoded.
    let user = match address[..authority].rfind('@') {
        None if !has_port(&address[..authority]) => address.rfind('@'),
        user => user,
    };
    let left = match user {
        Some(at) => {
            to.push_str(REDACTED);
            &address[at..]
        }
        None => address,
    };
    let Some((path, query)) = left.split_once('?') else {
        to.push_str(left);
        return;
    };
    to.push_str(path);
    for (at, pair) in query.split('&').enumerate() {
        to.push(if at == 0 { '?' } else { '&' });
        match pair.split_once('=') {
            Some((name, _)) if is_secret(name) => {
                to.push_str(name);
                to.push('=');
                to.push_str(REDACTED);
            }
            _ => to.push_str(pair),
        }
    }
}

fn is_secret(name: &str) -> bool {
    let name = name.to_lowercase();
    SECRET_PARAMETERS.iter().any(|part| name.contains(part))
}

/// A writer that removes secrets from addresses. Each call of `write` must hold whole addresses.
pub struct Redacting<W>(pub W);

impl<W: io::Write> io::Write for Redacting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match std::str::from_utf8(bytes) {
            Ok(text) if text.contains("://") => self.0.write_all(without_secrets(text).as_bytes())?,
            _ => self.0.write_all(bytes)?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_keep_all_but_their_secrets() {
        for (text, shown) in [
            ("plain, me@example.com", "plain, me@example.com"),
            (
                "see https://h:80/p?x=1 and https://h/@scope/p",
                "see https://h:80/p?x=1 and https://h/@scope/p",
            ),
            (
                "at https://u:p@h/q, \"http://t@[::1]:1\"",
                "at https://[redacted]@h/q, \"http://[redacted]@[::1]:1\"",
            ),
            ("postgres://u:a/b@h/d?sslmode=require", "postgres://[redacted]@h/d?sslmode=require"),
            ("postgres://u:a@b@h/d", "postgres://[redacted]@h/d"),
            ("http://h/p?api_key=1&b=2&Token=3)", "http://h/p?api_key=[redacted]&b=2&Token=[redacted]"),
            ("://", "://"),
        ] {
            assert_eq!(without_secrets(text), shown, "{text}");
        }
        assert_eq!(address_without_secrets("u:p@h:5/x"), "[redacted]@h:5/x");
        assert_eq!(address_without_secrets("h.example"), "h.example");
        let mut written = Vec::new();
        io::Write::write_all(&mut Redacting(&mut written), b"at http://u:p@h\n").unwrap();
        assert_eq!(written, b"at http://[redacted]@h\n");
    }

    #[test]
    fn nothing_of_a_secret_is_shown() {
        let secret = Secret::new("hunter2");
        let shown = format!("{secret} {secret:?}");
        assert!(!shown.contains("hunter2"), "{shown}");
        assert_eq!(Secret::default().to_string(), "");
    }
}
