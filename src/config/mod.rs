//! Settings: flags win over environment, environment over file, file over default. They are resolved once and
//! validated.
//!
//! Loading is a pure function of a file's text, a map of environment variables and overrides from flags.
//!
//! A setting is declared once, in the file of its section: name and unit, type, default, meaning, the variables that
//! other tools know it by, and what it must be. `config/default.toml` is made of these declarations (a test compares
//! them), and so are the variables `REFARCH_<SECTION>_<KEY>`. Users write flat keys; where a section has several kinds,
//! those of the kind that is chosen become the fields of an enum's variant.

mod declare;
mod embedder;
mod environment;
mod error;
mod index;
mod load;
mod otlp;
mod queue;
mod read;
mod roles;
mod settings;
mod system;
#[cfg(test)]
mod template;
mod values;

pub use embedder::{Embedder, EmbedderKind, HttpEmbedder, LocalEmbedder};
pub use error::ConfigError;
pub use index::{
    Index, OWNERSHIP_NAMESPACE, PgvectorIndex, PineconeIndex, RESERVED_METADATA_PREFIX, SearchMethod,
};
pub use load::{DEFAULT_FILE, File, Override};
pub use otlp::Otlp;
pub use queue::{Queue, QueueKind, SqsQueue};
pub use roles::{Audit, IndexCheck, Indexer, Relay, Scaling, Serve, Up};
pub use settings::Settings;
pub use system::{Admin, Database, Log, Runtime, Source};

/// The defaults as users read them.
pub const DEFAULTS: &str = include_str!("../../config/default.toml");
