//! A double of an embedding server that speaks `OpenAI`'s protocol and can refuse every text.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use axum::{Json, Router};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Length of a vector.
pub const DIMENSIONS: usize = 32;

/// The name of its model.
pub const MODEL: &str = "double";

/// The double. It stops when it is dropped.
pub struct EmbedderDouble {
    url: String,
    server: Arc<Server>,
    _stop: DropGuard,
}

#[derive(Default)]
struct Server {
    refuses_until: Mutex<Option<Instant>>,
}

impl EmbedderDouble {
    /// Serves on a free loopback port.
    pub async fn start() -> std::io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let url = format!("http://{}", listener.local_addr()?);
        let server = Arc::<Server>::default();
        let stop = CancellationToken::new();
        let router = Router::new()
            .route("/v1/embeddings", post(embed))
            .layer(DefaultBodyLimit::disable())
            .with_state(Arc::clone(&server));
        let serving = axum::serve(listener, router).with_graceful_shutdown(stop.clone().cancelled_owned());
        tokio::spawn(serving.into_future());
        Ok(Self { url, server, _stop: stop.drop_guard() })
    }

    /// The address that it serves on.
    #[must_use]
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// From now on and for this long, answers every request with 400. A duration of zero ends the refusals.
    pub fn refuse(&self, long: Duration) {
        let until = (!long.is_zero()).then(|| Instant::now() + long);
        *self.server.refuses_until.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }
}

async fn embed(State(server): State<Arc<Server>>, Json(request): Json<Value>) -> Response {
    let until = *server.refuses_until.lock().unwrap_or_else(PoisonError::into_inner);
    if until.is_some_and(|until| Instant::now() < until) {
        let body = json!({ "error": { "message": "injected fault: no text is accepted", "type": "invalid_request_error" } });
        return (StatusCode::BAD_REQUEST, Json(body)).into_response();
    }
    let texts = match &request["input"] {
        Value::Array(texts) => texts.iter().filter_map(Value::as_str).collect(),
        Value::String(text) => vec![text.as_str()],
        _ => Vec::new(),
    };
    let data: Vec<Value> = texts
        .iter()
        .enumerate()
        .map(|(index, text)| json!({ "object": "embedding", "index": index, "embedding": vector(text) }))
        .collect();
    Json(json!({ "object": "list", "data": data, "model": MODEL, "usage": { "prompt_tokens": 0, "total_tokens": 0 } }))
        .into_response()
}

/// A unit vector that depends only on the text.
fn vector(text: &str) -> Vec<f32> {
    let hash: [u8; DIMENSIONS] = Sha256::digest(text.as_bytes()).into();
    let values = hash.map(|byte| f32::from(byte) - 127.5);
    let length = values.iter().map(|value| value * value).sum::<f32>().sqrt();
    values.map(|value| value / length).to_vec()
}
