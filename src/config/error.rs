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
    /// A file is not TOML. The error shows nothing of its text, which may be a password.
    #[error("{origin} is not valid TOML: {position}{message}")]
    Syntax {
        /// The file.
        origin: String,
        /// Line and column, and the key there if refarch has such a setting.
        position: String,
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
