//! A double of Pinecone's data plane in this process, which keeps its limits and can be made to fail.
//!
//! It is written from Pinecone's documentation, apart from the client, so that the two agree only
//! where both are right.

mod faults;
mod limits;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Json, Response};
use axum::routing::{get, post};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};

use faults::Fate;
pub use faults::{Counts, Faults};
use limits::{Parameters, Refused};

/// How the default namespace is called where it has a name.
const DEFAULT_NAMESPACE: &str = "__default__";

/// A record as it is kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// The vector.
    pub values: Vec<f32>,
    /// What travels beside it.
    pub metadata: Map<String, Value>,
}

/// The double; it stops with its last clone.
#[derive(Clone)]
pub struct Double {
    url: String,
    index: Arc<Index>,
    _stop: Arc<DropGuard>,
}

/// A write that is within the limits.
enum Write {
    Upsert { namespace: String, records: Vec<(String, Record)> },
    Delete { namespace: String, ids: Vec<String> },
}

struct Index {
    dimensions: usize,
    records: Mutex<BTreeMap<String, BTreeMap<String, Record>>>,
    chance: Mutex<Chance>,
}

struct Chance {
    dice: StdRng,
    faults: Faults,
    counts: Counts,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Double {
    /// Serves an empty index of vectors of that length on a loopback port that is free. What goes
    /// wrong follows from the seed and the order of requests.
    pub async fn start(dimensions: usize, seed: u64) -> std::io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let url = format!("http://{}", listener.local_addr()?);
        let index = Arc::new(Index {
            dimensions,
            records: Mutex::default(),
            chance: Mutex::new(Chance {
                dice: StdRng::seed_from_u64(seed),
                faults: Faults::default(),
                counts: Counts::default(),
            }),
        });
        let stop = CancellationToken::new();
        let server = axum::serve(listener, router(Arc::clone(&index)))
            .with_graceful_shutdown(stop.clone().cancelled_owned());
        tokio::spawn(server.into_future());
        Ok(Self { url, index, _stop: Arc::new(stop.drop_guard()) })
    }

    /// Where it listens, such as `http://127.0.0.1:5081`.
    #[must_use]
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// What goes wrong from now on. Writes that are late already still come.
    pub fn set_faults(&self, faults: Faults) {
        lock(&self.index.chance).faults = faults;
    }

    /// Requests and faults since the start.
    #[must_use]
    pub fn counts(&self) -> Counts {
        lock(&self.index.chance).counts
    }

    /// The records of a namespace, as they are; empty names the default one.
    #[must_use]
    pub fn snapshot(&self, namespace: &str) -> BTreeMap<String, Record> {
        lock(&self.index.records).get(named(namespace)).cloned().unwrap_or_default()
    }
}

fn named(namespace: &str) -> &str {
    if namespace.is_empty() { DEFAULT_NAMESPACE } else { namespace }
}

fn router(index: Arc<Index>) -> Router {
    Router::new()
        .route("/vectors/upsert", post(upsert))
        .route("/vectors/delete", post(delete))
        .route("/vectors/fetch", get(fetch))
        .route("/vectors/list", get(list))
        .route("/query", post(query))
        .route("/describe_index_stats", post(stats))
        .layer(middleware::from_fn_with_state(Arc::clone(&index), admit))
        // The limit is Pinecone's, with Pinecone's answer.
        .layer(DefaultBodyLimit::disable())
        .with_state(index)
}

async fn admit(State(index): State<Arc<Index>>, request: Request, next: Next) -> Response {
    lock(&index.chance).counts.requests += 1;
    if request.headers().get("Api-Key").is_none_or(header::HeaderValue::is_empty) {
        return (StatusCode::UNAUTHORIZED, "Unauthorized").into_response();
    }
    next.run(request).await
}

async fn upsert(State(index): State<Arc<Index>>, body: Bytes) -> Response {
    index.write(|| limits::upsert(&body, index.dimensions)).await
}

async fn delete(State(index): State<Arc<Index>>, body: Bytes) -> Response {
    index.write(|| limits::delete(&body)).await
}

async fn fetch(State(index): State<Arc<Index>>, Query(query): Query<Vec<(String, String)>>) -> Response {
    index.read(|| Ok(index.fetch(&limits::fetch(query)?))).await
}

async fn list(State(index): State<Arc<Index>>, Query(query): Query<Vec<(String, String)>>) -> Response {
    index.read(|| Ok(index.list(&limits::list(query)?))).await
}

async fn query(State(index): State<Arc<Index>>, body: Bytes) -> Response {
    index.read(|| Ok(index.query(&limits::query(&body, index.dimensions)?))).await
}

async fn stats(State(index): State<Arc<Index>>) -> Response {
    index.read(|| Ok(index.stats())).await
}

impl Index {
    /// Serves a write as chance has it.
    async fn write(self: &Arc<Self>, check: impl FnOnce() -> Refused<Write>) -> Response {
        let fate = self.draw(true);
        if let Some(answer) = self.turn_away(fate) {
            return answer;
        }
        let write = match check() {
            Ok(write) => write,
            Err(message) => return error(StatusCode::BAD_REQUEST, &message),
        };
        if let Write::Delete { namespace, .. } = &write
            && !lock(&self.records).contains_key(named(namespace))
        {
            return error(StatusCode::NOT_FOUND, "Namespace not found");
        }
        self.count(fate);
        let answer = match &write {
            Write::Upsert { records, .. } => json!({ "upsertedCount": records.len() }),
            Write::Delete { .. } => json!({}),
        };
        match fate {
            Fate::Late(delay) => {
                self.apply_later(write, delay);
                error(StatusCode::GATEWAY_TIMEOUT, "the upstream server did not answer in time")
            }
            Fate::Hung { hold, applied } => {
                if let Some(delay) = applied {
                    self.apply_later(write, delay);
                }
                tokio::time::sleep(hold).await;
                match applied {
                    Some(_) => Json(answer).into_response(),
                    None => error(StatusCode::GATEWAY_TIMEOUT, "the upstream server did not answer in time"),
                }
            }
            Fate::Lied => {
                self.apply(write);
                error(StatusCode::INTERNAL_SERVER_ERROR, "internal error")
            }
            Fate::Dropped => {
                self.apply(write);
                broken_off()
            }
            Fate::Served | Fate::Unavailable(_) | Fate::RateLimited { .. } => {
                self.apply(write);
                Json(answer).into_response()
            }
        }
    }

    /// Serves a read as chance has it.
    async fn read(&self, answer: impl FnOnce() -> Refused<Value>) -> Response {
        let fate = self.draw(false);
        if let Some(answer) = self.turn_away(fate) {
            return answer;
        }
        self.count(fate);
        if let Fate::Hung { hold, .. } = fate {
            tokio::time::sleep(hold).await;
        }
        match answer() {
            Ok(answer) => Json(answer).into_response(),
            Err(message) => error(StatusCode::BAD_REQUEST, &message),
        }
    }

    fn draw(&self, is_write: bool) -> Fate {
        let mut chance = lock(&self.chance);
        let faults = chance.faults;
        faults.draw(&mut chance.dice, is_write)
    }

    fn count(&self, fate: Fate) {
        lock(&self.chance).counts.add(fate);
    }

    /// The answer to a request that is not even looked at.
    fn turn_away(&self, fate: Fate) -> Option<Response> {
        let answer = match fate {
            Fate::Unavailable(status) => error(status, "the service is unavailable"),
            Fate::RateLimited { says_when } => {
                let mut answer = error(StatusCode::TOO_MANY_REQUESTS, "too many requests");
                if says_when {
                    answer.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
                }
                answer
            }
            _ => return None,
        };
        self.count(fate);
        Some(answer)
    }

    fn apply(&self, write: Write) {
        let mut namespaces = lock(&self.records);
        match write {
            Write::Upsert { namespace, records } => {
                namespaces.entry(named(&namespace).to_owned()).or_default().extend(records);
            }
            Write::Delete { namespace, ids } => {
                if let Some(records) = namespaces.get_mut(named(&namespace)) {
                    for id in &ids {
                        records.remove(id);
                    }
                }
            }
        }
    }

    /// In a task of its own: the request's ends with its connection.
    fn apply_later(self: &Arc<Self>, write: Write, delay: Duration) {
        let index = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            index.apply(write);
        });
    }

    fn fetch(&self, asked: &Parameters) -> Value {
        let namespaces = lock(&self.records);
        let records = namespaces.get(named(&asked.namespace));
        let found = asked.ids.iter().filter_map(|id| Some((id, records?.get(id)?)));
        let vectors: Map<String, Value> = found
            .map(|(id, record)| {
                let vector = json!({ "id": id, "values": record.values, "metadata": record.metadata });
                (id.clone(), vector)
            })
            .collect();
        json!({ "vectors": vectors, "namespace": asked.namespace, "usage": { "readUnits": 1 } })
    }

    fn list(&self, asked: &Parameters) -> Value {
        let namespaces = lock(&self.records);
        // A map of strings is in bitwise order, as Pinecone's listing is.
        let mut left = namespaces
            .get(named(&asked.namespace))
            .into_iter()
            .flat_map(BTreeMap::keys)
            .filter(|id| asked.after.as_ref().is_none_or(|after| *id > after))
            .peekable();
        let ids: Vec<&String> = left.by_ref().take(asked.limit).collect();
        let mut answer = json!({
            "vectors": ids.iter().map(|id| json!({ "id": id })).collect::<Vec<_>>(),
            "namespace": asked.namespace,
            "usage": { "readUnits": 1 },
        });
        if left.peek().is_some() {
            answer["pagination"] = json!({ "next": ids.last() });
        }
        answer
    }

    fn query(&self, asked: &limits::Query) -> Value {
        let namespaces = lock(&self.records);
        let mut matches: Vec<(f64, &String)> = namespaces
            .get(named(&asked.namespace))
            .into_iter()
            .flatten()
            .map(|(id, record)| (cosine(&asked.vector, &record.values), id))
            .collect();
        matches.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1)));
        let matches: Vec<Value> = matches
            .into_iter()
            .take(asked.top_k)
            .map(|(score, id)| json!({ "id": id, "score": score, "values": [] }))
            .collect();
        json!({ "matches": matches, "namespace": asked.namespace, "usage": { "readUnits": 1 } })
    }

    fn stats(&self) -> Value {
        let namespaces = lock(&self.records);
        let total: usize = namespaces.values().map(BTreeMap::len).sum();
        let namespaces: Map<String, Value> = namespaces
            .iter()
            .map(|(name, records)| (name.clone(), json!({ "vectorCount": records.len() })))
            .collect();
        json!({
            "namespaces": namespaces,
            "dimension": self.dimensions,
            "indexFullness": 0,
            "totalVectorCount": total,
        })
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// An error as Pinecone tells it, with gRPC's code.
fn error(status: StatusCode, message: &str) -> Response {
    let code = match status {
        StatusCode::BAD_REQUEST => 3,
        StatusCode::GATEWAY_TIMEOUT => 4,
        StatusCode::NOT_FOUND => 5,
        StatusCode::TOO_MANY_REQUESTS => 8,
        StatusCode::SERVICE_UNAVAILABLE => 14,
        _ => 13,
    };
    (status, Json(json!({ "code": code, "message": message, "details": [] }))).into_response()
}

/// An answer that makes the server close the connection before anything of it was sent.
fn broken_off() -> Response {
    let broken = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
    let body = futures::stream::once(std::future::ready(Err::<Bytes, _>(broken)));
    Response::new(Body::from_stream(body))
}
