//! The HTTP API.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts, MatchedPath, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use serde::Deserialize;
use serde_json::{Value, json};
use tower_http::set_header::SetResponseHeaderLayer;

use super::access_control::{AccessControl, check_request};
use super::app::App;
use super::error::ApiError;
use super::paging::{MAX_PAGE, Paging};
use super::{caller_trust, page_files, search};
use crate::backend::postgres::products::{Edit, Edited, EditedBySku, Place};
use crate::product::Product;
use crate::role::http_server::ConnectionTracker;

/// Most bytes of a request's body: a description of a megabyte, and JSON's escapes.
const MAX_BODY: usize = 2 * 1024 * 1024;

/// Most bytes of a search's body, which any client may send.
const MAX_SEARCH_BODY: usize = 64 * 1024;

/// Rows on a page of the reference architecture's search.
const LEGACY_PAGE: u64 = 10;

/// The page loads files from its own server only, and uses no inline scripts or styles.
const CONTENT_SECURITY_POLICY: &str =
    "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'";

type Shared = State<Arc<App>>;
type Answer<T> = Result<T, ApiError>;

/// A JSON body. Errors have the API's form.
#[derive(FromRequest)]
#[from_request(via(axum::Json), rejection(ApiError))]
struct Body<T>(T);

/// A query string. Errors have the API's form.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(ApiError))]
struct Query<T>(T);

/// A part of the path. Errors have the API's form.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(ApiError))]
struct Path<T>(T);

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        let (code, message) = match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => (
                "too_large",
                format!(
                    "the body is too large: send at most {} MiB for an edit and {} KiB for a search",
                    MAX_BODY >> 20,
                    MAX_SEARCH_BODY >> 10
                ),
            ),
            StatusCode::UNSUPPORTED_MEDIA_TYPE => {
                ("unsupported_media_type", "send JSON, with the header Content-Type: application/json".into())
            }
            // Also for valid JSON of the wrong shape: axum's status for it is 422.
            _ => return Self::bad_request(rejection.body_text()),
        };
        Self::new(rejection.status(), code, message)
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> Self {
        Self::bad_request(rejection.body_text())
    }
}

impl From<PathRejection> for ApiError {
    fn from(rejection: PathRejection) -> Self {
        Self::bad_request(rejection.body_text())
    }
}

/// All routes. axum bounds the bodies, and the extractors report its limit in the API's form. Responses are
/// not compressed: their memory is counted by their bytes, and a proxy can compress them where that is
/// worthwhile.
pub fn router(app: Arc<App>, access: AccessControl) -> Router {
    Router::new()
        .route("/api/v1/products", get(list).post(create))
        .route("/api/v1/products/{id}", get(read).patch(patch).delete(delete))
        .route("/api/v1/search", get(find))
        .route("/api/v1/status", get(status))
        .route("/api/products", post(legacy_search).layer(DefaultBodyLimit::max(MAX_SEARCH_BODY)))
        .route("/api/updateDescription", post(legacy_update))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .merge(page_files::routes())
        .fallback(async |uri: Uri| ApiError::not_found(format!("there is nothing at {}", uri.path())))
        .method_not_allowed_fallback(async || {
            ApiError::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "this path does not support that method",
            )
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), time_out))
        .layer(middleware::from_fn_with_state(Arc::new(access), check_request))
        .layer(always(header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .layer(always(header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY))
        .layer(always(header::REFERRER_POLICY, "no-referrer"))
        .layer(SetResponseHeaderLayer::if_not_present(
            header::CACHE_CONTROL,
            HeaderValue::from_static("no-store"),
        ))
        .with_state(app)
}

/// A header of every response, refusals included.
fn always(name: HeaderName, value: &'static str) -> SetResponseHeaderLayer<HeaderValue> {
    SetResponseHeaderLayer::overriding(name, HeaderValue::from_static(value))
}

/// Ends requests that take too long, and counts all. Written by hand, because `tower-http`'s layer always answers with an
/// empty body and one status; here the answer depends on whether the client or the server was late.
async fn time_out(State(app): Shared, request: axum::extract::Request, next: middleware::Next) -> Response {
    let tracker = request.extensions().get::<Arc<ConnectionTracker>>().cloned();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let started = Instant::now();
    let response = in_time(&app, tracker, request, next).await;
    let route = route.as_ref().map_or("other", MatchedPath::as_str);
    app.metrics.answered(route, response.status().as_u16(), started.elapsed());
    response
}

async fn in_time(
    app: &App,
    tracker: Option<Arc<ConnectionTracker>>,
    request: axum::extract::Request,
    next: middleware::Next,
) -> Response {
    if let Ok(response) = tokio::time::timeout(app.limits.request, next.run(request)).await {
        return app.with_room(response).unwrap_or_else(IntoResponse::into_response);
    }
    if tracker.is_some_and(|tracker| tracker.waits_for_body()) {
        let message = "the request's body did not arrive in time";
        return ApiError::new(StatusCode::REQUEST_TIMEOUT, "slow_body", message).into_response();
    }
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "timeout", "the request took too long; try again")
        .into_response()
}

async fn list(State(app): Shared, Query(paging): Query<Paging>) -> Answer<Json<Value>> {
    let (page, per_page) = paging.resolve(&app)?;
    let place = match paging.cursor()? {
        Some(_) if paging.page.is_some() => {
            return Err(ApiError::bad_request("use one of page, after and before"));
        }
        Some(cursor) => cursor,
        None => Place::Number(page),
    };
    let _permit = app.permit(&app.reads).await?;
    let found = app.products.page(place, per_page).await?;
    Ok(Json(json!({
        "page": matches!(place, Place::Number(_)).then_some(page),
        "per_page": per_page,
        "pages": found.total.div_ceil(per_page).max(1),
        "total": found.total,
        "total_estimated": found.total_estimated,
        "approximate": found.approximate,
        "previous": found.previous,
        "next": found.next,
        "rows": found.rows,
    })))
}

async fn find(State(app): Shared, Query(paging): Query<Paging>) -> Answer<Json<search::Results>> {
    let (page, per_page) = paging.resolve(&app)?;
    if paging.cursor()?.is_some() {
        return Err(ApiError::bad_request("a search has pages by number only: use page"));
    }
    search::search(&app, paging.q.as_deref().unwrap_or_default(), page, per_page).await.map(Json)
}

fn row_id(text: &str) -> Answer<i64> {
    text.parse()
        .map_err(|_| ApiError::bad_request(format!("{text:?} is not the id of a row: use a whole number")))
}

async fn read(State(app): Shared, Path(id): Path<String>) -> Answer<Response> {
    let id = row_id(&id)?;
    let _permit = app.permit(&app.reads).await?;
    let product = app.products.get(id).await?.ok_or_else(|| no_row(id))?;
    let searchable = app.sync_status.is_searchable(&id.to_string()).await?;
    let mut response = with_revision(StatusCode::OK, &product);
    let mut body = json!(product);
    body["searchable"] = json!(searchable);
    *response.body_mut() = body.to_string().into();
    Ok(response)
}

/// An edit from an object of texts and nulls. Parsed by hand, because serde would also accept an array, and
/// would not name the column at fault.
fn edit_of(body: serde_json::Map<String, Value>) -> Answer<Edit> {
    if body.is_empty() {
        return Err(ApiError::bad_request(
            "the edit is empty: set at least one of name, sku, description and price",
        ));
    }
    let mut edit = Edit::default();
    for (key, value) in body {
        let column = match key.as_str() {
            "name" => &mut edit.name,
            "sku" => &mut edit.sku,
            "description" => &mut edit.description,
            "price" => &mut edit.price,
            _ => {
                let message = format!("{key:?} cannot be edited: use name, sku, description and price");
                return Err(ApiError::bad_request(message));
            }
        };
        *column = Some(match value {
            Value::Null => None,
            Value::String(text) => Some(text),
            _ => return Err(ApiError::bad_request(format!("{key} must be a text or null"))),
        });
    }
    Ok(edit)
}

async fn create(State(app): Shared, Body(body): Body<serde_json::Map<String, Value>>) -> Answer<Response> {
    let edit = edit_of(body)?;
    let _permit = app.permit(&app.edits).await?;
    let product = app.products.create(edit).await?;
    let mut response = with_revision(StatusCode::CREATED, &product);
    if let Ok(location) = HeaderValue::from_str(&format!("/api/v1/products/{}", product.id)) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

async fn patch(
    State(app): Shared,
    Path(id): Path<String>,
    headers: HeaderMap,
    Body(body): Body<serde_json::Map<String, Value>>,
) -> Answer<Response> {
    let id = row_id(&id)?;
    let (revision, edit) = (revision(&headers)?, edit_of(body)?);
    let _permit = app.permit(&app.edits).await?;
    match app.products.patch(id, revision, edit).await? {
        Edited::Done(product) => Ok(with_revision(StatusCode::OK, &product)),
        Edited::Stale(current) => Err(stale(&current)),
        Edited::Gone => Err(no_row(id)),
    }
}

async fn delete(State(app): Shared, Path(id): Path<String>, headers: HeaderMap) -> Answer<StatusCode> {
    let id = row_id(&id)?;
    let revision = revision(&headers)?;
    let _permit = app.permit(&app.edits).await?;
    match app.products.delete(id, revision).await? {
        Edited::Done(()) => Ok(StatusCode::NO_CONTENT),
        Edited::Stale(current) => Err(stale(&current)),
        Edited::Gone => Err(no_row(id)),
    }
}

fn no_row(id: i64) -> ApiError {
    ApiError::not_found(format!("there is no row {id}"))
}

fn stale(current: &Product) -> ApiError {
    ApiError::new(
        StatusCode::PRECONDITION_FAILED,
        "stale",
        "the row was changed meanwhile; its new version is in current",
    )
    .with("current", json!(current))
}

fn with_revision(status: StatusCode, product: &Product) -> Response {
    let mut response = (status, Json(product)).into_response();
    if let Ok(tag) = HeaderValue::from_str(&format!("\"{}\"", product.revision)) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    response
}

/// The revision that an edit is based on.
fn revision(headers: &HeaderMap) -> Answer<&str> {
    let required = || {
        ApiError::new(
            StatusCode::PRECONDITION_REQUIRED,
            "revision_required",
            "send If-Match with the row's revision in quotes, so that your edit overwrites no other",
        )
    };
    let tag = headers.get(header::IF_MATCH).and_then(|tag| tag.to_str().ok()).ok_or_else(required)?;
    tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"')).ok_or_else(required)
}

async fn status(State(app): Shared) -> Answer<Json<Value>> {
    app.status.get(&*app.sync_status).await.map(caller_trust::redacted).map(Json).map_err(ApiError::from)
}

async fn ready(State(app): Shared) -> Answer<String> {
    let super::readiness::Readiness { reasons, notes, proof } = app.ready.get(app.to_check()).await;
    if reasons.is_empty() {
        let notes = notes.iter().map(super::readiness::Reason::shown);
        let lines = ["ready".to_owned(), proof].into_iter().chain(notes).filter(|line| !line.is_empty());
        return Ok(lines.map(|line| line + "\n").collect());
    }
    let mut kinds: Vec<&str> = reasons.iter().map(|reason| reason.kind).collect();
    kinds.dedup();
    let message = format!("not ready: {}", kinds.join(", "));
    let reasons: Vec<String> = reasons.iter().map(super::readiness::Reason::shown).collect();
    let refusal = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", message);
    Err(refusal.with("reasons", json!(reasons)))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LegacySearch {
    #[serde(default)]
    search_term: String,
    current_page: Option<i64>,
}

async fn legacy_search(State(app): Shared, Body(body): Body<LegacySearch>) -> Answer<Json<Vec<Value>>> {
    let page = body.current_page.and_then(|page| u64::try_from(page).ok()).unwrap_or(1).clamp(1, MAX_PAGE);
    if body.search_term.trim().is_empty() {
        let _permit = app.permit(&app.reads).await?;
        return Ok(Json(app.products.legacy_page(page, LEGACY_PAGE).await?));
    }
    let results = search::search(&app, &body.search_term, page, LEGACY_PAGE).await?;
    let _permit = app.permit(&app.reads).await?;
    let ids: Vec<i64> = results.rows.iter().map(|hit| hit.product.id).collect();
    Ok(Json(app.products.legacy_by_ids(&ids).await?))
}

#[derive(Deserialize)]
struct LegacyUpdate {
    sku: String,
    description: String,
}

async fn legacy_update(State(app): Shared, Body(body): Body<LegacyUpdate>) -> Answer<Json<Value>> {
    let _permit = app.permit(&app.edits).await?;
    match app.products.describe_by_sku(&body.sku, &body.description).await? {
        EditedBySku::Done(row) => Ok(Json(row)),
        EditedBySku::Unknown => Err(ApiError::not_found(format!("no row has the SKU {:?}", body.sku))),
        EditedBySku::Ambiguous(count) => Err(ApiError::new(
            StatusCode::CONFLICT,
            "ambiguous_sku",
            format!(
                "{count} rows have the SKU {:?}, and none was changed: edit by id with PATCH /api/v1/products/{{id}}",
                body.sku
            ),
        )),
    }
}
