//! The worker lock: a session that holds an advisory lock on the worker's id.
//!
//! The server releases the lock when the session ends, for whatever reason, and keeps the lock while the
//! process is only frozen. A heartbeat on this session tells the worker that it still holds the lock. The
//! heartbeat reads the backend's process number, since a pooler in transaction mode would let any session
//! answer. Behind such a pooler no client can hold a lock, so that is checked at the start.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use tokio_postgres::SimpleQueryMessage;

use super::{Postgres, failure};
use crate::pipeline::failure::{Class, Error, FailureKind, Result};
use crate::pipeline::lease::Lease;
use crate::pipeline::retry::Backoff;

/// The class of advisory locks that workers hold.
pub(super) const WORKER_LOCKS: &str = "refarch.worker";

/// Heartbeats in a lease, so that some may be lost.
const BEATS_A_LEASE: u32 = 10;

/// Holds the worker lock until `stop`, and confirms the lease with each heartbeat. Returns early only if the
/// database refuses permanently.
pub async fn keep(
    postgres: &Postgres,
    worker: &str,
    lease: &Arc<Lease>,
    stop: &CancellationToken,
) -> Result<()> {
    let mut backoff = Backoff::default();
    let mut checked = false;
    while !stop.is_cancelled() {
        if !checked {
            match postgres.supports_sessions().await {
                Ok(true) => checked = true,
                Ok(false) => return Err(cannot_lock()),
                Err(error) if is_final(&error) => return Err(error),
                // The database is away: `hold_lock` reports that.
                Err(_) => {}
            }
        }
        let Some(ended) = stop.run_until_cancelled(hold_lock(postgres, worker, lease, &mut backoff)).await
        else {
            break;
        };
        let Err(error) = ended else { continue };
        if is_final(&error) {
            return Err(error);
        }
        let pause = backoff.next(&**lease.clock());
        tracing::debug!(worker.id = worker, %error, "lost the worker's session, opening another");
        stop.run_until_cancelled(tokio::time::sleep(pause)).await;
    }
    Ok(())
}

/// Whether the database refuses permanently. A database that is missing may be being restored; if it never was
/// there, the worker's other work says so.
fn is_final(error: &Error) -> bool {
    error.class() == Class::Fatal && !error.may_pass()
}

/// Opens a session, takes the lock, and sends heartbeats until one fails.
async fn hold_lock(postgres: &Postgres, worker: &str, lease: &Lease, backoff: &mut Backoff) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("keep the worker's session", error);
    let (client, connection) = postgres.dedicated().await.map_err(fail)?;
    // Nothing may keep the session open after this function ends.
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let at = lease.clock().now();
    let lock = client.prepare("SELECT pg_advisory_lock(hashtext($1), hashtext($2))").await.map_err(fail)?;
    // Waits while the server still keeps an earlier session of this worker, so the role's timeouts must not
    // apply. The lock outlives the transaction.
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
            .map_err(|_| {
                Error::new(
                    FailureKind::TimedOut,
                    "keep the worker's session",
                    "no answer to a heartbeat in time",
                )
            })?
            .map_err(fail)?;
        if answered != backend {
            return Err(cannot_lock());
        }
        lease.confirm(at);
    }
}

/// The process number of the server process that answers.
async fn backend(client: &tokio_postgres::Client) -> Result<Option<String>, tokio_postgres::Error> {
    let messages = client.simple_query("SELECT pg_backend_pid()").await?;
    Ok(messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    }))
}

fn cannot_lock() -> Error {
    Error::new(
        FailureKind::WrongSetting,
        "keep the worker's session",
        "database.url leads to a pooler in transaction mode, and a worker cannot hold a lock behind such a pooler: \
         use the address of the server itself, or of the pooler in session mode",
    )
}
