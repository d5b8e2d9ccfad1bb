//! A database's address: options of encryption and of other tools are removed from it. By hand: tokio-postgres
//! refuses an option that it does not know, and takes nothing out of an address.

use super::options::{OptionPolicy, names_schema, nearest, policy};
use crate::pipeline::failure::{Error, FailureKind, Result};

/// An address, and the options that were removed from it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ConnectionString {
    /// The address for tokio-postgres.
    pub(super) rest: String,
    pub(super) sslmode: Option<String>,
    pub(super) sslrootcert: Option<String>,
    /// Names of ignored options, which belong to other tools.
    pub(super) ignored: Vec<String>,
}

/// Names of the scheme. A driver's name may follow after a plus sign.
const SCHEMES: &[&str] = &["postgres", "postgresql", "postgis", "pgsql"];

/// An option for tokio-postgres: its name and its value, as written.
type Kept<'a> = (&'a str, &'a str);

impl ConnectionString {
    /// Removes the options from an address of either form: a URL with a query, or pairs of key and value.
    pub(super) fn of(address: &str) -> Result<Self> {
        let address = address.trim();
        // Files of environment variables may put the address in quotes.
        let quoted = ['"', '\''].iter().find_map(|c| address.strip_prefix(*c)?.strip_suffix(*c));
        let address = quoted.unwrap_or(address);
        let Some((scheme, rest)) = address.split_once("://").filter(|(scheme, _)| is_scheme(scheme)) else {
            return Self::of_pairs(address);
        };
        let scheme = scheme.strip_prefix("jdbc:").unwrap_or(scheme);
        let name = scheme.split('+').next().unwrap_or_default();
        if !SCHEMES.contains(&name) {
            return Err(refused(&format!(
                "{scheme}:// is not an address of PostgreSQL: use postgres://user:password@host:port/name with the address of the database itself"
            )));
        }
        Self::of_url(rest)
    }

    fn of_url(address: &str) -> Result<Self> {
        let mut connection_string = Self::default();
        // A question mark in a password is percent-encoded.
        let (before, query) = address.split_once('?').unwrap_or((address, ""));
        let mut left = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, raw) = pair.split_once('=').unwrap_or((pair, ""));
            if let Some((key, raw)) = connection_string.take(key, raw, &decoded(raw))? {
                left.push(format!("{key}={raw}"));
            }
        }
        let query = if left.is_empty() { String::new() } else { format!("?{}", left.join("&")) };
        connection_string.rest = format!("postgresql://{before}{query}");
        Ok(connection_string)
    }

    /// Reads pairs as libpq does: spaces around `=`, quoted values, backslashes before quotes.
    fn of_pairs(address: &str) -> Result<Self> {
        let mut connection_string = Self::default();
        let mut rest: Vec<String> = Vec::new();
        let mut left = address.trim_start();
        while !left.is_empty() {
            let Some((key, after)) = left.split_once('=') else {
                // Not a pair: tokio-postgres says what is wrong.
                rest.push(left.into());
                break;
            };
            let after = after.trim_start();
            let (raw, next) = after.split_at(value_length(after));
            if let Some((key, raw)) = connection_string.take(key.trim(), raw, &unquoted(raw))? {
                rest.push(format!("{key}={raw}"));
            }
            left = next.trim_start();
        }
        connection_string.rest = rest.join(" ");
        Ok(connection_string)
    }

    /// Handles one option. Returns it if tokio-postgres reads it.
    fn take<'a>(&mut self, name: &'a str, raw: &'a str, value: &str) -> Result<Option<Kept<'a>>> {
        let Some(policy) = policy(name) else {
            // An unknown name that resembles no option may be part of a password, so it is not printed.
            return Err(refused(&match nearest(name) {
                Some(known) => format!("there is no option {name}; did you mean {known}?"),
                None => "the address has an unknown option; its name is not printed, since it may be part of a password: \
                         remove the option, or percent-encode (or quote) the password"
                    .into(),
            }));
        };
        match policy {
            OptionPolicy::Mode if value.is_empty() => {}
            OptionPolicy::Mode => {
                // sslmode is more exact than ssl, whichever comes first.
                if name != "ssl" || self.sslmode.is_none() {
                    self.sslmode = Some(mode_of(name, value)?);
                }
            }
            OptionPolicy::Root => self.sslrootcert = Some(value.into()),
            OptionPolicy::Read => return Ok(Some((name, raw))),
            OptionPolicy::As(other) => return Ok(Some((other, raw))),
            OptionPolicy::Ignore => self.ignore(name),
            OptionPolicy::IgnoreUnless(fine) => {
                if !fine.contains(&value) {
                    self.ignore(name);
                }
            }
            OptionPolicy::Refuse(cure) => return Err(refused(&format!("{name} is not supported: {cure}"))),
            OptionPolicy::RefuseUnless(fine, cure) => {
                if !fine.contains(&value) {
                    return Err(refused(&format!("this value of {name} is not supported: {cure}")));
                }
                // tokio-postgres supports this option: it refuses to write to a standby.
                if name == "target_session_attrs" && value != "any" {
                    return Ok(Some((name, "read-write")));
                }
            }
        }
        Ok(None)
    }

    fn ignore(&mut self, name: &str) {
        if !self.ignored.iter().any(|known| known == name) {
            self.ignored.push(name.into());
        }
    }

    /// A warning about ignored options.
    pub(super) fn warning(&self) -> Option<String> {
        let schema = if self.ignored.iter().any(|name| names_schema(name)) {
            "; to name a schema, set source.table to schema.table"
        } else {
            ""
        };
        (!self.ignored.is_empty()).then(|| {
            format!("database.url: options of other tools are ignored: {}{schema}", self.ignored.join(", "))
        })
    }
}

/// Whether this is a scheme before `://`, and not the beginning of a pair.
fn is_scheme(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_alphanumeric() || "+-.:_".contains(c))
}

fn refused(message: &str) -> Error {
    Error::new(FailureKind::WrongSetting, "read database.url", message)
}

/// A mode by its name in libpq. In tools that have `ssl`, true means that the certificate is checked.
fn mode_of(name: &str, value: &str) -> Result<String> {
    let mode = match (name, value) {
        ("ssl", "true" | "1" | "on" | "yes") => "verify-full",
        ("ssl", "false" | "0" | "off" | "no") => "disable",
        (_, "no-verify") => {
            return Err(refused(&format!(
                "{name}=no-verify is an option of another tool: use sslmode=require, which encrypts and does not check the \
                 certificate either, or sslmode=verify-full with sslrootcert"
            )));
        }
        _ => value,
    };
    Ok(mode.into())
}

/// A query's value, percent-decoded.
fn decoded(value: &str) -> String {
    percent_encoding::percent_decode_str(value).decode_utf8_lossy().into_owned()
}

/// The length of the first value in the text, in bytes, with its quotes.
fn value_length(text: &str) -> usize {
    let is_quoted = text.starts_with('\'');
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        if escaped {
            escaped = false;
        } else if c == '\\' {
            escaped = true;
        } else if is_quoted && c == '\'' && at > 0 {
            return at + 1;
        } else if !is_quoted && c.is_whitespace() {
            return at;
        }
    }
    text.len()
}

fn unquoted(raw: &str) -> String {
    let inner = raw.strip_prefix('\'').and_then(|rest| rest.strip_suffix('\'')).unwrap_or(raw);
    let mut out = String::with_capacity(inner.len());
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        out.extend(if c == '\\' { chars.next() } else { Some(c) });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection_string(
        rest: &str,
        sslmode: Option<&str>,
        sslrootcert: Option<&str>,
        ignored: &[&str],
    ) -> ConnectionString {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        let ignored = ignored.iter().map(|name| (*name).to_owned()).collect();
        ConnectionString {
            rest: rest.into(),
            sslmode: owned(sslmode),
            sslrootcert: owned(sslrootcert),
            ignored,
        }
    }

    #[test]
    fn both_forms_of_an_address_lose_their_tls_options_and_keep_the_rest() {
        for (address, expected) in [
            ("postgres://u:p@h/d", connection_string("postgresql://u:p@h/d", None, None, &[])),
            (
                "postgresql://u:p@h:5/d?sslmode=verify-full&connect_timeout=3&sslrootcert=%2Fa%20b.pem",
                connection_string(
                    "postgresql://u:p@h:5/d?connect_timeout=3",
                    Some("verify-full"),
                    Some("/a b.pem"),
                    &[],
                ),
            ),
            (
                "postgres://u:sslmode%3Dx@h/d?sslmode=require",
                connection_string("postgresql://u:sslmode%3Dx@h/d", Some("require"), None, &[]),
            ),
            (
                "jdbc:postgresql://h/d?user=u&password=p%26q&currentSchema=s&ssl=true",
                connection_string(
                    "postgresql://h/d?user=u&password=p%26q",
                    Some("verify-full"),
                    None,
                    &["currentSchema"],
                ),
            ),
            (
                "postgres+psycopg2://u@h/d?pool=1&schema=public&pool=2&options=-c%20a%3Db&ssl=true&sslmode=prefer",
                connection_string("postgresql://u@h/d?options=-c%20a%3Db", Some("prefer"), None, &["pool"]),
            ),
            (
                "\"postgres://u@h/d?sslmode=disable&ssl=true&keepalives_count=3\"\n",
                connection_string("postgresql://u@h/d?keepalives_retries=3", Some("disable"), None, &[]),
            ),
            (
                r"host=h sslmode = 'verify-ca' password='it\'s' dbname=d",
                connection_string(r"host=h password='it\'s' dbname=d", Some("verify-ca"), None, &[]),
            ),
            (
                r"password='a sslmode=disable \' b' sslrootcert=/x\ y host=h schema = 'my shop'",
                connection_string(
                    r"password='a sslmode=disable \' b' host=h",
                    None,
                    Some("/x y"),
                    &["schema"],
                ),
            ),
            ("password=a://b host=h", connection_string("password=a://b host=h", None, None, &[])),
            (
                "target_session_attrs=primary host=h",
                connection_string("target_session_attrs=read-write host=h", None, None, &[]),
            ),
            ("host=h nonsense", connection_string("host=h nonsense", None, None, &[])),
            ("", connection_string("", None, None, &[])),
        ] {
            assert_eq!(ConnectionString::of(address).unwrap(), expected, "{address}");
        }
    }

    #[test]
    fn a_name_that_nothing_is_like_is_not_printed() {
        for address in ["postgres://u:se?cret=x@h/d", "host=h password=my se=cret", "mysql://u:secret@h/d"] {
            let error = ConnectionString::of(address).unwrap_err().to_string();
            assert!(!error.contains("cret"), "{error}");
        }
    }
}
