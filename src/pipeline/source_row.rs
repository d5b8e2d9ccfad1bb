//! The rows that are kept in step, and the hashes that tell whether they are.

use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};

/// SHA-256 of what decides a vector or of what travels beside it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// Reads a hash as the database stores it.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in &self.0[..6] {
            write!(f, "{byte:02x}")?;
        }
        f.write_str("..")
    }
}

/// Everything besides the text that decides a row's vector: model, precision and text template.
///
/// The hash is plain SHA-256 over `salt || 0x00 || text`, so that SQL can compute it too:
/// `sha256(convert_to($salt, 'UTF8') || '\x00' || convert_to(text, 'UTF8'))`, a blank text as an empty one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentSalt(String);

impl ContentSalt {
    /// The salt of a model (with its precision) and a text template.
    #[must_use]
    pub fn new(model: &str, template: &str) -> Self {
        Self(format!("{model}\u{1}{template}"))
    }

    /// A salt that was stored.
    #[must_use]
    pub fn stored(salt: String) -> Self {
        Self(salt)
    }

    /// The salt as text, for hashing in SQL.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The content hash of a text. A row whose text is null or blank hashes like one with an empty text:
    /// neither has a vector, and the hash alone tells so.
    #[must_use]
    pub fn hash(&self, text: &str) -> Hash {
        let mut digest = Sha256::new();
        digest.update(self.0.as_bytes());
        digest.update([0]);
        if !text.trim().is_empty() {
            digest.update(text.as_bytes());
        }
        Hash(digest.finalize().into())
    }
}

/// A row of the source as the indexer sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceRow {
    /// The row's id, as text.
    pub id: String,
    /// The text to embed; empty when the row has none, and then the row has no vector.
    pub text: Arc<str>,
    /// [`ContentSalt::hash`] of the text.
    pub content_hash: Hash,
    /// The metadata columns as a JSON object, with nulls left out.
    pub metadata: Arc<str>,
    /// SHA-256 of the metadata.
    pub metadata_hash: Hash,
}

impl SourceRow {
    /// Whether the row has a vector at all: a null, empty or blank text has none.
    #[must_use]
    pub fn has_text(&self) -> bool {
        !self.text.trim().is_empty()
    }
}
