//! The page's files, built into the executable.

use axum::Router;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use sha2::{Digest, Sha256};

/// Path, content type, content.
const ASSETS: [(&str, &str, &str); 4] = [
    ("/", "text/html; charset=utf-8", include_str!("assets/index.html")),
    ("/app.css", "text/css; charset=utf-8", include_str!("assets/app.css")),
    ("/app.js", "text/javascript; charset=utf-8", include_str!("assets/app.js")),
    ("/favicon.svg", "image/svg+xml", include_str!("assets/favicon.svg")),
];

/// Routes of the page's files.
pub fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    ASSETS.into_iter().fold(Router::new(), |router, (path, content_type, content)| {
        let hash = Sha256::digest(content.as_bytes());
        let tag = format!(
            "\"{:02x}{:02x}{:02x}{:02x}{:02x}{:02x}\"",
            hash[0], hash[1], hash[2], hash[3], hash[4], hash[5]
        );
        router.route(path, get(async move |headers: HeaderMap| answer(&headers, &tag, content_type, content)))
    })
}

/// The file, or 304 if the browser has the same version.
fn answer(headers: &HeaderMap, tag: &str, content_type: &'static str, content: &'static str) -> Response {
    let about =
        [(header::ETAG, tag), (header::CACHE_CONTROL, "no-cache"), (header::CONTENT_TYPE, content_type)];
    if headers.get(header::IF_NONE_MATCH).is_some_and(|known| known == tag) {
        return (StatusCode::NOT_MODIFIED, [(header::ETAG, tag)]).into_response();
    }
    // The response outlives `tag`, so it needs its own copy.
    let about = about.map(|(name, value)| (name, value.to_owned()));
    (about, content).into_response()
}
