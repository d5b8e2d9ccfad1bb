//! `refarch serve`: the page, and the HTTP API that it uses.

mod access_control;
mod app;
mod caller_trust;
mod error;
mod limits;
mod page_files;
mod paging;
mod query_cache;
mod readiness;
mod route;
mod search;
mod status;
mod sync_status;
mod throttle;

use std::sync::Arc;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::backend::postgres::products::Products;
use crate::backend::{Backends, Database, LoadedModel};
use crate::config::Settings;
use crate::shutdown;

use super::admin::Observed;
use super::harness::Process;

pub use super::http_server::{ClientTimeouts, ConnectionLimits, serve};
pub use access_control::AccessControl;
pub use app::App;
pub use limits::Limits;
use limits::REQUEST_TIMEOUT;
pub use route::router;
pub use sync_status::{Health, SyncStatus};

/// Binds the address in the settings.
pub async fn bind(settings: &Settings) -> anyhow::Result<TcpListener> {
    let address = settings.serve.bind;
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot serve on {address}; name another address with --bind or serve.bind"))
}

/// Runs the role in its own process.
pub async fn run(settings: &Settings) -> anyhow::Result<()> {
    let process = Process::start("serve", settings).await?;
    let listener = bind(settings).await?;
    super::harness::with_model(settings, async |database: &Database, model: &LoadedModel| {
        let backends = process.open_backends(database, settings, Some(model)).await?;
        let address = listener.local_addr()?;
        super::output::print(format!("refarch serves http://{address}\n").as_bytes())?;
        let work = work(listener, &backends, settings, model, &process.observed, &process.stop);
        process.exporting(Box::pin(work)).await
    })
    .await
}

/// Serves until `stop`, then lets requests finish within the grace period.
pub async fn work(
    listener: TcpListener,
    backends: &Backends,
    settings: &Settings,
    model: &LoadedModel,
    observed: &Observed,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let requests = backends.postgres.for_requests(settings.serve.pool_size, REQUEST_TIMEOUT)?;
    observed.watch_pool("requests", &requests.pool);
    let asked = Backends::open_for(&requests, settings, Some(model)).await?;
    let mut products = Products::new(requests.pool.clone(), &asked.generation.table.relation);
    if let Some(vectors) = &asked.vectors {
        observed.page.watch_second_looks(vectors.second_looks());
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
    )
    .measuring(Arc::clone(&observed.page));
    let app = Arc::new(app);
    observed.watch_readiness(Arc::clone(&app) as _);
    let connection_limits = ConnectionLimits::new(
        settings.serve.max_connections,
        settings.serve.pool_size + settings.database.pool_size,
    );
    let worker = super::harness::register(backends, settings, "serve", 1, &Arc::default()).await?;
    let abort = shutdown::after_grace(stop, settings.runtime.grace);
    let server = serve(listener, router(app, access), connection_limits, stop.clone());
    let result = super::harness::with_heartbeat(&worker, observed, async {
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
