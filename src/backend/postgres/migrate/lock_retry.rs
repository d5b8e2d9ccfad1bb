//! Transactions that are repeated when a lock is not free, so that other sessions never wait long behind
//! them.

use std::time::{Duration, Instant};

use tokio_postgres::{Client, Transaction};

use crate::backend::postgres::{connection, failure};
use crate::pipeline::failure::{Class, Error, FailureKind, Result};

/// How long a migration tries to get its locks.
const RETRY_TIMEOUT: Duration = Duration::from_mins(2);

/// Pauses between two attempts, in which sessions that waited behind the first one go on.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A session in which short transactions are repeated until they get their locks.
pub(super) struct LockRetrySession {
    client: Client,
    connection: tokio::task::JoinHandle<Result<(), tokio_postgres::Error>>,
}

impl LockRetrySession {
    pub(super) async fn open(postgres: &crate::backend::postgres::Postgres) -> Result<Self> {
        let (client, connection) =
            postgres.dedicated().await.map_err(|error| failure("connect to the database", error))?;
        Ok(Self { client, connection: tokio::spawn(connection) })
    }

    pub(super) async fn close(self) {
        drop(self.client);
        let _ = self.connection.await;
    }

    /// Does the work in one transaction, and repeats all of it if a lock is not free. An advisory lock lets
    /// one migration run at a time. If locks are not free, the message names the sessions that use `table`.
    pub(super) async fn with_lock_retry<T>(
        &mut self,
        table: Option<&str>,
        is_plan: bool,
        work: impl AsyncFn(&Transaction<'_>) -> Result<T>,
    ) -> Result<T> {
        let started = Instant::now();
        let mut pause = FIRST_PAUSE;
        let mut logged = false;
        loop {
            let error = match self.once(is_plan, &work).await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            let again = error.class() == Class::Retryable && !self.client.is_closed();
            if !again || started.elapsed() > RETRY_TIMEOUT {
                return Err(match table {
                    Some(table) if again => Error::new(
                        FailureKind::Conflict,
                        "migrate",
                        format!("{error}; {}", self.users(table).await),
                    )
                    .because(error),
                    _ => error,
                });
            }
            if !logged {
                logged = true;
                let users = match table {
                    Some(table) => self.users(table).await,
                    None => String::new(),
                };
                tracing::warn!(%error, users, "a lock is not free: trying again for up to 2 minutes");
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn once<T>(
        &mut self,
        is_plan: bool,
        work: &impl AsyncFn(&Transaction<'_>) -> Result<T>,
    ) -> Result<T> {
        let fail = |error: tokio_postgres::Error| failure("wait for other migrations", error);
        let transaction = connection::begin(&mut self.client).await.map_err(fail)?;
        // The lock belongs to the transaction, not to the session: a pooler may give the session to other
        // clients.
        transaction
            .batch_execute("SELECT pg_advisory_xact_lock(hashtext('refarch.migrate'))")
            .await
            .map_err(fail)?;
        let done = work(&transaction).await?;
        let ended = if is_plan { transaction.rollback().await } else { transaction.commit().await };
        ended.map_err(|error| failure("commit a migration", error))?;
        Ok(done)
    }

    /// Names sessions that hold locks on a table: process numbers and the beginnings of their statements.
    async fn users(&self, table: &str) -> String {
        let rows = self
            .client
            .query(
                "SELECT DISTINCT format('%s (%s)', a.pid, left(a.query, 60)) FROM pg_catalog.pg_locks l \
                 JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid \
                 WHERE l.relation = pg_catalog.to_regclass($1) AND l.granted AND l.pid <> pg_catalog.pg_backend_pid() LIMIT 5",
                &[&table],
            )
            .await
            .unwrap_or_default();
        let users: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        format!("{table} is in use by {}", users.join(", "))
    }
}
