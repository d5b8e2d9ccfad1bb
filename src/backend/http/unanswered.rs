//! Requests that got no answer.

use crate::pipeline::failure::{FailureKind, chain};

/// The kind of failure of a request without an answer.
pub(in crate::backend) fn kind(error: &reqwest::Error) -> FailureKind {
    if error.is_timeout() {
        FailureKind::TimedOut
    } else if error.is_connect() {
        // No server received the request, so no server will apply it.
        FailureKind::Unreachable
    } else if error.is_decode() {
        FailureKind::UnexpectedAnswer
    } else {
        FailureKind::ConnectionLost
    }
}

/// The cause of an error, as text. The error's own text is left out, because it contains the URL, which may
/// hold ids or a secret.
pub(in crate::backend) fn reason(error: &reqwest::Error) -> Option<String> {
    std::error::Error::source(error).map(chain)
}
