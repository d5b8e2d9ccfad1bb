//! A double of Pinecone in this process: data plane and control plane, with Pinecone's limits and with faults
//! on request.
//!
//! It is written from Pinecone's documentation and shares no code with the client, so that the two agree only
//! where both are right.

mod asked;
mod control_plane;
mod faults;
mod forbid;
mod indexes;
mod limits;
mod lock;
mod metadata_filter;
mod record;
mod server_state;
mod store;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Json, Response};
use axum::routing::{get, post};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};

pub use faults::{PineconeCounts, PineconeFaults};
use forbid::Forbidden;
pub use forbid::Verb;
use lock::lock;
pub use record::Record;
use server_state::{FaultState, ServerState, error};

/// The double. It stops when its last clone is dropped.
#[derive(Clone)]
pub struct PineconeDouble {
    url: String,
    index: Arc<ServerState>,
    _stop: Arc<DropGuard>,
}

impl PineconeDouble {
    /// Serves an empty index of vectors of this length on a free loopback port. The faults follow from the
    /// seed and the order of requests.
    pub async fn start(dimensions: usize, seed: u64) -> std::io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let url = format!("http://{}", listener.local_addr()?);
        let index = Arc::new(ServerState {
            url: url.clone(),
            dimensions: AtomicUsize::new(dimensions),
            is_key_revoked: AtomicBool::new(false),
            forbidden: Forbidden::default(),
            indexes: Mutex::default(),
            log: Mutex::default(),
            fault_state: Mutex::new(FaultState {
                rng: StdRng::seed_from_u64(seed),
                faults: PineconeFaults::default(),
                counts: PineconeCounts::default(),
            }),
        });
        let stop = CancellationToken::new();
        let server = axum::serve(listener, router(Arc::clone(&index)))
            .with_graceful_shutdown(stop.clone().cancelled_owned());
        tokio::spawn(server.into_future());
        Ok(Self { url, index, _stop: Arc::new(stop.drop_guard()) })
    }

    /// The address that it serves on, such as `http://127.0.0.1:5081`.
    #[must_use]
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// Sets the faults from now on. Late writes that are already waiting are still applied.
    pub fn set_faults(&self, faults: PineconeFaults) {
        lock(&self.index.fault_state).faults = faults;
    }

    /// The counts of requests and faults since the start.
    #[must_use]
    pub fn counts(&self) -> PineconeCounts {
        lock(&self.index.fault_state).counts
    }

    /// The records of a namespace as readers see them. The empty name is the default namespace.
    #[must_use]
    pub fn snapshot(&self, namespace: &str) -> BTreeMap<String, Record> {
        lock(&self.index.log).snapshot(namespace)
    }

    /// Refuses every API key from now on.
    pub fn revoke_keys(&self) {
        self.index.is_key_revoked.store(true, Ordering::Relaxed);
    }

    /// From now on, answers requests about such a record with 403, as a filter in front of the index may.
    pub fn forbid(&self, is_forbidden: impl Fn(Verb, &str, &str) -> bool + Send + Sync + 'static) {
        self.index.forbidden.set(is_forbidden);
    }

    /// Sets how long a write takes until readers see it.
    pub fn set_delay(&self, delay: Duration) {
        lock(&self.index.log).delay = delay;
    }
}

fn router(index: Arc<ServerState>) -> Router {
    Router::new()
        .route("/vectors/upsert", post(upsert))
        .route("/vectors/delete", post(delete))
        .route("/vectors/update", post(update))
        .route("/vectors/fetch", get(fetch))
        .route("/vectors/fetch_by_metadata", post(fetch_by_metadata))
        .route("/vectors/list", get(list))
        .route("/namespaces", get(namespaces).post(add_namespace))
        .route("/namespaces/{name}", get(namespace).delete(remove_namespace))
        .route("/indexes", get(control_plane::list).post(control_plane::create))
        .route(
            "/indexes/{name}",
            get(control_plane::describe).patch(control_plane::configure).delete(control_plane::delete),
        )
        .route("/query", post(query))
        .route("/describe_index_stats", post(stats))
        .layer(middleware::from_fn_with_state(Arc::clone(&index), authenticate))
        // The double checks Pinecone's limit itself, with Pinecone's answer.
        .layer(DefaultBodyLimit::disable())
        .with_state(index)
}

async fn authenticate(State(index): State<Arc<ServerState>>, request: Request, next: Next) -> Response {
    lock(&index.fault_state).counts.requests += 1;
    let without_key = request.headers().get("Api-Key").is_none_or(header::HeaderValue::is_empty);
    if without_key || index.is_key_revoked.load(Ordering::Relaxed) {
        return (StatusCode::UNAUTHORIZED, "Unauthorized").into_response();
    }
    next.run(request).await
}

async fn upsert(State(index): State<Arc<ServerState>>, body: Bytes) -> Response {
    index.write(|| limits::upsert(&body, index.dimensions())).await
}

async fn delete(State(index): State<Arc<ServerState>>, body: Bytes) -> Response {
    index.write(|| limits::delete(&body)).await
}

async fn update(State(index): State<Arc<ServerState>>, body: Bytes) -> Response {
    index.write(|| limits::update(&body, index.dimensions())).await
}

async fn fetch(
    State(index): State<Arc<ServerState>>,
    Query(query): Query<Vec<(String, String)>>,
) -> Response {
    if index.forbidden.has_fetch(&query) {
        return forbid::answer();
    }
    index.read(|| Ok((lock(&index.log).fetch(&limits::fetch(query)?), None))).await
}

async fn fetch_by_metadata(State(index): State<Arc<ServerState>>, body: Bytes) -> Response {
    index.read(|| Ok((lock(&index.log).fetch_by_metadata(&limits::by_metadata(&body)?)?, None))).await
}

async fn list(State(index): State<Arc<ServerState>>, Query(query): Query<Vec<(String, String)>>) -> Response {
    index.read(|| Ok((lock(&index.log).list(&limits::list(query)?), None))).await
}

async fn query(State(index): State<Arc<ServerState>>, body: Bytes) -> Response {
    lock(&index.fault_state).counts.queries += 1;
    let answer = || {
        let asked = limits::query(&body, index.dimensions())?;
        let mut log = lock(&index.log);
        let seen = log.seen(&asked.namespace);
        let vector = match &asked.id {
            Some(id) => log.values(&asked.namespace, id).ok_or("no record has this id")?,
            None => asked.vector.clone(),
        };
        Ok((log.query(&asked, &vector)?, Some(seen)))
    };
    index.read(answer).await
}

async fn stats(State(index): State<Arc<ServerState>>) -> Response {
    index.read(|| Ok((lock(&index.log).stats(index.dimensions()), None))).await
}

async fn namespaces(State(index): State<Arc<ServerState>>) -> Response {
    let counts = lock(&index.log).counts();
    let shown = counts.into_iter().map(|(name, count)| json!({ "name": name, "record_count": count }));
    Json(json!({ "namespaces": shown.collect::<Vec<_>>() })).into_response()
}

async fn namespace(State(index): State<Arc<ServerState>>, Path(name): Path<String>) -> Response {
    match lock(&index.log).counts().get(&name) {
        Some(count) => Json(json!({ "name": name, "record_count": count })).into_response(),
        None => error(StatusCode::NOT_FOUND, "Namespace not found"),
    }
}

async fn add_namespace(State(index): State<Arc<ServerState>>, Json(body): Json<Value>) -> Response {
    let name = body["name"].as_str().unwrap_or_default().to_owned();
    lock(&index.log).add(&name);
    Json(json!({ "name": name, "record_count": 0 })).into_response()
}

async fn remove_namespace(State(index): State<Arc<ServerState>>, Path(name): Path<String>) -> Response {
    if lock(&index.log).remove(&name) {
        return Json(json!({})).into_response();
    }
    error(StatusCode::NOT_FOUND, "Namespace not found")
}
