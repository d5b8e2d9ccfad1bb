//! What a migration tells.

use serde::Serialize;

/// What a migration did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Migrations applied, by name.
    pub applied: Vec<String>,
    /// Tables, queues and extensions made.
    pub created: Vec<String>,
    /// What was taken off: triggers of a system that this one takes over from.
    pub removed: Vec<String>,
    /// Tables on which capture was armed.
    pub armed: Vec<String>,
    /// Rows queued because they were there before capture was.
    pub queued: u64,
    /// What is not kept in step, and why.
    pub warnings: Vec<String>,
    /// What is left to the user to do or to know.
    pub notes: Vec<String>,
}
