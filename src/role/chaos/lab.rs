//! Where the drill takes place: a private database, a double of the index, and the settings that
//! point the roles at them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use tokio_postgres::Client;

use super::double::Double;
use super::embedder_double::{self, EmbedderDouble};
use super::queue_double::QueueDouble;
use super::schedule::MAX_LATE;
use super::writer;
use crate::backend::Backends;
use crate::backend::embedded::{Cluster, Options};
use crate::backend::postgres::{Postgres, migrate};
use crate::backend::sqs::{self, Sqs};
use crate::backend::{self, model_dir};
use crate::cli::{self, ChaosEmbedder, ChaosIndex, ChaosQueue};
use crate::config::{EmbedderKind, IndexKind, QueueKind, Settings};
use crate::pipeline::queue::Queue;
use crate::secret::Secret;

/// The application's table.
const PRODUCTS: &str = include_str!("../../backend/postgres/schema/products.sql");
const PRODUCTS_TABLE: &str = "public.products_with_increment";

/// The role of the database that the roles' processes have: no superuser, no owner, no right but those that
/// `refarch migrate --roles` gives.
pub const FLEET: &str = "chaos_fleet";

/// The role of the database that the application has.
pub const APPLICATION: &str = "chaos_application";

/// The condition of a policy that shows rows to the application only.
pub const APPLICATION_SEES: &str = "current_setting('app.tenant', true) = 'chaos'";

/// What the application sets for that.
const TENANT: &str = "-c app.tenant=chaos";

/// Minutes that a round of the continuous proof takes, unless the drill is shorter.
const PROOF_PERIOD: f64 = 1.0;

/// Timeouts of the drill's roles: short, so that much happens in a minute.
const VISIBILITY_S: u64 = 6;
const TIMEOUT_MS: u64 = 1_000;
/// More than any operation on the table lasts.
const PATIENCE_S: u64 = 30;
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
    /// The embedding server, if it is the double.
    pub embedder_double: Option<EmbedderDouble>,
    /// Where logs are.
    pub dir: PathBuf,
    cluster: Cluster,
    /// Hours that a round of the continuous proof takes; 0 for none.
    proof_period_h: f64,
    /// Columns that the roles send beside the vector; they get more.
    metadata: Mutex<Vec<String>>,
}

impl Lab {
    /// Makes everything, in a folder of its own under the runtime folder.
    pub async fn set_up(settings: &Settings, args: &cli::Chaos) -> anyhow::Result<Self> {
        let seed = args.seed;
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
        let embedder_double = match args.embedder {
            ChaosEmbedder::Minilm => None,
            ChaosEmbedder::Double => {
                let double = EmbedderDouble::start().await.context("start the embedder double")?;
                settings.embedder.kind = EmbedderKind::Openai;
                settings.embedder.url = double.url();
                settings.embedder.model = embedder_double::MODEL.into();
                settings.embedder.dimensions = embedder_double::DIMENSIONS;
                Some(double)
            }
        };
        settings.runtime.dir = runtime;
        settings.database.url = cluster.url().clone();
        settings.queue.visibility_s = VISIBILITY_S;
        settings.indexer.workers = 1;
        settings.indexer.lease_ms = LEASE_MS;
        settings.indexer.settle_ms = SETTLE_MS;
        settings.index.timeout_ms = TIMEOUT_MS;
        let shape = backend::index_shape(&settings).await?;
        let double = match args.index {
            ChaosIndex::Pgvector => None,
            ChaosIndex::Pinecone => {
                let double = Double::start(shape.dimensions, seed).await.context("start the index double")?;
                settings.index.kind = IndexKind::Pinecone;
                settings.index.host = double.url();
                settings.index.api_key = Secret::new("chaos");
                Some(double)
            }
        };
        let queue_double = match args.queue {
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
        // The key is narrow at first, as the reference architecture has it.
        let client = writer::connect(cluster.url()).await?;
        let narrow = "ALTER TABLE public.products_with_increment ALTER id TYPE integer";
        client.batch_execute(&format!("{PRODUCTS}; {narrow}")).await.context("make the table")?;
        let password = &cluster.tcp().password;
        let roles = format!(
            "CREATE ROLE {FLEET} LOGIN PASSWORD '{0}'; CREATE ROLE {APPLICATION} LOGIN PASSWORD '{0}'; \
             GRANT ALL ON {PRODUCTS_TABLE} TO {APPLICATION}",
            password.expose()
        );
        client.batch_execute(&roles).await.context("make the roles of the database")?;
        let postgres = Postgres::new(&settings.database.url, &settings.database)?;
        let rights = ["listen", "embed"].map(|part| (part.to_owned(), FLEET.to_owned()));
        let options = migrate::Options { roles: rights.into(), ..migrate::Options::default() };
        backend::migrate_with(&postgres, &settings, &options).await?;
        postgres.pool.close();
        let metadata = Mutex::new(settings.source.metadata.clone());
        let proof_period_h = if args.no_proof { 0.0 } else { args.minutes.min(PROOF_PERIOD) / 60.0 };
        Ok(Self { settings, double, queue_double, embedder_double, dir, cluster, proof_period_h, metadata })
    }

    /// The roles' settings as they are now.
    #[must_use]
    pub fn settings_now(&self) -> Settings {
        let mut settings = self.settings.clone();
        settings.source.metadata = self.metadata();
        settings
    }

    /// The columns that the roles send beside the vector now.
    #[must_use]
    pub fn metadata(&self) -> Vec<String> {
        self.metadata.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sends a column more.
    pub fn add_metadata(&self, column: &str) {
        let mut metadata = self.metadata.lock().unwrap_or_else(PoisonError::into_inner);
        if !metadata.iter().any(|there| there == column) {
            metadata.push(column.into());
        }
    }

    /// The environment of the roles.
    #[must_use]
    pub fn env(&self) -> Vec<(String, String)> {
        let set = &self.settings_now();
        let mut env = vec![
            ("DATABASE_URL".to_owned(), self.url_of(FLEET)),
            ("REFARCH_RUNTIME_DIR".to_owned(), set.runtime.dir.display().to_string()),
            ("REFARCH_EMBEDDER_MODEL".to_owned(), set.embedder.model.clone()),
            ("REFARCH_QUEUE_VISIBILITY_S".to_owned(), VISIBILITY_S.to_string()),
            ("REFARCH_INDEXER_WORKERS".to_owned(), "1".to_owned()),
            ("REFARCH_INDEXER_LEASE_MS".to_owned(), LEASE_MS.to_string()),
            ("REFARCH_INDEXER_SETTLE_MS".to_owned(), SETTLE_MS.to_string()),
            ("REFARCH_INDEX_TIMEOUT_MS".to_owned(), TIMEOUT_MS.to_string()),
            // A role that starts while a column has another name waits for it.
            ("REFARCH_DATABASE_CONNECT_TIMEOUT_S".to_owned(), PATIENCE_S.to_string()),
            ("REFARCH_LOG_LEVEL".to_owned(), set.log.level.clone()),
            ("REFARCH_SOURCE_METADATA".to_owned(), set.source.metadata.join(",")),
        ];
        env.push(("REFARCH_AUDIT_PERIOD_H".to_owned(), self.proof_period_h.to_string()));
        if let Some(double) = &self.embedder_double {
            for (name, value) in [
                ("REFARCH_EMBEDDER_KIND", "openai"),
                ("REFARCH_EMBEDDER_URL", &double.url()),
                ("REFARCH_EMBEDDER_DIMENSIONS", &set.embedder.dimensions.to_string()),
            ] {
                env.push((name.to_owned(), value.to_owned()));
            }
        }
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
            return Ok(Backends::open(postgres, &self.settings_now()).await?);
        };
        let client = sqs::connect_to(&double.url());
        let queue = Sqs::open(client, postgres.clone(), backend::sqs_options(&self.settings)).await?;
        Ok(Backends::with_queue(postgres, &self.settings_now(), Queue::new(Arc::new(queue))).await?)
    }

    /// The database's address for the application.
    #[must_use]
    pub fn application_url(&self) -> Secret {
        Secret::new(format!("{} options='{TENANT}'", self.url_of(APPLICATION)))
    }

    /// The address for a role: of two users in it, the last counts.
    fn url_of(&self, role: &str) -> String {
        format!("{} user={role}", self.url().expose())
    }

    /// The database's address for its superuser.
    #[must_use]
    pub fn url(&self) -> &Secret {
        self.cluster.url()
    }

    /// A connection of its own, of the superuser.
    pub async fn client(&self) -> Result<Client, tokio_postgres::Error> {
        writer::connect(self.url()).await
    }

    /// Restarts the database.
    pub async fn restart_database(&self, crash: bool) -> anyhow::Result<()> {
        self.cluster.restart(crash).await
    }

    /// Does something with the database's files while it is stopped.
    pub async fn while_database_is_stopped(
        &self,
        work: impl FnOnce(&Path) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<()> {
        self.cluster.while_stopped(false, work).await
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
