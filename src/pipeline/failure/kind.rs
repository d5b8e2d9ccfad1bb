//! The table of failures: each kind, its class, and what the operator does about it.
//!
//! A backend maps its own codes (SQLSTATE, codes of SQS, statuses of HTTP) to a kind. All that is decided
//! about a failure follows from the kind.

use std::fmt;

/// What the program does about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Trying again may help: a lost connection, a rate limit, a serialization conflict.
    Retryable,
    /// The same work fails again for ever: a malformed message, a value the index refuses.
    Permanent,
    /// No work is possible until somebody repairs the cause: a missing table, a refused password, an index of
    /// the wrong shape. A role that starts ends; a role at work holds its work.
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

/// What kind of failure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FailureKind {
    /// No connection was made, so the request was not sent.
    Unreachable,
    /// The connection broke after the request may have been sent.
    ConnectionLost,
    /// No answer came in time.
    TimedOut,
    /// The backend asks for fewer requests.
    RateLimited,
    /// The backend failed by its own fault, or lacks memory, disk or connections.
    Overloaded,
    /// Another process or transaction worked on the same data at the same time.
    Conflict,
    /// This worker has no session in the database, so that it must not write.
    NoSession,
    /// The source is not as it was described: its table, its rights, or the settings of other processes.
    SourceChanged,
    /// A row-level policy would hide rows from this role.
    HiddenRows,
    /// The account has no credit left.
    NoCredit,
    /// The answer is not one of the protocol.
    UnexpectedAnswer,
    /// Stored data is damaged.
    DamagedData,
    /// The rows at hand are beyond a limit of the backend, or a trigger raised an error over them.
    SuspectRows,
    /// The backend refuses the data.
    RefusedData,
    /// The data is not what this program can read or write.
    Malformed,
    /// The backend does not support the request.
    Unsupported,
    /// The credentials are refused, or do not allow this.
    RefusedCredentials,
    /// A resource named by a setting does not exist.
    MissingResource,
    /// The resource has another shape: length, model or metric.
    WrongShape,
    /// A setting is wrong.
    WrongSetting,
    /// The backend and this build are of versions that do not go together.
    WrongVersion,
    /// Even harmless data is refused, so the data of the request is not at fault.
    RefusesAll,
    /// This process itself is broken, for example because a thread has ended. Another process can continue.
    ProcessBroken,
}

/// A kind's line in the table.
#[derive(Clone, Copy)]
struct Policy {
    class: Class,
    /// Whether what was asked for may have been done, or may yet be, all the same.
    is_doubtful: bool,
    /// Whether the rows at hand may be at fault, and not the world.
    is_about_rows: bool,
    remedy: &'static str,
}

const fn retryable(remedy: &'static str) -> Policy {
    Policy { class: Class::Retryable, is_doubtful: false, is_about_rows: false, remedy }
}

const fn doubtful(remedy: &'static str) -> Policy {
    Policy { is_doubtful: true, ..retryable(remedy) }
}

const fn about_rows(class: Class, remedy: &'static str) -> Policy {
    Policy { class, is_about_rows: true, ..retryable(remedy) }
}

const fn fatal(remedy: &'static str) -> Policy {
    Policy { class: Class::Fatal, ..retryable(remedy) }
}

impl FailureKind {
    /// Every kind.
    pub const ALL: [Self; 23] = [
        Self::Unreachable,
        Self::ConnectionLost,
        Self::TimedOut,
        Self::RateLimited,
        Self::Overloaded,
        Self::Conflict,
        Self::NoSession,
        Self::SourceChanged,
        Self::HiddenRows,
        Self::NoCredit,
        Self::UnexpectedAnswer,
        Self::DamagedData,
        Self::SuspectRows,
        Self::RefusedData,
        Self::Malformed,
        Self::Unsupported,
        Self::RefusedCredentials,
        Self::MissingResource,
        Self::WrongShape,
        Self::WrongSetting,
        Self::WrongVersion,
        Self::RefusesAll,
        Self::ProcessBroken,
    ];

    /// The table.
    const fn policy(self) -> Policy {
        match self {
            Self::Unreachable => retryable("is the backend up, and its address right?"),
            Self::ConnectionLost => {
                doubtful("see the network between, and the backend's own log, if this lasts")
            }
            Self::TimedOut => doubtful("is the backend slow, or the timeout too short?"),
            Self::RateLimited => retryable("ask the provider for a higher limit if this lasts"),
            Self::Overloaded => doubtful("see the backend's own log if this lasts"),
            Self::Conflict => retryable("wait, or see who holds the locks if this lasts"),
            Self::NoSession => retryable("is the database up?"),
            Self::SourceChanged => {
                retryable("put the table back, or mend the settings, run refarch migrate and restart")
            }
            Self::HiddenRows => retryable("refarch's role needs BYPASSRLS"),
            Self::NoCredit => retryable("pay for more, or use another key"),
            Self::UnexpectedAnswer => retryable("is the address that of the right server?"),
            Self::DamagedData => {
                about_rows(Class::Retryable, "mend the database: restore it, or delete the damaged row")
            }
            Self::SuspectRows => about_rows(Class::Retryable, "mend the row, or the trigger that refuses it"),
            Self::RefusedData => about_rows(Class::Permanent, "mend the row, and run refarch redrive"),
            Self::Malformed => {
                about_rows(Class::Permanent, "see who wrote it: refarch redrive lists dead letters")
            }
            Self::Unsupported => about_rows(Class::Permanent, "use a newer version of the backend"),
            Self::RefusedCredentials => fatal("are the credentials right, and do they allow this?"),
            Self::MissingResource => {
                fatal("is its name right? refarch migrate makes what is refarch's own, and is missing")
            }
            Self::WrongShape => fatal("name another index, or another model, and run refarch migrate"),
            Self::WrongSetting => fatal("mend the setting"),
            Self::WrongVersion => fatal("use versions that go together, and run refarch migrate"),
            Self::RefusesAll => fatal("look at the settings of the embedder and of the index"),
            Self::ProcessBroken => fatal("start the process again, and report it"),
        }
    }

    /// What the program does about it.
    #[must_use]
    pub const fn class(self) -> Class {
        self.policy().class
    }

    /// What the operator does about it.
    #[must_use]
    pub const fn remedy(self) -> &'static str {
        self.policy().remedy
    }

    /// Whether what was asked for may have been done, or may yet be, all the same.
    #[must_use]
    pub const fn is_doubtful(self) -> bool {
        self.policy().is_doubtful
    }

    /// Whether it arose over the rows at hand, so that they may be at fault and not the world: never for a
    /// lost connection, a deadlock or a rate limit.
    #[must_use]
    pub const fn is_about_rows(self) -> bool {
        self.policy().is_about_rows
    }

    /// Whether this process is what is broken, so that only another one can go on.
    #[must_use]
    pub const fn is_of_process(self) -> bool {
        matches!(self, Self::ProcessBroken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_stands_in_the_table_once_and_says_what_to_do() {
        let distinct: std::collections::HashSet<FailureKind> = FailureKind::ALL.into();
        assert_eq!(distinct.len(), FailureKind::ALL.len());
        for kind in FailureKind::ALL {
            assert!(!kind.remedy().is_empty(), "{kind:?}");
            // Only who may try again can be in doubt of the first try.
            assert!(!kind.is_doubtful() || kind.class() == Class::Retryable, "{kind:?}");
            assert!(!(kind.is_doubtful() && kind.is_about_rows()), "{kind:?}");
            // What another process can do needs nobody's mending of data.
            assert!(!kind.is_of_process() || kind.class() == Class::Fatal, "{kind:?}");
        }
    }
}
