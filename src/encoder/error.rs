//! The reasons why a model cannot be loaded.

use std::path::PathBuf;

/// Reason why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the model folder does not exist.
    #[error("there is no {}", .file.display())]
    Missing {
        /// Expected path.
        file: PathBuf,
    },
    /// A file of the model folder cannot be read.
    #[error("cannot read {}: {source}", .file.display())]
    Unreadable {
        /// Path of the file.
        file: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A file of the model folder is damaged, or has another format.
    #[error("{}: {why}", .file.display())]
    Malformed {
        /// Path of the file.
        file: PathBuf,
        /// The defect.
        why: String,
    },
    /// The encoder does not support this kind of model.
    #[error("{}: {why}", .file.display())]
    Unsupported {
        /// The file with the unsupported setting.
        file: PathBuf,
        /// The unsupported setting.
        why: String,
    },
    /// The CPU has no kernel for the settings.
    #[error("{0}")]
    Cpu(String),
}
