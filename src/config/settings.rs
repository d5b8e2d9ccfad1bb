//! All settings together: the sections, and the checks that compare sections.

use super::declare::Key;
use super::embedder::{Embedder, HttpEmbedder, LocalEmbedder};
use super::error::ConfigError;
use super::index::{Choice, Index, PgvectorIndex, PineconeIndex, RESERVED_METADATA_PREFIX};
use super::otlp::Otlp;
use super::queue::{Queue, SqsQueue};
use super::read::Section;
use super::roles::{Audit, Indexer, Relay, Scaling, Serve, Up};
use super::system::{Admin, Database, Log, Runtime, Source};
use super::values::Values;

/// Every section, in the order in which it is shown.
const SECTIONS: [&[Key]; 20] = [
    Database::KEYS,
    Source::KEYS,
    Queue::KEYS,
    SqsQueue::KEYS,
    Choice::KEYS,
    PgvectorIndex::KEYS,
    PineconeIndex::KEYS,
    Embedder::KEYS,
    LocalEmbedder::KEYS,
    HttpEmbedder::KEYS,
    Relay::KEYS,
    Indexer::KEYS,
    Scaling::KEYS,
    Audit::KEYS,
    Serve::KEYS,
    Up::KEYS,
    Runtime::KEYS,
    Admin::KEYS,
    Log::KEYS,
    Otlp::KEYS,
];

/// Every key that there is.
pub(super) fn keys() -> impl Iterator<Item = &'static Key> {
    SECTIONS.iter().copied().flatten()
}

/// The system's settings. Each key is described in `config/default.toml`.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "each is a section's name, and its type tells about it")]
pub struct Settings {
    pub database: Database,
    pub source: Source,
    pub queue: Queue,
    pub index: Index,
    pub embedder: Embedder,
    pub relay: Relay,
    pub indexer: Indexer,
    pub scaling: Scaling,
    pub audit: Audit,
    pub serve: Serve,
    pub up: Up,
    pub runtime: Runtime,
    pub admin: Admin,
    pub log: Log,
    pub otlp: Otlp,
    /// Every key, also those of kinds that were not chosen.
    shown: String,
}

impl Settings {
    /// Every setting as TOML, secrets hidden.
    #[must_use]
    pub fn as_toml(&self) -> &str {
        &self.shown
    }

    pub(super) fn read(values: &Values) -> Result<Self, ConfigError> {
        let settings = Self {
            database: Database::read(values)?,
            source: Source::read(values)?,
            queue: Queue::read(values)?,
            index: Choice::read(values)?.kind,
            embedder: Embedder::read(values)?,
            relay: Relay::read(values)?,
            indexer: Indexer::read(values)?,
            scaling: Scaling::read(values)?,
            audit: Audit::read(values)?,
            serve: Serve::read(values)?,
            up: Up::read(values)?,
            runtime: Runtime::read(values)?,
            admin: Admin::read(values)?,
            log: Log::read(values)?,
            otlp: Otlp::read(values)?,
            shown: values.redacted(),
        };
        settings.check_sections_together(values)?;
        Ok(settings)
    }

    /// Checks what depends on several sections.
    fn check_sections_together(&self, values: &Values) -> Result<(), ConfigError> {
        let Index::Pinecone(pinecone) = &self.index else { return Ok(()) };
        if pinecone.timeout * 2 > self.indexer.lease {
            let reason =
                "use at least 1, and at most half of indexer.lease_ms: a request must end within the lease";
            return Err(values.refused("index.timeout_ms", reason));
        }
        let taken =
            |column: &&String| column.starts_with(RESERVED_METADATA_PREFIX) || column.starts_with('$');
        let Some(column) = self.source.metadata.iter().find(taken) else { return Ok(()) };
        let reason = "use other columns: in Pinecone's metadata, refarch reserves names that begin with _refarch_, and Pinecone those that begin with $";
        Err(values.refused_as("source.metadata", column, reason))
    }
}
