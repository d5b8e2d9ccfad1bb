//! A source in this process: its settings, and a database that is migrated for it.

use std::collections::BTreeMap;
use std::sync::Arc;

use refarch::backend::pgvector::{self, PgVector};
use refarch::backend::postgres::Postgres;
use refarch::backend::postgres::generation::{self, Generation, IndexLocation, IndexShape};
use refarch::backend::postgres::ledger::PgLedger;
use refarch::backend::postgres::migrate::{self, Report};
use refarch::config::Settings;
use refarch::pipeline::failure::Error;
use refarch::secret::Secret;
use tokio_postgres::Client;

use super::Database;

/// A table `item` of keys and texts.
pub const ITEM: [(&str, &str); 3] = [
    ("REFARCH_SOURCE_TABLE", "public.item"),
    ("REFARCH_SOURCE_TEXT", "body"),
    ("REFARCH_SOURCE_METADATA", "id"),
];

/// The settings that these environment variables make, with the runtime folder that `scripts/setup` fills.
pub fn settings(env: &[(&str, &str)]) -> Settings {
    let runtime = super::runtime_dir().display().to_string();
    let mut all: BTreeMap<String, String> = [("REFARCH_RUNTIME_DIR".to_owned(), runtime)].into();
    all.extend(env.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
    Settings::load(None, &all, &[]).unwrap()
}

/// The shape of an index of that kind, with vectors of three numbers that no real model makes.
pub fn shape(kind: &str) -> IndexShape {
    IndexShape {
        kind: kind.into(),
        model: "test".into(),
        former_model: None,
        dimensions: 3,
        location: IndexLocation::default(),
    }
}

/// Migrates a database for an index of that shape.
pub async fn migrate(postgres: &Postgres, settings: &Settings, shape: &IndexShape) -> Result<Report, Error> {
    migrate::migrate(postgres, &settings.source, &settings.queue, shape).await
}

impl Database {
    /// Connections as a role with these settings has them.
    pub fn postgres(&self, settings: &Settings) -> Postgres {
        Postgres::new(&Secret::new(self.url()), &settings.database).unwrap()
    }
}

/// An index that builds a graph from this many vectors on.
pub fn graph_options(min_rows: u64) -> pgvector::PgVectorOptions {
    pgvector::PgVectorOptions {
        method: refarch::config::SearchMethod::Graph,
        exact_limit: std::time::Duration::from_millis(10),
        recall: 0.99,
        build_memory: 256,
        graph_min_rows: min_rows,
        graph_max_backlog: min_rows,
        ef_search: 100,
        acknowledged_in_same_log: true,
    }
}

/// A database that is migrated for a source, and a session in it.
pub struct Migrated {
    pub settings: Settings,
    pub shape: IndexShape,
    pub postgres: Postgres,
    pub client: Client,
    /// What the migration did.
    pub report: Report,
    pub database: Database,
}

impl Migrated {
    /// Runs `setup` in a new database, and migrates it for an index of that kind.
    pub async fn new(setup: &str, settings: Settings, kind: &str) -> Self {
        let database = Database::create().await;
        let client = database.client().await;
        client.batch_execute(setup).await.unwrap();
        let (postgres, shape) = (database.postgres(&settings), shape(kind));
        let report = migrate(&postgres, &settings, &shape).await.unwrap();
        Self { settings, shape, postgres, client, report, database }
    }

    pub async fn generation(&self) -> Generation {
        generation::find(&self.postgres, &self.settings.source, &self.shape).await.unwrap()
    }

    pub fn ledger(&self, generation: &Generation) -> PgLedger {
        let table = Arc::new(generation.table.clone());
        PgLedger::new(self.postgres.clone(), table, generation.id, generation.salt.clone())
    }

    pub fn pgvector(&self, generation: &Generation) -> PgVector {
        self.pgvector_with(generation, graph_options(1_000))
    }

    pub fn pgvector_with(&self, generation: &Generation, options: pgvector::PgVectorOptions) -> PgVector {
        let table = Arc::new(generation.table.clone());
        PgVector::new(self.postgres.clone(), table, generation.salt.clone(), generation.id, options)
    }
}
