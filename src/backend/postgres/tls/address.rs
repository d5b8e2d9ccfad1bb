//! What an address says of encryption, taken out of it.

/// An address and what was taken out of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parted {
    pub(super) rest: String,
    pub(super) sslmode: Option<String>,
    pub(super) sslrootcert: Option<String>,
}

/// Takes the two keys out of either form of an address: a URL's query, or pairs of key and value.
pub(super) fn part(address: &str) -> Parted {
    if address.starts_with("postgres://") || address.starts_with("postgresql://") {
        part_url(address)
    } else {
        part_pairs(address)
    }
}

fn part_url(address: &str) -> Parted {
    let mut parted = Parted { rest: address.into(), sslmode: None, sslrootcert: None };
    // A password's own question mark is percent-encoded.
    let Some((before, query)) = address.split_once('?') else { return parted };
    let mut left = Vec::new();
    for pair in query.split('&') {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        match key {
            "sslmode" => parted.sslmode = Some(decoded(value)),
            "sslrootcert" => parted.sslrootcert = Some(decoded(value)),
            _ => left.push(pair),
        }
    }
    parted.rest = if left.is_empty() { before.into() } else { format!("{before}?{}", left.join("&")) };
    parted
}

/// A query's value without its percent signs.
fn decoded(value: &str) -> String {
    percent_encoding::percent_decode_str(value).decode_utf8_lossy().into_owned()
}

/// Pairs as libpq reads them: blanks around, a value in quotes with backslashes before quotes.
fn part_pairs(address: &str) -> Parted {
    let mut parted = Parted { rest: String::new(), sslmode: None, sslrootcert: None };
    let mut left = address;
    while !left.trim_start().is_empty() {
        left = left.trim_start();
        let Some((key, after)) = left.split_once('=') else {
            // Not a pair: the parser proper says what is wrong.
            if !parted.rest.is_empty() {
                parted.rest.push(' ');
            }
            parted.rest.push_str(left);
            break;
        };
        let after = after.trim_start();
        let length = value_length(after);
        let (raw, next) = after.split_at(length);
        match key.trim() {
            "sslmode" => parted.sslmode = Some(unquoted(raw)),
            "sslrootcert" => parted.sslrootcert = Some(unquoted(raw)),
            _ => {
                if !parted.rest.is_empty() {
                    parted.rest.push(' ');
                }
                parted.rest.push_str(key.trim());
                parted.rest.push('=');
                parted.rest.push_str(raw);
            }
        }
        left = next;
    }
    parted
}

/// How many bytes of the text are its first value, quotes included.
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

    fn parted(rest: &str, sslmode: Option<&str>, sslrootcert: Option<&str>) -> Parted {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Parted { rest: rest.into(), sslmode: owned(sslmode), sslrootcert: owned(sslrootcert) }
    }

    #[test]
    fn both_forms_of_an_address_are_parted_and_the_rest_is_as_it_was() {
        for (address, expected) in [
            ("postgres://u:p@h/d", parted("postgres://u:p@h/d", None, None)),
            (
                "postgresql://u:p@h:5/d?sslmode=verify-full&connect_timeout=3&sslrootcert=%2Fa%20b.pem",
                parted("postgresql://u:p@h:5/d?connect_timeout=3", Some("verify-full"), Some("/a b.pem")),
            ),
            (
                "postgres://u:sslmode%3Dx@h/d?sslmode=require",
                parted("postgres://u:sslmode%3Dx@h/d", Some("require"), None),
            ),
            (
                r"host=h sslmode = 'verify-ca' password='it\'s' dbname=d",
                parted(r"host=h password='it\'s' dbname=d", Some("verify-ca"), None),
            ),
            (
                r"password='a sslmode=disable \' b' sslrootcert=/x\ y host=h",
                parted(r"password='a sslmode=disable \' b' host=h", None, Some("/x y")),
            ),
            ("host=h nonsense", parted("host=h nonsense", None, None)),
            ("", parted("", None, None)),
        ] {
            assert_eq!(part(address), expected, "{address}");
        }
    }
}
