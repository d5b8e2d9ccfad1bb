//! The failure of a group.

use crate::pipeline::failure::Error;

/// Why nothing more of a group could be written.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: Error,
    /// Whether texts were what failed.
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
