//! PostgreSQL: connections, schema, capture, outbox, ledger, worker registry, and the state of the proof.

pub mod capture;
pub mod chore;
pub mod connection;
pub mod counts;
mod error_policy;
pub mod event;
pub mod fault;
pub mod freshness_turns;
pub mod generation;
pub mod ledger;
pub mod listener;
pub mod measured_rate;
pub mod migrate;
pub mod outbox;
pub mod ownership;
pub mod products;
pub mod proof;
pub mod pruning;
mod schema_version;
pub mod search_index;
pub mod source;
pub mod source_rows;
pub mod status;
pub mod throughput;
pub mod tls;
pub mod worker_lock;
pub mod worker_registry;

use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use tokio_postgres::Socket;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres_rustls::MakeRustlsConnect;

use connection::Connection;
pub(crate) use error_policy::{fail, failure, hides_rows};

use crate::config::Database;
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::secret::Secret;

/// How long to wait for a connection of the pool. A longer wait means that the pool is too small.
const POOL_WAIT: Duration = Duration::from_secs(30);

/// How long a request waits for a connection: its client waits meanwhile.
const REQUEST_POOL_WAIT: Duration = Duration::from_secs(5);

/// An encrypted stream to the server.
type TlsStream = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream;

/// A database's address and its connection pool.
#[derive(Clone)]
pub struct Postgres {
    config: tokio_postgres::Config,
    tls: MakeRustlsConnect,
    /// Connections for short statements.
    pub pool: Pool,
    /// The settings with which each of our transactions begins.
    settings: Arc<str>,
}

impl Postgres {
    /// Prepares a pool; nothing is connected yet.
    pub fn new(url: &Secret, settings: &Database) -> Result<Self> {
        let wanted = tls::ConnectionSettings::read(url, settings)?;
        let tls = wanted.connector()?;
        let mut config = wanted.config;
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(settings.connect_timeout);
        }
        if config.get_application_name().is_none() {
            config.application_name("refarch");
        }
        config.keepalives_idle(Duration::from_secs(30));
        let pool = pool(&config, &tls, settings.pool_size, POOL_WAIT)?;
        Ok(Self { config, tls, pool, settings: connection::settings(0) })
    }

    /// The same connections for work that is acknowledged outside of the database. Each commit waits for the
    /// disk, whatever the role's own `synchronous_commit`: otherwise a crash could lose work that was
    /// acknowledged.
    #[must_use]
    pub fn waiting_for_the_disk(&self) -> Self {
        let settings = format!("{}; {}", self.settings, connection::WAIT_FOR_THE_DISK).into();
        Self { settings, ..self.clone() }
    }

    /// Connects once, so that a wrong address or password fails at the start.
    pub async fn check(&self) -> Result<()> {
        let client = self.client().await?;
        let row = client
            .query_one("SELECT current_setting('server_version_num')::int", &[])
            .await
            .map_err(|error| failure("read the server's version", error))?;
        let version: i32 = row.get(0);
        if version < 150_000 {
            return Err(Error::new(
                FailureKind::WrongVersion,
                "check the database",
                format!(
                    "PostgreSQL 15 or later is needed, and the server is PostgreSQL {}",
                    version / 10_000
                ),
            ));
        }
        Ok(())
    }

    /// The same database through a separate pool, for requests of clients. They then never take connections
    /// of the pipeline, and no statement takes longer than `statement_timeout`.
    pub fn for_requests(&self, connections: usize, statement_timeout: Duration) -> Result<Self> {
        let pool = pool(&self.config, &self.tls, connections, REQUEST_POOL_WAIT)?;
        let settings = connection::settings(statement_timeout.as_millis());
        Ok(Self { config: self.config.clone(), tls: self.tls.clone(), pool, settings })
    }

    /// A connection of the pool.
    pub async fn client(&self) -> Result<Connection> {
        match client(&self.pool).await {
            Ok(client) => Ok(Connection::new(client, Arc::clone(&self.settings))),
            Err(error) => Err(error.amid(format!("connect to {}", self.address()))),
        }
    }

    /// Host, port and database, for messages; without user and password.
    #[must_use]
    pub fn address(&self) -> String {
        let hosts = self.config.get_hosts().iter().map(|host| match host {
            tokio_postgres::config::Host::Tcp(name) => name.clone(),
            tokio_postgres::config::Host::Unix(path) => path.display().to_string(),
        });
        let port = self.config.get_ports().first().copied().unwrap_or(5432);
        let host = hosts.collect::<Vec<_>>().join(",");
        format!("{host}:{port}/{}", self.config.get_dbname().unwrap_or("?"))
    }

    /// The role that logs in, for messages.
    #[must_use]
    pub fn user(&self) -> &str {
        self.config.get_user().unwrap_or("of this login")
    }

    /// The SQL that begins a transaction of ours on a session outside of the pool. Its settings end with the
    /// transaction.
    pub(crate) fn begin(&self) -> String {
        connection::begun_by(&self.settings)
    }

    /// A connection outside of the pool, for LISTEN and for locks that outlive a transaction. The session has
    /// the role's own settings, so work on it begins with [`Self::begin`].
    pub(crate) async fn dedicated(
        &self,
    ) -> Result<(tokio_postgres::Client, tokio_postgres::Connection<Socket, TlsStream>), tokio_postgres::Error>
    {
        self.config.connect(self.tls.clone()).await
    }
}

fn pool(
    config: &tokio_postgres::Config,
    tls: &MakeRustlsConnect,
    connections: usize,
    wait: Duration,
) -> Result<Pool> {
    let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
    Pool::builder(Manager::from_config(config.clone(), tls.clone(), recycling))
        .max_size(connections)
        .runtime(Runtime::Tokio1)
        .wait_timeout(Some(wait))
        .create_timeout(config.get_connect_timeout().copied())
        .build()
        .map_err(|error| {
            Error::new(FailureKind::WrongSetting, "make a connection pool", error).because(error)
        })
}

/// A connection of a pool; errors of the pool itself are classed.
pub(crate) async fn client(pool: &Pool) -> Result<deadpool_postgres::Object> {
    use deadpool_postgres::PoolError;
    const WHAT: &str = "connect to the database";
    pool.get().await.map_err(|error| match error {
        PoolError::Backend(error) => failure(WHAT, error),
        PoolError::Timeout(_) => Error::new(FailureKind::Overloaded, WHAT, "no free connection in time"),
        error => Error::new(FailureKind::Unreachable, WHAT, &error).because(error),
    })
}
