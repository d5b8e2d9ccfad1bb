//! `refarch serve`: the page, and the HTTP API that it uses.

mod asset;
mod error;
mod guard;
mod route;
mod search;
mod status;

use std::sync::Arc;

use anyhow::Context as _;
use async_trait::async_trait;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::backend::postgres;
use crate::backend::postgres::products::Products;
use crate::backend::postgres::registry::Worker;
use crate::backend::{self, Backends, Database, LoadedModel};
use crate::config::Settings;
use crate::pipeline::embedder::Embedder;
use crate::pipeline::failure::Result;
use crate::pipeline::index::VectorIndex;
use crate::pipeline::ledger::Ledger as _;
use crate::shutdown;

pub use guard::Guard;
pub use route::router;

/// Searches at once; more wait for their turn, since each embeds on one thread.
const SEARCHES: usize = 16;

/// What the page tells of the sync.
#[async_trait]
pub trait Probe: Send + Sync {
    /// What `refarch status --json` prints.
    async fn status(&self) -> Result<Value>;
    /// Whether the index holds what the row says now.
    async fn is_searchable(&self, id: &str) -> Result<bool>;
    /// Faults that make results wrong for good, and how the proof stands.
    async fn health(&self) -> Result<(Vec<String>, String)> {
        Ok((Vec::new(), String::new()))
    }
}

#[async_trait]
impl Probe for Backends {
    async fn status(&self) -> Result<Value> {
        let status = Self::status(self).await?;
        Ok(serde_json::to_value(status).unwrap_or_default())
    }

    async fn is_searchable(&self, id: &str) -> Result<bool> {
        let peeked = self.ledger.peek(&[id.to_owned()]).await?;
        Ok(peeked.iter().any(|p| p.entry.as_ref().is_some_and(|entry| entry.matches(p.row.as_ref()))))
    }

    async fn health(&self) -> Result<(Vec<String>, String)> {
        let faults = postgres::proof::capture_faults(&self.postgres, &self.source).await?;
        let faults = faults.into_iter().map(|fault| format!("not captured: {fault}")).collect();
        Ok((faults, self.proof().await?.describe()))
    }
}

/// What the routes work with.
pub struct App {
    products: Products,
    embedder: Arc<dyn Embedder>,
    index: Arc<dyn VectorIndex>,
    probe: Arc<dyn Probe>,
    searches: Semaphore,
    status: status::Cache,
    page_size: u64,
    /// A vector for asking whether the index answers.
    zero: Vec<f32>,
}

impl App {
    /// The routes' backends; `page_size` rows on a page unless a request says otherwise.
    #[must_use]
    pub fn new(
        products: Products,
        embedder: Arc<dyn Embedder>,
        index: Arc<dyn VectorIndex>,
        probe: Arc<dyn Probe>,
        page_size: u32,
    ) -> Self {
        let zero = vec![1.0; embedder.dimensions()];
        Self {
            products,
            embedder,
            index,
            probe,
            searches: Semaphore::new(SEARCHES),
            status: status::Cache::default(),
            page_size: page_size.into(),
            zero,
        }
    }
}

/// Takes the address of the settings.
pub async fn bind(settings: &Settings) -> anyhow::Result<TcpListener> {
    let address = settings.serve.bind;
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot serve on {address}; name another address with --bind or serve.bind"))
}

/// Runs the role in a process of its own.
pub async fn run(settings: &Settings) -> anyhow::Result<()> {
    let stop = shutdown::on_signal()?;
    let listener = bind(settings).await?;
    let model = backend::patiently(settings, async || LoadedModel::load(settings).await).await?;
    super::with_database(settings, async |database: &Database| {
        let backends = super::open(database, settings).await?;
        let address = listener.local_addr()?;
        super::print(format!("refarch serves http://{address}\n").as_bytes())?;
        work(listener, &backends, settings, &model, &stop).await
    })
    .await
}

/// Serves until `stop`, then lets requests end within the grace period.
pub async fn work(
    listener: TcpListener,
    backends: &Backends,
    settings: &Settings,
    model: &LoadedModel,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let products = Products::new(backends.postgres.pool.clone(), &backends.target.table.relation);
    products.check().await?;
    let guard = Guard::new(listener.local_addr()?, settings.serve.edit_token.clone());
    // A thread of its own, so that a search does not wait behind a load.
    let app = App::new(
        products,
        model.start(1),
        Arc::clone(&backends.index),
        Arc::new(backends.clone()),
        settings.serve.page_size,
    );
    let worker = Worker::join(backends.postgres.clone(), "serve", 1, Arc::default()).await?;
    let abort = shutdown::after_grace(stop, settings.runtime.grace());
    let server = axum::serve(listener, router(Arc::new(app), guard))
        .with_graceful_shutdown(stop.clone().cancelled_owned());
    let result = super::while_beating(&worker, async {
        tokio::select! {
            result = server.into_future() => result.context("serve HTTP"),
            () = abort.cancelled() => Ok(()),
        }
    })
    .await;
    abort.cancel();
    result
}
