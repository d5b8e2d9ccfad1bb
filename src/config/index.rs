//! `[index]`

use std::time::Duration;

use toml::Value;

use super::declare::Rule::{Address, AtLeast, Between, Chooses, Is, OneOf, Variable};
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
        /// Build the HNSW graph once there are this many vectors. Below, a search reads all vectors and misses
        /// nothing: some 40 ms for 100,000 on two cores. A graph misses texts that are unlike all others: among
        /// 100,000 products, 16 of 100 edits to such texts were not found through it.
        graph_min_rows: u64 = 250000;
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
        /// How often, while changes are written, a query learns which writes queries can see. Each is billed as a
        /// query. Freshness is measured no finer than this.
        freshness as "freshness_ms": Duration = 1000, AtLeast(10);
    }
}

fn is_given(value: &Value) -> bool {
    value.as_str() != Some("")
}

fn is_not_of_notes(value: &Value) -> bool {
    value.as_str() != Some(OWNERSHIP_NAMESPACE)
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
