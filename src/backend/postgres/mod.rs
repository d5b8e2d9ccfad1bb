//! PostgreSQL: connections, schema, capture, outbox, ledger, kept counts, worker registry, and the state of the proof.

pub mod capture;
pub mod connection;
pub mod counts;
pub mod fault;
pub mod generation;
pub mod ledger;
pub mod listener;
pub mod migrate;
pub mod outbox;
pub mod ownership;
pub mod products;
pub mod proof;
pub mod source;
pub mod source_rows;
pub mod status;
pub mod tls;
pub mod worker_lock;
pub mod worker_registry;

use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use tokio_postgres::Socket;
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres_rustls::MakeRustlsConnect;

use connection::Connection;

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

/// Whether an error says that a row-level policy would have hidden rows from a read. The check is by the name
/// of the function that raises the error, which is the same in every language.
pub(crate) fn hides_rows(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|said| {
        said.code() == &SqlState::INSUFFICIENT_PRIVILEGE && said.routine() == Some("check_enable_rls")
    })
}

/// Whether an error says that a prepared statement's plan no longer fits its tables.
pub(crate) fn is_outdated(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|said| {
        said.code() == &SqlState::FEATURE_NOT_SUPPORTED && said.routine() == Some("RevalidateCachedQuery")
    })
}

/// The kind of an error of PostgreSQL, by its SQLSTATE.
pub(crate) fn failure(what: &str, error: tokio_postgres::Error) -> Error {
    // Another attempt does not make a certificate valid.
    if let Some(hint) = tls::hint(&error) {
        return Error::caused(FailureKind::WrongSetting, what, error).with_remedy(hint);
    }
    if hides_rows(&error) {
        // Retryable, since the right may be granted at any time, and no change causes the error.
        let remedy = FailureKind::HiddenRows.remedy();
        return Error::caused(FailureKind::HiddenRows, what, error).with_remedy(remedy);
    }
    let kind = match error.code() {
        // The statement succeeds when it is prepared again.
        _ if is_outdated(&error) => FailureKind::Conflict,
        Some(code) => kind_of(code),
        // No SQLSTATE: the connection failed, or a value did not fit its parameter.
        None if error.is_closed() => FailureKind::ConnectionLost,
        None => {
            let wrong_value = std::error::Error::source(&error)
                .is_some_and(|source| source.downcast_ref::<std::io::Error>().is_none());
            if wrong_value { FailureKind::RefusedData } else { FailureKind::ConnectionLost }
        }
    };
    Error::caused(kind, what, error)
}

/// The kind of an SQLSTATE.
pub(crate) fn kind_of(code: &SqlState) -> FailureKind {
    match code.code() {
        // A wrong password, or a missing right.
        "28P01" | "28000" | "42501" => FailureKind::RefusedCredentials,
        // A missing database, schema, table, column or function.
        "3D000" | "3F000" | "42P01" | "42703" | "42883" => FailureKind::MissingResource,
        // A statement that was stopped, by its timeout or by somebody.
        "57014" => FailureKind::TimedOut,
        code => match &code[..2] {
            // Data that a type or a constraint refuses.
            "22" | "23" => FailureKind::RefusedData,
            "0A" | "42" => FailureKind::Unsupported,
            // Rows that a statement or a check on a view does not expect, a limit of the server, and what a
            // trigger raises.
            "21" | "27" | "44" | "54" | "P0" => FailureKind::SuspectRows,
            "XX" => FailureKind::DamagedData,
            "08" | "57" => FailureKind::ConnectionLost,
            "40" | "55" => FailureKind::Conflict,
            "53" | "58" => FailureKind::Overloaded,
            _ => FailureKind::UnexpectedAnswer,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::failure::Class;

    #[test]
    fn only_what_may_come_of_the_rows_at_hand_is_a_changes_fault() {
        let kind = |code: &str| kind_of(&SqlState::from_code(code));
        for code in ["22001", "22P02", "23505", "0A000", "42601", "42P07", "42704"] {
            assert_eq!(kind(code).class(), Class::Permanent, "{code}");
        }
        for code in ["28P01", "28000", "3D000", "42501", "42P01", "42703", "42883", "3F000"] {
            assert_eq!(kind(code).class(), Class::Fatal, "{code}");
        }
        for code in ["21000", "27000", "44000", "54000", "P0001", "XX001", "XX002"] {
            assert!(kind(code).class() == Class::Retryable && kind(code).is_about_rows(), "{code}");
        }
        for code in ["08006", "40001", "40P01", "53300", "55P03", "57014", "57P01", "58030", "25P02", "F0000"]
        {
            assert!(kind(code).class() == Class::Retryable && !kind(code).is_about_rows(), "{code}");
        }
    }
}
