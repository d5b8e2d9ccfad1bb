//! The bodies of requests and answers.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::metadata_keys;
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::index::Record;

/// The most bytes of a record's metadata (a limit of Pinecone).
pub(super) const MAX_METADATA: usize = 40 * 1024;

/// The most characters of an id (a limit of Pinecone).
const MAX_ID: usize = 512;

/// The most ids in one fetch, and the most bytes that they may take in the URL.
const FETCH_IDS: usize = 50;
const FETCH_BYTES: usize = 8_000;

/// A record for an upsert. Not built from a [`Value`], whose floats are 64 bits wide and would take twice the
/// digits.
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

/// How many of the first ids fit into a URL: at least one, if `ids` is not empty.
pub(super) fn fetched_at_once(ids: &[String]) -> usize {
    let mut bytes = 0;
    let fits = |id: &&String| {
        // Percent-encoding makes a byte up to three bytes.
        bytes += "&ids=".len() + 3 * id.len();
        bytes <= FETCH_BYTES
    };
    ids.iter().take(FETCH_IDS).take_while(fits).count().max(1)
}

/// Builds the record for an upsert. A record that Pinecone would refuse is refused here, with its id in the
/// error. Metadata that cannot be parsed is refused too (a number may be too large for this JSON parser),
/// because a record without its metadata would look complete. Metadata that is too long is cut, the embedded
/// columns first.
pub(super) fn sent<'a>(record: &'a Record, text: &[String]) -> Result<Sent<'a>> {
    let id = &record.row.id;
    let wrong = |message: String| Error::new(FailureKind::RefusedData, "upsert records", message);
    if id.is_empty() || id.chars().count() > MAX_ID {
        let message = format!(
            "an id has {} characters, but Pinecone allows 1 to {MAX_ID}: {id:.60}",
            id.chars().count()
        );
        return Err(wrong(message));
    }
    if let Some(value) = record.embedding.iter().find(|value| !value.is_finite()) {
        return Err(wrong(format!("the vector of {id:?} contains {value}")));
    }
    let mut metadata: Map<String, Value> = serde_json::from_str(&record.row.metadata)
        .map_err(|error| wrong(format!("cannot read the metadata of {id:?}: {error}")))?;
    metadata_keys::add(&mut metadata, record);
    if let Some(over) = shorten(&mut metadata, text) {
        let message = format!(
            "the metadata of {id:?} is {over} bytes over Pinecone's limit of {MAX_METADATA}, even with every text cut: list fewer columns in source.metadata"
        );
        return Err(wrong(message));
    }
    Ok(Sent { id, values: &record.embedding, metadata })
}

/// Cuts texts until the metadata is within the limit: first the embedded texts, because the vector represents
/// them, then the longest. Returns the bytes that are still over the limit; `None` if it fits.
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

/// Removes characters from the end of a text until its JSON is at least `bytes` shorter, or the text is
/// empty.
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

/// Counts the bytes written to it.
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

/// The bytes of a value as JSON.
fn written(value: &impl Serialize) -> usize {
    let mut counter = Counter(0);
    // A value that cannot be serialized is not sent either.
    let _ = serde_json::to_writer(&mut counter, value);
    counter.0
}

/// The bytes of a record in an upsert, with the comma after it. The record is really serialized, because an
/// estimate would not hold: JSON escapes ids, and writes some numbers longer than PostgreSQL does.
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
        // Then the longest of the other texts.
        let mut both = of(json!({ "a": "a".repeat(100), "b": "b".repeat(50_000), "description": "d" }));
        assert_eq!(shorten(&mut both, &text), None);
        assert_eq!((both["a"].as_str().map(str::len), both["description"].as_str()), (Some(100), Some("")));
        let mut lists = of(json!({ "l": vec!["x".repeat(30_000); 2] }));
        assert!(shorten(&mut lists, &text).is_some_and(|over| over > 10_000));
    }
}
