//! `[index]`

use std::time::Duration;

use toml::Value;

use super::declare::Rule::{Address, AtLeast, Between, Chooses, Is, OneOf, Variable};
use super::error::ConfigError;
use super::queue::is_url;
use super::read::{Section as _, Setting, section};
use super::values::Values;
use crate::secret::Secret;

/// What keys of ours in a record's metadata begin with, so that no column's key meets them.
pub const OWN_KEYS: &str = "_refarch_";

/// The namespace of an index in which the notes stand that tell whose the others are.
pub const NOTES_NAMESPACE: &str = "refarch-notes";

section! {
    /// `[index]`: where vectors are.
    pub struct Choice in "index" {
        /// Where vectors are: `pgvector` (in the source's database) or `pinecone`.
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
        /// Build the HNSW graph once there are this many vectors. Below, a search reads them all: some 40 ms for
        /// 100,000 on two cores, and it misses nothing. A graph misses texts unlike all others: among 100,000
        /// products, 16 of 100 edits to such texts were not found through it.
        graph_min_rows: u64 = 250000;
        /// Build it only while fewer changes than this wait: a graph slows a load down fourfold.
        graph_max_backlog: u64 = 1000;
        /// Candidates that a search keeps while it walks the graph: more is slower and more exact.
        ef_search: u32 = 200, Between(1, 1000);
    }
}

section! {
    /// `[index]` of the kind `pinecone`.
    pub struct PineconeIndex in "index" of ["pinecone"] {
        /// The index's host (`PINECONE_INDEX_HOST`). Empty: it is asked for by name.
        host: String = "", Address, Chooses("PINECONE_INDEX_HOST", "pinecone");
        /// The index's name (`PINECONE_INDEX`); either of the two chooses `pinecone`. `refarch migrate` makes the
        /// index if there is none of that name.
        name: String = "", Chooses("PINECONE_INDEX", "pinecone");
        /// The key to it (`PINECONE_API_KEY`).
        api_key: Secret = "", Variable("PINECONE_API_KEY"),
            Is(is_given, "set PINECONE_API_KEY to the key that Pinecone's console shows");
        /// The namespace for the records (`PINECONE_NAMESPACE`). Empty: the default one.
        namespace: String = "", Variable("PINECONE_NAMESPACE"),
            Is(is_not_of_notes, "use another: the notes that tell whose an index is stand there");
        /// Where `refarch migrate` makes a missing index: the cloud.
        cloud: String = "aws";
        /// Where `refarch migrate` makes a missing index: the cloud's region.
        region: String = "us-east-1";
        /// The address that indexes are made at and looked up by name.
        controller: String = "https://api.pinecone.io", Address, Is(is_url, "use a URL");
        /// How long a request may take; at most half of `indexer.lease_ms`.
        timeout as "timeout_ms": Duration = 5000, AtLeast(1);
        /// How often, while changes are written, it is asked how far its queries are. Each time is a query that is
        /// billed; freshness is measured no finer than this.
        freshness as "freshness_ms": Duration = 1000, AtLeast(10);
    }
}

fn is_given(value: &Value) -> bool {
    value.as_str() != Some("")
}

fn is_not_of_notes(value: &Value) -> bool {
    value.as_str() != Some(NOTES_NAMESPACE)
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
