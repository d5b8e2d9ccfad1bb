//! Where unchanged rows and texts are recognised.
//!
//! Only this module compares a row's hashes with the hashes of an index's record. Knowledge of a record is a
//! [`Known`], and [`needed`] returns the work that is left. The sources of knowledge are:
//!
//! - the ledger's entry ([`Entry::known`](super::ledger::Entry::known)): before a group is written, after
//!   a write, and in an audit;
//! - an id that was opened for a write ([`Opened::known`](super::ledger::Opened::known)), and the index's own
//!   copy of its record ([`Stored::known`](super::index::Stored::known)): whether the vector can be used
//!   again;
//! - the row that a write rests on: whether the row is still the same once its entry is locked.

use super::source_row::{Hash, SourceRow};

/// The knowledge of the record that an index holds for an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// The id was never worked on, so the index holds nothing.
    Never,
    /// Nothing is known: the index may hold any record, or none.
    Unknown,
    /// The index holds nothing, because the row was gone.
    Deleted,
    /// The index holds what a row with these hashes becomes: nothing, if that row had no text.
    Hashes {
        /// The row's content hash, if it is known.
        content: Option<Hash>,
        /// The row's metadata hash, if it is known.
        metadata: Option<Hash>,
    },
}

impl Known {
    /// What an index holds after this row was written to it.
    #[must_use]
    pub fn written(row: Option<&SourceRow>) -> Self {
        row.map_or(Self::Deleted, |row| Self::Hashes {
            content: Some(row.content_hash),
            metadata: Some(row.metadata_hash),
        })
    }
}

/// The work that is left until the index holds the id's row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing: the index and the ledger agree with the row.
    Nothing,
    /// The metadata. The vector stands, because the text is the same.
    Metadata,
    /// A new vector, and the metadata with it.
    Vector,
    /// A delete: the row is gone or has no text.
    Delete,
}

impl Need {
    /// Whether the record's vector is that of the row's text. Of a row without a text there is no vector.
    #[must_use]
    pub fn keeps_vector(self) -> bool {
        matches!(self, Self::Nothing | Self::Metadata)
    }
}

/// The work that is left for an id with this row.
#[must_use]
pub fn needed(row: Option<&SourceRow>, known: Known) -> Need {
    let Some(row) = row else {
        return match known {
            Known::Never | Known::Deleted => Need::Nothing,
            Known::Unknown | Known::Hashes { .. } => Need::Delete,
        };
    };
    let same_text = matches!(known, Known::Hashes { content, .. } if content == Some(row.content_hash));
    let same_metadata =
        matches!(known, Known::Hashes { metadata, .. } if metadata == Some(row.metadata_hash));
    if same_text && same_metadata {
        Need::Nothing
    } else if !row.has_text() {
        Need::Delete
    } else if same_text {
        Need::Metadata
    } else {
        Need::Vector
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(text: &str, metadata: u8) -> SourceRow {
        SourceRow {
            id: "1".into(),
            text: text.into(),
            content_hash: Hash([text.len() as u8; 32]),
            metadata: "{}".into(),
            metadata_hash: Hash([metadata; 32]),
        }
    }

    #[test]
    fn an_id_needs_what_is_not_known_to_be_there() {
        let (here, other, empty) = (row("text", 1), row("another text", 1), row("", 1));
        let moved = row("text", 2);
        let holds_here = Known::written(Some(&here));
        let cases = [
            (None, Known::Never, Need::Nothing),
            (None, Known::Deleted, Need::Nothing),
            (None, Known::Unknown, Need::Delete),
            (None, holds_here, Need::Delete),
            (Some(&here), holds_here, Need::Nothing),
            (Some(&moved), holds_here, Need::Metadata),
            (Some(&other), holds_here, Need::Vector),
            (Some(&here), Known::Never, Need::Vector),
            (Some(&here), Known::Unknown, Need::Vector),
            (Some(&here), Known::Deleted, Need::Vector),
            (Some(&empty), Known::written(Some(&empty)), Need::Nothing),
            (Some(&empty), Known::Never, Need::Delete),
            (Some(&empty), Known::Deleted, Need::Delete),
            (Some(&empty), holds_here, Need::Delete),
        ];
        for (row, known, need) in cases {
            assert_eq!(needed(row, known), need, "{row:?} {known:?}");
        }
    }
}
