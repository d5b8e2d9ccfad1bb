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

use super::source::{Source, SourceTable};

/// How long a transaction may wait for its process, in milliseconds: none of ours does anything but
/// talk to the database while one is open, and a process that freezes must not lock rows for ever.
const IDLE_IN_TRANSACTION_MS: u32 = 60_000;

/// What a transaction of ours sets. Values have one spelling, whatever the role's settings; a row-level
/// policy that would hide rows raises an error; no timeout of the role's cuts it off (`transaction_timeout`
/// is known from PostgreSQL 17 on); and plans are made for the parameters at hand, because one
/// kept from when the ledger was empty reads all of it for each id.
pub(super) fn settings(statement_timeout_ms: u128) -> Arc<str> {
    format!(
        "SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL row_security = off; \
         SET LOCAL statement_timeout = {statement_timeout_ms}; SET LOCAL lock_timeout = 0; \
         SET LOCAL idle_in_transaction_session_timeout = {IDLE_IN_TRANSACTION_MS}; \
         SET LOCAL timezone = 'UTC'; SET LOCAL datestyle = 'ISO, YMD'; SET LOCAL intervalstyle = 'postgres'; \
         SET LOCAL bytea_output = 'hex'; SET LOCAL extra_float_digits = 1; SET LOCAL lc_monetary = 'C'; \
         SET LOCAL plan_cache_mode = force_custom_plan; \
         SELECT set_config('transaction_timeout', '0', true) WHERE current_setting('transaction_timeout', true) IS NOT NULL"
    )
    .into()
}

/// What begins a transaction of ours.
pub(super) fn begun_by(settings: &str) -> String {
    format!("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {settings}")
}

/// Begins a transaction on a session outside of the pool, with the settings of one in it. It waits for a lock
/// for a second: what stands in line for a lock on a table makes all who come later wait, too.
pub(super) async fn begin(
    client: &mut tokio_postgres::Client,
) -> Result<tokio_postgres::Transaction<'_>, Error> {
    let transaction = client
        .build_transaction()
        .isolation_level(IsolationLevel::ReadCommitted)
        .read_only(false)
        .start()
        .await?;
    let settings = settings(0);
    transaction.batch_execute(&format!("{settings}; SET LOCAL lock_timeout = '1s'")).await?;
    Ok(transaction)
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

    /// Takes it out of what is prepared on this connection; whether it can be prepared again.
    fn forget(&self, client: &ClientWrapper) -> bool;
}

#[async_trait]
impl Sql for str {
    async fn prepared(&self, client: &ClientWrapper) -> Result<Statement, Error> {
        client.prepare_cached(self).await
    }

    fn forget(&self, client: &ClientWrapper) -> bool {
        client.statement_cache.remove(self, &[]);
        true
    }
}

#[async_trait]
impl Sql for String {
    async fn prepared(&self, client: &ClientWrapper) -> Result<Statement, Error> {
        client.prepare_cached(self).await
    }

    fn forget(&self, client: &ClientWrapper) -> bool {
        client.statement_cache.remove(self, &[]);
        true
    }
}

#[async_trait]
impl Sql for Statement {
    async fn prepared(&self, _: &ClientWrapper) -> Result<Statement, Error> {
        Ok(self.clone())
    }

    fn forget(&self, _: &ClientWrapper) -> bool {
        false
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
        loop {
            let statement = sql.prepared(&self.client).await?;
            let result = self.alone(self.client.query(&statement, parameters)).await;
            if !self.is_outdated(sql, &result) {
                return result;
            }
        }
    }

    /// Runs one statement that gives exactly one row.
    pub async fn query_one(
        &self,
        sql: &(impl Sql + ?Sized),
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, Error> {
        loop {
            let statement = sql.prepared(&self.client).await?;
            let result = self.alone(self.client.query_one(&statement, parameters)).await;
            if !self.is_outdated(sql, &result) {
                return result;
            }
        }
    }

    /// Runs one statement that gives one row or none.
    pub async fn query_opt(
        &self,
        sql: &(impl Sql + ?Sized),
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Row>, Error> {
        loop {
            let statement = sql.prepared(&self.client).await?;
            let result = self.alone(self.client.query_opt(&statement, parameters)).await;
            if !self.is_outdated(sql, &result) {
                return result;
            }
        }
    }

    /// Runs one statement and returns how many rows it touched.
    pub async fn execute(
        &self,
        sql: &(impl Sql + ?Sized),
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<u64, Error> {
        loop {
            let statement = sql.prepared(&self.client).await?;
            let result = self.alone(self.client.execute(&statement, parameters)).await;
            if !self.is_outdated(sql, &result) {
                return result;
            }
        }
    }

    /// Runs statements without parameters, in one transaction.
    pub async fn batch_execute(&self, sql: &str) -> Result<(), Error> {
        self.alone(self.client.batch_execute(sql)).await
    }

    /// Reads the source's table by a description, with the look at the catalog that tells whether it is true.
    pub(crate) async fn read_source(
        &self,
        table: &SourceTable,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<(Vec<Row>, Option<Row>), Error> {
        loop {
            let statement = sql.prepared(&self.client).await?;
            let check = Source::check().prepared(&self.client).await?;
            let read = self.alone(Source::read(&**self.client, table, &statement, parameters, &check)).await;
            if !self.is_outdated(sql, &read) {
                return read;
            }
        }
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

    /// Whether a statement failed because a table was altered since it was prepared, and is to be prepared anew.
    fn is_outdated<T>(&self, sql: &(impl Sql + ?Sized), result: &Result<T, Error>) -> bool {
        result.as_ref().is_err_and(super::is_outdated) && sql.forget(&self.client)
    }

    /// Sends the transaction's begin, the work and the commit at once: each is put on the wire when it is
    /// first polled, in this order. After an error the commit rolls back.
    async fn alone<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let opening = begun_by(&self.settings);
        let (begun, done, ended) =
            join3(self.client.batch_execute(&opening), work, self.client.batch_execute("COMMIT")).await;
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
