//! Deletes what is kept for a time only: samples, events, ledger entries of deleted rows.

use super::worker_registry::KEEP;
use super::{Postgres, fail};
use crate::pipeline::failure::Result;

/// How long events are kept, and those of dead letters, which somebody may look into later.
const KEEP_EVENTS: &str = "7 days";
const KEEP_LETTERS: &str = "90 days";

/// How long entries of deleted rows are kept.
const KEEP_DELETED: &str = "1 day";

/// Rows that are deleted at a time.
const PRUNED_AT_ONCE: i64 = 5_000;

/// Deletes old samples and events, and what workers left that ended without leaving; some at a time. True if
/// there may be more.
pub async fn prune_history(postgres: &Postgres) -> Result<bool> {
    let client = postgres.client().await?;
    let mut may_be_more = false;
    for (table, is_old) in [
        ("sample", format!("at < now() - interval '{KEEP}'")),
        (
            "event",
            format!(
                "at < now() - CASE kind WHEN 'dead_letter' THEN interval '{KEEP_LETTERS}' ELSE interval '{KEEP_EVENTS}' END"
            ),
        ),
        ("worker", format!("heartbeat_at < now() - interval '{KEEP}'")),
        ("fault", format!("seen_at < now() - interval '{KEEP}'")),
    ] {
        let sql = format!(
            "DELETE FROM refarch.{table} WHERE ctid = ANY (ARRAY( \
               SELECT ctid FROM refarch.{table} WHERE {is_old} LIMIT $1 FOR UPDATE SKIP LOCKED))"
        );
        let deleted =
            client.execute(&sql, &[&PRUNED_AT_ONCE]).await.map_err(fail("delete old samples and events"))?;
        may_be_more |= deleted == PRUNED_AT_ONCE.cast_unsigned();
    }
    Ok(may_be_more)
}

/// Deletes entries of deleted rows, some at a time. True if there may be more. Reads the whole ledger.
///
/// A deleted entry reads like that of a row that never existed, and the index holds nothing for either. A
/// worker that saw the old entry conflicts with a new one, whose epoch begins at 0 again. The row is then
/// read again under the new entry's lock, and a write that was made for another state of the row does not
/// happen. A write to an index outside of the database can be on its way only while an attempt is open on the
/// entry, and then the entry stays. A day is far longer than a worker keeps an entry in memory.
pub async fn prune_ledger(postgres: &Postgres, generation: i32) -> Result<bool> {
    let client = postgres.client().await?;
    // SKIP LOCKED: an entry that another transaction uses is not deleted now.
    let deleted = client
        .execute(
            &format!(
                "DELETE FROM refarch.ledger l WHERE l.target = $1 AND l.id = ANY (ARRAY( \
                   SELECT k.id FROM refarch.ledger k WHERE k.target = $1 AND k.deleted AND k.open = 0 AND NOT k.dirty \
                     AND NOT k.parked AND k.synced_at < now() - interval '{KEEP_DELETED}' \
                   ORDER BY k.id COLLATE \"C\" LIMIT $2 FOR UPDATE SKIP LOCKED)) \
                 AND l.deleted AND l.open = 0 AND NOT l.dirty"
            ),
            &[&generation, &PRUNED_AT_ONCE],
        )
        .await
        .map_err(fail("delete ledger entries of deleted rows"))?;
    Ok(deleted == PRUNED_AT_ONCE.cast_unsigned())
}
