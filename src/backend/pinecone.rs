//! The vector index on Pinecone, over its REST data plane.
//!
//! Records are always written whole: an update merges metadata, so that a column set to NULL would
//! survive, and it answers 200 for an id that is not there. Vectors travel as JSON.

use std::time::Duration;

use async_trait::async_trait;
use reqwest::{Method, RequestBuilder, StatusCode, Url, header};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::pipeline::catalog::Hash;
use crate::pipeline::embedder::Embedding;
use crate::pipeline::failure::{Class, Error, Result};
use crate::pipeline::index::{Listing, Match, Notes, PlainWrite, Record, Stored, VectorIndex, Writes};
use crate::secret::Secret;

/// The version of the API that is spoken: without one, the oldest that is supported answers.
const API_VERSION: &str = "2026-04";

/// Records in an upsert at most, by Pinecone's limits.
const MAX_RECORDS: usize = 1_000;

/// Bytes of an upsert at most: under the limit of 2 MB, for what surrounds the records.
const MAX_BYTES: usize = 1_900_000;

/// Ids in a delete at most, by Pinecone's limits.
const MAX_DELETES: usize = 1_000;

/// Ids in one fetch, and bytes that they may take there: they travel in the URL.
const FETCH_IDS: usize = 50;
const FETCH_BYTES: usize = 8_000;

/// Ids on a page of a listing at most, by Pinecone's limits.
const MAX_LISTED: usize = 100;

/// Bytes of an error's body that are read.
const MAX_ERROR_BODY: usize = 4_096;

/// Keys of our own beside the row's columns.
const CONTENT_HASH: &str = "content_hash";
const METADATA_HASH: &str = "metadata_hash";
const VERSION: &str = "version";

/// What a delete is called in errors.
const DELETE: &str = "delete records";

/// Namespace and id of the note: beside the records, never among them.
const NOTES: &str = "refarch-notes";
const NOTE_ID: &str = "note";

/// An id that no row has: a row's id never holds a control character here.
const PROBE_ID: &str = "refarch\u{1}probe";

/// What the index needs of the settings.
#[derive(Clone, Debug)]
pub struct Options {
    /// The index's host, with or without a scheme; without one it is HTTPS.
    pub host: String,
    /// The key that may use it.
    pub api_key: Secret,
    /// The namespace that holds the records; empty for the default one.
    pub namespace: String,
    /// How long a request may take.
    pub timeout: Duration,
    /// Length of a vector.
    pub dimensions: usize,
}

/// Records of one namespace of an index.
pub struct Pinecone {
    client: reqwest::Client,
    base: Url,
    namespace: String,
    timeout: Duration,
    dimensions: usize,
}

/// A record as it is sent. Not by way of a [`Value`], whose floats are wider: each would take twice
/// the digits.
#[derive(Debug, Serialize)]
struct Sent<'a> {
    id: &'a str,
    values: &'a [f32],
    metadata: Map<String, Value>,
}

#[derive(Debug, Serialize)]
struct Upsert<'a> {
    namespace: &'a str,
    vectors: &'a [Sent<'a>],
}

#[derive(Debug, Default, Deserialize)]
struct Vector {
    id: String,
    #[serde(default)]
    values: Vec<f32>,
    #[serde(default)]
    metadata: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
struct Fetched {
    #[serde(default)]
    vectors: std::collections::HashMap<String, Vector>,
}

#[derive(Debug, Deserialize)]
struct Matches {
    #[serde(default)]
    matches: Vec<Scored>,
}

#[derive(Debug, Deserialize)]
struct Scored {
    id: String,
    score: f32,
}

#[derive(Debug, Deserialize)]
struct Listed {
    #[serde(default)]
    vectors: Vec<Id>,
    pagination: Option<Next>,
}

#[derive(Debug, Deserialize)]
struct Id {
    id: String,
}

#[derive(Debug, Deserialize)]
struct Next {
    next: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Stats {
    #[serde(default)]
    namespaces: std::collections::HashMap<String, NamespaceStats>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct NamespaceStats {
    vector_count: u64,
}

impl Pinecone {
    /// The index at a host. Nothing is asked of it yet.
    pub fn new(options: Options) -> Result<Self> {
        let wrong = |message: String| Error::fatal("use the Pinecone index", message);
        let host = options.host.trim();
        if host.is_empty() {
            return Err(wrong(
                "index.host is not set: it is the index's host, as Pinecone's console shows it".into(),
            ));
        }
        let url = if host.contains("://") { host.to_owned() } else { format!("https://{host}") };
        let base = Url::parse(&url).map_err(|error| wrong(format!("index.host = {host:?}: {error}")))?;
        if !matches!(base.scheme(), "http" | "https") || base.host().is_none() {
            return Err(wrong(format!("index.host = {host:?}: use a host name, or https:// before it")));
        }
        let mut key = header::HeaderValue::from_str(options.api_key.expose())
            .map_err(|_| wrong("index.api_key holds characters that no key has".into()))?;
        key.set_sensitive(true);
        let mut headers = header::HeaderMap::new();
        headers.insert("Api-Key", key);
        headers.insert("X-Pinecone-Api-Version", header::HeaderValue::from_static(API_VERSION));
        let client = reqwest::Client::builder()
            .default_headers(headers)
            .user_agent(concat!("refarch/", env!("CARGO_PKG_VERSION")))
            .timeout(options.timeout)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| wrong(error.to_string()))?;
        Ok(Self {
            client,
            base,
            namespace: options.namespace,
            timeout: options.timeout,
            dimensions: options.dimensions,
        })
    }

    fn request(&self, method: Method, path: &str) -> Result<RequestBuilder> {
        let url = self.base.join(path).map_err(|error| Error::fatal("use the Pinecone index", error))?;
        Ok(self.client.request(method, url))
    }

    /// Some vector: one of zeros is refused.
    fn first_axis(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.dimensions];
        if let Some(first) = values.first_mut() {
            *first = 1.0;
        }
        values
    }

    async fn upsert_into(&self, namespace: &str, vectors: &[Sent<'_>]) -> Result<()> {
        let body = Upsert { namespace, vectors };
        send(self.request(Method::POST, "/vectors/upsert")?.json(&body), "upsert records").await.map(|_| ())
    }

    async fn fetch_from(&self, namespace: &str, ids: &[String]) -> Result<Vec<Vector>> {
        let mut query: Vec<(&str, &str)> = ids.iter().map(|id| ("ids", id.as_str())).collect();
        query.push(("namespace", namespace));
        let mut request = self.request(Method::GET, "/vectors/fetch")?;
        request = with_query(request, &query);
        Ok(read::<Fetched>(request, "fetch records").await?.vectors.into_values().collect())
    }
}

/// How many of the first ids fit into a URL; at least one, if there is one.
fn fetched_at_once(ids: &[String]) -> usize {
    let mut bytes = 0;
    let fits = |id: &&String| {
        // Encoded, a byte takes three at most.
        bytes += "&ids=".len() + 3 * id.len();
        bytes <= FETCH_BYTES
    };
    ids.iter().take(FETCH_IDS).take_while(fits).count().max(1)
}

/// Adds query parameters, percent-encoded.
fn with_query(request: RequestBuilder, query: &[(&str, &str)]) -> RequestBuilder {
    let (client, built) = request.build_split();
    match built {
        Ok(mut built) => {
            built.url_mut().query_pairs_mut().extend_pairs(query);
            RequestBuilder::from_parts(client, built)
        }
        // A request that can't be built fails in the same way without its query.
        Err(_) => client.request(Method::GET, "invalid:"),
    }
}

/// Sends a request; any answer is one.
async fn ask(request: RequestBuilder, what: &str) -> Result<reqwest::Response> {
    request.send().await.map_err(|error| failure(what, &error))
}

/// An answer, if it is a success.
async fn accepted(response: reqwest::Response, what: &str) -> Result<reqwest::Response> {
    if response.status().is_success() { Ok(response) } else { Err(refusal(what, response).await) }
}

async fn send(request: RequestBuilder, what: &str) -> Result<reqwest::Response> {
    accepted(ask(request, what).await?, what).await
}

async fn read<T: DeserializeOwned>(request: RequestBuilder, what: &str) -> Result<T> {
    send(request, what).await?.json().await.map_err(|error| failure(what, &error))
}

/// Classes a request that got no answer.
fn failure(what: &str, error: &reqwest::Error) -> Error {
    let message = describe(error);
    if error.is_builder() {
        return Error::permanent(what, message);
    }
    // Nobody took the request, so nobody will apply it.
    if error.is_connect() {
        return Error::retryable(what, message);
    }
    Error::doubtful(what, message)
}

/// An error with what lies under it, and without the URL, which carries ids.
fn describe(error: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(inner) = cause {
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    if error.is_timeout() {
        text = "no answer in time".into();
    }
    if text.is_empty() { "no usable answer".into() } else { text }
}

/// Classes an answer that is no success.
async fn refusal(what: &str, response: reqwest::Response) -> Error {
    let status = response.status();
    let retry_after = response
        .headers()
        .get(header::RETRY_AFTER)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.trim().parse().ok())
        .map(Duration::from_secs);
    let message = format!("{status}: {}", message(response).await);
    let (class, doubtful) = class_of(status);
    Error { retry_after, doubtful, ..Error::new(class, what, message) }
}

/// What an answer's status means, and whether the request may have been done all the same. Only what
/// is said of the request itself can be a change's own fault: an index that is gone, or a key that is
/// refused, is everybody's.
fn class_of(status: StatusCode) -> (Class, bool) {
    match status {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::CONFLICT => (Class::Retryable, false),
        StatusCode::REQUEST_TIMEOUT => (Class::Retryable, true),
        StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNPROCESSABLE_ENTITY => {
            (Class::Permanent, false)
        }
        status if status.is_server_error() => (Class::Retryable, true),
        _ => (Class::Fatal, false),
    }
}

/// The message of an error's body: the data plane's, the control plane's, or the text as it is.
async fn message(mut response: reqwest::Response) -> String {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        body.extend_from_slice(&chunk);
        if body.len() >= MAX_ERROR_BODY {
            break;
        }
    }
    body.truncate(MAX_ERROR_BODY);
    let text = String::from_utf8_lossy(&body).trim().to_owned();
    let parsed: Value = serde_json::from_str(&text).unwrap_or_default();
    let inner = parsed.get("message").or_else(|| parsed.pointer("/error/message"));
    inner.and_then(Value::as_str).map_or(text, str::to_owned)
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

/// A record as it travels. Metadata that can't be read is refused: a number may be too large for JSON's
/// reader here, and a record without its metadata would pass for complete.
fn sent(record: &Record) -> Result<Sent<'_>> {
    let mut metadata: Map<String, Value> = serde_json::from_str(&record.row.metadata).map_err(|error| {
        Error::permanent("upsert records", format!("metadata of {:?}: {error}", record.row.id))
    })?;
    metadata.insert(CONTENT_HASH.into(), hex(&record.row.content_hash).into());
    metadata.insert(METADATA_HASH.into(), hex(&record.row.metadata_hash).into());
    metadata.insert(VERSION.into(), record.version.into());
    Ok(Sent { id: &record.row.id, values: &record.embedding, metadata })
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

/// A record's bytes as it travels, with the comma after it. Written out, as no bound would hold:
/// JSON escapes ids, and writes some numbers longer than PostgreSQL does.
fn weight(record: &Record) -> usize {
    let mut counter = Counter(1);
    if let Ok(sent) = sent(record) {
        // What can't be written will not be sent either.
        let _ = serde_json::to_writer(&mut counter, &sent);
    }
    counter.0
}

#[async_trait]
impl PlainWrite for Pinecone {
    async fn upsert(&self, records: &[Record]) -> Result<()> {
        let vectors = records.iter().map(sent).collect::<Result<Vec<_>>>()?;
        self.upsert_into(&self.namespace, &vectors).await
    }

    async fn delete(&self, ids: &[String]) -> Result<()> {
        let body = json!({ "namespace": self.namespace, "ids": ids });
        let request = self.request(Method::POST, "/vectors/delete")?.json(&body);
        let response = ask(request, DELETE).await?;
        // A namespace that was never written to holds nothing.
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(());
        }
        accepted(response, DELETE).await.map(drop)
    }

    fn fits(&self, records: &[Record]) -> usize {
        let mut bytes = 0;
        records
            .iter()
            .take(MAX_RECORDS)
            .take_while(|record| {
                bytes += weight(record);
                bytes <= MAX_BYTES
            })
            .count()
            .max(1)
    }

    fn max_deletes(&self) -> usize {
        MAX_DELETES
    }

    fn request_timeout(&self) -> Duration {
        self.timeout
    }
}

#[async_trait]
impl VectorIndex for Pinecone {
    async fn query(&self, embedding: &[f32], top: usize) -> Result<Vec<Match>> {
        let body = json!({
            "namespace": self.namespace,
            "vector": embedding,
            "topK": top.clamp(1, 10_000),
            "includeValues": false,
            "includeMetadata": false,
        });
        let answer: Matches = read(self.request(Method::POST, "/query")?.json(&body), "search").await?;
        Ok(answer.matches.into_iter().map(|m| Match { id: m.id, score: m.score }).collect())
    }

    async fn count(&self) -> Result<u64> {
        let request = self.request(Method::POST, "/describe_index_stats")?.json(&json!({}));
        let stats: Stats = read(request, "count records").await?;
        let default = if self.namespace.is_empty() { "__default__" } else { &self.namespace };
        let of = |name: &str| stats.namespaces.get(name).map(|namespace| namespace.vector_count);
        Ok(of(&self.namespace).or_else(|| of(default)).unwrap_or_default())
    }

    async fn list(&self, cursor: Option<&str>, limit: usize) -> Result<Listing> {
        let limit = limit.clamp(1, MAX_LISTED).to_string();
        let mut query = vec![("namespace", self.namespace.as_str()), ("limit", &limit)];
        query.extend(cursor.map(|cursor| ("paginationToken", cursor)));
        let request = with_query(self.request(Method::GET, "/vectors/list")?, &query);
        let listed: Listed = read(request, "list records").await?;
        Ok(Listing {
            ids: listed.vectors.into_iter().map(|vector| vector.id).collect(),
            next: listed.pagination.and_then(|pagination| pagination.next),
        })
    }

    async fn fetch(&self, ids: &[String]) -> Result<Vec<Stored>> {
        let mut stored = Vec::with_capacity(ids.len());
        let mut left = ids;
        while !left.is_empty() {
            let (ids, rest) = left.split_at(fetched_at_once(left));
            left = rest;
            for vector in self.fetch_from(&self.namespace, ids).await? {
                stored.push(Stored {
                    content_hash: unhex(vector.metadata.get(CONTENT_HASH)),
                    metadata_hash: unhex(vector.metadata.get(METADATA_HASH)),
                    embedding: Embedding::from(vector.values),
                    id: vector.id,
                });
            }
        }
        Ok(stored)
    }

    fn writes(&self) -> Writes<'_> {
        Writes::Plain(self)
    }

    async fn maintain(&self, _backlog: u64) -> Result<()> {
        Ok(())
    }

    async fn probe(&self) -> Result<()> {
        // Among the records a delete of what can't be there, and an upsert beside them.
        self.delete(&[PROBE_ID.to_owned()]).await?;
        let vector = Sent { id: PROBE_ID, values: &self.first_axis(), metadata: Map::new() };
        self.upsert_into(NOTES, &[vector]).await
    }

    fn notes(&self) -> Option<&dyn Notes> {
        Some(self)
    }
}

#[async_trait]
impl Notes for Pinecone {
    async fn note(&self) -> Result<Option<String>> {
        let found = self.fetch_from(NOTES, &[NOTE_ID.to_owned()]).await?;
        let text = found.first().and_then(|vector| vector.metadata.get("text"));
        Ok(text.and_then(Value::as_str).map(str::to_owned))
    }

    async fn set_note(&self, note: &str) -> Result<()> {
        let metadata = [("text".to_owned(), note.into())].into_iter().collect();
        self.upsert_into(NOTES, &[Sent { id: NOTE_ID, values: &self.first_axis(), metadata }]).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(host: &str) -> Result<Pinecone> {
        Pinecone::new(Options {
            host: host.into(),
            api_key: Secret::new("key".to_owned()),
            namespace: String::new(),
            timeout: Duration::from_secs(1),
            dimensions: 3,
        })
    }

    #[test]
    fn a_host_without_a_scheme_is_https() {
        assert_eq!(open("x-1.svc.pinecone.io").unwrap().base.as_str(), "https://x-1.svc.pinecone.io/");
        assert_eq!(open("http://127.0.0.1:5081/").unwrap().base.as_str(), "http://127.0.0.1:5081/");
        for wrong in ["", " ", "ftp://x", "http://", "two words"] {
            assert!(open(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn only_what_is_said_of_the_request_is_the_changes_fault() {
        let class = |status: u16| class_of(StatusCode::from_u16(status).unwrap());
        for status in [400, 413, 422] {
            assert_eq!(class(status), (Class::Permanent, false), "{status}");
        }
        for (status, doubtful) in
            [(429, false), (409, false), (408, true), (500, true), (503, true), (504, true)]
        {
            assert_eq!(class(status), (Class::Retryable, doubtful), "{status}");
        }
        for status in [301, 401, 402, 403, 404, 405, 410, 412] {
            assert_eq!(class(status), (Class::Fatal, false), "{status}");
        }
    }

    #[test]
    fn hashes_survive_their_journey() {
        let hash = Hash([0xa7; 32]);
        assert_eq!(unhex(Some(&hex(&hash).into())), Some(hash));
        for wrong in ["", "a7", &"zz".repeat(32), &"é".repeat(32)] {
            assert_eq!(unhex(Some(&wrong.into())), None);
        }
    }
}
