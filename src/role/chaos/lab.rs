//! Where the drill takes place: a private database, a double of the index, and the settings that
//! point the roles at them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tokio_postgres::Client;

use super::double::Double;
use super::queue_double::QueueDouble;
use super::schedule::MAX_LATE;
use super::writer;
use crate::backend::Backends;
use crate::backend::embedded::{Cluster, Options};
use crate::backend::postgres::Postgres;
use crate::backend::sqs::{self, Sqs};
use crate::backend::{self, model_dir};
use crate::cli::{ChaosIndex, ChaosQueue};
use crate::config::{EmbedderKind, IndexKind, QueueKind, Settings};
use crate::secret::Secret;

/// Timeouts of the drill's roles: short, so that much happens in a minute.
const VISIBILITY_S: u64 = 6;
const TIMEOUT_MS: u64 = 1_000;
const LEASE_MS: u64 = 4_000;
/// More than the double is ever late.
const SETTLE_MS: u64 = MAX_LATE.as_millis() as u64 + 2_000;

/// The database, the index, and how the roles find them.
pub struct Lab {
    /// The roles' settings.
    pub settings: Settings,
    /// The index, if it is the double.
    pub double: Option<Double>,
    /// The queue, if it is the double.
    pub queue_double: Option<QueueDouble>,
    /// Where logs are.
    pub dir: PathBuf,
    cluster: Cluster,
}

impl Lab {
    /// Makes everything, in a folder of its own under the runtime folder.
    pub async fn set_up(
        settings: &Settings,
        index: ChaosIndex,
        queue: ChaosQueue,
        seed: u64,
    ) -> anyhow::Result<Self> {
        let runtime = std::path::absolute(&settings.runtime.dir)?;
        let dir = runtime.join(format!("chaos-{}", std::process::id()));
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let options = Options { dir: dir.join("postgres"), ..Options::in_runtime_dir(&runtime) };
        let cluster = Cluster::join(options).await?;
        let mut settings = Settings {
            runtime: settings.runtime.clone(),
            embedder: settings.embedder.clone(),
            log: settings.log.clone(),
            // The reference table and the usual names, whatever the user keeps in step: the roles'
            // processes are told of what is set below only.
            ..Settings::load(None, &BTreeMap::new(), &[])?
        };
        // The model on this machine: a server should not be tormented.
        if settings.embedder.kind != EmbedderKind::Minilm {
            settings.embedder = Settings::load(None, &BTreeMap::new(), &[])?.embedder;
        }
        settings.embedder.model = std::path::absolute(model_dir(&settings))?.display().to_string();
        settings.runtime.dir = runtime;
        settings.database.url = cluster.url().clone();
        settings.queue.visibility_s = VISIBILITY_S;
        settings.indexer.workers = 1;
        settings.indexer.lease_ms = LEASE_MS;
        settings.indexer.settle_ms = SETTLE_MS;
        settings.index.timeout_ms = TIMEOUT_MS;
        let shape = backend::index_shape(&settings).await?;
        let double = match index {
            ChaosIndex::Pgvector => None,
            ChaosIndex::Pinecone => {
                let double = Double::start(shape.dimensions, seed).await.context("start the index double")?;
                settings.index.kind = IndexKind::Pinecone;
                settings.index.host = double.url();
                settings.index.api_key = Secret::new("chaos");
                Some(double)
            }
        };
        let queue_double = match queue {
            ChaosQueue::Pgmq => None,
            ChaosQueue::Sqs => {
                let double = QueueDouble::start(seed).await.context("start the queue double")?;
                let max_receives = settings.queue.max_receives * 2;
                let [live, bulk, dead] = double.create("chaos", max_receives);
                settings.queue.kind = QueueKind::Sqs;
                (settings.queue.url, settings.queue.bulk_url, settings.queue.dead_url) = (live, bulk, dead);
                settings.queue.wait_s = 1;
                Some(double)
            }
        };
        let postgres = Postgres::new(&settings.database.url, &settings.database)?;
        backend::migrate(&postgres, &settings).await?;
        postgres.pool.close();
        Ok(Self { settings, double, queue_double, dir, cluster })
    }

    /// The environment of the roles.
    #[must_use]
    pub fn env(&self) -> Vec<(String, String)> {
        let set = &self.settings;
        let mut env = vec![
            ("DATABASE_URL".to_owned(), set.database.url.expose().to_owned()),
            ("REFARCH_RUNTIME_DIR".to_owned(), set.runtime.dir.display().to_string()),
            ("REFARCH_EMBEDDER_MODEL".to_owned(), set.embedder.model.clone()),
            ("REFARCH_QUEUE_VISIBILITY_S".to_owned(), VISIBILITY_S.to_string()),
            ("REFARCH_INDEXER_WORKERS".to_owned(), "1".to_owned()),
            ("REFARCH_INDEXER_LEASE_MS".to_owned(), LEASE_MS.to_string()),
            ("REFARCH_INDEXER_SETTLE_MS".to_owned(), SETTLE_MS.to_string()),
            ("REFARCH_INDEX_TIMEOUT_MS".to_owned(), TIMEOUT_MS.to_string()),
            ("REFARCH_LOG_LEVEL".to_owned(), set.log.level.clone()),
        ];
        if let Some(double) = &self.double {
            env.push(("REFARCH_INDEX_KIND".to_owned(), "pinecone".to_owned()));
            env.push(("REFARCH_INDEX_HOST".to_owned(), double.url()));
            env.push(("REFARCH_INDEX_API_KEY".to_owned(), "chaos".to_owned()));
        }
        if let Some(double) = &self.queue_double {
            for (name, value) in [
                ("REFARCH_QUEUE_KIND", "sqs"),
                ("REFARCH_QUEUE_URL", &set.queue.url),
                ("REFARCH_QUEUE_BULK_URL", &set.queue.bulk_url),
                ("REFARCH_QUEUE_DEAD_URL", &set.queue.dead_url),
                ("REFARCH_QUEUE_WAIT_S", "1"),
                ("AWS_ENDPOINT_URL_SQS", &double.url()),
                ("AWS_REGION", "us-east-1"),
                ("AWS_ACCESS_KEY_ID", "chaos"),
                ("AWS_SECRET_ACCESS_KEY", "chaos"),
            ] {
                env.push((name.to_owned(), value.to_owned()));
            }
        }
        for name in ["PATH", "HOME", "NO_COLOR"] {
            env.extend(std::env::var(name).ok().map(|value| (name.to_owned(), value)));
        }
        env
    }

    /// The backends, as the roles have them.
    pub async fn backends(&self, postgres: &Postgres) -> anyhow::Result<Backends> {
        let Some(double) = &self.queue_double else {
            return Ok(Backends::open(postgres, &self.settings).await?);
        };
        let client = sqs::connect_to(&double.url());
        let queue = Sqs::open(client, postgres.clone(), backend::sqs_options(&self.settings)).await?;
        Ok(Backends::with_queue(postgres, &self.settings, std::sync::Arc::new(queue)).await?)
    }

    /// The database's address.
    #[must_use]
    pub fn url(&self) -> &Secret {
        self.cluster.url()
    }

    /// A connection of its own.
    pub async fn client(&self) -> Result<Client, tokio_postgres::Error> {
        writer::connect(self.url()).await
    }

    /// Restarts the database.
    pub async fn restart_database(&self, crash: bool) -> anyhow::Result<()> {
        self.cluster.restart(crash).await
    }

    /// Removes everything; with `keep`, everything but the logs.
    pub async fn tear_down(self, keep: bool) -> anyhow::Result<()> {
        self.cluster.destroy().await?;
        if keep { Ok(()) } else { remove(&self.dir) }
    }
}

fn remove(dir: &Path) -> anyhow::Result<()> {
    std::fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))
}
