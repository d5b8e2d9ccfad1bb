//! The control plane: indexes by name. Every index stands for the one index of the double.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Json, Response};
use serde_json::{Value, json};

use super::indexes::IndexDescription;
use super::lock::lock;
use super::server_state::ServerState;

/// An error in the control plane's format.
fn error(status: StatusCode, code: &str, message: &str) -> Response {
    let body = json!({ "status": status.as_u16(), "error": { "code": code, "message": message } });
    (status, Json(body)).into_response()
}

fn missing(name: &str) -> Response {
    error(StatusCode::NOT_FOUND, "NOT_FOUND", &format!("Resource {name} not found"))
}

/// An index in the format of the requested version: newer versions describe its fields.
fn index_json(name: &str, description: &IndexDescription, url: &str, headers: &HeaderMap) -> Value {
    let version =
        headers.get("X-Pinecone-Api-Version").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let ready = description.unready == 0;
    let mut shown = json!({
        "name": name,
        "host": url,
        "status": { "ready": ready, "state": if ready { "Ready" } else { "Initializing" } },
        "deletion_protection": if description.protected { "enabled" } else { "disabled" },
    });
    if version >= "2026-07" {
        let field = json!({ "type": "dense_vector", "dimension": description.dimension, "metric": description.metric });
        shown["schema"] = json!({ "fields": { "_values": field } });
        shown["deployment"] =
            json!({ "deployment_type": "managed", "cloud": description.cloud, "region": description.region });
    } else {
        shown["dimension"] = description.dimension.into();
        shown["metric"] = description.metric.clone().into();
        shown["vector_type"] = "dense".into();
        shown["spec"] = json!({ "serverless": { "cloud": description.cloud, "region": description.region } });
    }
    shown
}

pub(super) async fn list(State(index): State<Arc<ServerState>>, headers: HeaderMap) -> Response {
    let indexes = lock(&index.indexes);
    let shown: Vec<Value> = indexes
        .iter()
        .map(|(name, description)| index_json(name, description, &index.url, &headers))
        .collect();
    Json(json!({ "indexes": shown })).into_response()
}

pub(super) async fn describe(
    State(index): State<Arc<ServerState>>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Response {
    let mut indexes = lock(&index.indexes);
    let Some(description) = indexes.get_mut(&name) else { return missing(&name) };
    let answer = Json(index_json(&name, description, &index.url, &headers)).into_response();
    description.unready = description.unready.saturating_sub(1);
    answer
}

pub(super) async fn create(
    State(index): State<Arc<ServerState>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let invalid = |message: &str| error(StatusCode::BAD_REQUEST, "INVALID_ARGUMENT", message);
    let Ok(body) = serde_json::from_slice::<Value>(&body) else { return invalid("the body is not JSON") };
    let name = body["name"].as_str().unwrap_or_default().to_owned();
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > 45 || !name.chars().all(fits) {
        return invalid("Name must consist of lower case alphanumeric characters or '-'");
    }
    // In newer versions, the fields describe the index.
    let field = &body["schema"]["fields"]["_values"];
    let (deployment, values) =
        if field.is_object() { (&body["deployment"], field) } else { (&body["spec"]["serverless"], &body) };
    let Some(dimension) = values["dimension"].as_u64().filter(|n| (1..=20_000).contains(n)) else {
        return invalid("dimension must be between 1 and 20000");
    };
    let text = |value: &Value, default: &str| value.as_str().unwrap_or(default).to_owned();
    let (Some(cloud), Some(region)) = (deployment["cloud"].as_str(), deployment["region"].as_str()) else {
        return invalid("spec is required");
    };
    let description = IndexDescription {
        dimension: dimension as usize,
        metric: text(&values["metric"], "cosine"),
        cloud: cloud.to_owned(),
        region: region.to_owned(),
        protected: body["deletion_protection"] == "enabled",
        unready: 1,
    };
    let mut indexes = lock(&index.indexes);
    if indexes.contains_key(&name) {
        return error(StatusCode::CONFLICT, "ALREADY_EXISTS", &format!("Resource {name} already exists"));
    }
    index.dimensions.store(description.dimension, Ordering::Relaxed);
    let answer = index_json(&name, &description, &index.url, &headers);
    indexes.insert(name, description);
    (StatusCode::CREATED, Json(answer)).into_response()
}

pub(super) async fn configure(
    State(index): State<Arc<ServerState>>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let mut indexes = lock(&index.indexes);
    let Some(description) = indexes.get_mut(&name) else { return missing(&name) };
    if let Some(protection) = body["deletion_protection"].as_str() {
        description.protected = protection == "enabled";
    }
    Json(index_json(&name, description, &index.url, &headers)).into_response()
}

pub(super) async fn delete(State(index): State<Arc<ServerState>>, Path(name): Path<String>) -> Response {
    let mut indexes = lock(&index.indexes);
    let Some(description) = indexes.get(&name) else { return missing(&name) };
    if description.protected {
        return error(StatusCode::FORBIDDEN, "FORBIDDEN", "Deletion protection is enabled for this index.");
    }
    indexes.remove(&name);
    // All indexes share the same records.
    if indexes.is_empty() {
        drop(indexes);
        lock(&index.log).clear();
    }
    StatusCode::ACCEPTED.into_response()
}
