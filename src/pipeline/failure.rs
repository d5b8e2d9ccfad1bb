//! Every error that a backend can raise, sorted into what is done about it.

use std::fmt;
use std::time::Duration;

/// What is to be done about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Trying again may help: a lost connection, a rate limit, a serialization conflict.
    Retryable,
    /// The same work fails again for ever: a malformed message, a value the index refuses.
    Permanent,
    /// Nothing can go on until somebody mends it: a missing table, a refused password, an index of the
    /// wrong shape. Ends a role that starts; one that works holds its work.
    Fatal,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Retryable => "retryable",
            Self::Permanent => "permanent",
            Self::Fatal => "fatal",
        })
    }
}

/// A failure of one of the pipeline's backends, with its class.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {message}")]
pub struct Error {
    /// What is to be done about it.
    pub class: Class,
    /// What was being done, such as "read the ledger".
    pub what: String,
    /// What went wrong, in the backend's own words.
    pub message: String,
    /// How long the backend asks to be left alone.
    pub retry_after: Option<Duration>,
    /// Whether what was asked for may have been done, or may yet be, all the same: a timeout, a
    /// connection that broke, a server's own error.
    pub doubtful: bool,
    /// Whether it arose over the change itself, so that the change may be at fault and not the world:
    /// never for a lost connection, a deadlock or a rate limit. Who raises it knows: the backend, by its code.
    pub about_change: bool,
    /// Whether this process is what is broken, so that only another one can go on.
    pub of_process: bool,
}

/// A result whose error is classed.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of the given class.
    pub fn new(class: Class, what: impl Into<String>, message: impl fmt::Display) -> Self {
        Self {
            class,
            what: what.into(),
            message: message.to_string(),
            retry_after: None,
            doubtful: false,
            about_change: false,
            of_process: false,
        }
    }

    /// A failure that another try may mend.
    pub fn retryable(what: impl Into<String>, message: impl fmt::Display) -> Self {
        Self::new(Class::Retryable, what, message)
    }

    /// A failure after which nobody knows whether the work was done.
    pub fn doubtful(what: impl Into<String>, message: impl fmt::Display) -> Self {
        Self { doubtful: true, ..Self::retryable(what, message) }
    }

    /// The same failure, as one that arose over the change itself.
    #[must_use]
    pub fn over_the_change(self) -> Self {
        Self { about_change: true, ..self }
    }

    /// A failure that will come again however often this is tried.
    pub fn permanent(what: impl Into<String>, message: impl fmt::Display) -> Self {
        Self::new(Class::Permanent, what, message)
    }

    /// A failure that ends the role.
    pub fn fatal(what: impl Into<String>, message: impl fmt::Display) -> Self {
        Self::new(Class::Fatal, what, message)
    }

    /// A failure of this process itself, such as a thread that has ended.
    pub fn of_process(what: impl Into<String>, message: impl fmt::Display) -> Self {
        Self { of_process: true, ..Self::fatal(what, message) }
    }
}
