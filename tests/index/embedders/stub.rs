//! A server whose answers a test decides, and which records its requests.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse as _, Json, Response};
use serde_json::{Value, json};

/// Length of its vectors.
pub const DIMENSIONS: usize = 4;

/// One request.
#[derive(Clone, Debug)]
pub struct ReceivedRequest {
    /// Path and query.
    pub target: String,
    pub texts: Vec<String>,
    /// The key that came with it.
    pub key: String,
    pub is_get: bool,
}

type Asks = Arc<Mutex<Vec<ReceivedRequest>>>;

pub struct ScriptedServer {
    pub url: String,
    asked: Asks,
}

impl ScriptedServer {
    /// Starts it. `answer` is given each request and how many came before.
    pub async fn start(
        answer: impl Fn(&ReceivedRequest, usize) -> Response + Clone + Send + Sync + 'static,
    ) -> Self {
        let asked = Asks::default();
        let log = Arc::clone(&asked);
        let handle = move |method: Method, uri: Uri, headers: HeaderMap, body: Bytes| {
            let one = read(&method, &uri, &headers, &body);
            let mut log = log.lock().unwrap();
            let response = answer(&one, log.len());
            log.push(one);
            std::future::ready(response)
        };
        let router = Router::new().fallback(handle);
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { url, asked }
    }

    /// All requests so far.
    pub fn asked(&self) -> Vec<ReceivedRequest> {
        self.asked.lock().unwrap().clone()
    }
}

fn read(method: &Method, uri: &Uri, headers: &HeaderMap, body: &Bytes) -> ReceivedRequest {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    let texts = body.get("input").or_else(|| body.get("inputs")).and_then(Value::as_array);
    let text = |one: &Value| one.as_str().or(one["text"].as_str()).unwrap().to_owned();
    let key = headers.get("Authorization").or_else(|| headers.get("Api-Key"));
    ReceivedRequest {
        target: uri.path_and_query().unwrap().to_string(),
        texts: texts.into_iter().flatten().map(text).collect(),
        key: key.and_then(|key| key.to_str().ok()).unwrap_or_default().to_owned(),
        is_get: method == Method::GET,
    }
}

/// A vector that tells texts apart by their first character.
fn vector(text: &str) -> [f32; DIMENSIONS] {
    let first = text.chars().next().map_or(0.5, |first| (first as u32 % 97) as f32);
    [1.0, first, 2.0, 3.0]
}

/// What the stub answers when nothing is wrong, in the protocol of the path.
pub fn vectors(asked: &ReceivedRequest) -> Response {
    let path = asked.target.split('?').next().unwrap();
    if path.ends_with("/embeddings") {
        let data: Vec<Value> = asked
            .texts
            .iter()
            .enumerate()
            .map(|(index, text)| json!({ "index": index, "embedding": vector(text) }))
            .collect();
        return Json(json!({ "data": data })).into_response();
    }
    if asked.is_get {
        return Json(json!({ "model_id": "stub" })).into_response();
    }
    Json(asked.texts.iter().map(|text| vector(text)).collect::<Vec<_>>()).into_response()
}

pub fn status(status: u16, body: &str) -> Response {
    (StatusCode::from_u16(status).unwrap(), Body::from(body.to_owned())).into_response()
}

pub fn with_header(status: u16, name: &str, value: &str) -> Response {
    Response::builder().status(status).header(name, value).body(Body::empty()).unwrap()
}
