//! The admin endpoint of a process: `/metrics`, `/healthz` and `/readyz`.
//!
//! It only reads. It is for monitors and load balancers, on loopback or in a private network: whoever reaches it may
//! read it.

pub mod catalogue;
mod exposition;
mod fleet;
mod observed;
mod otlp;
mod page_metrics;
mod process;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::http_server::hosts::Hosts;
use super::http_server::{ClientTimeouts, ConnectionLimits, serve};
use exposition::Format;

pub use observed::{Observed, ReadinessCheck, Reason};
pub use otlp::export_until;
pub use page_metrics::PageMetrics;

/// Connections at once: some monitors, and somebody who looks.
const CONNECTIONS: usize = 16;

/// Timeouts of a client. A scraper keeps its connection from scrape to scrape.
const TIMEOUTS: ClientTimeouts = ClientTimeouts {
    head: Duration::from_secs(5),
    idle: Duration::from_secs(75),
    write: Duration::from_secs(5),
    answer: Duration::from_secs(30),
};

/// Why a process does not do its work, for clients that may not see error texts.
const NOT_SHOWN: &str = "see the log, or refarch status";

/// The state of all routes.
struct Admin {
    observed: Arc<Observed>,
    hosts: Hosts,
    /// Whether only this machine can ask, so that error texts are shown.
    is_loopback: bool,
}

/// Serves the endpoint until the returned handle is dropped. Returns the address too: port 0 takes any free one.
pub async fn start(
    address: SocketAddr,
    observed: &Arc<Observed>,
) -> anyhow::Result<(SocketAddr, AbortOnDropHandle<()>)> {
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!(
            "cannot serve metrics on {address}; name another address with --admin or admin.listen (each process \
             needs a port of its own)"
        )
    })?;
    let address = listener.local_addr()?;
    let is_loopback = address.ip().is_loopback();
    let admin = Admin { observed: Arc::clone(observed), hosts: Hosts::new(is_loopback, &[]), is_loopback };
    let limits = ConnectionLimits { connections: CONNECTIONS, timeouts: TIMEOUTS };
    // It answers while the process drains.
    let served = serve(listener, router(Arc::new(admin)), limits, CancellationToken::new());
    tracing::info!(address = %address, "metrics, health and readiness are served");
    Ok((address, AbortOnDropHandle::new(tokio::spawn(served))))
}

fn router(admin: Arc<Admin>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .fallback(async || (StatusCode::NOT_FOUND, "there are /metrics, /healthz and /readyz\n"))
        .layer(middleware::from_fn_with_state(Arc::clone(&admin), check_host))
        .with_state(admin)
}

/// Refuses other names on loopback, against DNS rebinding by a page in a browser of this machine.
async fn check_host(State(admin): State<Arc<Admin>>, request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    if !admin.hosts.allow(host.unwrap_or_default()) {
        return (StatusCode::FORBIDDEN, "use http://localhost or http://127.0.0.1\n").into_response();
    }
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

async fn metrics(State(admin): State<Arc<Admin>>, headers: axum::http::HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    let format = Format::accepted(accept);
    match admin.observed.collect().await.page(format) {
        Ok(page) => ([(header::CONTENT_TYPE, format.content_type())], page).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn ready(State(admin): State<Arc<Admin>>) -> Response {
    let reasons = admin.observed.reasons().await;
    let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let shown: Vec<_> = reasons
        .iter()
        .map(|Reason { kind, message }| {
            json!({ "kind": kind, "message": if admin.is_loopback { message } else { NOT_SHOWN } })
        })
        .collect();
    let body = json!({ "ready": reasons.is_empty(), "role": admin.observed.role, "reasons": shown });
    (status, Json(body)).into_response()
}
