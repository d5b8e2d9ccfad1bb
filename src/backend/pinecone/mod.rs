//! The vector index on Pinecone, over its REST data plane.
//!
//! Records are always written whole. Pinecone's update merges metadata, so a column set to NULL would keep
//! its old value; and an update of a missing id returns 200. Vectors are sent as JSON.

pub mod control;
mod http;
pub mod location;
mod metadata_keys;
mod ownership;
mod response;
mod wire;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use reqwest::{Method, StatusCode};
use serde_json::{Map, json};

use crate::config::OWNERSHIP_NAMESPACE;
use crate::pipeline::embedder::Embedding;
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::index::{
    ExternalWrite, IndexFreshness, Listing, Match, OwnershipStore, Record, Stored, VectorIndex, Writes,
};
use crate::secret::Secret;
use http::Http;
use metadata_keys::OldKeys;
use response::with_query;
use wire::{Fetched, Listed, Matches, Sent, Stats, Upsert, Vector, fetched_at_once, sent, weight};

/// The most records in an upsert (a limit of Pinecone).
const MAX_RECORDS: usize = 1_000;

/// The most bytes of records in an upsert. Less than the limit of 2 MB, to leave room for the rest of the
/// request.
const MAX_BYTES: usize = 1_900_000;

/// The most ids in a delete (a limit of Pinecone).
const MAX_DELETES: usize = 1_000;

/// The most ids on a page of a listing (a limit of Pinecone).
const MAX_LISTED: usize = 100;

/// An id that no row can have, because a row's id never holds a control character.
const CANARY_ID: &str = "refarch\u{1}probe";

/// Headers with a position (LSN) in the namespace's log: of this write, and up to which a query has seen the
/// log.
const WRITTEN: &str = "x-pinecone-request-lsn";
const SEEN: &str = "x-pinecone-max-indexed-lsn";

/// The settings of the index.
#[derive(Clone, Debug)]
pub struct PineconeOptions {
    /// The index's host. Without a scheme it is HTTPS.
    pub host: String,
    /// The API key.
    pub api_key: Secret,
    /// The namespace of the records; empty for the default namespace.
    pub namespace: String,
    /// The time limit of a request.
    pub timeout: Duration,
    /// Dimensions of a vector.
    pub dimensions: usize,
    /// The embedded columns. They are cut first when metadata is too long.
    pub text: Vec<String>,
    /// The columns stored as metadata beside the vector.
    pub metadata: Vec<String>,
}

/// The records of one namespace in an index.
pub struct Pinecone {
    http: Http,
    namespace: String,
    dimensions: usize,
    text: Vec<String>,
    old_keys: OldKeys,
    /// Whether the index is known to hold vectors of this length.
    checked: AtomicBool,
    /// Positions in the namespace's log: of the newest write, and up to which queries have seen the log; 0 if
    /// the index does not report them.
    written: AtomicU64,
    seen: AtomicU64,
}

/// The log position in an answer's header, if there is one.
fn log_position(response: &reqwest::Response, name: &str) -> Option<u64> {
    response.headers().get(name)?.to_str().ok()?.trim().parse().ok()
}

impl Pinecone {
    /// Opens the index at a host. Sends no request yet.
    pub fn new(options: PineconeOptions) -> Result<Self> {
        Ok(Self {
            http: Http::new("index.host", &options.host, &options.api_key, options.timeout)?,
            namespace: options.namespace,
            dimensions: options.dimensions,
            text: options.text,
            old_keys: OldKeys::beside(&options.metadata),
            checked: AtomicBool::new(false),
            written: AtomicU64::new(0),
            seen: AtomicU64::new(0),
        })
    }

    /// A valid vector: Pinecone refuses a vector of zeros.
    fn first_axis(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.dimensions];
        if let Some(first) = values.first_mut() {
            *first = 1.0;
        }
        values
    }

    async fn stats(&self) -> Result<Stats> {
        let request = self.http.request(Method::POST, "/describe_index_stats")?.json(&json!({}));
        self.http.read(request, "count records").await
    }

    /// Checks the index's dimensions once, before the first write. With wrong dimensions every record would
    /// be refused alone.
    async fn check(&self) -> Result<()> {
        if self.checked.load(Ordering::Relaxed) {
            return Ok(());
        }
        let wanted = self.dimensions;
        if let Some(found) = self.stats().await?.dimension.filter(|found| *found != wanted) {
            let message = format!(
                "it holds vectors of length {found}, but the model makes {wanted}: set another index, or another model"
            );
            return Err(Error::new(FailureKind::WrongShape, "check the index", message));
        }
        self.checked.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn upsert_into(&self, namespace: &str, vectors: &[Sent<'_>]) -> Result<reqwest::Response> {
        let body = Upsert { namespace, vectors };
        let request = self.http.request(Method::POST, "/vectors/upsert")?.json(&body);
        self.http.write(request, "upsert records", None).await
    }

    /// Writes the probe record, whose id no row has.
    async fn upsert_probe(&self, namespace: &str) -> Result<()> {
        let vector = Sent { id: CANARY_ID, values: &self.first_axis(), metadata: Map::new() };
        self.upsert_into(namespace, &[vector]).await.map(drop)
    }

    fn record_write_position(&self, response: &reqwest::Response) {
        if let Some(position) = log_position(response, WRITTEN) {
            self.written.fetch_max(position, Ordering::Relaxed);
        }
    }

    async fn fetch_from(&self, namespace: &str, ids: &[String]) -> Result<Vec<Vector>> {
        let mut query: Vec<(&str, &str)> = ids.iter().map(|id| ("ids", id.as_str())).collect();
        query.push(("namespace", namespace));
        let request = with_query(self.http.request(Method::GET, "/vectors/fetch")?, &query);
        Ok(self.http.read::<Fetched>(request, "fetch records").await?.vectors.into_values().collect())
    }

    async fn search(&self, embedding: &[f32], top: usize) -> Result<Vec<Match>> {
        let body = json!({
            "namespace": self.namespace,
            "vector": embedding,
            "topK": top.clamp(1, 10_000),
            "includeValues": false,
            "includeMetadata": false,
        });
        let request = self.http.request(Method::POST, "/query")?.json(&body);
        let response = self.http.ask(request, "search").await?;
        if let Some(position) = log_position(&response, SEEN) {
            self.seen.fetch_max(position, Ordering::Relaxed);
        }
        let answer: Matches = response.json().await.map_err(|error| response::failure("search", error))?;
        Ok(answer.matches.into_iter().map(|m| Match { id: m.id, score: m.score }).collect())
    }
}

#[async_trait]
impl ExternalWrite for Pinecone {
    async fn upsert(&self, records: &[Record]) -> Result<()> {
        let vectors = records.iter().map(|record| sent(record, &self.text)).collect::<Result<Vec<_>>>()?;
        let response = self.upsert_into(&self.namespace, &vectors).await?;
        self.record_write_position(&response);
        Ok(())
    }

    async fn delete(&self, ids: &[String]) -> Result<()> {
        let body = json!({ "namespace": self.namespace, "ids": ids });
        let request = self.http.request(Method::POST, "/vectors/delete")?.json(&body);
        // A namespace without any write does not exist yet, so nothing needs to be deleted.
        let response = self.http.write(request, "delete records", Some(StatusCode::NOT_FOUND)).await?;
        self.record_write_position(&response);
        Ok(())
    }

    fn fits(&self, records: &[Record]) -> usize {
        let mut bytes = 0;
        records
            .iter()
            .take(MAX_RECORDS)
            .take_while(|record| {
                bytes += weight(record, &self.text);
                bytes <= MAX_BYTES
            })
            .count()
            .max(1)
    }

    fn max_deletes(&self) -> usize {
        MAX_DELETES
    }

    fn request_timeout(&self) -> Duration {
        self.http.timeout()
    }

    async fn probe_record(&self) -> Result<()> {
        let written = self.upsert_probe(&self.namespace).await;
        // The record may have been written although the answer was an error.
        let taken_out = self.delete(&[CANARY_ID.to_owned()]).await;
        written.and(taken_out)
    }
}

#[async_trait]
impl VectorIndex for Pinecone {
    async fn ready(&self) {
        self.http.ready().await;
    }

    async fn query(&self, embedding: &[f32], top: usize) -> Result<Vec<Match>> {
        self.search(embedding, top).await
    }

    async fn count(&self) -> Result<u64> {
        let stats = self.stats().await?;
        let of = |name: &str| stats.namespaces.get(name).map(|namespace| namespace.vector_count);
        Ok(match location::normalize_namespace(&self.namespace) {
            "" => of("").or_else(|| of(location::DEFAULT_NAMESPACE)),
            named => of(named),
        }
        .unwrap_or_default())
    }

    async fn list(&self, cursor: Option<&str>, limit: usize) -> Result<Listing> {
        let limit = limit.clamp(1, MAX_LISTED).to_string();
        let mut query = vec![("namespace", self.namespace.as_str()), ("limit", &limit)];
        query.extend(cursor.map(|cursor| ("paginationToken", cursor)));
        let request = with_query(self.http.request(Method::GET, "/vectors/list")?, &query);
        let listed: Listed = self.http.read(request, "list records").await?;
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
                let (content_hash, metadata_hash) = self.old_keys.hashes(&vector.metadata);
                stored.push(Stored {
                    content_hash,
                    metadata_hash,
                    embedding: Embedding::from(vector.values),
                    id: vector.id,
                });
            }
        }
        Ok(stored)
    }

    fn writes(&self) -> Writes<'_> {
        Writes::External(self)
    }

    async fn maintain(&self, _backlog: u64) -> Result<bool> {
        Ok(false)
    }

    async fn check_writable(&self) -> Result<()> {
        // Tests both kinds of write without touching a record: a delete of an id that no row has, and an
        // upsert into the ownership namespace.
        self.delete(&[CANARY_ID.to_owned()]).await?;
        self.upsert_probe(OWNERSHIP_NAMESPACE).await
    }

    fn freshness(&self) -> Option<&dyn IndexFreshness> {
        Some(self)
    }

    fn ownership_store(&self) -> Option<&dyn OwnershipStore> {
        Some(self)
    }
}

#[async_trait]
impl IndexFreshness for Pinecone {
    fn last_written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    async fn searchable_up_to(&self) -> Result<u64> {
        self.search(&self.first_axis(), 1).await?;
        Ok(self.seen.load(Ordering::Relaxed))
    }
}
