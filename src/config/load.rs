//! Loads settings from files, environment and flags.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::environment;
use super::error::ConfigError;
use super::settings::{Settings, keys};
use super::values::{RawValue, Values};

/// Where configuration is looked for when no `--config` is given.
pub const DEFAULT_FILE: &str = "refarch.toml";

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
        let mut values = Values::defaults(keys().collect())?;
        if let Some(file) = file {
            put_file(&mut values, file)?;
        }
        for (origin, path, value) in environment::given(values.keys(), env) {
            values.set_value(&origin, &path, RawValue::Text(&value))?;
        }
        for flag in flags {
            values.set_value(flag.flag, flag.key, RawValue::Text(&flag.value))?;
        }
        environment::apply_provider_key(&mut values, env)?;
        Self::read(&values)
    }
}

fn put_file(values: &mut Values, file: &File) -> Result<(), ConfigError> {
    let origin = file.path.display().to_string();
    let table: Table =
        toml::from_str(&file.text).map_err(|error| values.syntax_error(&origin, &file.text, &error))?;
    for (section, value) in table {
        let is_known = values.keys().iter().any(|key| key.section == section);
        let Value::Table(given) = value else { return Err(values.unknown_key(&origin, &section)) };
        if !is_known {
            return Err(values.unknown_key(&origin, &section));
        }
        for (name, value) in given {
            values.set_value(&origin, &format!("{section}.{name}"), RawValue::Toml(value))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Index, QueueKind};

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
    fn conventional_variables_select_their_service_and_ours_win() {
        let env = [
            ("SQS_QUEUE_URL", "https://sqs.eu-west-1.amazonaws.com/1/jobs"),
            ("PINECONE_INDEX", "shop"),
            ("PINECONE_API_KEY", "hidden"),
            ("PGSSLMODE", "require"),
        ];
        let settings = load("", &env, &[]).unwrap();
        assert!(matches!(settings.queue.kind, QueueKind::Sqs(_)));
        assert!(matches!(settings.index, Index::Pinecone(_)));
        assert_eq!(settings.database.sslmode, "require");
        assert!(!format!("{settings:?}").contains("hidden"));
        let ours = [&env[..], &[("REFARCH_QUEUE_KIND", "pgmq"), ("REFARCH_INDEX_NAME", "other")]].concat();
        let settings = load("", &ours, &[]).unwrap();
        assert!(settings.queue.is_pgmq());
        assert_eq!(settings.index.pinecone().unwrap().name, "other");
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
        assert!(!settings.as_toml().contains("hidden"));
        assert!(!format!("{settings:?}").contains("hidden"));
    }
}
