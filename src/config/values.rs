//! The value of every key, and where each comes from.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::declare::{Key, Rule, sets};
use super::error::ConfigError;
use crate::secret::{address_without_secrets, without_secrets};

/// A name with a greater edit distance is not suggested.
const MAX_EDIT_DISTANCE: usize = 4;

/// A value as it was given.
pub(super) enum RawValue<'a> {
    Toml(Value),
    Text(&'a str),
}

struct Entry {
    key: &'static Key,
    value: Value,
    /// None for a default.
    origin: Option<String>,
}

/// The value of every key.
pub(super) struct Values {
    /// In the order in which they are shown.
    keys: Vec<&'static Key>,
    by_path: BTreeMap<&'static str, Entry>,
}

impl Values {
    /// The defaults.
    pub(super) fn defaults(keys: Vec<&'static Key>) -> Result<Self, ConfigError> {
        let entry = |key: &&'static Key| Ok((key.path, Entry { key, value: default_of(key)?, origin: None }));
        let by_path = keys.iter().map(entry).collect::<Result<_, _>>()?;
        Ok(Self { keys, by_path })
    }

    /// Every key that there is.
    pub(super) fn keys(&self) -> &[&'static Key] {
        &self.keys
    }

    /// Puts a value in the place of the one that is there.
    pub(super) fn set_value(
        &mut self,
        origin: &str,
        path: &str,
        given: RawValue<'_>,
    ) -> Result<(), ConfigError> {
        let Some(entry) = self.by_path.get_mut(path) else { return Err(self.unknown_key(origin, path)) };
        entry.value = match given {
            RawValue::Toml(value) => value,
            RawValue::Text(text) => parse_as(&entry.value, text).map_err(|reason| ConfigError::Invalid {
                origin: origin.into(),
                key: path.into(),
                value: redacted(entry.key, text),
                reason,
            })?,
        };
        entry.origin = Some(origin.into());
        Ok(())
    }

    /// Checks a key's value by its rules. What is not used need only be of the right type.
    pub(super) fn check(&self, path: &str) -> Result<(), ConfigError> {
        let Entry { key, value, .. } = self.entry(path)?;
        let is_used = key.kinds.is_empty() || key.kinds.contains(&self.kind(key.section));
        let fault = key.rules.iter().filter(|_| is_used).find_map(|rule| rule.fault(value));
        fault.map_or(Ok(()), |(value, reason)| Err(self.refused_as(path, &value, &reason)))
    }

    /// A key's value, read by serde. Each is read by itself, so that an error names its key.
    pub(super) fn parse<T: DeserializeOwned>(&self, path: &str) -> Result<T, ConfigError> {
        let value = &self.entry(path)?.value;
        value.clone().try_into().map_err(|error: toml::de::Error| {
            self.refused_as(path, &value.to_string(), &reason(error.message()))
        })
    }

    /// The kind that is chosen in a section that has several.
    pub(super) fn kind(&self, section: &str) -> &str {
        self.text(&format!("{section}.kind"))
    }

    /// A key's value if it is a text; empty for anything else.
    pub(super) fn text(&self, path: &str) -> &str {
        self.by_path.get(path).and_then(|entry| entry.value.as_str()).unwrap_or_default()
    }

    /// Whether a key's value is the empty text.
    pub(super) fn is_blank(&self, path: &str) -> bool {
        self.by_path.get(path).is_some_and(|entry| entry.value.as_str() == Some(""))
    }

    /// That a key's value is of no use, and what would be.
    pub(super) fn refused(&self, path: &str, reason: &str) -> ConfigError {
        let value = self.by_path.get(path).map(|entry| sets(&entry.value)).unwrap_or_default();
        self.refused_as(path, &value, reason)
    }

    /// The same, with what is told of the value.
    pub(super) fn refused_as(&self, path: &str, value: &str, reason: &str) -> ConfigError {
        let entry = self.by_path.get(path);
        ConfigError::Invalid {
            origin: entry.and_then(|e| e.origin.clone()).unwrap_or_else(|| "configuration".into()),
            key: path.into(),
            value: entry.map(|entry| redacted(entry.key, value)).unwrap_or_default(),
            reason: reason.into(),
        }
    }

    /// All of them as TOML, secrets hidden.
    pub(super) fn redacted(&self) -> String {
        let mut text = String::new();
        let mut section = "";
        for key in &self.keys {
            let Some(Entry { value, .. }) = self.by_path.get(key.path) else { continue };
            if section != key.section {
                section = key.section;
                let gap = if text.is_empty() { "" } else { "\n" };
                let _ = writeln!(text, "{gap}[{section}]");
            }
            let value = match value {
                Value::String(value) if !value.is_empty() => Value::from(redacted(key, value)),
                value => value.clone(),
            };
            let _ = writeln!(text, "{} = {value}", key.name);
        }
        without_secrets(&text)
    }

    fn entry(&self, path: &str) -> Result<&Entry, ConfigError> {
        self.by_path.get(path).ok_or_else(|| self.unknown_key("configuration", path))
    }

    /// That there is no such key or section, and which is nearest.
    pub(super) fn unknown_key(&self, origin: &str, path: &str) -> ConfigError {
        let nearest = self
            .keys
            .iter()
            .flat_map(|key| [key.section, key.path])
            .map(|candidate| (strsim::damerau_levenshtein(candidate, path), candidate))
            .min()
            .filter(|(distance, _)| *distance <= MAX_EDIT_DISTANCE)
            .map(|(_, candidate)| candidate.to_owned());
        ConfigError::UnknownKey { origin: origin.into(), key: path.into(), nearest }
    }

    /// The error and its place in a text that is not TOML. The parser's messages are fixed sentences; its
    /// `Display` would print the line, which may hold a secret.
    pub(super) fn syntax_error(&self, origin: &str, text: &str, error: &toml::de::Error) -> ConfigError {
        let position = error.span().map(|span| {
            let mut at = span.start.min(text.len());
            while !text.is_char_boundary(at) {
                at -= 1;
            }
            let before = &text[..at];
            let line_start = before.rfind('\n').map_or(0, |end| end + 1);
            let line = before.matches('\n').count() + 1;
            let column = text[line_start..at].chars().count() + 1;
            let key = self.key_at(text, line).map(|key| format!(", at {key}")).unwrap_or_default();
            format!("line {line}, column {column}{key}: ")
        });
        ConfigError::Syntax {
            origin: origin.into(),
            position: position.unwrap_or_default(),
            message: error.message().into(),
        }
    }

    /// The setting that a line sets, if there is one of that name.
    fn key_at(&self, text: &str, line: usize) -> Option<&'static str> {
        let lines: Vec<&str> = text.lines().take(line).collect();
        let (name, _) = lines.last()?.split_once('=')?;
        let header = lines.iter().rev().find_map(|line| line.trim().strip_prefix('['))?;
        let path = format!("{}.{}", header.split(']').next()?.trim(), name.trim());
        self.keys.iter().map(|key| key.path).find(|known| *known == path)
    }
}

/// A key's default as a value.
pub(super) fn default_of(key: &Key) -> Result<Value, ConfigError> {
    let refused = |reason: &str| ConfigError::Invalid {
        origin: "default".into(),
        key: key.path.into(),
        value: key.default.into(),
        reason: reason.into(),
    };
    let table: Table =
        toml::from_str(&format!("value = {}", key.default)).map_err(|error| refused(error.message()))?;
    table.get("value").cloned().ok_or_else(|| refused("there is none"))
}

/// A key's value as it may be shown.
fn redacted(key: &Key, value: &str) -> String {
    match key {
        Key { is_secret: true, .. } => "[redacted]".into(),
        Key { rules, .. } if rules.iter().any(|rule| matches!(rule, Rule::Address)) => {
            address_without_secrets(value)
        }
        _ => without_secrets(value),
    }
}

/// Reads text as the type of the default. A list is comma-separated.
fn parse_as(default: &Value, text: &str) -> Result<Value, String> {
    match default {
        Value::Integer(_) => text.trim().parse().map(Value::Integer).map_err(|_| "use a whole number".into()),
        Value::Float(_) => text.trim().parse().map(Value::Float).map_err(|_| "use a number".into()),
        Value::Boolean(_) => text.trim().parse().map(Value::Boolean).map_err(|_| "use true or false".into()),
        Value::Array(_) => Ok(Value::Array(
            text.split(',').map(str::trim).filter(|t| !t.is_empty()).map(Value::from).collect(),
        )),
        _ => Ok(Value::from(text)),
    }
}

/// The end of serde's message, which tells what was expected. The rest may show the value.
fn reason(message: &str) -> String {
    match message.rsplit_once("expected ") {
        Some((_, expected)) => format!("expected {}", expected.trim()),
        // Messages such as that for a socket address show no value.
        None if !message.contains(['`', '"', '\'']) => message.trim().into(),
        None => "the value has the wrong type".into(),
    }
}
