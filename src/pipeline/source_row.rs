//! The rows of the source, and the hashes that show whether the index holds their newest content.

use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};

/// A SHA-256 hash of a row's text or of its metadata.
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

/// The model, its precision and the text template. Together with the text they decide a row's vector.
///
/// The hash is plain SHA-256 over `salt || 0x00 || text`, so that SQL can compute it too:
/// `sha256(convert_to($salt, 'UTF8') || '\x00' || convert_to(text, 'UTF8'))`. A blank text counts as an empty text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentSalt(String);

impl ContentSalt {
    /// The salt of a model (with its precision) and a text template.
    #[must_use]
    pub fn new(model: &str, template: &str) -> Self {
        Self(format!("{model}\u{1}{template}"))
    }

    /// A salt that the database stored.
    #[must_use]
    pub fn stored(salt: String) -> Self {
        Self(salt)
    }

    /// The salt as text, for hashing in SQL.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The content hash of a text. Null, blank and empty texts have the same hash. So the hash alone shows that
    /// a row has no vector.
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

/// A row of the source as the indexer reads the row.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceRow {
    /// The row's id, as text.
    pub id: String,
    /// The text to embed. If the row has no text, this is empty, and the row has no vector.
    pub text: Arc<str>,
    /// [`ContentSalt::hash`] of the text.
    pub content_hash: Hash,
    /// The metadata columns as a JSON object, with nulls left out.
    pub metadata: Arc<str>,
    /// SHA-256 of the metadata.
    pub metadata_hash: Hash,
}

impl SourceRow {
    /// Whether the row has a text to embed. A row with a null, empty or blank text has no vector.
    #[must_use]
    pub fn has_text(&self) -> bool {
        !self.text.trim().is_empty()
    }
}
