//! Where the drill takes place: a private database, a double of the index, and the settings that
//! point the roles at them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use tokio_postgres::Client;

use super::writer;
use crate::backend::Backends;
use crate::backend::embedded::{Cluster, Options};
use crate::backend::postgres::{Postgres, migrate};
use crate::backend::sqs::{self, Sqs};
use crate::backend::{self, model_dir};
use crate::cli::{self, ChaosEmbedder, ChaosIndex, ChaosQueue};
use crate::config::{ConfigError, EmbedderKind, QueueKind, Settings};
use crate::double::embedder::{self, EmbedderDouble};
use crate::double::pinecone::Double;
use crate::double::sqs::QueueDouble;
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
/// How long a write to the index's double may be late: less than what the roles are told to wait.
pub const MAX_LATE: Duration = Duration::from_secs(3);
/// More than the double is ever late.
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
    /// What the roles' settings are made of.
    env: Env,
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
        // The model on this machine: a server should not be tormented.
        let mut of_model = settings.clone();
        if !matches!(settings.embedder.kind, EmbedderKind::Minilm(_)) {
            of_model.embedder = Env::default().settings()?.embedder;
        }
        // The reference table and the usual names, whatever the user keeps in step: the drill and the roles'
        // processes know what is set here only.
        let mut env = Env::default();
        let set = &mut env;
        set.add("REFARCH_RUNTIME_DIR", runtime.display());
        set.add("REFARCH_EMBEDDER_MODEL", std::path::absolute(model_dir(&of_model))?.display());
        set.add("REFARCH_QUEUE_VISIBILITY_S", VISIBILITY_S);
        set.add("REFARCH_INDEXER_WORKERS", 1);
        set.add("REFARCH_INDEXER_LEASE_MS", LEASE_MS);
        set.add("REFARCH_INDEXER_SETTLE_MS", SETTLE_MS);
        set.add("REFARCH_INDEX_TIMEOUT_MS", TIMEOUT_MS);
        // A role that starts while a column has another name waits for it.
        set.add("REFARCH_DATABASE_CONNECT_TIMEOUT_S", PATIENCE_S);
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
        let double = match args.index {
            ChaosIndex::Pgvector => None,
            ChaosIndex::Pinecone => {
                let double = Double::start(shape.dimensions, seed).await.context("start the index double")?;
                set.add("REFARCH_INDEX_KIND", "pinecone");
                set.add("REFARCH_INDEX_HOST", double.url());
                set.add("REFARCH_INDEX_API_KEY", "chaos");
                Some(double)
            }
        };
        let queue_double = match args.queue {
            ChaosQueue::Pgmq => None,
            ChaosQueue::Sqs => {
                let double = QueueDouble::start(seed).await.context("start the queue double")?;
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
        Ok(Self { settings, double, queue_double, embedder_double, dir, cluster, env, metadata })
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
        let mut env = self.env.clone();
        env.add("DATABASE_URL", self.url_of(FLEET));
        env.add("REFARCH_SOURCE_METADATA", self.metadata().join(","));
        let mut env: Vec<(String, String)> = env.0.into_iter().collect();
        for name in ["PATH", "HOME", "NO_COLOR"] {
            env.extend(std::env::var(name).ok().map(|value| (name.to_owned(), value)));
        }
        env
    }

    /// The backends, as the roles have them.
    pub async fn backends(&self, postgres: &Postgres) -> anyhow::Result<Backends> {
        let settings = self.settings_now();
        let (Some(double), QueueKind::Sqs(queue)) = (&self.queue_double, &settings.queue.kind) else {
            return Ok(Backends::open(postgres, &settings).await?);
        };
        let options = backend::sqs_options(&settings, queue);
        let queue = Sqs::open(sqs::connect_to(&double.url()), postgres.clone(), options).await?;
        Ok(Backends::with_queue(postgres, &settings, std::sync::Arc::new(queue)).await?)
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
