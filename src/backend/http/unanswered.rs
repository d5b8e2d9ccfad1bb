//! What it means that no answer came.

use crate::pipeline::failure::{FailureKind, chain};

/// The kind of failure that a request came to without an answer.
pub(in crate::backend) fn kind(error: &reqwest::Error) -> FailureKind {
    if error.is_timeout() {
        FailureKind::TimedOut
    } else if error.is_connect() {
        // Nobody took the request, so nobody will apply it.
        FailureKind::Unreachable
    } else if error.is_decode() {
        FailureKind::UnexpectedAnswer
    } else {
        FailureKind::ConnectionLost
    }
}

/// What lies under such an error. The error itself names the address, which may hold ids or a secret.
pub(in crate::backend) fn reason(error: &reqwest::Error) -> Option<String> {
    std::error::Error::source(error).map(chain)
}
