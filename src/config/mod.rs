//! Settings: flags win over environment, environment over file, file over default. They are resolved once and
//! validated.
//!
//! Loading is a pure function of a file's text, a map of environment variables and overrides from
//! flags. `config/default.toml` lists all keys: a key that is not in that file does not exist.

mod environment;
mod load;
mod validate;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::encoder::{Instructions, Precision};
use crate::secret::Secret;

pub use load::{ConfigError, DEFAULT_FILE, DEFAULTS, File, Override};

/// The system's settings. Each key is described in `config/default.toml`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Settings {
    pub database: Database,
    pub source: Source,
    pub queue: Queue,
    pub index: Index,
    pub embedder: Embedder,
    pub relay: Relay,
    pub indexer: Indexer,
    pub audit: Audit,
    pub serve: Serve,
    pub up: Up,
    pub runtime: Runtime,
    pub log: Log,
}

/// `[database]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Database {
    pub url: Secret,
    pub sslmode: String,
    pub sslrootcert: PathBuf,
    pub pool_size: usize,
    pub connect_timeout_s: u64,
}

/// `[source]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Source {
    pub name: String,
    pub table: String,
    pub id: String,
    pub text: Vec<String>,
    pub metadata: Vec<String>,
}

/// `[queue]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Queue {
    pub kind: QueueKind,
    pub name: String,
    #[serde(serialize_with = "crate::secret::serialize_address")]
    pub url: String,
    #[serde(serialize_with = "crate::secret::serialize_address")]
    pub bulk_url: String,
    #[serde(serialize_with = "crate::secret::serialize_address")]
    pub dead_url: String,
    pub wait_s: u64,
    pub shared_bound: u64,
    pub visibility_s: u64,
    pub max_receives: u32,
}

/// The queues that can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QueueKind {
    /// pgmq in the source's database.
    Pgmq,
    /// Amazon SQS.
    Sqs,
}

/// Prefix of refarch's own keys in a record's metadata. No column may have a name with this prefix.
pub const OWN_KEYS: &str = "_refarch_";

/// The namespace of an index that holds the ownership records of the other namespaces.
pub const NOTES_NAMESPACE: &str = "refarch-notes";

/// `[index]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Index {
    pub kind: IndexKind,
    #[serde(serialize_with = "crate::secret::serialize_address")]
    pub host: String,
    pub name: String,
    pub api_key: Secret,
    pub namespace: String,
    pub cloud: String,
    pub region: String,
    #[serde(serialize_with = "crate::secret::serialize_address")]
    pub controller: String,
    pub freshness_ms: u64,
    pub timeout_ms: u64,
    pub graph_min_rows: u64,
    pub graph_max_backlog: u64,
    pub ef_search: u32,
}

/// The indexes that can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IndexKind {
    /// pgvector in the source's database.
    Pgvector,
    /// A Pinecone index.
    Pinecone,
}

/// `[embedder]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Embedder {
    pub kind: EmbedderKind,
    pub model: String,
    pub precision: Precision,
    pub instructions: Instructions,
    #[serde(serialize_with = "crate::secret::serialize_address")]
    pub url: String,
    pub api_key: Secret,
    pub dimensions: usize,
    pub batch_texts: usize,
    pub batch_tokens: usize,
    pub text_tokens: usize,
    pub requests_per_minute: u32,
    pub tokens_per_minute: u64,
    pub timeout_ms: u64,
}

/// The embedders that can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EmbedderKind {
    /// A `MiniLM`-class model on this machine's CPU.
    Minilm,
    /// A server that speaks `/v1/embeddings`, as `OpenAI` does.
    Openai,
    /// A text-embeddings-inference server, by `/embed`.
    Tei,
    /// Pinecone's hosted models, by `/embed`.
    Pinecone,
}

/// `[relay]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Relay {
    pub poll_ms: u64,
    pub pack: usize,
    pub bulk_threshold: u64,
    pub live_bound: u64,
}

/// `[indexer]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Indexer {
    pub workers: usize,
    pub slice_ms: u64,
    pub hold_ms: u64,
    pub poll_ms: u64,
    pub lease_ms: u64,
    pub settle_ms: u64,
}

/// `[audit]`
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Audit {
    pub period_h: f64,
    pub index: IndexCheck,
    pub armed_s: u64,
}

/// How much of an index outside of the database the proof compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IndexCheck {
    /// The ids of all records, and some records.
    Sample,
    /// Every record.
    Full,
}

/// `[serve]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Serve {
    pub bind: SocketAddr,
    pub edit_token: Secret,
    pub allowed_hosts: Vec<String>,
    pub page_size: u32,
    pub max_connections: usize,
    pub pool_size: usize,
}

/// `[up]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Up {
    pub products: u64,
}

/// `[runtime]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Runtime {
    pub dir: PathBuf,
    pub grace_s: u64,
}

/// `[log]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Log {
    pub format: String,
    pub level: String,
}

impl Runtime {
    /// [`Self::grace_s`] as a duration.
    #[must_use]
    pub fn grace(&self) -> Duration {
        Duration::from_secs(self.grace_s)
    }
}

impl Audit {
    /// How long a round of the continuous proof takes; none if there is no proof.
    #[must_use]
    pub fn period(&self) -> Option<Duration> {
        (self.period_h > 0.0).then(|| Duration::from_secs_f64(self.period_h * 3_600.0))
    }
}

impl Indexer {
    /// [`Self::lease_ms`] as a duration.
    #[must_use]
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }

    /// How long a tracked write of a dead worker stays open. The worker may have written until its lease
    /// ended, and its writes are applied within [`Self::settle_ms`].
    #[must_use]
    pub fn settle(&self) -> Duration {
        Duration::from_millis(self.lease_ms + self.settle_ms)
    }

    /// Number of embedding threads: as set, or one for each core.
    #[must_use]
    pub fn worker_count(&self) -> usize {
        if self.workers > 0 {
            return self.workers;
        }
        std::thread::available_parallelism().map_or(1, usize::from)
    }
}
