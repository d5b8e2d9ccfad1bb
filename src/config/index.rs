//! `[index]`

use std::time::Duration;

use serde::Deserialize;
use toml::Value;

use super::declare::Rule::{Address, AtLeast, Between, Chooses, Is, OneOf, Seconds, Variable};
use super::error::ConfigError;
use super::queue::is_url;
use super::read::{Section as _, Setting, section};
use super::values::Values;
use crate::secret::Secret;

/// Prefix of refarch's own keys in a record's metadata. No column may have a name with this prefix.
pub const RESERVED_METADATA_PREFIX: &str = "_refarch_";

/// The namespace of an index that holds the ownership records of the other namespaces.
pub const OWNERSHIP_NAMESPACE: &str = "refarch-notes";

section! {
    /// `[index]`: where vectors are.
    pub struct Choice in "index" {
        /// The vector index: pgvector (in the source's database) or pinecone.
        kind: Index = "pgvector", OneOf(&["pgvector", "pinecone"]);
    }
}

/// How the nearest vectors are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SearchMethod {
    /// Exactly while that is fast, then through lists.
    Auto,
    /// By reading all vectors.
    Exact,
    /// Through lists (IVFFlat).
    Lists,
    /// Through a graph (HNSW).
    Graph,
}

/// The indexes that can be chosen.
#[derive(Clone, Debug)]
pub enum Index {
    /// pgvector in the source's database.
    Pgvector(PgvectorIndex),
    /// A Pinecone index.
    Pinecone(PineconeIndex),
}

section! {
    /// `[index]` of the kind `pgvector`.
    pub struct PgvectorIndex in "index" of ["pgvector"] {
        /// How the nearest vectors are found: exact (a search reads all vectors and misses nothing), lists (IVFFlat),
        /// graph (HNSW), or auto: exact while that takes at most `index.exact_ms`, then lists.
        search: SearchMethod = "auto", OneOf(&["auto", "exact", "lists", "graph"]);
        /// With `search = "auto"`: build lists once an exact search takes longer than this. Some 20,000 vectors on
        /// one core.
        exact_limit as "exact_ms": Duration = 10, AtLeast(1);
        /// The part of the true ten nearest that a search through lists should find. More reads more lists. Sampled
        /// each hour, and after a tenth of the rows was written; `refarch status` shows it.
        recall: f64 = 0.99, Between(0, 1);
        /// The most memory that PostgreSQL may use to build lists or a graph (`maintenance_work_mem`), in MiB. A million
        /// vectors need 300 for lists.
        build_memory as "build_memory_mib": u64 = 2048, AtLeast(64);
        /// With `search = "graph"`: build the graph once there are this many vectors. Below, a search is exact. A graph
        /// misses texts that are unlike all others, and products that resemble each other closely.
        graph_min_rows: u64 = 50000;
        /// Build the graph only while fewer changes than this wait, because a graph makes a load four times slower.
        graph_max_backlog: u64 = 1000;
        /// Candidates that a search keeps while it walks the graph. More is slower and more exact.
        ef_search: u32 = 200, Between(1, 1000);
    }
}

section! {
    /// `[index]` of the kind `pinecone`.
    pub struct PineconeIndex in "index" of ["pinecone"] {
        /// The index's host (`PINECONE_INDEX_HOST`). Empty: it is looked up by `index.name`.
        host: String = "", Address, Chooses("PINECONE_INDEX_HOST", "pinecone");
        /// The index's name (`PINECONE_INDEX`). Either of the two variables chooses pinecone. `refarch migrate`
        /// creates the index if none has that name.
        name: String = "", Chooses("PINECONE_INDEX", "pinecone");
        /// The API key (`PINECONE_API_KEY`).
        api_key: Secret = "", Variable("PINECONE_API_KEY"),
            Is(is_given, "set PINECONE_API_KEY to the key that Pinecone's console shows");
        /// The namespace for the records (`PINECONE_NAMESPACE`). Empty: the default namespace.
        namespace: String = "", Variable("PINECONE_NAMESPACE"),
            Is(is_not_of_notes, "use another namespace: refarch keeps its index ownership records in this one");
        /// Where `refarch migrate` creates a missing index: the cloud.
        cloud: String = "aws";
        /// Where `refarch migrate` creates a missing index: the region.
        region: String = "us-east-1";
        /// The address of the control plane, which creates indexes and looks them up by name.
        controller: String = "https://api.pinecone.io", Address, Is(is_url, "use a URL");
        /// How long a request may take. At most half of `indexer.lease_ms`.
        timeout as "timeout_ms": Duration = 5000, AtLeast(1);
        /// Freshness is sampled: a sample of the written changes is followed until a query can see it. This is the
        /// time between two queries that ask. Each is billed. Freshness is measured no finer than this.
        freshness as "freshness_ms": Duration = 1000, AtLeast(10);
        /// The time between two samples of a lane, in the whole fleet.
        freshness_sample as "freshness_sample_s": Duration = 60, Seconds(1, 86_400);
    }
}

fn is_given(value: &Value) -> bool {
    value.as_str() != Some("")
}

fn is_not_of_notes(value: &Value) -> bool {
    value.as_str() != Some(OWNERSHIP_NAMESPACE)
}

impl Setting for SearchMethod {
    fn read(values: &Values, path: &'static str) -> Result<Self, ConfigError> {
        values.parse(path)
    }
}

impl Setting for Index {
    fn read(values: &Values, path: &'static str) -> Result<Self, ConfigError> {
        let (pgvector, pinecone) = (PgvectorIndex::read(values)?, PineconeIndex::read(values)?);
        if values.text(path) == "pgvector" {
            return Ok(Self::Pgvector(pgvector));
        }
        if pinecone.host().is_empty() && pinecone.name.is_empty() {
            return Err(values.refused("index.name", "name the index, or set index.host to its host"));
        }
        Ok(Self::Pinecone(pinecone))
    }
}

impl Index {
    /// The settings of a Pinecone index, if it is one.
    #[must_use]
    pub fn pinecone(&self) -> Option<&PineconeIndex> {
        match self {
            Self::Pgvector(_) => None,
            Self::Pinecone(pinecone) => Some(pinecone),
        }
    }
}

impl PineconeIndex {
    /// The host, if it is given; else empty.
    #[must_use]
    pub fn host(&self) -> &str {
        self.host.trim()
    }
}
