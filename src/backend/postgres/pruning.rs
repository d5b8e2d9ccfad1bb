//! Deletes old samples, events and ledger entries.

use super::worker_registry::KEEP;
use super::{Postgres, fail};
use crate::pipeline::failure::Result;

/// How long entries of deleted rows are kept.
const KEEP_DELETED: &str = "1 day";

/// Rows that are deleted at a time.
const PRUNED_AT_ONCE: i64 = 5_000;

/// Deletes old samples and events, some at a time.
pub async fn prune_history(postgres: &Postgres) -> Result<()> {
    let client = postgres.client().await?;
    client
        .execute(
            &format!(
                "WITH samples AS (DELETE FROM refarch.sample WHERE ctid = ANY (ARRAY( \
                   SELECT ctid FROM refarch.sample WHERE at < now() - interval '{KEEP}' LIMIT $1))) \
                 DELETE FROM refarch.event WHERE ctid = ANY (ARRAY( \
                   SELECT ctid FROM refarch.event WHERE at < now() - interval '{KEEP}' AND kind <> 'dead_letter' LIMIT $1))"
            ),
            &[&PRUNED_AT_ONCE],
        )
        .await
        .map(drop)
        .map_err(fail("delete old samples and events"))
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
