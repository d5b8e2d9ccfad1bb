//! The environment of `refarch chaos`: a private database, doubles of index, queue and embedder, and the
//! settings that point the roles at them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use tokio_postgres::Client;

use super::workload;
use crate::backend::Backends;
use crate::backend::embedded::{Cluster, ClusterOptions};
use crate::backend::postgres::{Postgres, migrate};
use crate::backend::sqs::{self, Sqs};
use crate::backend::{self, model_dir};
use crate::cli::{self, ChaosEmbedder, ChaosIndex, ChaosQueue};
use crate::config::{ConfigError, EmbedderKind, QueueKind, Settings};
use crate::double::embedder::{self, EmbedderDouble};
use crate::double::pinecone::PineconeDouble;
use crate::double::sqs::SqsDouble;
use crate::pipeline::queue::Queue;
use crate::secret::Secret;

/// The application's table.
const PRODUCTS: &str = include_str!("../../backend/postgres/schema/products.sql");
const PRODUCTS_TABLE: &str = "public.products_with_increment";

/// The database role of the roles' processes. It is no superuser and owns nothing. It has only the rights
/// that `refarch migrate --roles` gives.
pub const FLEET_ROLE: &str = "chaos_fleet";

/// The database role of the application.
pub const APPLICATION_ROLE: &str = "chaos_application";

/// The condition of a policy that shows rows to the application only.
pub const APPLICATION_POLICY: &str = "current_setting('app.tenant', true) = 'chaos'";

/// The connection option of the application that meets [`APPLICATION_POLICY`].
const TENANT_OPTION: &str = "-c app.tenant=chaos";

/// Minutes of a round of the continuous proof. A shorter run uses its own length.
const PROOF_PERIOD: f64 = 1.0;

/// Timeouts of the roles. They are short, so that much happens in a minute.
const VISIBILITY_S: u64 = 6;
const TIMEOUT_MS: u64 = 1_000;
/// Longer than any operation on the table.
const CONNECT_TIMEOUT_S: u64 = 30;
const LEASE_MS: u64 = 4_000;
/// Greatest delay of a write in the index's double. It is less than [`SETTLE_MS`].
pub const MAX_LATE: Duration = Duration::from_secs(3);
/// Longer than the greatest delay of a write in the double.
const SETTLE_MS: u64 = MAX_LATE.as_millis() as u64 + 2_000;

/// Variables that make settings.
#[derive(Clone, Default)]
struct Env(BTreeMap<String, String>);

impl Env {
    #[allow(clippy::needless_pass_by_value, reason = "numbers and texts alike, as they come")]
    fn add(&mut self, name: &str, value: impl ToString) {
        self.0.insert(name.into(), value.to_string());
    }

    fn settings(&self) -> Result<Settings, ConfigError> {
        Settings::load(None, &self.0, &[])
    }
}

/// The private database, the doubles, and the roles' settings.
pub struct Environment {
    /// The roles' settings.
    pub settings: Settings,
    /// The Pinecone double, if the index is one.
    pub pinecone_double: Option<PineconeDouble>,
    /// The SQS double, if the queue is one.
    pub sqs_double: Option<SqsDouble>,
    /// The double of an embedding server, if the embedder is one.
    pub embedder_double: Option<EmbedderDouble>,
    /// The folder of the logs.
    pub dir: PathBuf,
    cluster: Cluster,
    /// The variables that make the roles' settings.
    env: Env,
    /// Columns that the roles store beside the vector. The operator adds some.
    metadata: Mutex<Vec<String>>,
}

impl Environment {
    /// Creates everything in a new folder under the runtime folder.
    pub async fn create(settings: &Settings, args: &cli::Chaos) -> anyhow::Result<Self> {
        let seed = args.seed;
        let runtime = std::path::absolute(&settings.runtime.dir)?;
        let dir = runtime.join(format!("chaos-{}", std::process::id()));
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let options =
            ClusterOptions { dir: dir.join("postgres"), ..ClusterOptions::in_runtime_dir(&runtime) };
        let cluster = Cluster::join(options).await?;
        // The model on this machine: a real server should not receive this load.
        let mut of_model = settings.clone();
        if !matches!(settings.embedder.kind, EmbedderKind::Minilm(_)) {
            of_model.embedder = Env::default().settings()?.embedder;
        }
        // The reference table and the default names, whatever table the user keeps in step: the drill and the
        // roles' processes get only the settings below.
        let mut env = Env::default();
        let set = &mut env;
        set.add("REFARCH_RUNTIME_DIR", runtime.display());
        set.add("REFARCH_EMBEDDER_MODEL", std::path::absolute(model_dir(&of_model))?.display());
        set.add("REFARCH_QUEUE_VISIBILITY_S", VISIBILITY_S);
        set.add("REFARCH_INDEXER_WORKERS", 1);
        set.add("REFARCH_INDEXER_LEASE_MS", LEASE_MS);
        set.add("REFARCH_INDEXER_SETTLE_MS", SETTLE_MS);
        set.add("REFARCH_INDEX_TIMEOUT_MS", TIMEOUT_MS);
        // A role that starts while a column is renamed waits until the name is back.
        set.add("REFARCH_DATABASE_CONNECT_TIMEOUT_S", CONNECT_TIMEOUT_S);
        set.add("REFARCH_LOG_LEVEL", &settings.log.level);
        set.add(
            "REFARCH_AUDIT_PERIOD_H",
            if args.no_proof { 0.0 } else { args.minutes.min(PROOF_PERIOD) / 60.0 },
        );
        let embedder_double = match args.embedder {
            ChaosEmbedder::Minilm => None,
            ChaosEmbedder::Double => {
                let double = EmbedderDouble::start().await.context("start the embedder double")?;
                set.add("REFARCH_EMBEDDER_KIND", "openai");
                set.add("REFARCH_EMBEDDER_URL", double.url());
                set.add("REFARCH_EMBEDDER_MODEL", embedder::MODEL);
                set.add("REFARCH_EMBEDDER_DIMENSIONS", embedder::DIMENSIONS);
                Some(double)
            }
        };
        let shape = backend::index_shape(&set.settings()?).await?;
        let pinecone_double = match args.index {
            ChaosIndex::Pgvector => None,
            ChaosIndex::Pinecone => {
                let double =
                    PineconeDouble::start(shape.dimensions, seed).await.context("start the index double")?;
                set.add("REFARCH_INDEX_KIND", "pinecone");
                set.add("REFARCH_INDEX_HOST", double.url());
                set.add("REFARCH_INDEX_API_KEY", "chaos");
                Some(double)
            }
        };
        let sqs_double = match args.queue {
            ChaosQueue::Pgmq => None,
            ChaosQueue::Sqs => {
                let double = SqsDouble::start(seed).await.context("start the queue double")?;
                let max_receives = set.settings()?.queue.max_receives * 2;
                let [live, bulk, dead] = double.create("chaos", max_receives);
                set.add("REFARCH_QUEUE_KIND", "sqs");
                set.add("REFARCH_QUEUE_URL", live);
                set.add("REFARCH_QUEUE_BULK_URL", bulk);
                set.add("REFARCH_QUEUE_DEAD_URL", dead);
                set.add("REFARCH_QUEUE_WAIT_S", 1);
                set.add("AWS_ENDPOINT_URL_SQS", double.url());
                set.add("AWS_REGION", "us-east-1");
                set.add("AWS_ACCESS_KEY_ID", "chaos");
                set.add("AWS_SECRET_ACCESS_KEY", "chaos");
                Some(double)
            }
        };
        let mut settings = set.settings()?;
        settings.database.url = cluster.url().clone();
        // The key is an integer at first, as in the reference architecture.
        let client = workload::connect(cluster.url()).await?;
        let narrow = "ALTER TABLE public.products_with_increment ALTER id TYPE integer";
        client.batch_execute(&format!("{PRODUCTS}; {narrow}")).await.context("make the table")?;
        let password = &cluster.tcp().password;
        let roles = format!(
            "CREATE ROLE {FLEET_ROLE} LOGIN PASSWORD '{0}'; CREATE ROLE {APPLICATION_ROLE} LOGIN PASSWORD '{0}'; \
             GRANT ALL ON {PRODUCTS_TABLE} TO {APPLICATION_ROLE}",
            password.expose()
        );
        client.batch_execute(&roles).await.context("make the roles of the database")?;
        let postgres = Postgres::new(&settings.database.url, &settings.database)?;
        let rights = ["listen", "embed"].map(|part| (part.to_owned(), FLEET_ROLE.to_owned()));
        let options = migrate::MigrateOptions { roles: rights.into(), ..migrate::MigrateOptions::default() };
        backend::migrate_with(&postgres, &settings, &options).await?;
        postgres.pool.close();
        let metadata = Mutex::new(settings.source.metadata.clone());
        Ok(Self { settings, pinecone_double, sqs_double, embedder_double, dir, cluster, env, metadata })
    }

    /// The roles' current settings.
    #[must_use]
    pub fn settings_now(&self) -> Settings {
        let mut settings = self.settings.clone();
        settings.source.metadata = self.metadata();
        settings
    }

    /// The columns that the roles currently store beside the vector.
    #[must_use]
    pub fn metadata(&self) -> Vec<String> {
        self.metadata.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Adds a column to store beside the vector.
    pub fn add_metadata(&self, column: &str) {
        let mut metadata = self.metadata.lock().unwrap_or_else(PoisonError::into_inner);
        if !metadata.iter().any(|there| there == column) {
            metadata.push(column.into());
        }
    }

    /// Environment variables of the roles' processes.
    #[must_use]
    pub fn variables(&self) -> Vec<(String, String)> {
        let mut env = self.env.clone();
        env.add("DATABASE_URL", self.url_of(FLEET_ROLE));
        env.add("REFARCH_SOURCE_METADATA", self.metadata().join(","));
        let mut env: Vec<(String, String)> = env.0.into_iter().collect();
        for name in ["PATH", "HOME", "NO_COLOR"] {
            env.extend(std::env::var(name).ok().map(|value| (name.to_owned(), value)));
        }
        env
    }

    /// The backends, as the roles open them.
    pub async fn backends(&self, postgres: &Postgres) -> anyhow::Result<Backends> {
        let settings = self.settings_now();
        let (Some(double), QueueKind::Sqs(queue)) = (&self.sqs_double, &settings.queue.kind) else {
            return Ok(Backends::open(postgres, &settings).await?);
        };
        let options = backend::sqs_options(&settings, queue);
        let queue = Sqs::open(sqs::connect_to(&double.url()), postgres.clone(), options).await?;
        Ok(Backends::with_queue(postgres, &settings, Queue::new(Arc::new(queue))).await?)
    }

    /// The database's address for the application.
    #[must_use]
    pub fn application_url(&self) -> Secret {
        Secret::new(format!("{} options='{TENANT_OPTION}'", self.url_of(APPLICATION_ROLE)))
    }

    /// The address for a database role. If an address names two users, the last one counts.
    fn url_of(&self, role: &str) -> String {
        format!("{} user={role}", self.url().expose())
    }

    /// The database's address for its superuser.
    #[must_use]
    pub fn url(&self) -> &Secret {
        self.cluster.url()
    }

    /// A new connection as the superuser.
    pub async fn client(&self) -> Result<Client, tokio_postgres::Error> {
        workload::connect(self.url()).await
    }

    /// Restarts the database; with `crash`, without a clean shutdown.
    pub async fn restart_database(&self, crash: bool) -> anyhow::Result<()> {
        self.cluster.restart(crash).await
    }

    /// Stops the database, runs `work` on its data directory, and starts it again.
    pub async fn while_database_is_stopped(
        &self,
        work: impl FnOnce(&Path) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<()> {
        self.cluster.while_stopped(false, work).await
    }

    /// Removes everything; with `keep`, everything except the logs.
    pub async fn tear_down(self, keep: bool) -> anyhow::Result<()> {
        self.cluster.destroy().await?;
        if keep { Ok(()) } else { remove(&self.dir) }
    }
}

fn remove(dir: &Path) -> anyhow::Result<()> {
    std::fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))
}
