//! The report of an audit: counts, and some of the differences.

use std::fmt;

use serde::Serialize;

/// The most differences that the report names.
pub(super) const MAX_EXAMPLES: usize = 20;

/// How an index can differ from its table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DifferenceKind {
    /// The row has a text, and the index has no record.
    Missing,
    /// The record is of another text or other metadata.
    Stale,
    /// There is a record, and no row with a text.
    Orphaned,
    /// The index is right, but the ledger's entry is not settled.
    Unsettled,
    /// The row cannot be read, so it cannot be compared.
    Unreadable,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.id, format!("{:?}", self.kind).to_lowercase())
    }
}

/// A difference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The row's id.
    pub id: String,
    /// How the index differs.
    pub kind: DifferenceKind,
}

/// The result of an audit. All counts are ids.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Rows of the source.
    pub rows: u64,
    /// Records of the index.
    pub indexed: u64,
    /// Rows with a text and without a record.
    pub missing: u64,
    /// Records of another text or other metadata.
    pub stale: u64,
    /// Records without a row.
    pub orphaned: u64,
    /// Ids that differ and could not be settled in time.
    pub undecided: u64,
    /// Rows that cannot be read, so they cannot be compared.
    pub unreadable: u64,
    /// Rows whose text was embedded again.
    pub sampled: u64,
    /// Sampled rows whose vector differs in the index.
    pub vector_mismatch: u64,
    /// Rows of the sample whose text could not be embedded again.
    pub unsampled: u64,
    /// The error of the embedder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unsampled_error: Option<String>,
    /// Ids that were queued to be done again.
    pub repaired: u64,
    /// Some of the differences.
    pub examples: Vec<Difference>,
}

impl Report {
    /// Ids that certainly differ.
    #[must_use]
    pub fn differences(&self) -> u64 {
        self.missing + self.stale + self.orphaned + self.vector_mismatch
    }

    /// Whether a part of the audit was not compared completely.
    #[must_use]
    pub fn is_partial(&self) -> bool {
        self.undecided + self.unreadable + self.unsampled > 0
    }

    /// Counts rows that cannot be read, once each, and names some.
    pub(super) fn name_unreadable(&mut self, ids: Vec<String>) {
        self.unreadable += ids.len() as u64;
        let room = MAX_EXAMPLES.saturating_sub(self.examples.len());
        let named = ids.into_iter().take(room).map(|id| Difference { id, kind: DifferenceKind::Unreadable });
        self.examples.extend(named);
    }
}

impl fmt::Display for Report {
    /// One count per line, for people, and then some of the differences.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [
            ("rows", self.rows),
            ("indexed", self.indexed),
            ("missing", self.missing),
            ("stale", self.stale),
            ("orphaned", self.orphaned),
            ("undecided", self.undecided),
            ("unreadable", self.unreadable),
            ("repaired", self.repaired),
        ];
        for (name, count) in counts {
            writeln!(f, "{name:<16} {count}")?;
        }
        writeln!(f, "{:<16} {} compared, {} otherwise", "vectors", self.sampled, self.vector_mismatch)?;
        if let Some(error) = &self.unsampled_error {
            writeln!(f, "{:<16} {} of them: {error}", "not compared", self.unsampled)?;
        }
        self.examples.iter().try_for_each(|one| writeln!(f, "  {:<14} {:?}", one.id, one.kind))
    }
}
