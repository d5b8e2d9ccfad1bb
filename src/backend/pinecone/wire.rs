//! Bodies as they travel, and what is in them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::metadata_keys;
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::index::Record;

/// Bytes of a record's metadata, by Pinecone's limits.
pub(super) const MAX_METADATA: usize = 40 * 1024;

/// Characters of an id, by Pinecone's limits.
const MAX_ID: usize = 512;

/// Ids in one fetch, and bytes that they may take there: they travel in the URL.
const FETCH_IDS: usize = 50;
const FETCH_BYTES: usize = 8_000;

/// A record as it is sent. Not by way of a [`Value`], whose floats are wider: each would take twice
/// the digits.
#[derive(Debug, Serialize)]
pub(super) struct Sent<'a> {
    pub(super) id: &'a str,
    pub(super) values: &'a [f32],
    pub(super) metadata: Map<String, Value>,
}

#[derive(Debug, Serialize)]
pub(super) struct Upsert<'a> {
    pub(super) namespace: &'a str,
    pub(super) vectors: &'a [Sent<'a>],
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Vector {
    pub(super) id: String,
    #[serde(default)]
    pub(super) values: Vec<f32>,
    #[serde(default)]
    pub(super) metadata: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Fetched {
    #[serde(default)]
    pub(super) vectors: std::collections::HashMap<String, Vector>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Matches {
    #[serde(default)]
    pub(super) matches: Vec<Scored>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Scored {
    pub(super) id: String,
    pub(super) score: f32,
}

#[derive(Debug, Deserialize)]
pub(super) struct Listed {
    #[serde(default)]
    pub(super) vectors: Vec<Id>,
    pub(super) pagination: Option<Next>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Id {
    pub(super) id: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Next {
    pub(super) next: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Stats {
    pub(super) dimension: Option<usize>,
    #[serde(default)]
    pub(super) namespaces: std::collections::HashMap<String, NamespaceStats>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NamespaceStats {
    pub(super) vector_count: u64,
}

/// How many of the first ids fit into a URL; at least one, if there is one.
pub(super) fn fetched_at_once(ids: &[String]) -> usize {
    let mut bytes = 0;
    let fits = |id: &&String| {
        // Encoded, a byte takes three at most.
        bytes += "&ids=".len() + 3 * id.len();
        bytes <= FETCH_BYTES
    };
    ids.iter().take(FETCH_IDS).take_while(fits).count().max(1)
}

/// A record as it travels. What Pinecone would refuse for good is refused here, by the id's name.
/// Metadata that can't be read is refused: a number may be too large for JSON's reader here, and a record
/// without its metadata would pass for complete. Metadata that is too long is cut, the columns that were
/// embedded first.
pub(super) fn sent<'a>(record: &'a Record, text: &[String]) -> Result<Sent<'a>> {
    let id = &record.row.id;
    let wrong = |message: String| Error::new(FailureKind::RefusedData, "upsert records", message);
    if id.is_empty() || id.chars().count() > MAX_ID {
        let message =
            format!("an id of {} characters, and Pinecone takes 1 to {MAX_ID}: {id:.60}", id.chars().count());
        return Err(wrong(message));
    }
    if let Some(value) = record.embedding.iter().find(|value| !value.is_finite()) {
        return Err(wrong(format!("the vector of {id:?} holds {value}")));
    }
    let mut metadata: Map<String, Value> = serde_json::from_str(&record.row.metadata)
        .map_err(|error| wrong(format!("metadata of {id:?}: {error}")))?;
    metadata_keys::add(&mut metadata, record);
    if let Some(over) = shorten(&mut metadata, text) {
        let message = format!(
            "metadata of {id:?} is {over} bytes beyond Pinecone's {MAX_METADATA} with every text cut: name fewer columns in source.metadata"
        );
        return Err(wrong(message));
    }
    Ok(Sent { id, values: &record.embedding, metadata })
}

/// Cuts texts until the metadata is within the limit: those that were embedded first, since their vector
/// stands for them, then the longest. Returns by how many bytes it is still too long.
fn shorten(metadata: &mut Map<String, Value>, text: &[String]) -> Option<usize> {
    let mut over = written(metadata).saturating_sub(MAX_METADATA);
    if over == 0 {
        return None;
    }
    let mut texts: Vec<(bool, usize, String)> = metadata
        .iter()
        .filter(|(key, _)| !metadata_keys::is_ours(key))
        .filter_map(|(key, value)| {
            Some((!text.contains(key), usize::MAX - value.as_str()?.len(), key.clone()))
        })
        .collect();
    texts.sort();
    for (_, _, key) in texts {
        if let Some(Value::String(value)) = metadata.get_mut(&key) {
            cut(value, over);
        }
        over = written(metadata).saturating_sub(MAX_METADATA);
        if over == 0 {
            return None;
        }
    }
    Some(over)
}

/// Takes so many characters from a text's end that it is at least `bytes` shorter as JSON, if it is as long.
fn cut(value: &mut String, bytes: usize) {
    let mut saved = 0;
    while saved < bytes
        && let Some(last) = value.pop()
    {
        saved += match last {
            '"' | '\\' | '\n' | '\r' | '\t' | '\u{8}' | '\u{c}' => 2,
            control if control < ' ' => 6,
            other => other.len_utf8(),
        };
    }
}

/// Counts what is written to it.
struct Counter(usize);

impl std::io::Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Bytes of a value as JSON.
fn written(value: &impl Serialize) -> usize {
    let mut counter = Counter(0);
    // What can't be written will not be sent either.
    let _ = serde_json::to_writer(&mut counter, value);
    counter.0
}

/// A record's bytes as it travels, with the comma after it. Written out, as no bound would hold: JSON
/// escapes ids, and writes some numbers longer than PostgreSQL does.
pub(super) fn weight(record: &Record, text: &[String]) -> usize {
    sent(record, text).map_or(0, |sent| written(&sent)) + 1
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn long_metadata_is_cut_the_text_first() {
        let text = ["description".to_owned()];
        let of = |value: Value| value.as_object().unwrap().clone();
        let mut short = of(json!({ "description": "x", "n": 1 }));
        assert_eq!((shorten(&mut short, &text), short.len()), (None, 2));
        for filler in ["x", "é", "\"", "\n", "\u{1}", "日"] {
            let mut long = of(
                json!({ "name": "kept", "notes": "k".repeat(2_000), "description": filler.repeat(45_000) }),
            );
            assert_eq!(shorten(&mut long, &text), None);
            let bytes = serde_json::to_string(&long).unwrap().len();
            assert!((MAX_METADATA - 8..=MAX_METADATA).contains(&bytes), "{filler:?}: {bytes}");
            assert_eq!(
                (long["name"].as_str(), long["notes"].as_str().map(str::len)),
                (Some("kept"), Some(2_000))
            );
        }
        // Then the longest of the others.
        let mut both = of(json!({ "a": "a".repeat(100), "b": "b".repeat(50_000), "description": "d" }));
        assert_eq!(shorten(&mut both, &text), None);
        assert_eq!((both["a"].as_str().map(str::len), both["description"].as_str()), (Some(100), Some("")));
        let mut lists = of(json!({ "l": vec!["x".repeat(30_000); 2] }));
        assert!(shorten(&mut lists, &text).is_some_and(|over| over > 10_000));
    }
}
