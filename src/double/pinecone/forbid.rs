//! Records that a filter before the index lets nobody ask about.

use std::sync::Mutex;

use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};

use super::asked::{DeleteSelection, Write};
use super::lock;

/// What is asked about a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Verb {
    Upsert,
    Delete,
    Fetch,
}

/// By what is asked, the namespace as the request names it, and the id.
type IsForbidden = dyn Fn(Verb, &str, &str) -> bool + Send + Sync;

/// Which requests are refused for a record in them.
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

    /// By the parameters of a fetch.
    pub(super) fn has_fetch(&self, query: &[(String, String)]) -> bool {
        let is = lock(&self.0);
        let namespace = query.iter().find(|(key, _)| key == "namespace").map_or("", |(_, name)| name);
        query.iter().any(|(key, id)| key == "ids" && is(Verb::Fetch, namespace, id))
    }
}

/// What the filter says, which is not the index's own word.
pub(super) fn answer() -> Response {
    (StatusCode::FORBIDDEN, "<html>Request blocked</html>").into_response()
}
