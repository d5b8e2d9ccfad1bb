//! The keys that refarch adds to a record's metadata, beside the row's columns.
//!
//! All of these keys begin with [`RESERVED_METADATA_PREFIX`], and no column may, so neither overwrites the
//! other. Older versions used the names without the prefix. Their records are still read, so that an upgrade
//! rewrites nothing. The exception is a table with a column of one of these names: then the value may be
//! refarch's instead of the column's, so the record is written anew.

use serde_json::{Map, Value};

use crate::config::RESERVED_METADATA_PREFIX;
use crate::pipeline::index::Record;
use crate::pipeline::source_row::Hash;

const CONTENT_HASH: &str = "_refarch_content_hash";
const METADATA_HASH: &str = "_refarch_metadata_hash";
const VERSION: &str = "_refarch_version";

/// The keys of older versions, without the prefix.
const OLD_CONTENT_HASH: &str = "content_hash";
const OLD_METADATA_HASH: &str = "metadata_hash";
const OLD_VERSION: &str = "version";

pub(super) fn is_ours(key: &str) -> bool {
    key.starts_with(RESERVED_METADATA_PREFIX)
}

/// Adds the keys of refarch to the row's columns.
pub(super) fn add(metadata: &mut Map<String, Value>, record: &Record) {
    metadata.insert(CONTENT_HASH.into(), hex(&record.row.content_hash).into());
    metadata.insert(METADATA_HASH.into(), hex(&record.row.metadata_hash).into());
    metadata.insert(VERSION.into(), record.version.into());
}

/// Whether the keys of older versions can be told from the row's columns.
#[derive(Clone, Copy, Debug)]
pub(super) struct OldKeys {
    are_ours: bool,
}

impl OldKeys {
    /// For these metadata columns.
    pub(super) fn beside(columns: &[String]) -> Self {
        let old = [OLD_CONTENT_HASH, OLD_METADATA_HASH, OLD_VERSION];
        Self { are_ours: !columns.iter().any(|column| old.contains(&column.as_str())) }
    }

    /// The content hash and the metadata hash in a record.
    pub(super) fn hashes(self, metadata: &Map<String, Value>) -> (Option<Hash>, Option<Hash>) {
        let has_ours = metadata.keys().any(|key| is_ours(key));
        let of = |key: &str, old: &str| match (has_ours, self.are_ours) {
            (true, _) => unhex(metadata.get(key)),
            (false, true) => unhex(metadata.get(old)),
            (false, false) => None,
        };
        (of(CONTENT_HASH, OLD_CONTENT_HASH), of(METADATA_HASH, OLD_METADATA_HASH))
    }
}

fn hex(hash: &Hash) -> String {
    use std::fmt::Write as _;
    hash.0.iter().fold(String::with_capacity(64), |mut text, byte| {
        // Writing to a string can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(value: Option<&Value>) -> Option<Hash> {
    let text = value?.as_str().filter(|text| text.len() == 64 && text.is_ascii())?;
    let bytes: Option<Vec<u8>> =
        (0..32).map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok()).collect();
    Hash::from_bytes(&bytes?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn hashes_survive_their_journey() {
        let hash = Hash([0xa7; 32]);
        assert_eq!(unhex(Some(&hex(&hash).into())), Some(hash));
        for wrong in ["", "a7", &"zz".repeat(32), &"é".repeat(32)] {
            assert_eq!(unhex(Some(&wrong.into())), None);
        }
    }

    #[test]
    fn old_keys_count_only_where_no_column_has_their_names() {
        let (a, b) = (Hash([1; 32]), Hash([2; 32]));
        let of = |value: Value| value.as_object().unwrap().clone();
        let old = of(json!({ "content_hash": hex(&a), "metadata_hash": hex(&b), "version": 7 }));
        let new = of(
            json!({ "_refarch_content_hash": hex(&a), "_refarch_metadata_hash": hex(&b), "version": "v1" }),
        );
        let columns = |name: &str| OldKeys::beside(&["id".to_owned(), name.to_owned()]);
        assert_eq!(columns("name").hashes(&old), (Some(a), Some(b)));
        assert_eq!(columns("version").hashes(&old), (None, None));
        for name in ["name", "version", "content_hash"] {
            assert_eq!(columns(name).hashes(&new), (Some(a), Some(b)), "{name}");
        }
        // If a record has some of the new keys, the missing ones are not taken from the old keys.
        let mut part = new.clone();
        part.remove("_refarch_metadata_hash");
        part.insert("metadata_hash".into(), hex(&b).into());
        assert_eq!(columns("name").hashes(&part), (Some(a), None));
    }
}
