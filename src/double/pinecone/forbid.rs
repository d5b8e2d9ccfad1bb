//! A filter in front of the index that refuses requests about certain records.

use std::sync::Mutex;

use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};

use super::asked::{DeleteSelection, Write};
use super::lock::lock;

/// The kind of request about a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Verb {
    Upsert,
    Delete,
    Fetch,
}

/// Decides by the kind of request, the namespace as the request names it, and the id.
type IsForbidden = dyn Fn(Verb, &str, &str) -> bool + Send + Sync;

/// The filter: which records make a request refused.
pub(super) struct Forbidden(Mutex<Box<IsForbidden>>);

impl Default for Forbidden {
    fn default() -> Self {
        Self(Mutex::new(Box::new(|_, _, _| false)))
    }
}

impl Forbidden {
    pub(super) fn set(&self, is_forbidden: impl Fn(Verb, &str, &str) -> bool + Send + Sync + 'static) {
        *lock(&self.0) = Box::new(is_forbidden);
    }

    pub(super) fn has_write(&self, write: &Write) -> bool {
        let is = lock(&self.0);
        match write {
            Write::Upsert { namespace, records } => {
                records.iter().any(|(id, _)| is(Verb::Upsert, namespace, id))
            }
            Write::Delete { namespace, selection: DeleteSelection::Ids(ids) } => {
                ids.iter().any(|id| is(Verb::Delete, namespace, id))
            }
            Write::Delete { .. } | Write::Update(_) => false,
        }
    }

    /// Whether a fetch with these parameters is refused.
    pub(super) fn has_fetch(&self, query: &[(String, String)]) -> bool {
        let is = lock(&self.0);
        let namespace = query.iter().find(|(key, _)| key == "namespace").map_or("", |(_, name)| name);
        query.iter().any(|(key, id)| key == "ids" && is(Verb::Fetch, namespace, id))
    }
}

/// The answer of the filter. It differs from the answers of the index.
pub(super) fn answer() -> Response {
    (StatusCode::FORBIDDEN, "<html>Request blocked</html>").into_response()
}
