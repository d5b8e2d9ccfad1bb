//! Settings from environment variables: refarch's own (`REFARCH_...`) and those of other tools.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::{EmbedderKind, Settings};
use crate::secret::Secret;

/// Prefix of refarch's own environment variables.
const PREFIX: &str = "REFARCH_";

/// Variables with our prefix that are not settings.
const OTHER_VARIABLES: &[&str] = &["REFARCH_CONFIG"];

/// A variable of another tool, and the setting that it gives.
struct Customary {
    variable: &'static str,
    key: &'static str,
    /// A second setting: a variable that names an SQS queue also chooses SQS.
    implies: Option<(&'static str, &'static str)>,
}

const fn plain(variable: &'static str, key: &'static str) -> Customary {
    Customary { variable, key, implies: None }
}

const fn choosing(
    variable: &'static str,
    key: &'static str,
    implied: &'static str,
    value: &'static str,
) -> Customary {
    Customary { variable, key, implies: Some((implied, value)) }
}

/// Variables of libpq, of the reference architecture and of vendors' own tools.
const CUSTOMARY: &[Customary] = &[
    plain("PGSSLMODE", "database.sslmode"),
    plain("PGSSLROOTCERT", "database.sslrootcert"),
    choosing("SQS_QUEUE_URL", "queue.url", "queue.kind", "sqs"),
    plain("SQS_BULK_QUEUE_URL", "queue.bulk_url"),
    plain("SQS_DEAD_LETTER_QUEUE_URL", "queue.dead_url"),
    plain("PINECONE_API_KEY", "index.api_key"),
    choosing("PINECONE_INDEX", "index.name", "index.kind", "pinecone"),
    choosing("PINECONE_INDEX_HOST", "index.host", "index.kind", "pinecone"),
    plain("PINECONE_NAMESPACE", "index.namespace"),
];

/// The settings that the environment gives, each as origin, key and value. Later entries win: refarch's own
/// variables over those of other tools.
pub(super) fn given(env: &BTreeMap<String, String>) -> Vec<(String, String, String)> {
    let mut given = Vec::new();
    let mut add = |variable: &str, key: &str, value: &str| {
        given.push((format!("environment variable {variable}"), key.to_owned(), value.to_owned()));
    };
    if let Some((variable, value)) = database_url(env) {
        add(variable, "database.url", &value);
    }
    for Customary { variable, key, implies } in CUSTOMARY {
        let Some(value) = set(env, variable) else { continue };
        add(variable, key, value);
        if let Some((key, value)) = implies {
            add(variable, key, value);
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
pub(super) fn lend_key(settings: &mut Settings, env: &BTreeMap<String, String>) {
    if settings.embedder.kind == EmbedderKind::Openai
        && settings.embedder.api_key.is_empty()
        && let Some(key) = set(env, "OPENAI_API_KEY")
    {
        settings.embedder.api_key = Secret::new(key.clone());
    }
}

/// A variable that is set and not empty.
fn set<'a>(env: &'a BTreeMap<String, String>, name: &str) -> Option<&'a String> {
    env.get(name).filter(|value| !value.is_empty())
}

/// The database that the environment names: `DATABASE_URL`, or the reference architecture's five.
fn database_url(env: &BTreeMap<String, String>) -> Option<(&'static str, String)> {
    if let Some(url) = set(env, "DATABASE_URL") {
        return Some(("DATABASE_URL", url.clone()));
    }
    let host = set(env, "POSTGRES_DB_HOST")?;
    // The key-value form needs no percent-encoding: a quoted value takes anything.
    let mut url = String::new();
    let parts = [
        ("host", Some(host)),
        ("port", set(env, "POSTGRES_DB_PORT")),
        ("dbname", set(env, "POSTGRES_DB_NAME")),
        ("user", set(env, "POSTGRES_DB_USER")),
        ("password", set(env, "POSTGRES_DB_PASSWORD")),
    ];
    for (name, value) in parts {
        if let Some(value) = value {
            let quoted = value.replace('\\', r"\\").replace('\'', r"\'");
            let _ = write!(url, "{name}='{quoted}' ");
        }
    }
    Some(("POSTGRES_DB_HOST", url.trim_end().to_owned()))
}
