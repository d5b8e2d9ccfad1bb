//! Requests to Pinecone that were found to be within its limits.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::record::Record;

/// The most records in a listing, and the default.
pub(super) const MAX_LISTED: usize = 100;

/// The name of the default namespace, where Pinecone gives it one.
const DEFAULT_NAMESPACE: &str = "__default__";

/// The result of checking a request: the error says why it is refused.
pub(super) type LimitResult<T> = Result<T, String>;

/// A write within the limits.
#[derive(Debug)]
pub(super) enum Write {
    Upsert { namespace: String, records: Vec<(String, Record)> },
    Delete { namespace: String, selection: DeleteSelection },
    Update(Update),
}

/// Which records a delete removes.
#[derive(Debug)]
pub(super) enum DeleteSelection {
    Ids(Vec<String>),
    All,
    Filter(Value),
}

impl Write {
    pub(super) fn namespace(&self) -> &str {
        match self {
            Self::Upsert { namespace, .. } | Self::Delete { namespace, .. } => {
                namespace_or_default(namespace)
            }
            Self::Update(update) => namespace_or_default(&update.namespace),
        }
    }
}

pub(super) fn namespace_or_default(namespace: &str) -> &str {
    if namespace.is_empty() { DEFAULT_NAMESPACE } else { namespace }
}

/// An update of one record.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Update {
    #[serde(default)]
    pub(super) namespace: String,
    pub(super) id: String,
    pub(super) values: Option<Vec<f32>>,
    #[serde(default)]
    pub(super) set_metadata: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Query {
    #[serde(default)]
    pub(super) namespace: String,
    #[serde(default)]
    pub(super) vector: Vec<f32>,
    pub(super) id: Option<String>,
    pub(super) top_k: usize,
    #[serde(default = "everything")]
    pub(super) filter: Value,
    #[serde(default)]
    pub(super) include_values: bool,
    #[serde(default)]
    pub(super) include_metadata: bool,
}

/// A fetch of the records that match a filter.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct FetchByMetadata {
    #[serde(default)]
    pub(super) namespace: String,
    #[serde(default = "everything")]
    pub(super) filter: Value,
    #[serde(default = "a_page")]
    pub(super) limit: usize,
    pub(super) pagination_token: Option<String>,
}

fn everything() -> Value {
    Value::Object(Map::new())
}

fn a_page() -> usize {
    MAX_LISTED
}

/// The parameters of a fetch or a listing.
#[derive(Default)]
pub(super) struct Parameters {
    pub(super) namespace: String,
    pub(super) ids: Vec<String>,
    pub(super) limit: usize,
    pub(super) after: Option<String>,
    pub(super) prefix: String,
}
