//! The state that all requests share, and how a read or a write is answered.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse as _, Json, Response};
use rand::rngs::StdRng;
use serde_json::{Value, json};

use super::asked::{LimitResult, Write};
use super::faults::{FaultDecision, PineconeCounts, PineconeFaults};
use super::forbid::{self, Forbidden};
use super::indexes::Indexes;
use super::lock::lock;
use super::store::Log;

/// Headers with a position (LSN) in the namespace's log: of this write, and up to which a query has seen the
/// log.
const REQUEST_LSN_HEADER: &str = "x-pinecone-request-lsn";
const MAX_INDEXED_LSN_HEADER: &str = "x-pinecone-max-indexed-lsn";

/// The state that all requests share.
pub(super) struct ServerState {
    pub(super) url: String,
    pub(super) dimensions: AtomicUsize,
    /// Whether every API key is refused.
    pub(super) is_key_revoked: AtomicBool,
    pub(super) forbidden: Forbidden,
    pub(super) indexes: Mutex<Indexes>,
    pub(super) log: Mutex<Log>,
    pub(super) fault_state: Mutex<FaultState>,
}

/// The faults that are drawn, and their counts.
pub(super) struct FaultState {
    pub(super) rng: StdRng,
    pub(super) faults: PineconeFaults,
    pub(super) counts: PineconeCounts,
}

impl ServerState {
    /// Serves a write, with a fault if one is drawn.
    pub(super) async fn write(self: &Arc<Self>, check: impl FnOnce() -> LimitResult<Write>) -> Response {
        let decision = self.draw(true);
        if let Some(answer) = self.injected_refusal(decision) {
            return answer;
        }
        let write = match check() {
            Ok(write) => write,
            Err(message) => return error(StatusCode::BAD_REQUEST, &message),
        };
        if self.forbidden.has_write(&write) {
            return forbid::answer();
        }
        if let Write::Delete { namespace, .. } = &write
            && !lock(&self.log).contains(namespace)
        {
            return error(StatusCode::NOT_FOUND, "Namespace not found");
        }
        self.count(decision);
        let answer = match &write {
            Write::Upsert { records, .. } => json!({ "upsertedCount": records.len() }),
            Write::Delete { .. } | Write::Update(_) => json!({}),
        };
        match decision {
            FaultDecision::Late(delay) => {
                self.apply_later(write, delay);
                error(StatusCode::GATEWAY_TIMEOUT, "the upstream server did not answer in time")
            }
            FaultDecision::Hung { hold, applied } => {
                if let Some(delay) = applied {
                    self.apply_later(write, delay);
                }
                tokio::time::sleep(hold).await;
                match applied {
                    Some(_) => Json(answer).into_response(),
                    None => error(StatusCode::GATEWAY_TIMEOUT, "the upstream server did not answer in time"),
                }
            }
            FaultDecision::FalseError => {
                self.apply(write);
                error(StatusCode::INTERNAL_SERVER_ERROR, "internal error")
            }
            FaultDecision::Dropped => {
                self.apply(write);
                broken_connection()
            }
            FaultDecision::Served | FaultDecision::Unavailable(_) | FaultDecision::RateLimited { .. } => {
                let mut answer = Json(answer).into_response();
                answer.headers_mut().insert(REQUEST_LSN_HEADER, self.apply(write).into());
                answer
            }
        }
    }

    /// Serves a read, with a fault if one is drawn.
    pub(super) async fn read(&self, answer: impl FnOnce() -> LimitResult<(Value, Option<u64>)>) -> Response {
        let decision = self.draw(false);
        if let Some(answer) = self.injected_refusal(decision) {
            return answer;
        }
        self.count(decision);
        if let FaultDecision::Hung { hold, .. } = decision {
            tokio::time::sleep(hold).await;
        }
        match answer() {
            Ok((answer, seen)) => {
                let mut answer = Json(answer).into_response();
                answer
                    .headers_mut()
                    .extend(seen.map(|seen| (HeaderName::from_static(MAX_INDEXED_LSN_HEADER), seen.into())));
                answer
            }
            Err(message) => error(StatusCode::BAD_REQUEST, &message),
        }
    }

    fn draw(&self, is_write: bool) -> FaultDecision {
        let mut fault_state = lock(&self.fault_state);
        let faults = fault_state.faults;
        faults.draw(&mut fault_state.rng, is_write)
    }

    fn count(&self, decision: FaultDecision) {
        lock(&self.fault_state).counts.add(decision);
    }

    /// The answer if the fault refuses the request without looking at it.
    fn injected_refusal(&self, decision: FaultDecision) -> Option<Response> {
        let answer = match decision {
            FaultDecision::Unavailable(status) => error(status, "the service is unavailable"),
            FaultDecision::RateLimited { says_when } => {
                let mut answer = error(StatusCode::TOO_MANY_REQUESTS, "too many requests");
                if says_when {
                    answer.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
                }
                answer
            }
            _ => return None,
        };
        self.count(decision);
        Some(answer)
    }

    pub(super) fn dimensions(&self) -> usize {
        self.dimensions.load(Ordering::Relaxed)
    }

    /// Applies a write. Returns its position in the log.
    fn apply(&self, write: Write) -> u64 {
        lock(&self.log).apply(write)
    }

    /// Applies a write in a task of its own, because the request's task ends with its connection.
    fn apply_later(self: &Arc<Self>, write: Write, delay: Duration) {
        let index = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            index.apply(write);
        });
    }
}

/// An error in Pinecone's format, with the gRPC code.
pub(super) fn error(status: StatusCode, message: &str) -> Response {
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

/// An answer that makes the server close the connection before it sends a byte.
fn broken_connection() -> Response {
    let broken = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
    let body = futures::stream::once(std::future::ready(Err::<Bytes, _>(broken)));
    Response::new(Body::from_stream(body))
}
