//! A connection of the pool whose every transaction sets what it relies on.
//!
//! A role of the database may have settings of its own (`search_path`, `statement_timeout`, `TimeZone`,
//! `default_transaction_isolation`, `row_security`), and a pooler in transaction mode hands one session to
//! many clients. So nothing is set for a session: each transaction begins with `SET LOCAL`, and a single
//! statement gets a transaction of its own. Its three messages are sent together, so that it costs one
//! round trip, as it would alone.
//!
//! SQL that runs here names the schema of everything that is not in `pg_catalog`.

use std::ops::Deref;
use std::sync::Arc;

use async_trait::async_trait;
use deadpool_postgres::{ClientWrapper, Object, Transaction};
use futures::future::join3;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Error, IsolationLevel, Row, Statement};

/// How long a transaction may wait for its process, in milliseconds: none of ours does anything but
/// talk to the database while one is open, and a process that freezes must not lock rows for ever.
const IDLE_IN_TRANSACTION_MS: u32 = 60_000;

/// What a transaction of ours sets. Values have one spelling, whatever the role's settings; a row-level
/// policy that would hide rows raises an error; and plans are made for the parameters at hand, because one
/// kept from when the ledger was empty reads all of it for each id.
pub(super) fn settings(statement_timeout_ms: u128) -> Arc<str> {
    format!(
        "SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL row_security = off; \
         SET LOCAL statement_timeout = {statement_timeout_ms}; SET LOCAL lock_timeout = 0; \
         SET LOCAL idle_in_transaction_session_timeout = {IDLE_IN_TRANSACTION_MS}; \
         SET LOCAL timezone = 'UTC'; SET LOCAL datestyle = 'ISO, YMD'; SET LOCAL intervalstyle = 'postgres'; \
         SET LOCAL bytea_output = 'hex'; SET LOCAL extra_float_digits = 1; SET LOCAL lc_monetary = 'C'; \
         SET LOCAL plan_cache_mode = force_custom_plan"
    )
    .into()
}

/// Makes a transaction wait for the disk where the role's own setting would not. A setting that waits for
/// standbys too, or for none of them, stays.
pub(super) const WAIT_FOR_THE_DISK: &str = "SELECT set_config('synchronous_commit', 'on', true) \
    WHERE current_setting('synchronous_commit') = 'off'";

/// SQL as text, or prepared.
#[async_trait]
pub trait Sql: Sync {
    /// The statement on this connection; text is prepared once a connection.
    async fn prepared(&self, client: &ClientWrapper) -> Result<Statement, Error>;
}

#[async_trait]
impl Sql for str {
    async fn prepared(&self, client: &ClientWrapper) -> Result<Statement, Error> {
        client.prepare_cached(self).await
    }
}

#[async_trait]
impl Sql for String {
    async fn prepared(&self, client: &ClientWrapper) -> Result<Statement, Error> {
        client.prepare_cached(self).await
    }
}

#[async_trait]
impl Sql for Statement {
    async fn prepared(&self, _: &ClientWrapper) -> Result<Statement, Error> {
        Ok(self.clone())
    }
}

/// A connection of the pool, which it goes back to when this is dropped.
pub struct Connection {
    client: Object,
    settings: Arc<str>,
}

impl Connection {
    pub(super) fn new(client: Object, settings: Arc<str>) -> Self {
        Self { client, settings }
    }

    /// Runs one statement in a transaction of its own.
    pub async fn query(
        &self,
        sql: &(impl Sql + ?Sized),
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        let statement = sql.prepared(&self.client).await?;
        self.alone(self.client.query(&statement, parameters)).await
    }

    /// Runs one statement that gives exactly one row.
    pub async fn query_one(
        &self,
        sql: &(impl Sql + ?Sized),
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, Error> {
        let statement = sql.prepared(&self.client).await?;
        self.alone(self.client.query_one(&statement, parameters)).await
    }

    /// Runs one statement that gives one row or none.
    pub async fn query_opt(
        &self,
        sql: &(impl Sql + ?Sized),
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Row>, Error> {
        let statement = sql.prepared(&self.client).await?;
        self.alone(self.client.query_opt(&statement, parameters)).await
    }

    /// Runs one statement and returns how many rows it touched.
    pub async fn execute(
        &self,
        sql: &(impl Sql + ?Sized),
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<u64, Error> {
        let statement = sql.prepared(&self.client).await?;
        self.alone(self.client.execute(&statement, parameters)).await
    }

    /// Runs statements without parameters, in one transaction.
    pub async fn batch_execute(&self, sql: &str) -> Result<(), Error> {
        self.alone(self.client.batch_execute(sql)).await
    }

    /// Begins a transaction.
    pub async fn transaction(&mut self) -> Result<Transaction<'_>, Error> {
        let transaction = self
            .client
            .build_transaction()
            .isolation_level(IsolationLevel::ReadCommitted)
            .read_only(false)
            .start()
            .await?;
        transaction.batch_execute(&self.settings).await?;
        Ok(transaction)
    }

    /// Sends the transaction's begin, the work and the commit at once: each is put on the wire when it is
    /// first polled, in this order. After an error the commit rolls back.
    async fn alone<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let begin = format!("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {}", self.settings);
        let (begun, done, ended) =
            join3(self.client.batch_execute(&begin), work, self.client.batch_execute("COMMIT")).await;
        begun?;
        let done = done?;
        ended?;
        Ok(done)
    }
}

/// What is not wrapped above runs without these settings: COPY into the user's table, whose own triggers
/// see the role's settings, as they would for anybody.
impl Deref for Connection {
    type Target = ClientWrapper;

    fn deref(&self) -> &ClientWrapper {
        &self.client
    }
}
