//! What Pinecone is asked, once it is known to be within its limits.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::Record;

/// Records in a listing, unless fewer are asked for.
pub(super) const MAX_LISTED: usize = 100;

/// How the default namespace is called where it has a name.
const DEFAULT_NAMESPACE: &str = "__default__";

/// Why a request is refused.
pub(super) type LimitResult<T> = Result<T, String>;

/// A write that is within the limits.
#[derive(Debug)]
pub(super) enum Write {
    Upsert { namespace: String, records: Vec<(String, Record)> },
    Delete { namespace: String, selection: DeleteSelection },
    Update(Update),
}

/// What a delete means.
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

/// A change of one record.
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

/// A fetch of what passes a filter.
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

/// Parameters of a fetch or a listing.
#[derive(Default)]
pub(super) struct Parameters {
    pub(super) namespace: String,
    pub(super) ids: Vec<String>,
    pub(super) limit: usize,
    pub(super) after: Option<String>,
    pub(super) prefix: String,
}
