//! The table of a generation's vectors, and the extension that it needs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::observations::{BuildHistory, Observations};
use crate::backend::postgres::search_index::vector_table;
use crate::backend::postgres::source::{SourceReader, SourceTable};
use crate::backend::postgres::{Postgres, failure};
use crate::config::SearchMethod;
use crate::pipeline::clock::{BootClock, Clock};
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::metrics::SecondLooks;
use crate::pipeline::source_row::ContentSalt;

/// A version of pgvector.
pub type Version = (u32, u32, u32);

/// The oldest pgvector that has `halfvec`.
pub const MIN_VERSION: Version = (0, 7, 0);

/// The oldest pgvector whose graphs are known to be sound (its changelog, 0.8.2 to 0.8.4). With an older one,
/// no graph is built, and searches read all vectors.
pub const MIN_GRAPH_VERSION: Version = (0, 8, 4);

/// Settings of the index.
#[derive(Clone, Copy, Debug)]
pub struct PgVectorOptions {
    /// How the nearest vectors are found.
    pub method: SearchMethod,
    /// With [`SearchMethod::Auto`]: a search may read all vectors as long as that takes no longer.
    pub exact_limit: Duration,
    /// The part of the true ten nearest that a search through the lists should find, from 0 to 1.
    pub recall: f64,
    /// The most memory for building an index, in MiB.
    pub build_memory: u64,
    /// From this many vectors on, a graph is built.
    pub graph_min_rows: u64,
    /// A graph is built if at most this many changes wait.
    pub graph_max_backlog: u64,
    /// Candidates that a search keeps.
    pub ef_search: u32,
    /// Whether a write is acknowledged in the same database after the write, so that a crash that loses the
    /// write loses the acknowledgement too.
    pub acknowledged_in_same_log: bool,
}

/// The installed pgvector.
#[derive(Clone, Debug)]
pub(super) struct Extension {
    /// The schema of its types and operators, quoted.
    pub(super) schema: String,
    pub(super) version: Version,
}

/// The vectors of one target.
pub struct PgVector {
    pub(super) postgres: Postgres,
    pub(super) source: SourceReader,
    pub(super) salt: ContentSalt,
    pub(super) generation: i32,
    pub(super) table: String,
    pub(super) options: PgVectorOptions,
    extension: Mutex<Option<Extension>>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) builds: Mutex<BuildHistory>,
    pub(super) observations: tokio::sync::Mutex<Observations>,
    pub(super) second_looks: Arc<SecondLooks>,
}

/// Reads a version such as `0.8.4`.
#[must_use]
pub fn parse_version(text: &str) -> Version {
    let mut parts = text.split('.').map(|part| part.parse::<u32>().unwrap_or_default());
    let mut next = || parts.next().unwrap_or_default();
    (next(), next(), next())
}

impl PgVector {
    /// The index of a target. Its table must exist.
    #[must_use]
    pub fn new(
        postgres: Postgres,
        source: Arc<SourceTable>,
        salt: ContentSalt,
        generation: i32,
        options: PgVectorOptions,
    ) -> Self {
        let table = vector_table(generation);
        let source = SourceReader::new(postgres.clone(), source);
        Self {
            postgres,
            source,
            salt,
            generation,
            table,
            options,
            extension: Mutex::default(),
            clock: Arc::new(BootClock),
            builds: Mutex::default(),
            observations: tokio::sync::Mutex::default(),
            second_looks: Arc::default(),
        }
    }

    /// Measures the pauses between builds of the graph by this clock.
    #[must_use]
    pub fn with_clock(self, clock: Arc<dyn Clock>) -> Self {
        Self { clock, ..self }
    }

    pub(super) fn builds(&self) -> MutexGuard<'_, BuildHistory> {
        self.builds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn known_extension(&self) -> MutexGuard<'_, Option<Extension>> {
        self.extension.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The installed pgvector. It is looked up once, and again after [`Self::failed`].
    pub(super) async fn extension(&self) -> Result<Extension> {
        let known = self.known_extension().clone();
        if let Some(known) = known {
            return Ok(known);
        }
        let installed = self.installed().await?;
        *self.known_extension() = Some(installed.clone());
        Ok(installed)
    }

    /// An error of SQL that names pgvector's schema. If the extension may have moved to another schema, it is
    /// looked up again at the next attempt, and no change is blamed.
    pub(super) fn failed(&self, what: &str, error: tokio_postgres::Error) -> Error {
        if !is_about_names(&error) {
            return failure(what, error);
        }
        *self.known_extension() = None;
        failure(what, error).of_kind(FailureKind::Conflict)
    }

    pub(super) async fn installed(&self) -> Result<Extension> {
        let client = self.postgres.client().await?;
        let sql = "SELECT quote_ident(n.nspname), e.extversion FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace \
                   WHERE e.extname = 'vector'";
        let row = client
            .query_opt(sql, &[])
            .await
            .map_err(|error| failure("look for pgvector", error))?
            .ok_or_else(|| {
                Error::new(
                    FailureKind::MissingResource,
                    "look for pgvector",
                    "the database has no extension vector: run refarch migrate",
                )
            })?;
        Ok(Extension { schema: row.get(0), version: parse_version(row.get(1)) })
    }
}

/// Whether an error says that a type, an operator or a schema does not exist.
pub(super) fn is_about_names(error: &tokio_postgres::Error) -> bool {
    use tokio_postgres::error::SqlState;
    let missing = [SqlState::UNDEFINED_OBJECT, SqlState::UNDEFINED_FUNCTION, SqlState::INVALID_SCHEMA_NAME];
    error.code().is_some_and(|code| missing.contains(code))
}
