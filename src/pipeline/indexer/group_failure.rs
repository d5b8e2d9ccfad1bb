//! The failure of a group.

use crate::pipeline::failure::Error;

/// The reason why the rest of a group could not be written.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: Error,
    /// Whether the embedder failed.
    pub(super) at_embedder: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, at_embedder: false }
    }
}

impl Failure {
    /// A failure to embed texts.
    pub(super) fn at_embedder(error: Error) -> Self {
        Self { error, at_embedder: true }
    }
}
