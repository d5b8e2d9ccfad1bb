//! Settings from environment variables: refarch's own (`REFARCH_...`) and those of other tools.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::declare::{Key, Rule};
use super::error::ConfigError;
use super::values::{RawValue, Values};

/// Prefix of refarch's own environment variables.
const PREFIX: &str = "REFARCH_";

/// Variables with our prefix that are not settings.
const OTHER_VARIABLES: &[&str] = &["REFARCH_CONFIG"];

/// The variable of `OpenAI`'s own tools.
const OPENAI_KEY: &str = "OPENAI_API_KEY";

/// The settings that the environment gives, each as origin, key and value. Later entries win: refarch's own
/// variables over those of other tools.
pub(super) fn given(keys: &[&Key], env: &BTreeMap<String, String>) -> Vec<(String, String, String)> {
    let mut given = Vec::new();
    let mut add = |variable: &str, path: &str, value: &str| {
        given.push((format!("environment variable {variable}"), path.to_owned(), value.to_owned()));
    };
    if let Some((variable, value)) = database_url(env) {
        add(variable, "database.url", &value);
    }
    for key in keys {
        for rule in key.rules {
            let (Rule::Variable(variable) | Rule::Chooses(variable, _)) = rule else { continue };
            let Some(value) = non_empty(env, variable) else { continue };
            add(variable, key.path, value);
            if let Rule::Chooses(_, kind) = rule {
                add(variable, &format!("{}.kind", key.section), kind);
            }
        }
    }
    for (variable, value) in env {
        let Some(rest) = variable.strip_prefix(PREFIX) else { continue };
        if !OTHER_VARIABLES.contains(&variable.as_str()) {
            add(variable, &rest.to_lowercase().replacen('_', ".", 1), value);
        }
    }
    given
}

/// Uses the provider's usual variable if the embedder has no API key. Only the provider's own: a key must
/// not go to another server.
pub(super) fn apply_provider_key(
    values: &mut Values,
    env: &BTreeMap<String, String>,
) -> Result<(), ConfigError> {
    match non_empty(env, OPENAI_KEY) {
        Some(key) if values.kind("embedder") == "openai" && values.is_blank("embedder.api_key") => {
            let origin = format!("environment variable {OPENAI_KEY}");
            values.set_value(&origin, "embedder.api_key", RawValue::Text(key))
        }
        _ => Ok(()),
    }
}

/// A variable that is set and not empty.
fn non_empty<'a>(env: &'a BTreeMap<String, String>, name: &str) -> Option<&'a String> {
    env.get(name).filter(|value| !value.is_empty())
}

/// The database that the environment names: `DATABASE_URL`, or the reference architecture's five.
fn database_url(env: &BTreeMap<String, String>) -> Option<(&'static str, String)> {
    if let Some(url) = non_empty(env, "DATABASE_URL") {
        return Some(("DATABASE_URL", url.clone()));
    }
    let host = non_empty(env, "POSTGRES_DB_HOST")?;
    // The key-value form needs no percent-encoding: a quoted value takes anything.
    let mut url = String::new();
    let parts = [
        ("host", Some(host)),
        ("port", non_empty(env, "POSTGRES_DB_PORT")),
        ("dbname", non_empty(env, "POSTGRES_DB_NAME")),
        ("user", non_empty(env, "POSTGRES_DB_USER")),
        ("password", non_empty(env, "POSTGRES_DB_PASSWORD")),
    ];
    for (name, value) in parts {
        if let Some(value) = value {
            let quoted = value.replace('\\', r"\\").replace('\'', r"\'");
            let _ = write!(url, "{name}='{quoted}' ");
        }
    }
    Some(("POSTGRES_DB_HOST", url.trim_end().to_owned()))
}
