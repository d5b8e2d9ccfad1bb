//! Why settings could not be loaded.

use std::path::PathBuf;

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
    /// A file is not TOML. Nothing of its text is told, which may be a password.
    #[error("{origin} is not valid TOML: {place}{message}")]
    Syntax {
        /// The file.
        origin: String,
        /// Line and column, and the key there if it is one of ours.
        place: String,
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
