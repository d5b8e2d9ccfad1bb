//! Takes an index over: waits for late writes, and queues every row.

use std::time::{Duration, SystemTime};

use tokio_postgres::Client;

use super::comparison::read_and_check;
use super::database_epoch::{Check, DatabaseEpoch, TAKEN_FOR, advance_epoch, read};
use crate::backend::postgres::{Postgres, failure};
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::index::{OwnershipStore, VectorIndex};

/// How many times a missing record is looked for, a second apart, before it counts as missing: an index may
/// show a write some time later.
const CHECKS_BEFORE_MISSING: u32 = 4;

/// How often a worker that waits for late writes uses its session.
const BEAT_EVERY: Duration = Duration::from_secs(1);

/// Advances the epoch, first in the database and then in the index, if the index still belongs to this
/// database. Takes the index over otherwise, after waiting for `settle` as [`claim`] does.
pub async fn renew(
    postgres: &Postgres,
    generation: i32,
    store: &dyn OwnershipStore,
    settle: Duration,
) -> Result<()> {
    advance(postgres, generation, store, settle, None).await
}

pub(super) async fn advance(
    postgres: &Postgres,
    generation: i32,
    store: &dyn OwnershipStore,
    settle: Duration,
    lost: Option<SystemTime>,
) -> Result<()> {
    match read_and_check(postgres, generation, store, lost).await?.2 {
        Check::Owned | Check::Unclaimed => write_record(postgres, generation, store).await,
        // Another worker may have found the same. The lock lets one worker handle it.
        _ => take_over(postgres, generation, store, settle, lost, &|_| ()).await,
    }
}

async fn write_record(postgres: &Postgres, generation: i32, store: &dyn OwnershipStore) -> Result<()> {
    let (name, epoch) = advance_epoch(postgres, generation).await?;
    store.set_record(&format!("{name}/{epoch}")).await
}

/// Makes sure that the index belongs to this database, before anything is written to the index.
///
/// If the index may still apply writes that the ledger does not know of, waits for `settle`, the time within
/// which it applies them. `report` gets the reason as a sentence. To end the waiting early, drop the future.
pub async fn claim(
    postgres: &Postgres,
    generation: i32,
    index: &dyn VectorIndex,
    settle: Duration,
    report: &(dyn Fn(&str) + Sync),
) -> Result<()> {
    if let Some(store) = index.ownership_store() {
        return take_over(postgres, generation, store, settle, None, report).await;
    }
    let state = read(postgres, generation).await?;
    if state.has_changed_server() {
        requeue_all(postgres, generation, &state, 0).await?;
    }
    advance_epoch(postgres, generation).await.map(drop)
}

async fn take_over(
    postgres: &Postgres,
    generation: i32,
    store: &dyn OwnershipStore,
    settle: Duration,
    lost: Option<SystemTime>,
    report: &(dyn Fn(&str) + Sync),
) -> Result<()> {
    // The reason is reported before the lock is taken: if another worker holds the lock and waits, this worker
    // waits too.
    let (state, _, found) = read_and_check(postgres, generation, store, lost).await?;
    if let Some(why) = found.why_wait().filter(|_| !is_shared(&state, found)) {
        report(&format!(
            "{why}, and writes that the ledger does not know of may still be applied to the index: every row is \
             written anew after {} s",
            settle.as_secs_f64()
        ));
    }
    // A session of its own: the session's end releases the lock, whatever happens.
    let fail = |error: tokio_postgres::Error| failure("claim the index", error);
    let (session, connection) = postgres.dedicated().await.map_err(fail)?;
    let connection = tokio::spawn(connection);
    // The role's timeouts must not apply, since the lock is held for long. It outlives the transaction.
    session.batch_execute(&postgres.begin()).await.map_err(fail)?;
    session
        .execute("SELECT pg_advisory_lock(hashtext('refarch.lineage'), $1)", &[&generation])
        .await
        .map_err(fail)?;
    session.batch_execute("COMMIT").await.map_err(fail)?;
    let (mut state, mut seen, mut found) = read_and_check(postgres, generation, store, lost).await?;
    for _ in 1..CHECKS_BEFORE_MISSING {
        if found == Check::RecordMissing {
            tokio::time::sleep(Duration::from_secs(1)).await;
            (state, seen, found) = read_and_check(postgres, generation, store, lost).await?;
        }
    }
    if let Some(why) = found.why_wait().filter(|_| !is_shared(&state, found)) {
        tracing::info!(
            reason = why,
            wait_s = settle.as_secs_f64(),
            "waiting until the index has applied every write that the ledger does not know of"
        );
        wait(&session, settle).await.map_err(fail)?;
        (state, seen, found) = read_and_check(postgres, generation, store, lost).await?;
    }
    match found {
        Check::Owned | Check::Unclaimed => {}
        found if is_shared(&state, found) => return Err(shared_namespace(seen.as_deref())),
        found => invalidate_all(postgres, generation, &state, seen.as_deref(), found).await?,
    }
    write_record(postgres, generation, store).await?;
    drop(session);
    connection
        .await
        .map_err(|error| Error::caused(FailureKind::ConnectionLost, "claim the index", error))?
        .map_err(fail)
}

/// Waits. Fails if the session that holds the lock ends meanwhile: the database may have gone back again, and the
/// wait must start again. The session is used now and then, so that a timeout for idle sessions does not end it.
async fn wait(session: &Client, settle: Duration) -> Result<(), tokio_postgres::Error> {
    let mut left = settle;
    while !left.is_zero() {
        let pause = left.min(BEAT_EVERY);
        tokio::time::sleep(pause).await;
        session.simple_query("SELECT 1").await?;
        left -= pause;
    }
    Ok(())
}

/// Whether two running databases write to the index.
fn is_shared(state: &DatabaseEpoch, found: Check) -> bool {
    found == Check::OtherDatabase && state.taken_lately
}

pub(super) fn shared_namespace(record: Option<&str>) -> Error {
    let message = format!(
        "another database writes to this namespace too; its ownership record is {:?}. Give each database a namespace \
         of its own (index.namespace). Or stop the other database's workers and start this worker again in {TAKEN_FOR}",
        record.unwrap_or_default()
    );
    Error::new(FailureKind::WrongSetting, "claim the index", message)
}

/// Marks every row and every entry of the ledger as not to be trusted, queues them, and records why, in one
/// transaction.
async fn invalidate_all(
    postgres: &Postgres,
    generation: i32,
    state: &DatabaseEpoch,
    record: Option<&str>,
    found: Check,
) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("queue every row", error);
    let has_changed_server = state.has_changed_server();
    // This database wrote the records of the index, at another time.
    let keep = matches!(found, Check::IndexAhead(_) | Check::ServerChanged);
    let seen = if let Check::IndexAhead(seen) = found { seen } else { 0 };
    let mut client = postgres.client().await?;
    let transaction = client.transaction().await.map_err(fail)?;
    let row = transaction
        .query_one("SELECT refarch.distrust($1, $2)", &[&generation, &keep])
        .await
        .map_err(fail)?;
    // The new number is higher than the number that was read. So an older record that the index shows later is
    // not handled again.
    transaction
        .execute(
            "UPDATE refarch.lineage SET name = CASE WHEN $2 THEN gen_random_uuid()::text ELSE name END, \
               mark = greatest(mark, $3) + 1, foreign_note = $4, \
               changed_at = CASE WHEN $6 THEN clock_timestamp() ELSE changed_at END, \
               taken_at = CASE WHEN $5 THEN clock_timestamp() ELSE taken_at END, incarnation = refarch.incarnation() \
             WHERE target = $1",
            &[&generation, &has_changed_server, &seen, &record, &(found == Check::OtherDatabase), &keep],
        )
        .await
        .map_err(fail)?;
    transaction.commit().await.map_err(fail)?;
    let entries: i64 = row.get(0);
    if keep {
        tracing::warn!(
            entries,
            server.before = state.recorded,
            server.now = state.current,
            "the database went back to an earlier state or changed its server (a restore or a failover), and the index may be ahead of it: every row is written anew; a text whose vector is in the index is not embedded again"
        );
    } else {
        tracing::warn!(
            entries,
            "the index belongs to another database, or it is new: every row is written anew"
        );
    }
    Ok(())
}

/// Queues every id and keeps the entries, for vectors that went back together with the database.
pub(super) async fn requeue_all(
    postgres: &Postgres,
    generation: i32,
    state: &DatabaseEpoch,
    seen: i64,
) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("queue every row", error);
    let mut client = postgres.client().await?;
    let transaction = client.transaction().await.map_err(fail)?;
    transaction.execute("SELECT refarch.queue_all($1)", &[&generation]).await.map_err(fail)?;
    transaction
        .execute(
            "UPDATE refarch.lineage SET mark = greatest(mark, $2), changed_at = clock_timestamp(), \
             incarnation = refarch.incarnation() WHERE target = $1",
            &[&generation, &seen],
        )
        .await
        .map_err(fail)?;
    transaction.commit().await.map_err(fail)?;
    tracing::warn!(
        server.before = state.recorded,
        server.now = state.current,
        "the database went back to an earlier state or changed its server (a restore or a failover), and the queue may have lost changes: every row is compared with the index again"
    );
    Ok(())
}
