//! Loads settings from files, environment and flags.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::Settings;
use super::environment;
use crate::secret::{address_without_secrets, without_secrets};

/// The built-in defaults, and the list of every key.
pub const DEFAULTS: &str = include_str!("../../config/default.toml");

/// Where configuration is looked for when no `--config` is given.
pub const DEFAULT_FILE: &str = "refarch.toml";

/// Keys whose values are never shown.
const SECRETS: &[&str] = &["database.url", "embedder.api_key", "index.api_key", "serve.edit_token"];

/// Keys whose values are addresses. They are shown without the secrets in them.
const ADDRESSES: &[&str] =
    &["queue.url", "queue.bulk_url", "queue.dead_url", "index.host", "index.controller", "embedder.url"];

/// A name with a greater edit distance is not suggested.
const MAX_EDIT_DISTANCE: usize = 4;

/// Why settings could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file that was named can't be read.
    #[error("cannot read the configuration file {path}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not TOML. The error shows nothing of its text, which may be a password.
    #[error("{origin} is not valid TOML: {place}{message}")]
    Syntax {
        /// The file.
        origin: String,
        /// Line and column, and the key there if refarch has such a setting.
        place: String,
        /// The parser's message.
        message: String,
    },
    /// A key that does not exist.
    #[error("{origin}: there is no setting {key}{}", .nearest.as_deref().map(|n| format!("; did you mean {n}?")).unwrap_or_default())]
    UnknownKey {
        /// The file, variable or flag that set the key.
        origin: String,
        /// The key.
        key: String,
        /// The nearest key that exists.
        nearest: Option<String>,
    },
    /// A value that the key does not accept.
    #[error("{origin}: {key} = {value}: {reason}")]
    Invalid {
        /// The file, variable or flag that set the key.
        origin: String,
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What is wrong, and which values are right.
        reason: String,
    },
}

/// A value given by a flag, for one key such as `serve.bind`.
#[derive(Clone, Debug)]
pub struct Override {
    /// The flag, for errors.
    pub flag: &'static str,
    /// The key, `section.key`.
    pub key: &'static str,
    /// The value as TOML writes it; text without quotes.
    pub value: String,
}

/// A configuration file's name and text.
#[derive(Clone, Debug)]
pub struct File {
    /// Name, for errors.
    pub path: PathBuf,
    /// Its content.
    pub text: String,
}

impl File {
    /// Reads the file that `--config` or `REFARCH_CONFIG` names, or else `refarch.toml` when there
    /// is one in the working directory.
    pub fn find(named: Option<&Path>) -> Result<Option<Self>, ConfigError> {
        let path = named.unwrap_or(Path::new(DEFAULT_FILE)).to_path_buf();
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(Self { path, text })),
            Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(ConfigError::Unreadable { path, source }),
        }
    }
}

impl Settings {
    /// Resolves settings from a file, environment variables and flags.
    pub fn load(
        file: Option<&File>,
        env: &BTreeMap<String, String>,
        flags: &[Override],
    ) -> Result<Self, ConfigError> {
        let mut settings: Table =
            toml::from_str(DEFAULTS).map_err(|error| syntax("config/default.toml", DEFAULTS, &error))?;
        let mut origins = BTreeMap::new();
        if let Some(file) = file {
            let origin = file.path.display().to_string();
            let table: Table =
                toml::from_str(&file.text).map_err(|error| syntax(&origin, &file.text, &error))?;
            for (section, value) in table {
                let Value::Table(keys) = value else {
                    return Err(unknown(&settings, &origin, &section));
                };
                if !settings.contains_key(&section) {
                    return Err(unknown(&settings, &origin, &section));
                }
                for (key, value) in keys {
                    put(
                        &mut settings,
                        &mut origins,
                        &origin,
                        &format!("{section}.{key}"),
                        Given::Toml(value),
                    )?;
                }
            }
        }
        for (origin, key, value) in environment::given(env) {
            put(&mut settings, &mut origins, &origin, &key, Given::Text(&value))?;
        }
        for flag in flags {
            put(&mut settings, &mut origins, flag.flag, flag.key, Given::Text(&flag.value))?;
        }
        let mut settings = typed(&settings, &origins)?;
        environment::lend_key(&mut settings, env);
        settings.validate(&origins)?;
        Ok(settings)
    }
}

/// A key's value as it may be shown.
pub(super) fn shown(key: &str, value: &str) -> String {
    match key {
        _ if SECRETS.contains(&key) => "[redacted]".into(),
        _ if ADDRESSES.contains(&key) => address_without_secrets(value),
        _ => without_secrets(value),
    }
}

/// The error and its place in a text that is not TOML. The parser's messages are fixed sentences; its
/// `Display` would print the line, which may hold a secret.
fn syntax(origin: &str, text: &str, error: &toml::de::Error) -> ConfigError {
    let place = error.span().map(|span| {
        let mut at = span.start.min(text.len());
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        let before = &text[..at];
        let line_start = before.rfind('\n').map_or(0, |end| end + 1);
        let line = before.matches('\n').count() + 1;
        let column = text[line_start..at].chars().count() + 1;
        let key = key_at(text, line).map(|key| format!(", at {key}")).unwrap_or_default();
        format!("line {line}, column {column}{key}: ")
    });
    ConfigError::Syntax {
        origin: origin.into(),
        place: place.unwrap_or_default(),
        message: error.message().into(),
    }
}

/// The setting that a line sets, if there is one of that name.
fn key_at(text: &str, line: usize) -> Option<String> {
    let lines: Vec<&str> = text.lines().take(line).collect();
    let (name, _) = lines.last()?.split_once('=')?;
    let header = lines.iter().rev().find_map(|line| line.trim().strip_prefix('['))?;
    let key = format!("{}.{}", header.split(']').next()?.trim(), name.trim());
    let defaults: Table = toml::from_str(DEFAULTS).ok()?;
    let (section, name) = key.split_once('.')?;
    defaults.get(section)?.get(name).is_some().then_some(key)
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

/// A value as it was given.
enum Given<'a> {
    Toml(Value),
    Text(&'a str),
}

fn put(
    settings: &mut Table,
    origins: &mut BTreeMap<String, String>,
    origin: &str,
    key: &str,
    given: Given<'_>,
) -> Result<(), ConfigError> {
    let nearest = || unknown(settings, origin, key);
    let (section, name) = key.split_once('.').ok_or_else(nearest)?;
    let default = settings.get(section).and_then(|s| s.get(name)).ok_or_else(nearest)?;
    let value = match given {
        Given::Toml(value) => value,
        Given::Text(text) => parse_as(default, text).map_err(|reason| ConfigError::Invalid {
            origin: origin.into(),
            key: key.into(),
            value: shown(key, text),
            reason,
        })?,
    };
    if let Some(Value::Table(keys)) = settings.get_mut(section) {
        keys.insert(name.into(), value);
    }
    origins.insert(key.into(), origin.into());
    Ok(())
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

fn unknown(settings: &Table, origin: &str, key: &str) -> ConfigError {
    let keys = settings.iter().flat_map(|(section, value)| {
        let inner = value.as_table().into_iter().flatten();
        std::iter::once(section.clone()).chain(inner.map(move |(name, _)| format!("{section}.{name}")))
    });
    let nearest = keys
        .map(|candidate| (strsim::damerau_levenshtein(&candidate, key), candidate))
        .min()
        .filter(|(distance, _)| *distance <= MAX_EDIT_DISTANCE)
        .map(|(_, candidate)| candidate);
    ConfigError::UnknownKey { origin: origin.into(), key: key.into(), nearest }
}

/// Turns the table into settings. An error names the key at fault and its origin.
fn typed(settings: &Table, origins: &BTreeMap<String, String>) -> Result<Settings, ConfigError> {
    Value::Table(settings.clone()).try_into::<Settings>().map_err(|error| {
        let message = reason(error.message());
        // The key at fault is the one that fails alone among the defaults.
        let defaults: Table = toml::from_str(DEFAULTS).unwrap_or_default();
        for (key, origin) in origins {
            let Some((section, name)) = key.split_once('.') else { continue };
            let mut mended = defaults.clone();
            let value = settings.get(section).and_then(|s| s.get(name)).cloned();
            if let (Some(Value::Table(keys)), Some(value)) = (mended.get_mut(section), value.clone()) {
                keys.insert(name.into(), value);
            }
            if Value::Table(mended).try_into::<Settings>().is_err() {
                return ConfigError::Invalid {
                    origin: origin.clone(),
                    key: key.clone(),
                    value: shown(key, &value.map(|v| v.to_string()).unwrap_or_default()),
                    reason: message,
                };
            }
        }
        ConfigError::Syntax { origin: "configuration".into(), place: String::new(), message }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{IndexKind, QueueKind};

    fn load(file: &str, env: &[(&str, &str)], flags: &[Override]) -> Result<Settings, ConfigError> {
        let file = File { path: "test.toml".into(), text: file.into() };
        let env = env.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        Settings::load(Some(&file), &env, flags)
    }

    #[test]
    fn flags_win_over_environment_over_file_over_default() {
        let flag = Override { flag: "--bind", key: "serve.bind", value: "127.0.0.1:4".into() };
        let file = "[serve]\nbind = '127.0.0.1:2'";
        let env = [("REFARCH_SERVE_BIND", "127.0.0.1:3")];
        assert_eq!(load("", &[], &[]).unwrap().serve.bind.port(), 3000);
        assert_eq!(load(file, &[], &[]).unwrap().serve.bind.port(), 2);
        assert_eq!(load(file, &env, &[]).unwrap().serve.bind.port(), 3);
        assert_eq!(load(file, &env, &[flag]).unwrap().serve.bind.port(), 4);
    }

    #[test]
    fn an_unknown_key_names_the_nearest_right_one() {
        let error = load("[serve]\nbnid = ''", &[], &[]).unwrap_err().to_string();
        assert_eq!(error, "test.toml: there is no setting serve.bnid; did you mean serve.bind?");
        let error = load("", &[("REFARCH_RELAY_POLMS", "1")], &[]).unwrap_err().to_string();
        assert!(error.contains("did you mean relay.poll_ms?"), "{error}");
        let error = load("[sreve]\nbind = ''", &[], &[]).unwrap_err().to_string();
        assert!(error.contains("did you mean serve?"), "{error}");
    }

    #[test]
    fn a_wrong_value_names_its_key_origin_and_value() {
        let error = load("[relay]\npack = 501", &[], &[]).unwrap_err().to_string();
        assert_eq!(error, "test.toml: relay.pack = 501: use 1 to 500");
        let error = load("[relay]\npack = -1", &[], &[]).unwrap_err().to_string();
        assert!(error.starts_with("test.toml: relay.pack = -1: "), "{error}");
        let error = load("", &[("REFARCH_SERVE_BIND", "nowhere")], &[]).unwrap_err().to_string();
        assert!(error.contains("REFARCH_SERVE_BIND: serve.bind = \"nowhere\""), "{error}");
    }

    #[test]
    fn secrets_and_addresses_are_known_by_their_keys() {
        let defaults: Table = toml::from_str(DEFAULTS).unwrap();
        let texts = defaults.iter().flat_map(|(section, keys)| {
            let keys = keys.as_table().unwrap().iter().filter(|(_, value)| value.is_str());
            keys.map(move |(name, _)| (section.clone(), name.clone()))
        });
        for (section, name) in texts {
            let mut settings = defaults.clone();
            let keys = settings.get_mut(&section).and_then(Value::as_table_mut).unwrap();
            keys.insert(name.clone(), "u:p@host".into());
            let key = format!("{section}.{name}");
            let Ok(settings) = Value::Table(settings).try_into::<Settings>() else { continue };
            let shown = Table::try_from(&settings).unwrap()[&section][&name].as_str().unwrap().to_owned();
            assert_eq!(shown == "[redacted]", SECRETS.contains(&key.as_str()), "{key}");
            assert_eq!(shown == "[redacted]@host", ADDRESSES.contains(&key.as_str()), "{key}");
        }
    }

    #[test]
    fn the_reference_architectures_variables_make_a_database_url() {
        let env = [
            ("POSTGRES_DB_HOST", "db"),
            ("POSTGRES_DB_NAME", "shop"),
            ("POSTGRES_DB_USER", "me"),
            ("POSTGRES_DB_PASSWORD", "it's \\ here"),
        ];
        let settings = load("", &env, &[]).unwrap();
        let parsed: tokio_postgres::Config = settings.database.url.expose().parse().unwrap();
        assert_eq!(parsed.get_dbname(), Some("shop"));
        assert_eq!(parsed.get_password(), Some(&b"it's \\ here"[..]));
    }

    #[test]
    fn customary_variables_choose_their_service_and_ours_win() {
        let env = [
            ("SQS_QUEUE_URL", "https://sqs.eu-west-1.amazonaws.com/1/jobs"),
            ("PINECONE_INDEX", "shop"),
            ("PINECONE_API_KEY", "hidden"),
            ("PGSSLMODE", "require"),
        ];
        let settings = load("", &env, &[]).unwrap();
        assert_eq!((settings.queue.kind, settings.index.kind), (QueueKind::Sqs, IndexKind::Pinecone));
        assert_eq!(settings.database.sslmode, "require");
        assert!(!format!("{settings:?}").contains("hidden"));
        let ours = [&env[..], &[("REFARCH_QUEUE_KIND", "pgmq"), ("REFARCH_INDEX_NAME", "other")]].concat();
        let settings = load("", &ours, &[]).unwrap();
        assert_eq!((settings.queue.kind, settings.index.name.as_str()), (QueueKind::Pgmq, "other"));
    }

    #[test]
    fn a_service_that_lacks_what_it_needs_is_refused() {
        let message = |env: &[(&str, &str)]| load("", env, &[]).unwrap_err().to_string();
        let error = message(&[("REFARCH_QUEUE_KIND", "sqs")]);
        assert!(error.contains("queue.url"), "{error}");
        let error = message(&[("SQS_QUEUE_URL", "jobs")]);
        assert!(error.starts_with("environment variable SQS_QUEUE_URL: queue.url = jobs: "), "{error}");
        let error = message(&[("PINECONE_INDEX", "shop")]);
        assert!(error.contains("PINECONE_API_KEY"), "{error}");
        let error = message(&[("REFARCH_EMBEDDER_KIND", "tei")]);
        assert!(error.contains("embedder.url"), "{error}");
        let error = message(&[("PGSSLMODE", "verify")]);
        assert!(error.contains("PGSSLMODE: database.sslmode = verify: use disable"), "{error}");
    }

    #[test]
    fn database_url_wins_over_the_five_and_is_not_shown() {
        let env = [("DATABASE_URL", "postgres://u:hidden@h/x"), ("POSTGRES_DB_HOST", "other")];
        let settings = load("", &env, &[]).unwrap();
        assert!(settings.database.url.expose().contains("@h/x"));
        assert!(!toml::to_string(&settings).unwrap().contains("hidden"));
        assert!(!format!("{settings:?}").contains("hidden"));
    }
}
