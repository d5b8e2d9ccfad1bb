//! The whole loop in this process, a step at a time.

use std::sync::Arc;
use std::time::Duration;

use refarch::backend::postgres::Postgres;
use refarch::backend::{self, Backends, LoadedModel};
use refarch::config::Settings;
use refarch::pipeline::clock::BootClock;
use refarch::pipeline::embed_scheduler::EmbedScheduler;
use refarch::pipeline::embedder::Embedder;
use refarch::pipeline::fault::FaultBoard;
use refarch::pipeline::indexer::{self, Indexer};
use refarch::pipeline::lease::Lease;
use refarch::pipeline::metrics::Metrics;
use refarch::pipeline::relay::{self, Relay};
use tokio::sync::{Mutex, OnceCell};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::Database;
use super::source::settings;

static MODEL: OnceCell<LoadedModel> = OnceCell::const_new();

/// The model of these settings, which the tests of one process share.
pub async fn model(settings: &Settings) -> &'static LoadedModel {
    MODEL.get_or_init(async || LoadedModel::load(settings).await.unwrap()).await
}

/// A migrated database with the steps of relay and indexer at hand.
pub struct SyncFixture {
    pub database: Database,
    pub settings: Settings,
    pub postgres: Postgres,
    pub backends: Backends,
    pub client: Client,
    pub indexer: Arc<Indexer>,
    pub relay: Mutex<Relay>,
    pub metrics: Arc<Metrics>,
    /// Faults that the indexer reports.
    pub faults: Arc<FaultBoard>,
}

impl SyncFixture {
    /// Runs the SQL `setup`, with the settings of these environment variables.
    pub async fn new(setup: &str, env: &[(&str, &str)]) -> Self {
        Self::with_embedder(setup, env, |embedder| embedder).await
    }

    /// The same, with an embedder around the model's.
    pub async fn with_embedder(
        setup: &str,
        env: &[(&str, &str)],
        around: impl FnOnce(Arc<dyn Embedder>) -> Arc<dyn Embedder>,
    ) -> Self {
        let settings = settings(env);
        let database = Database::create().await;
        let client = database.client().await;
        client.batch_execute(setup).await.unwrap();
        let postgres = database.postgres(&settings);
        // Boxed, since these futures are large.
        Box::pin(backend::migrate(&postgres, &settings)).await.unwrap();
        let embedder = around(model(&settings).await.start(1));
        Box::pin(Self::over(database, settings, client, postgres, embedder)).await
    }

    /// By other connections to the same database.
    pub async fn by(self, postgres: Postgres) -> Self {
        let embedder = model(&self.settings).await.start(1);
        Box::pin(Self::over(self.database, self.settings, self.client, postgres, embedder)).await
    }

    async fn over(
        database: Database,
        settings: Settings,
        client: Client,
        postgres: Postgres,
        embedder: Arc<dyn Embedder>,
    ) -> Self {
        let backends = Backends::open(&postgres, &settings).await.unwrap();
        let relay = Mutex::new(Relay::new(
            backends.outbox(),
            Arc::clone(&backends.queue.stats),
            Arc::new(BootClock),
            relay::RelayOptions {
                source: "products".into(),
                changes_per_message: 500,
                bulk_threshold: 100,
                live_bound: 5000,
                poll: Duration::from_millis(100),
                start_timeout: Duration::ZERO,
            },
        ));
        let metrics: Arc<Metrics> = Arc::default();
        let faults: Arc<FaultBoard> = Arc::default();
        let indexer = Indexer::new(
            backends.queue.clone(),
            Arc::clone(&backends.ledger) as _,
            Arc::clone(&backends.index),
            EmbedScheduler::new(embedder, Duration::from_millis(50), Arc::new(BootClock)),
            Arc::clone(&metrics),
            Arc::new(Lease::new(Arc::new(BootClock), Duration::from_secs(10))),
            indexer::IndexerOptions {
                source: "products".into(),
                worker: "test".into(),
                workers: 1,
                prefetch: Duration::from_secs(2),
                poll: Duration::from_millis(100),
                // A test may hold the work for any time.
                max_receives: 1000,
                settle: Duration::from_secs(10),
                freshness_poll: Duration::from_millis(50),
                start_timeout: Duration::ZERO,
            },
        );
        let indexer = Arc::new(indexer.reporting(Arc::clone(&faults)));
        Self { database, settings, postgres, backends, client, indexer, relay, metrics, faults }
    }

    pub async fn run(&self, sql: &str) {
        super::run(&self.client, sql).await;
    }

    /// Relays until the outbox is empty.
    pub async fn relay(&self) {
        while self.relay.lock().await.step().await.unwrap().rows > 0 {}
    }

    /// Relays and indexes until nothing is left.
    pub async fn settle(&self) {
        self.relay().await;
        let stop = CancellationToken::new();
        self.indexer.run(&stop, &stop, true).await.unwrap();
        let status = self.backends.status().await.unwrap();
        assert_eq!((status.outstanding(), status.dead_letters), (0, 0));
    }
}
