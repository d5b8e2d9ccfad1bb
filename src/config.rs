//! Settings: flags over environment over file over default, resolved once and validated.
//!
//! Loading is a pure function of a file's text, a map of environment variables and overrides from
//! flags. `config/default.toml` is the one list of keys: a key that is not in there does not exist.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::secret::Secret;

/// The built-in defaults, and the list of every key.
pub const DEFAULTS: &str = include_str!("../config/default.toml");

/// Prefix of the environment variables that set a key.
const ENV_PREFIX: &str = "REFARCH_";

/// Where configuration is looked for when no `--config` is given.
pub const DEFAULT_FILE: &str = "refarch.toml";

/// Variables with our prefix that are not settings.
const OTHER_VARIABLES: &[&str] = &["REFARCH_CONFIG"];

/// Keys whose values are never shown.
const SECRETS: &[&str] = &["database.url", "index.api_key", "serve.edit_token"];

/// Names further apart than this are not offered as what was meant.
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
    /// A file is not TOML.
    #[error("{origin} is not valid TOML: {message}")]
    Syntax {
        /// The file.
        origin: String,
        /// What the parser says.
        message: String,
    },
    /// A key that does not exist.
    #[error("{origin}: there is no setting {key}{}", .nearest.as_deref().map(|n| format!("; did you mean {n}?")).unwrap_or_default())]
    UnknownKey {
        /// Where it stands.
        origin: String,
        /// The key.
        key: String,
        /// The nearest key that exists.
        nearest: Option<String>,
    },
    /// A value that a key can't have.
    #[error("{origin}: {key} = {value}: {reason}")]
    Invalid {
        /// Where it stands.
        origin: String,
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
}

/// The system's settings. Each key is described in `config/default.toml`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Settings {
    pub database: Database,
    pub source: Source,
    pub queue: Queue,
    pub index: Index,
    pub embedder: Embedder,
    pub relay: Relay,
    pub indexer: Indexer,
    pub serve: Serve,
    pub up: Up,
    pub runtime: Runtime,
    pub log: Log,
}

/// `[database]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Database {
    pub url: Secret,
    pub pool_size: usize,
    pub connect_timeout_s: u64,
}

/// `[source]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Source {
    pub name: String,
    pub table: String,
    pub id: String,
    pub text: Vec<String>,
    pub metadata: Vec<String>,
}

/// `[queue]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Queue {
    pub kind: QueueKind,
    pub name: String,
    pub visibility_s: u64,
    pub max_receives: u32,
}

/// The queues that can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QueueKind {
    /// pgmq in the source's database.
    Pgmq,
}

/// `[index]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Index {
    pub kind: IndexKind,
    pub host: String,
    pub api_key: Secret,
    pub namespace: String,
    pub timeout_ms: u64,
    pub graph_min_rows: u64,
    pub graph_max_backlog: u64,
    pub ef_search: u32,
}

/// The indexes that can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IndexKind {
    /// pgvector in the source's database.
    Pgvector,
    /// A Pinecone index.
    Pinecone,
}

/// `[embedder]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Embedder {
    pub kind: EmbedderKind,
    pub model: String,
}

/// The embedders that can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EmbedderKind {
    /// A `MiniLM`-class model on this machine's CPU.
    Minilm,
}

/// `[relay]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Relay {
    pub poll_ms: u64,
    pub pack: usize,
    pub bulk_threshold: u64,
    pub live_bound: u64,
}

/// `[indexer]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Indexer {
    pub workers: usize,
    pub slice_ms: u64,
    pub hold_ms: u64,
    pub poll_ms: u64,
    pub lease_ms: u64,
    pub settle_ms: u64,
}

/// `[serve]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Serve {
    pub bind: SocketAddr,
    pub edit_token: Secret,
    pub page_size: u32,
}

/// `[up]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Up {
    pub products: u64,
}

/// `[runtime]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Runtime {
    pub dir: PathBuf,
    pub grace_s: u64,
}

/// `[log]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Log {
    pub format: String,
    pub level: String,
}

impl Runtime {
    /// [`Self::grace_s`] as a duration.
    #[must_use]
    pub fn grace(&self) -> Duration {
        Duration::from_secs(self.grace_s)
    }
}

impl Indexer {
    /// [`Self::lease_ms`] as a duration.
    #[must_use]
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }

    /// How long an attempt of a dead worker stands: it may have written until its lease ended, and
    /// what it wrote is applied within [`Self::settle_ms`].
    #[must_use]
    pub fn settle(&self) -> Duration {
        Duration::from_millis(self.lease_ms + self.settle_ms)
    }

    /// Embedding threads: as set, or one for each core.
    #[must_use]
    pub fn worker_count(&self) -> usize {
        if self.workers > 0 {
            return self.workers;
        }
        std::thread::available_parallelism().map_or(1, usize::from)
    }
}

/// A value given by a flag, for one key such as `serve.bind`.
#[derive(Clone, Debug)]
pub struct Override {
    /// The flag, for errors.
    pub flag: &'static str,
    /// The key, `section.key`.
    pub key: &'static str,
    /// The value as it would stand in TOML or, for text, as it is.
    pub value: String,
}

/// A configuration file's name and text.
#[derive(Clone, Debug)]
pub struct File {
    /// Name, for errors.
    pub path: PathBuf,
    /// What it holds.
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
        let mut settings: Table = toml::from_str(DEFAULTS).map_err(|error| ConfigError::Syntax {
            origin: "config/default.toml".into(),
            message: error.to_string(),
        })?;
        let mut origins = BTreeMap::new();
        if let Some(file) = file {
            let origin = file.path.display().to_string();
            let table: Table = toml::from_str(&file.text).map_err(|error| ConfigError::Syntax {
                origin: origin.clone(),
                message: error.to_string(),
            })?;
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
        if let Some((key, value)) = database_url(env) {
            put(&mut settings, &mut origins, "environment", key, Given::Text(&value))?;
        }
        for (variable, value) in env {
            let Some(rest) = variable.strip_prefix(ENV_PREFIX) else { continue };
            if OTHER_VARIABLES.contains(&variable.as_str()) {
                continue;
            }
            let key = rest.to_lowercase().replacen('_', ".", 1);
            put(
                &mut settings,
                &mut origins,
                &format!("environment variable {variable}"),
                &key,
                Given::Text(value),
            )?;
        }
        for flag in flags {
            put(&mut settings, &mut origins, flag.flag, flag.key, Given::Text(&flag.value))?;
        }
        let settings = typed(&settings, &origins)?;
        settings.validate(&origins)?;
        Ok(settings)
    }

    fn validate(&self, origins: &BTreeMap<String, String>) -> Result<(), ConfigError> {
        let check = |good: bool, key: &str, value: &dyn fmt::Display, reason: &str| {
            if good {
                return Ok(());
            }
            Err(ConfigError::Invalid {
                origin: origins.get(key).cloned().unwrap_or_else(|| "configuration".into()),
                key: key.into(),
                value: value.to_string(),
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
            "use at least 4: the roles hold that many at once",
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
            "use 1 to 1024, or 0 for one each core",
        )?;
        check(self.indexer.slice_ms >= 1, "indexer.slice_ms", &self.indexer.slice_ms, "use at least 1")?;
        check(self.indexer.hold_ms >= 1, "indexer.hold_ms", &self.indexer.hold_ms, "use at least 1")?;
        check(self.indexer.poll_ms >= 1, "indexer.poll_ms", &self.indexer.poll_ms, "use at least 1")?;
        check(
            (1..=100).contains(&self.serve.page_size),
            "serve.page_size",
            &self.serve.page_size,
            "use 1 to 100",
        )?;
        check(
            matches!(self.log.format.as_str(), "" | "text" | "json"),
            "log.format",
            &self.log.format,
            "use text or json",
        )
    }
}

/// The database that the environment names: `DATABASE_URL`, or the reference architecture's five.
fn database_url(env: &BTreeMap<String, String>) -> Option<(&'static str, String)> {
    let set = |name: &str| env.get(name).filter(|value| !value.is_empty());
    if let Some(url) = set("DATABASE_URL") {
        return Some(("database.url", url.clone()));
    }
    let host = set("POSTGRES_DB_HOST")?;
    // The key-value form needs no percent-encoding: a quoted value takes anything.
    let mut url = String::new();
    let parts = [
        ("host", Some(host)),
        ("port", set("POSTGRES_DB_PORT")),
        ("dbname", set("POSTGRES_DB_NAME")),
        ("user", set("POSTGRES_DB_USER")),
        ("password", set("POSTGRES_DB_PASSWORD")),
    ];
    for (name, value) in parts {
        if let Some(value) = value {
            let quoted = value.replace('\\', r"\\").replace('\'', r"\'");
            let _ = write!(url, "{name}='{quoted}' ");
        }
    }
    Some(("database.url", url.trim_end().to_owned()))
}

/// A value, as it came.
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
            value: text.into(),
            reason,
        })?,
    };
    if let Some(Value::Table(keys)) = settings.get_mut(section) {
        keys.insert(name.into(), value);
    }
    origins.insert(key.into(), origin.into());
    Ok(())
}

/// Reads text as the type that the default has; a list is comma-separated.
fn parse_as(default: &Value, text: &str) -> Result<Value, String> {
    match default {
        Value::Integer(_) => text.trim().parse().map(Value::Integer).map_err(|_| "use a whole number".into()),
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

/// Reads each section by itself, so that an error can name its key and where that came from.
fn typed(settings: &Table, origins: &BTreeMap<String, String>) -> Result<Settings, ConfigError> {
    Value::Table(settings.clone()).try_into::<Settings>().map_err(|error| {
        let message = error.message().to_owned();
        // The key whose replacement by its default mends the error is the one at fault.
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
                    value: if SECRETS.contains(&key.as_str()) {
                        "[redacted]".into()
                    } else {
                        value.map(|v| v.to_string()).unwrap_or_default()
                    },
                    reason: message,
                };
            }
        }
        ConfigError::Syntax { origin: "configuration".into(), message }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn database_url_wins_over_the_five_and_is_not_shown() {
        let env = [("DATABASE_URL", "postgres://u:hidden@h/x"), ("POSTGRES_DB_HOST", "other")];
        let settings = load("", &env, &[]).unwrap();
        assert!(settings.database.url.expose().contains("@h/x"));
        assert!(!toml::to_string(&settings).unwrap().contains("hidden"));
        assert!(!format!("{settings:?}").contains("hidden"));
    }
}
