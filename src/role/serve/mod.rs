//! `refarch serve`: the page, and the HTTP API that it uses.

mod access_control;
mod caller_trust;
mod connection_tracker;
mod connections;
mod error;
mod hosts;
mod page_files;
mod query_cache;
mod readiness;
mod route;
mod search;
mod status;
mod throttle;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use axum::body::HttpBody as _;
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::sync::CancellationToken;

use crate::backend::postgres;
use crate::backend::postgres::products::Products;
use crate::backend::postgres::worker_registry::WorkerRegistration;
use crate::backend::{Backends, Database, LoadedModel};
use crate::config::Settings;
use crate::pipeline::embedder::Embedder;
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::index::VectorIndex;
use crate::pipeline::ledger::Ledger as _;
use crate::shutdown;

pub use access_control::AccessControl;
pub use connection_tracker::ClientTimeouts;
pub use connections::{ConnectionLimits, serve};
use error::ApiError;
use query_cache::QueryCache;
pub use route::router;

/// How long a request may take. Its database statements have the same timeout.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// Searches at once. More searches wait for a permit, because all of them embed on one thread.
const SEARCHES: usize = 16;

/// Memory for responses that clients have not read yet, in KiB. A page of a hundred long texts may take a
/// hundred megabytes, and a client may be slow.
const ANSWERS_KIB: u32 = 256 * 1024;

/// Responses up to this size reserve no memory.
const SMALL_ANSWER_KIB: u64 = 64;

/// How long a request waits for a permit.
const PERMIT_TIMEOUT: Duration = Duration::from_secs(5);

/// The state of the sync, as the page shows it.
#[async_trait]
pub trait SyncStatus: Send + Sync {
    /// Checks that the index which is searched is the one that is kept in step.
    async fn check_generation(&self) -> Result<()> {
        Ok(())
    }
    /// The output of `refarch status --json`.
    async fn status(&self) -> Result<Value>;
    /// Whether the index holds the row as it is now.
    async fn is_searchable(&self, id: &str) -> Result<bool>;
    /// Faults that make results wrong until somebody mends them, and the state of the continuous proof.
    async fn health(&self) -> Result<(Vec<String>, String)> {
        Ok((Vec::new(), String::new()))
    }
}

#[async_trait]
impl SyncStatus for Backends {
    async fn check_generation(&self) -> Result<()> {
        if postgres::generation::is_active(&self.postgres, self.generation.id).await? {
            return Ok(());
        }
        let message = "refarch migrate made another index after this process started: restart this process";
        Err(Error::new(FailureKind::WrongShape, "look for the index", message))
    }

    async fn status(&self) -> Result<Value> {
        let status = Self::status(self).await?;
        Ok(serde_json::to_value(status).unwrap_or_default())
    }

    async fn is_searchable(&self, id: &str) -> Result<bool> {
        let peeked = self.ledger.peek(&[id.to_owned()]).await?;
        Ok(peeked.iter().any(|p| p.entry.as_ref().is_some_and(|entry| entry.matches(p.row.as_ref()))))
    }

    async fn health(&self) -> Result<(Vec<String>, String)> {
        let faults = postgres::capture::faults(&self.postgres, &self.source).await?;
        let faults = faults.into_iter().map(|fault| format!("not captured: {fault}")).collect();
        Ok((faults, self.proof().await?.describe()))
    }
}

/// Limits on requests. Requests that need the database leave a few of its connections to status and
/// readiness.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long a request may take.
    pub request: Duration,
    /// How long a request waits for a permit.
    pub permit_timeout: Duration,
    /// Searches at once, embedding included.
    pub searches: usize,
    /// Searches at once in the database and the index. Each takes two connections.
    pub queries: usize,
    /// Reads of pages and rows at once.
    pub reads: usize,
    /// Edits at once.
    pub edits: usize,
    /// Memory for responses that clients have not read yet, in KiB.
    pub answers_kib: u32,
}

impl Limits {
    /// The limits for this number of connections to the database.
    #[must_use]
    pub fn new(connections: usize) -> Self {
        Self {
            request: REQUEST_TIMEOUT,
            permit_timeout: PERMIT_TIMEOUT,
            searches: SEARCHES,
            queries: (connections / 4).max(1),
            reads: (connections / 4).max(1),
            edits: (connections / 6).max(1),
            answers_kib: ANSWERS_KIB,
        }
    }
}

/// The state that all routes share.
pub struct App {
    products: Products,
    embedder: Arc<dyn Embedder>,
    query_cache: QueryCache,
    index: Arc<dyn VectorIndex>,
    sync_status: Arc<dyn SyncStatus>,
    limits: Limits,
    searches: Semaphore,
    queries: Semaphore,
    reads: Semaphore,
    edits: Semaphore,
    answers: Arc<Semaphore>,
    status: status::Cache,
    ready: readiness::Cache,
    page_size: u64,
    /// A query vector for checking that the index answers.
    zero: Vec<f32>,
}

impl App {
    /// The state with these backends. A page has `page_size` rows unless a request sets `per_page`.
    #[must_use]
    pub fn new(
        products: Products,
        embedder: Arc<dyn Embedder>,
        index: Arc<dyn VectorIndex>,
        sync_status: Arc<dyn SyncStatus>,
        page_size: u32,
        limits: Limits,
    ) -> Self {
        let zero = vec![1.0; embedder.dimensions()];
        Self {
            products,
            embedder,
            query_cache: QueryCache::default(),
            index,
            sync_status,
            limits,
            searches: Semaphore::new(limits.searches),
            queries: Semaphore::new(limits.queries),
            reads: Semaphore::new(limits.reads),
            edits: Semaphore::new(limits.edits),
            answers: Arc::new(Semaphore::new(limits.answers_kib as usize)),
            status: status::Cache::default(),
            ready: readiness::Cache::default(),
            page_size: page_size.into(),
            zero,
        }
    }

    /// Reserves memory for a large response; `busy` if too little is left.
    fn with_room(&self, mut response: Response) -> std::result::Result<Response, ApiError> {
        let kib = response.body().size_hint().lower() / 1024;
        if kib > SMALL_ANSWER_KIB {
            let kib = u32::try_from(kib).unwrap_or(u32::MAX).min(self.limits.answers_kib);
            let room = Arc::clone(&self.answers).try_acquire_many_owned(kib).map_err(|_| busy())?;
            response.extensions_mut().insert(connection_tracker::MemoryReservation::new(room));
        }
        Ok(response)
    }

    /// A permit for one kind of work; `busy` if none is free in time.
    async fn permit<'a>(&self, permits: &'a Semaphore) -> std::result::Result<SemaphorePermit<'a>, ApiError> {
        match tokio::time::timeout(self.limits.permit_timeout, permits.acquire()).await {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(busy()),
        }
    }
}

fn busy() -> ApiError {
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "busy", "too many requests at once; try again")
}

/// Binds the address in the settings.
pub async fn bind(settings: &Settings) -> anyhow::Result<TcpListener> {
    let address = settings.serve.bind;
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot serve on {address}; name another address with --bind or serve.bind"))
}

/// Runs the role in its own process.
pub async fn run(settings: &Settings) -> anyhow::Result<()> {
    let stop = shutdown::on_signal()?;
    let listener = bind(settings).await?;
    super::harness::with_model(settings, async |database: &Database, model: &LoadedModel| {
        let backends = super::harness::open_backends(database, settings, Some(model)).await?;
        let address = listener.local_addr()?;
        super::output::print(format!("refarch serves http://{address}\n").as_bytes())?;
        work(listener, &backends, settings, model, &stop).await
    })
    .await
}

/// Serves until `stop`, then lets requests finish within the grace period.
pub async fn work(
    listener: TcpListener,
    backends: &Backends,
    settings: &Settings,
    model: &LoadedModel,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let requests = backends.postgres.for_requests(settings.serve.pool_size, REQUEST_TIMEOUT)?;
    let asked = Backends::open_for(&requests, settings, Some(model)).await?;
    let mut products = Products::new(requests.pool.clone(), &asked.generation.table.relation);
    if let Some(vectors) = &asked.vectors {
        products = products.with_vectors(Arc::clone(vectors));
    }
    products.check().await?;
    let access = AccessControl::new(listener.local_addr()?, settings.serve.edit_token.clone())
        .with_hosts(&settings.serve.allowed_hosts);
    // Searches have their own embedding thread, so that a search does not wait behind a load.
    let app = App::new(
        products,
        model.start(1),
        Arc::clone(&asked.index),
        Arc::new(asked),
        settings.serve.page_size,
        Limits::new(settings.serve.pool_size),
    );
    let connection_limits = ConnectionLimits::new(
        settings.serve.max_connections,
        settings.serve.pool_size + settings.database.pool_size,
    );
    let worker = WorkerRegistration::join(backends.postgres.clone(), "serve", 1, Arc::default()).await?;
    let abort = shutdown::after_grace(stop, settings.runtime.grace);
    let server = serve(listener, router(Arc::new(app), access), connection_limits, stop.clone());
    let result = super::harness::with_heartbeat(&worker, async {
        tokio::select! {
            () = server => {}
            () = abort.cancelled() => {}
        }
        Ok(())
    })
    .await;
    abort.cancel();
    requests.pool.close();
    result
}
