//! The limits of Pinecone, as documented: which requests are accepted.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::asked::{
    DeleteSelection, FetchByMetadata, LimitResult, MAX_LISTED, Parameters, Query, Update, Write,
};
use super::record::Record;

const MAX_RECORDS: usize = 1_000;
const MAX_UPSERT_BYTES: usize = 2 * 1024 * 1024;
const MAX_IDS: usize = 1_000;
const MAX_ID_BYTES: usize = 512;
const MAX_METADATA_BYTES: usize = 40 * 1024;
const MAX_TOP: usize = 10_000;

#[derive(Deserialize)]
struct Upsert {
    #[serde(default)]
    namespace: String,
    vectors: Vec<UpsertedRecord>,
}

#[derive(Deserialize)]
struct UpsertedRecord {
    id: String,
    values: Vec<f32>,
    #[serde(default)]
    metadata: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Delete {
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    ids: Vec<String>,
    #[serde(default, rename = "deleteAll")]
    all: bool,
    filter: Option<Value>,
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> LimitResult<T> {
    serde_json::from_slice(body).map_err(|error| error.to_string())
}

pub(super) fn upsert(body: &[u8], dimensions: usize) -> LimitResult<Write> {
    if body.len() > MAX_UPSERT_BYTES {
        return Err(format!("Request size {} exceeds the maximum of {MAX_UPSERT_BYTES} bytes", body.len()));
    }
    let Upsert { namespace, vectors } = parse(body)?;
    if vectors.is_empty() || vectors.len() > MAX_RECORDS {
        return Err(format!("{} vectors in a request: from 1 to {MAX_RECORDS} are allowed", vectors.len()));
    }
    let mut records = Vec::with_capacity(vectors.len());
    for UpsertedRecord { id, values, metadata } in vectors {
        check_id(&id)?;
        check_values(&values, dimensions)?;
        check_metadata(&metadata)?;
        records.push((id, Record { values, metadata }));
    }
    Ok(Write::Upsert { namespace, records })
}

pub(super) fn delete(body: &[u8]) -> LimitResult<Write> {
    let Delete { namespace, ids, all, filter } = parse(body)?;
    let selection = match (all, filter) {
        (true, None) if ids.is_empty() => DeleteSelection::All,
        (false, Some(filter)) if ids.is_empty() => {
            super::metadata_filter::matches(&filter, &Map::new())?;
            DeleteSelection::Filter(filter)
        }
        (false, None) => {
            check_ids(&ids)?;
            DeleteSelection::Ids(ids)
        }
        _ => return Err("ids, deleteAll and filter exclude each other".into()),
    };
    Ok(Write::Delete { namespace, selection })
}

pub(super) fn update(body: &[u8], dimensions: usize) -> LimitResult<Write> {
    let update: Update = parse(body)?;
    check_id(&update.id)?;
    if let Some(values) = &update.values {
        check_values(values, dimensions)?;
    }
    check_metadata(&update.set_metadata)?;
    Ok(Write::Update(update))
}

pub(super) fn by_metadata(body: &[u8]) -> LimitResult<FetchByMetadata> {
    let asked: FetchByMetadata = parse(body)?;
    if !(1..=MAX_LISTED).contains(&asked.limit) {
        return Err(format!("limit {} is not from 1 to {MAX_LISTED}", asked.limit));
    }
    Ok(asked)
}

pub(super) fn query(body: &[u8], dimensions: usize) -> LimitResult<Query> {
    let query: Query = parse(body)?;
    if query.id.is_some() != query.vector.is_empty() {
        return Err("either vector or id is needed".into());
    }
    if query.id.is_none() {
        check_values(&query.vector, dimensions)?;
    }
    if !(1..=MAX_TOP).contains(&query.top_k) {
        return Err(format!("topK {} is not from 1 to {MAX_TOP}", query.top_k));
    }
    Ok(query)
}

pub(super) fn fetch(query: Vec<(String, String)>) -> LimitResult<Parameters> {
    let parameters = parameters(query)?;
    check_ids(&parameters.ids)?;
    Ok(parameters)
}

pub(super) fn list(query: Vec<(String, String)>) -> LimitResult<Parameters> {
    let parameters = parameters(query)?;
    if !(1..=MAX_LISTED).contains(&parameters.limit) {
        return Err(format!("limit {} is not from 1 to {MAX_LISTED}", parameters.limit));
    }
    Ok(parameters)
}

fn parameters(query: Vec<(String, String)>) -> LimitResult<Parameters> {
    let mut parameters = Parameters { limit: MAX_LISTED, ..Parameters::default() };
    for (key, value) in query {
        match key.as_str() {
            "namespace" => parameters.namespace = value,
            "ids" => parameters.ids.push(value),
            "limit" => {
                parameters.limit = value.parse().map_err(|_| format!("limit {value:?} is not a number"))?;
            }
            "paginationToken" => parameters.after = Some(value),
            "prefix" => parameters.prefix = value,
            _ => return Err(format!("unknown parameter {key:?}")),
        }
    }
    Ok(parameters)
}

fn check_ids(ids: &[String]) -> LimitResult<()> {
    if ids.is_empty() || ids.len() > MAX_IDS {
        return Err(format!("{} ids in a request: from 1 to {MAX_IDS} are allowed", ids.len()));
    }
    ids.iter().try_for_each(|id| check_id(id))
}

fn check_id(id: &str) -> LimitResult<()> {
    if id.is_empty() || id.len() > MAX_ID_BYTES {
        return Err(format!("an id of {} bytes: from 1 to {MAX_ID_BYTES} are allowed", id.len()));
    }
    Ok(())
}

fn check_values(values: &[f32], dimensions: usize) -> LimitResult<()> {
    if values.len() != dimensions {
        return Err(format!(
            "Vector dimension {} does not match the dimension of the index {dimensions}",
            values.len()
        ));
    }
    if values.iter().any(|value| !value.is_finite()) {
        return Err("Vector values must be finite".into());
    }
    if values.iter().all(|value| *value == 0.0) {
        return Err("Dense vectors must contain at least one non-zero value".into());
    }
    Ok(())
}

fn check_metadata(metadata: &Map<String, Value>) -> LimitResult<()> {
    for (key, value) in metadata {
        if key.starts_with('$') {
            return Err(format!("Metadata key '{key}' must not start with $"));
        }
        let is_flat = match value {
            Value::String(_) | Value::Number(_) | Value::Bool(_) => true,
            Value::Array(items) => items.iter().all(Value::is_string),
            Value::Null | Value::Object(_) => false,
        };
        if !is_flat {
            return Err(format!(
                "Metadata value must be a string, number, boolean or list of strings, got '{value}' for field '{key}'"
            ));
        }
    }
    let bytes = Value::from(metadata.clone()).to_string().len();
    if bytes > MAX_METADATA_BYTES {
        return Err(format!(
            "Metadata size is {bytes} bytes, which exceeds the limit of {MAX_METADATA_BYTES} bytes per vector"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refusal(vectors: &Value) -> Option<String> {
        upsert(json!({ "vectors": vectors }).to_string().as_bytes(), 2).err()
    }

    fn with_metadata(metadata: &Value) -> Option<String> {
        refusal(&json!([{ "id": "a", "values": [1, 2], "metadata": metadata }]))
    }

    #[test]
    fn records_within_the_limits_are_taken() {
        let record = |id: String| json!({ "id": id, "values": [0, -1e-30] });
        assert_eq!(refusal(&json!([record("x".repeat(512))])), None);
        assert_eq!(refusal(&(0..1_000).map(|n| record(n.to_string())).collect()), None);
        assert_eq!(with_metadata(&json!({ "s": "", "n": 1.5, "b": false, "l": ["a"], "e": [] })), None);
        // Braces, quotes, the key and the colon take eight bytes.
        assert_eq!(with_metadata(&json!({ "k": "x".repeat(40 * 1024 - 8) })), None);
    }

    #[test]
    fn records_beyond_the_limits_are_refused() {
        let record = |id: String, values: &[f64]| json!([{ "id": id, "values": values }]);
        for wrong in [
            json!([]),
            (0..1_001).map(|n| json!({ "id": n.to_string(), "values": [1, 2] })).collect(),
            record(String::new(), &[1.0, 2.0]),
            record("x".repeat(513), &[1.0, 2.0]),
            record("a".into(), &[1.0]),
            record("a".into(), &[0.0, 0.0]),
            record("a".into(), &[1.0, 1e300]),
            json!([{ "id": "a", "values": [1, null] }]),
            json!([{ "id": "a" }]),
        ] {
            assert!(refusal(&wrong).is_some(), "{wrong}");
        }
        for wrong in [
            json!({ "$k": 1 }),
            json!({ "k": null }),
            json!({ "k": {} }),
            json!({ "k": [1] }),
            json!({ "k": "x".repeat(40 * 1024 - 7) }),
            json!([]),
        ] {
            assert!(with_metadata(&wrong).is_some(), "{wrong}");
        }
        assert!(upsert(&vec![b' '; MAX_UPSERT_BYTES + 1], 2).is_err_and(|error| error.contains("size")));
    }

    #[test]
    fn other_requests_have_limits_too() {
        let ids = |count: usize| vec!["x".to_owned(); count];
        let deletes = |count| delete(json!({ "ids": ids(count) }).to_string().as_bytes()).is_ok();
        let fetches = |count| fetch(ids(count).into_iter().map(|id| ("ids".into(), id)).collect()).is_ok();
        for (count, allowed) in [(0, false), (1, true), (1_000, true), (1_001, false)] {
            assert_eq!((deletes(count), fetches(count)), (allowed, allowed), "{count}");
        }
        for (top, allowed) in [(0, false), (1, true), (10_000, true), (10_001, false)] {
            let body = json!({ "vector": [1, 0], "topK": top }).to_string();
            assert_eq!(query(body.as_bytes(), 2).is_ok(), allowed, "{top}");
        }
        for (limit, allowed) in [("0", false), ("1", true), ("100", true), ("101", false), ("x", false)] {
            assert_eq!(list(vec![("limit".into(), limit.into())]).is_ok(), allowed, "{limit}");
        }
    }
}
