//! Which kind of failure an error of PostgreSQL is.

use tokio_postgres::error::SqlState;

use super::tls;
use crate::pipeline::failure::{Error, FailureKind};

/// Whether an error says that a row-level policy would have hidden rows from a read. The check is by the name
/// of the function that raises the error, which is the same in every language.
pub(crate) fn hides_rows(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|said| {
        said.code() == &SqlState::INSUFFICIENT_PRIVILEGE && said.routine() == Some("check_enable_rls")
    })
}

/// Whether an error says that a prepared statement's plan no longer fits its tables.
pub(crate) fn is_outdated(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|said| {
        said.code() == &SqlState::FEATURE_NOT_SUPPORTED && said.routine() == Some("RevalidateCachedQuery")
    })
}

/// The failure of `what`, for `map_err`.
pub(crate) fn fail(what: &'static str) -> impl Fn(tokio_postgres::Error) -> Error {
    move |error| failure(what, error)
}

/// The failure of `what`. Its kind follows from the SQLSTATE of the error.
pub(crate) fn failure(what: &str, error: tokio_postgres::Error) -> Error {
    // Another attempt does not make a certificate valid.
    if let Some(hint) = tls::hint(&error) {
        return Error::caused(FailureKind::WrongSetting, what, error).with_remedy(hint);
    }
    if hides_rows(&error) {
        // Retryable, since the right may be granted at any time, and no change causes the error.
        let remedy = FailureKind::HiddenRows.remedy();
        return Error::caused(FailureKind::HiddenRows, what, error).with_remedy(remedy);
    }
    let kind = match error.code() {
        // The statement succeeds when it is prepared again.
        _ if is_outdated(&error) => FailureKind::Conflict,
        Some(code) => kind_of(code),
        // No SQLSTATE: the connection failed, or a value did not fit its parameter.
        None if error.is_closed() => FailureKind::ConnectionLost,
        None => {
            let wrong_value = std::error::Error::source(&error)
                .is_some_and(|source| source.downcast_ref::<std::io::Error>().is_none());
            if wrong_value { FailureKind::RefusedData } else { FailureKind::ConnectionLost }
        }
    };
    Error::caused(kind, what, error)
}

/// The kind of an SQLSTATE.
fn kind_of(code: &SqlState) -> FailureKind {
    match code.code() {
        // A wrong password, or a missing right.
        "28P01" | "28000" | "42501" => FailureKind::RefusedCredentials,
        // A missing database, schema, table, column, function, type or other object. No value of a row names one
        // of these in our statements, so rows are not at fault.
        "3D000" | "3F000" | "42P01" | "42703" | "42704" | "42883" => FailureKind::MissingResource,
        // A statement that was stopped, by its timeout or by somebody.
        "57014" => FailureKind::TimedOut,
        code => match &code[..2] {
            // Data that a type or a constraint refuses.
            "22" | "23" => FailureKind::RefusedData,
            "0A" | "42" => FailureKind::Unsupported,
            // Rows that a statement or a check on a view does not expect, a limit of the server, and what a
            // trigger raises.
            "21" | "27" | "44" | "54" | "P0" => FailureKind::SuspectRows,
            "XX" => FailureKind::DamagedData,
            "08" | "57" => FailureKind::ConnectionLost,
            "40" | "55" => FailureKind::Conflict,
            "53" | "58" => FailureKind::Overloaded,
            _ => FailureKind::UnexpectedAnswer,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::failure::Class;

    #[test]
    fn only_what_may_come_of_the_rows_at_hand_is_a_changes_fault() {
        let kind = |code: &str| kind_of(&SqlState::from_code(code));
        for code in ["22001", "22P02", "23505", "0A000", "42601", "42P07"] {
            assert_eq!(kind(code).class(), Class::Permanent, "{code}");
        }
        for code in ["28P01", "28000", "3D000", "42501", "42P01", "42703", "42704", "42883", "3F000"] {
            assert_eq!(kind(code).class(), Class::Fatal, "{code}");
        }
        for code in ["21000", "27000", "44000", "54000", "P0001", "XX001", "XX002"] {
            assert!(kind(code).class() == Class::Retryable && kind(code).is_about_rows(), "{code}");
        }
        for code in ["08006", "40001", "40P01", "53300", "55P03", "57014", "57P01", "58030", "25P02", "F0000"]
        {
            assert!(kind(code).class() == Class::Retryable && !kind(code).is_about_rows(), "{code}");
        }
    }
}
