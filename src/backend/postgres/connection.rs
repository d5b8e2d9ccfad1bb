//! A connection of the pool. Every transaction on it sets the settings that it relies on.
//!
//! A role of the database may have settings of its own (`search_path`, `statement_timeout`, `TimeZone`,
//! `default_transaction_isolation`, `row_security`), and a pooler in transaction mode gives one session to
//! many clients. So nothing is set for a session. Each transaction begins with `SET LOCAL`, and a single
//! statement gets its own transaction. The three messages of such a transaction are sent together, so it
//! costs one round trip, like the statement alone.
//!
//! SQL that runs here names the schema of everything outside of `pg_catalog`.

use std::future::poll_fn;
use std::ops::Deref;
use std::pin::pin;
use std::sync::Arc;

use async_trait::async_trait;
use deadpool_postgres::{ClientWrapper, Object, Transaction};
use futures::future::{FutureExt, join3, maybe_done};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Error, IsolationLevel, Row, Statement};

use super::error_policy::is_outdated;

/// How long a transaction may wait for its process, in milliseconds. Our transactions only talk to the
/// database, so they are never idle for long, and a process that freezes must not lock rows for ever.
const IDLE_IN_TRANSACTION_MS: u32 = 60_000;

/// The settings of each transaction. Values have one spelling, whatever the role's settings. A row-level
/// policy that would hide rows raises an error. No timeout of the role cuts the transaction off
/// (`transaction_timeout` exists since PostgreSQL 17). Plans are made for the given parameters, because a
/// plan from a time when the ledger was empty reads the whole ledger for each id.
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

/// The settings of a session of its own that builds an index. They cannot be set for the statement alone, which runs
/// outside of a transaction.
pub(crate) const BUILD_SESSION: &str = "SET search_path = pg_catalog, pg_temp; SET statement_timeout = 0; SET lock_timeout = 0; \
    SET default_transaction_isolation = 'read committed'; SET default_transaction_read_only = off; \
    SELECT set_config('transaction_timeout', '0', false) WHERE current_setting('transaction_timeout', true) IS NOT NULL";

/// The SQL that begins a transaction with these settings.
pub(super) fn begun_by(settings: &str) -> String {
    format!("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {settings}")
}

/// Begins a transaction on a session outside of the pool, with the same settings. It waits one second for a
/// lock, since a statement that waits for a table lock makes every later statement on the table wait too.
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

/// Makes commits wait for the disk if the role's own `synchronous_commit` is off. Any other value, with or
/// without waiting for standbys, is kept.
pub(super) const WAIT_FOR_THE_DISK: &str = "SELECT set_config('synchronous_commit', 'on', true) \
    WHERE current_setting('synchronous_commit') = 'off'";

/// SQL as text, or prepared.
#[async_trait]
pub trait Sql: Sync {
    /// The prepared statement on this connection. Text is prepared once for each connection.
    async fn prepared(&self, client: &ClientWrapper) -> Result<Statement, Error>;

    /// Removes the statement from the connection's cache. True if it can be prepared again.
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

/// A connection of the pool, which goes back to the pool on drop.
pub struct Connection {
    client: Object,
    settings: Arc<str>,
}

impl Connection {
    pub(super) fn new(client: Object, settings: Arc<str>) -> Self {
        Self { client, settings }
    }

    /// The settings of each transaction, as SQL.
    pub(super) fn settings(&self) -> &str {
        &self.settings
    }

    /// Runs one statement in a transaction of its own.
    pub async fn query(
        &self,
        sql: &(impl Sql + ?Sized),
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        self.run(sql, |statement| async move { self.client.query(&statement, parameters).await }).await
    }

    /// Runs one statement in a transaction of its own that begins with more settings, given as SQL without
    /// parameters.
    pub(crate) async fn query_with(
        &self,
        settings: &str,
        sql: &(impl Sql + ?Sized),
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        let settings = format!("{}; {settings}", self.settings).into();
        let work = |statement| async move { self.client.query(&statement, parameters).await };
        self.run_by(&settings, sql, work).await
    }

    /// Runs one statement that gives exactly one row.
    pub async fn query_one(
        &self,
        sql: &(impl Sql + ?Sized),
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, Error> {
        self.run(sql, |statement| async move { self.client.query_one(&statement, parameters).await }).await
    }

    /// Runs one statement that gives one row or none.
    pub async fn query_opt(
        &self,
        sql: &(impl Sql + ?Sized),
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Row>, Error> {
        self.run(sql, |statement| async move { self.client.query_opt(&statement, parameters).await }).await
    }

    /// Runs one statement and returns how many rows it touched.
    pub async fn execute(
        &self,
        sql: &(impl Sql + ?Sized),
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<u64, Error> {
        self.run(sql, |statement| async move { self.client.execute(&statement, parameters).await }).await
    }

    /// Runs statements without parameters, in one transaction.
    pub async fn batch_execute(&self, sql: &str) -> Result<(), Error> {
        self.transact(&self.settings, async { Ok(()) }, |()| self.client.batch_execute(sql)).await
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

    /// Whether the statement failed because a table was altered after it was prepared. It is then prepared
    /// again.
    pub(super) fn is_outdated<T>(&self, sql: &(impl Sql + ?Sized), result: &Result<T, Error>) -> bool {
        result.as_ref().is_err_and(is_outdated) && sql.forget(&self.client)
    }

    /// Prepares the statement and runs it in a transaction of its own.
    async fn run<T, W: Future<Output = Result<T, Error>>>(
        &self,
        sql: &(impl Sql + ?Sized),
        work: impl Fn(Statement) -> W,
    ) -> Result<T, Error> {
        self.run_by(&self.settings, sql, work).await
    }

    async fn run_by<T, W: Future<Output = Result<T, Error>>>(
        &self,
        settings: &Arc<str>,
        sql: &(impl Sql + ?Sized),
        work: impl Fn(Statement) -> W,
    ) -> Result<T, Error> {
        loop {
            let result = self.transact(settings, sql.prepared(&self.client), &work).await;
            if !self.is_outdated(sql, &result) {
                return result;
            }
        }
    }

    /// Sends the beginning of the transaction, the work and the commit. A future of the client sends its
    /// message when it is first polled, so all three go out at once if the statement is already prepared.
    /// Otherwise it is prepared inside the transaction: to parse a statement can wait for a lock, and the
    /// role's own timeouts would cut that off. After an error, the commit rolls back.
    pub(super) async fn transact<S, T, W: Future<Output = Result<T, Error>>>(
        &self,
        settings: &str,
        prepare: impl Future<Output = Result<S, Error>>,
        work: impl FnOnce(S) -> W,
    ) -> Result<T, Error> {
        let opening = begun_by(settings);
        let mut begun = pin!(maybe_done(self.client.batch_execute(&opening)));
        let open = OpenTransaction(&self.client);
        let prepared = {
            let mut prepare = pin!(prepare);
            // The answer to the beginning must be taken meanwhile: the connection reads no other answer before.
            poll_fn(|context| {
                let _ = begun.as_mut().poll(context);
                prepare.as_mut().poll(context)
            })
            .await
        };
        open.closes_now();
        let work = async { work(prepared?).await };
        let ((), done, ended) = join3(begun.as_mut(), work, self.client.batch_execute("COMMIT")).await;
        begun.take_output().unwrap_or(Ok(()))?;
        let done = done?;
        ended?;
        Ok(done)
    }
}

/// A transaction whose commit is not sent yet. It is rolled back if the caller gives up meanwhile: the
/// connection goes back to the pool.
struct OpenTransaction<'a>(&'a ClientWrapper);

impl OpenTransaction<'_> {
    /// The caller sends the commit before it waits for anything else.
    fn closes_now(self) {
        std::mem::forget(self);
    }
}

impl Drop for OpenTransaction<'_> {
    fn drop(&mut self) {
        // The first poll sends the message. Nobody waits for the answer.
        let _ = self.0.batch_execute("ROLLBACK").now_or_never();
    }
}

/// Methods that are not wrapped above run without these settings: COPY into the user's table, whose triggers
/// then run with the role's own settings, as for any other client.
impl Deref for Connection {
    type Target = ClientWrapper;

    fn deref(&self) -> &ClientWrapper {
        &self.client
    }
}
