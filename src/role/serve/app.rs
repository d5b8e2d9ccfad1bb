//! The state that all routes share, and the permits of their work.

use std::sync::Arc;

use async_trait::async_trait;
use axum::body::HttpBody as _;
use axum::http::StatusCode;
use axum::response::Response;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::error::ApiError;
use super::limits::Limits;
use super::query_cache::QueryCache;
use super::sync_status::SyncStatus;
use super::{readiness, status};
use crate::backend::postgres::products::Products;
use crate::pipeline::embedder::Embedder;
use crate::pipeline::index::VectorIndex;
use crate::role::admin::{self, PageMetrics, ReadinessCheck};
use crate::role::http_server::MemoryReservation;

/// Responses up to this size reserve no memory.
const SMALL_ANSWER_KIB: u64 = 64;

/// The state that all routes share.
pub struct App {
    pub(super) products: Products,
    pub(super) embedder: Arc<dyn Embedder>,
    pub(super) query_cache: QueryCache,
    pub(super) index: Arc<dyn VectorIndex>,
    pub(super) sync_status: Arc<dyn SyncStatus>,
    pub(super) limits: Limits,
    pub(super) searches: Semaphore,
    pub(super) queries: Semaphore,
    pub(super) reads: Semaphore,
    pub(super) edits: Semaphore,
    pub(super) answers: Arc<Semaphore>,
    pub(super) status: status::Cache,
    pub(super) ready: readiness::Cache,
    pub(super) page_size: u64,
    /// A query vector for checking that the index answers.
    pub(super) zero: Vec<f32>,
    pub(super) metrics: Arc<PageMetrics>,
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
            metrics: Arc::default(),
        }
    }

    /// The same state, which counts requests here.
    #[must_use]
    pub fn measuring(self, metrics: Arc<PageMetrics>) -> Self {
        Self { metrics, ..self }
    }

    /// What a check of readiness asks.
    pub(super) fn to_check(&self) -> readiness::Parts<'_> {
        readiness::Parts {
            products: &self.products,
            index: &*self.index,
            zero: &self.zero,
            sync_status: &*self.sync_status,
        }
    }

    /// Reserves memory for a large response; `busy` if too little is left.
    pub(super) fn with_room(&self, mut response: Response) -> Result<Response, ApiError> {
        let kib = response.body().size_hint().lower() / 1024;
        if kib > SMALL_ANSWER_KIB {
            let kib = u32::try_from(kib).unwrap_or(u32::MAX).min(self.limits.answers_kib);
            let room = Arc::clone(&self.answers).try_acquire_many_owned(kib).map_err(|_| busy())?;
            response.extensions_mut().insert(MemoryReservation::new(room));
        }
        Ok(response)
    }

    /// A permit for one kind of work; `busy` if none is free in time.
    pub(super) async fn permit<'a>(&self, permits: &'a Semaphore) -> Result<SemaphorePermit<'a>, ApiError> {
        match tokio::time::timeout(self.limits.permit_timeout, permits.acquire()).await {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(busy()),
        }
    }
}

fn busy() -> ApiError {
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "busy", "too many requests at once; try again")
}

#[async_trait]
impl ReadinessCheck for App {
    async fn reasons(&self) -> Vec<admin::Reason> {
        let readiness::Readiness { reasons, .. } = self.ready.get(self.to_check()).await;
        reasons.iter().map(|reason| admin::Reason::new(reason.kind, reason.in_full())).collect()
    }
}
