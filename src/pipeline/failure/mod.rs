//! Every error that a backend can raise, by its kind. [`FailureKind`] is the table of what is done about
//! each.

mod kind;

use std::any::Any;
use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

pub use kind::{Class, FailureKind};

/// Another error that lies under one of ours.
type Source = Box<dyn StdError + Send + Sync>;

/// A failure of one of the pipeline's backends.
#[derive(Debug)]
pub struct Error {
    kind: FailureKind,
    /// What was being done, such as "read the ledger".
    what: String,
    /// How long the backend asks to be left alone.
    retry_after: Option<Duration>,
    /// What went wrong, where the source does not say it itself.
    said: Option<String>,
    /// What the operator does about it, where that is more than the kind's own remedy.
    remedy: Option<&'static str>,
    source: Option<Source>,
    /// Whether it arose over a change, by where it arose.
    over_the_change: bool,
}

/// A result whose error has a kind.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failure in words of our own.
    pub fn new(kind: FailureKind, what: impl Into<String>, said: impl fmt::Display) -> Self {
        Self { said: Some(said.to_string()), ..Self::bare(kind, what.into()) }
    }

    /// A failure that another error tells.
    pub fn caused(kind: FailureKind, what: impl Into<String>, source: impl Into<Source>) -> Self {
        Self { source: Some(source.into()), ..Self::bare(kind, what.into()) }
    }

    /// A panic, as a failure of what was being done.
    pub fn panicked(what: impl Into<String>, payload: &(dyn Any + Send)) -> Self {
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        Self::new(FailureKind::Panicked, what, format_args!("it panicked: {}", text.unwrap_or("no reason")))
    }

    fn bare(kind: FailureKind, what: String) -> Self {
        Self { kind, what, retry_after: None, said: None, remedy: None, source: None, over_the_change: false }
    }

    /// The same failure in words of our own, with the error that lies under it.
    #[must_use]
    pub fn because(self, source: impl Into<Source>) -> Self {
        Self { source: Some(source.into()), ..self }
    }

    /// The same failure, with what the operator does about it, if that is known
    /// more closely than by its kind.
    #[must_use]
    pub fn with_remedy(self, remedy: impl Into<Option<&'static str>>) -> Self {
        Self { remedy: remedy.into(), ..self }
    }

    /// The same failure, of something else that was being done.
    #[must_use]
    pub fn amid(self, what: impl Into<String>) -> Self {
        Self { what: what.into(), ..self }
    }

    /// The same failure, of a backend that asks to be left alone for so long.
    #[must_use]
    pub fn with_pause(self, retry_after: Option<Duration>) -> Self {
        Self { retry_after, ..self }
    }

    /// The same failure, of another kind by what is known of its circumstances.
    #[must_use]
    pub fn of_kind(self, kind: FailureKind) -> Self {
        Self { kind, ..self }
    }

    /// The same failure, as one that arose over the change itself.
    #[must_use]
    pub fn over_the_change(self) -> Self {
        Self { over_the_change: true, ..self }
    }

    /// The kind.
    #[must_use]
    pub fn kind(&self) -> FailureKind {
        self.kind
    }

    /// What was being done.
    #[must_use]
    pub fn what(&self) -> &str {
        &self.what
    }

    /// How long the backend asks to be left alone. It is obeyed where requests are sent.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// What the program does about it.
    #[must_use]
    pub fn class(&self) -> Class {
        self.kind.class()
    }

    /// Whether what was asked for may have been done, or may yet be, all the same.
    #[must_use]
    pub fn is_doubtful(&self) -> bool {
        self.kind.is_doubtful()
    }

    /// Whether it arose over the change itself, so that the change may be at fault and not the world.
    #[must_use]
    pub fn is_about_change(&self) -> bool {
        self.over_the_change || self.kind.is_about_rows()
    }

    /// Whether a fatal failure may pass without a change of the settings.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        self.kind.may_pass()
    }

    /// Whether this process is what is broken, so that only another one can go on.
    #[must_use]
    pub fn is_of_process(&self) -> bool {
        self.kind.is_of_process()
    }

    /// What the operator does about it.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        self.remedy.unwrap_or_else(|| self.kind.remedy())
    }

    /// What went wrong, without what was being done.
    #[must_use]
    pub fn message(&self) -> String {
        let mut text = match (&self.said, &self.source) {
            (Some(said), _) => said.clone(),
            (None, Some(source)) => chain(&**source),
            (None, None) => String::new(),
        };
        // Words of our own say what to do; another program's do not.
        let is_told = self.remedy.is_some() || self.said.is_none() && self.class() == Class::Fatal;
        if is_told {
            text.push_str("; ");
            text.push_str(self.remedy());
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.message())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// An error with what lies under it, on one line. One of ours tells itself what lies under it.
#[must_use]
pub fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = String::new();
    for cause in causes(error) {
        let told = cause.to_string();
        if text.is_empty() {
            text = told;
        } else if !text.ends_with(&told) {
            text.push_str(": ");
            text.push_str(&told);
        }
        if cause.is::<Error>() {
            break;
        }
    }
    text
}

/// An error, and what lies under it.
pub fn causes<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let error = next?;
        next = error.source();
        Some(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the outer one")]
    struct Outer(#[source] std::io::Error);

    fn outer() -> Outer {
        Outer(std::io::Error::other("the inner one"))
    }

    #[test]
    fn an_error_keeps_its_source_and_tells_it_once() {
        let error = Error::caused(FailureKind::ConnectionLost, "read the ledger", outer());
        assert_eq!(error.to_string(), "read the ledger: the outer one: the inner one");
        assert!(matches!(error.source(), Some(source) if source.is::<Outer>()));
        assert_eq!(chain(&error), error.to_string(), "not again what it has told");
        let own = Error::new(FailureKind::WrongSetting, "use it", "mend it").because(outer());
        assert_eq!(own.to_string(), "use it: mend it");
        assert!(own.source().is_some());
    }

    #[test]
    fn what_another_program_says_is_told_with_what_to_do() {
        let fatal = Error::caused(FailureKind::RefusedCredentials, "connect", outer());
        let remedy = FailureKind::RefusedCredentials.remedy();
        assert_eq!(fatal.to_string(), format!("connect: the outer one: the inner one; {remedy}"));
        let closer = fatal.with_remedy("is the key right?");
        assert!(closer.to_string().ends_with("the inner one; is the key right?"), "{closer}");
        assert_eq!(closer.of_kind(FailureKind::Conflict).class(), Class::Retryable);
    }
}
