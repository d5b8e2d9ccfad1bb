//! A worker's sign of life: a session that holds an advisory lock under the worker's name.
//!
//! The server frees the lock when the session ends, however it ends, and keeps it while the process
//! is merely frozen. A heartbeat on this session tells the worker that it still has it: it asks for the
//! backend's number, since a pooler in transaction mode would answer from any. Behind such a pooler a lock
//! is nobody's, which is looked for at the start.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use tokio_postgres::SimpleQueryMessage;

use super::{Postgres, failure};
use crate::pipeline::failure::{Class, Error, Result};
use crate::pipeline::lease::Lease;
use crate::pipeline::retry::Backoff;

/// Names the class of advisory locks that workers hold.
pub(super) const WORKER_LOCKS: &str = "refarch.worker";

/// Heartbeats in a lease: some may be lost.
const BEATS_A_LEASE: u32 = 10;

/// Keeps a session for `worker`, and tells the lease of it, until `stop`. Returns early only when
/// the database refuses for good.
pub async fn keep(
    postgres: &Postgres,
    worker: &str,
    lease: &Arc<Lease>,
    stop: &CancellationToken,
) -> Result<()> {
    let mut backoff = Backoff::default();
    let mut looked = false;
    while !stop.is_cancelled() {
        if !looked {
            match postgres.has_sessions().await {
                Ok(true) => looked = true,
                Ok(false) => return Err(no_session()),
                Err(error) if error.class == Class::Fatal => return Err(error),
                // The database is away: the holding tells.
                Err(_) => {}
            }
        }
        let Some(ended) = stop.run_until_cancelled(hold(postgres, worker, lease, &mut backoff)).await else {
            break;
        };
        let Err(error) = ended else { continue };
        if error.class == Class::Fatal {
            return Err(error);
        }
        let pause = backoff.next(&error, &**lease.clock());
        tracing::debug!(worker.id = worker, %error, "the worker's session is gone");
        stop.run_until_cancelled(tokio::time::sleep(pause)).await;
    }
    Ok(())
}

/// Makes a session, and beats on it until it fails.
async fn hold(postgres: &Postgres, worker: &str, lease: &Lease, backoff: &mut Backoff) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("keep the worker's session", &error);
    let (client, connection) = postgres.dedicated().await.map_err(fail)?;
    // However this ends, nothing must keep the session.
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let at = lease.clock().now();
    let lock = client.prepare("SELECT pg_advisory_lock(hashtext($1), hashtext($2))").await.map_err(fail)?;
    // Waits while an earlier session of ours is not known to be gone: the role's timeouts must not end that.
    // The lock stays after the transaction.
    client.batch_execute(&postgres.begin()).await.map_err(fail)?;
    client.execute(&lock, &[&WORKER_LOCKS, &worker]).await.map_err(fail)?;
    client.batch_execute("COMMIT").await.map_err(fail)?;
    let backend = backend(&client).await.map_err(fail)?;
    lease.begin(at);
    backoff.reset();
    let beat: Duration = lease.length() / BEATS_A_LEASE;
    loop {
        tokio::time::sleep(beat).await;
        let at = lease.clock().now();
        let answered = tokio::time::timeout(lease.length(), self::backend(&client))
            .await
            .map_err(|_| Error::retryable("keep the worker's session", "no answer"))?
            .map_err(fail)?;
        if answered != backend {
            return Err(no_session());
        }
        lease.confirm(at);
    }
}

/// The number of the server process that answers on a connection.
async fn backend(client: &tokio_postgres::Client) -> Result<Option<String>, tokio_postgres::Error> {
    let messages = client.simple_query("SELECT pg_backend_pid()").await?;
    Ok(messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    }))
}

fn no_session() -> Error {
    Error::fatal(
        "keep the worker's session",
        "database.url leads to a pooler in transaction mode, behind which a worker can hold no lock: \
         give it the server itself, or the pooler's session mode",
    )
}
