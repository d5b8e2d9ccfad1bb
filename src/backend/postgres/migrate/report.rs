//! The report of a migration.

use serde::Serialize;

/// What a migration did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Migrations applied, by name.
    pub applied: Vec<String>,
    /// Tables, queues and extensions made.
    pub created: Vec<String>,
    /// Triggers that were removed: those of a replaced system, and our own on tables that are no longer
    /// indexed.
    pub removed: Vec<String>,
    /// Tables on which capture triggers were installed.
    pub armed: Vec<String>,
    /// Rows queued because they existed before capture.
    pub queued: u64,
    /// Changes and contents that are not covered, and why.
    pub warnings: Vec<String>,
    /// What the user should know or do.
    pub notes: Vec<String>,
}
