//! The table of failures: each kind, its class, and the operator's remedy.
//!
//! A backend maps its own codes (SQLSTATE, codes of SQS, statuses of HTTP) to a kind. Every decision about a
//! failure depends on the kind only.

use std::fmt;

/// What the program does about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Another attempt may succeed: a lost connection, a rate limit, a serialization conflict.
    Retryable,
    /// The same work always fails: a malformed message, a value that the index refuses.
    Permanent,
    /// No work is possible until an operator removes the cause: a missing table, a refused password, an index of
    /// the wrong shape. A role that starts exits. A role that runs keeps its messages and waits.
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

/// The kind of a failure.
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
    /// The backend itself failed, or lacks memory, disk or connections.
    Overloaded,
    /// Another process or transaction worked on the same data at the same time.
    Conflict,
    /// This worker has no session in the database. Without a session it must not write.
    NoSession,
    /// The source differs from its description: its table, its rights, or the settings of other processes.
    SourceChanged,
    /// A row-level policy would hide rows from this role.
    HiddenRows,
    /// The account has no credit left.
    NoCredit,
    /// The answer does not follow the protocol.
    UnexpectedAnswer,
    /// Stored data is damaged.
    DamagedData,
    /// The rows of the request exceed a limit of the backend, or a trigger raised an error because of them.
    SuspectRows,
    /// Code of this program panicked.
    Panicked,
    /// The backend refuses the data.
    RefusedData,
    /// This program cannot read or write the data.
    Malformed,
    /// The backend does not support the request.
    Unsupported,
    /// The backend refuses the credentials, or they lack a right.
    RefusedCredentials,
    /// A resource named by a setting does not exist.
    MissingResource,
    /// The resource has another shape: length, model or metric.
    WrongShape,
    /// A setting is wrong.
    WrongSetting,
    /// The version of the backend and the version of this build are not compatible.
    WrongVersion,
    /// The backend refuses even harmless data. So the data of the request is not the cause.
    RefusesAll,
    /// This process itself is broken, for example because a thread has ended. Another process can continue.
    ProcessBroken,
}

/// The line of one kind in the table.
#[derive(Clone, Copy)]
struct Policy {
    class: Class,
    /// Whether the backend may have done the request, or may still do it, although the request failed.
    is_doubtful: bool,
    /// Whether the rows of the request may be the cause.
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
    pub const ALL: [Self; 24] = [
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
        Self::Panicked,
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

    /// The kind's name in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::ConnectionLost => "connection_lost",
            Self::TimedOut => "timed_out",
            Self::RateLimited => "rate_limited",
            Self::Overloaded => "overloaded",
            Self::Conflict => "conflict",
            Self::NoSession => "no_session",
            Self::SourceChanged => "source_changed",
            Self::HiddenRows => "hidden_rows",
            Self::NoCredit => "no_credit",
            Self::UnexpectedAnswer => "unexpected_answer",
            Self::DamagedData => "damaged_data",
            Self::SuspectRows => "suspect_rows",
            Self::Panicked => "panicked",
            Self::RefusedData => "refused_data",
            Self::Malformed => "malformed",
            Self::Unsupported => "unsupported",
            Self::RefusedCredentials => "refused_credentials",
            Self::MissingResource => "missing_resource",
            Self::WrongShape => "wrong_shape",
            Self::WrongSetting => "wrong_setting",
            Self::WrongVersion => "wrong_version",
            Self::RefusesAll => "refuses_all",
            Self::ProcessBroken => "process_broken",
        }
    }

    /// The table.
    const fn policy(self) -> Policy {
        match self {
            Self::Unreachable => retryable("is the backend running, and is its address right?"),
            Self::ConnectionLost => doubtful("if this lasts, check the network and the backend's own log"),
            Self::TimedOut => doubtful("is the backend slow, or is the timeout too short?"),
            Self::RateLimited => retryable("if this lasts, ask the provider for a higher limit"),
            Self::Overloaded => doubtful("if this lasts, check the backend's own log"),
            Self::Conflict => retryable("wait; if this lasts, find the session that holds the locks"),
            Self::NoSession => retryable("is the database running?"),
            Self::SourceChanged => {
                retryable("restore the table; or correct the settings, run refarch migrate and restart")
            }
            Self::HiddenRows => retryable("give refarch's database role the attribute BYPASSRLS"),
            Self::NoCredit => retryable("buy credit, or use another key"),
            Self::UnexpectedAnswer => retryable("does the address lead to the right server?"),
            Self::DamagedData => {
                about_rows(Class::Retryable, "restore the database, or delete the damaged row")
            }
            Self::SuspectRows => {
                about_rows(Class::Retryable, "correct the row, or the trigger that refuses the row")
            }
            Self::Panicked => about_rows(Class::Retryable, "report the error with its place in the code"),
            Self::RefusedData => about_rows(Class::Permanent, "correct the row, and run refarch redrive"),
            Self::Malformed => about_rows(
                Class::Permanent,
                "find out which program wrote the data; refarch redrive lists the dead letters",
            ),
            Self::Unsupported => about_rows(Class::Permanent, "use a newer version of the backend"),
            Self::RefusedCredentials => {
                fatal("are the credentials right, and do they have the right to do this?")
            }
            Self::MissingResource => {
                fatal("is the name right? refarch migrate creates missing objects of refarch")
            }
            Self::WrongShape => {
                fatal("name another index or another model in the settings, and run refarch migrate")
            }
            Self::WrongSetting => fatal("correct the setting"),
            Self::WrongVersion => fatal("use compatible versions, and run refarch migrate"),
            Self::RefusesAll => fatal("check the settings of the embedder and of the index"),
            Self::ProcessBroken => fatal("start the process again, and report the error"),
        }
    }

    /// What the program does about the failure.
    #[must_use]
    pub const fn class(self) -> Class {
        self.policy().class
    }

    /// What the operator does about the failure.
    #[must_use]
    pub const fn remedy(self) -> &'static str {
        self.policy().remedy
    }

    /// Whether the backend may have done the request, or may still do it, although the request failed.
    #[must_use]
    pub const fn is_doubtful(self) -> bool {
        self.policy().is_doubtful
    }

    /// Whether the rows of the request may be the cause. They never are for a lost connection, a deadlock or a
    /// rate limit.
    #[must_use]
    pub const fn is_about_rows(self) -> bool {
        self.policy().is_about_rows
    }

    /// Whether a fatal failure may pass without a change of the settings: a database that is being restored
    /// has its tables and rights again soon.
    #[must_use]
    pub const fn may_pass(self) -> bool {
        matches!(self, Self::MissingResource | Self::RefusedCredentials)
    }

    /// Whether this process is broken, so that only another process can continue.
    #[must_use]
    pub const fn is_of_process(self) -> bool {
        matches!(self, Self::ProcessBroken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_in_the_table_once_and_has_a_remedy() {
        let distinct: std::collections::HashSet<FailureKind> = FailureKind::ALL.into();
        assert_eq!(distinct.len(), FailureKind::ALL.len());
        // The metrics count by place.
        assert!(FailureKind::ALL.into_iter().enumerate().all(|(at, kind)| kind as usize == at));
        for kind in FailureKind::ALL {
            assert!(!kind.remedy().is_empty(), "{kind:?}");
            // A failure in doubt is tried again, so its kind is retryable.
            assert!(!kind.is_doubtful() || kind.class() == Class::Retryable, "{kind:?}");
            assert!(!(kind.is_doubtful() && kind.is_about_rows()), "{kind:?}");
            assert!(!kind.may_pass() || kind.class() == Class::Fatal, "{kind:?}");
            // A broken process ends, so the kind is fatal. Another process does the work.
            assert!(!kind.is_of_process() || kind.class() == Class::Fatal, "{kind:?}");
        }
    }
}
