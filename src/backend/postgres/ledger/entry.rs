//! Entries of the ledger as rows of `refarch.ledger`.

use std::collections::{BTreeMap, HashMap};

use tokio_postgres::{Row, Transaction};

use crate::backend::postgres::fail;
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::ledger::Entry;
use crate::pipeline::source_row::Hash;

/// Columns of an entry, in the order in which [`read_entry`] reads them.
pub(super) const ENTRY: &str =
    "l.open, l.epoch, l.dirty, l.content_hash, l.metadata_hash, l.deleted, l.parked";

/// The entries of a target. The caller has a transaction, in which they are locked and written.
pub(crate) struct Entries(pub(crate) i32);

impl Entries {
    /// Locks the entries of these ids, in id order.
    pub(crate) async fn lock(
        &self,
        transaction: &Transaction<'_>,
        ids: &[&str],
    ) -> Result<BTreeMap<String, Entry>> {
        let sql = format!(
            "SELECT l.id, {ENTRY} FROM refarch.ledger l WHERE l.target = $1 AND l.id = ANY ($2) \
             ORDER BY l.id COLLATE \"C\" FOR UPDATE"
        );
        let rows = transaction.query(&sql, &[&self.0, &ids]).await.map_err(fail("lock ledger entries"))?;
        rows.iter().map(|row| Ok((row.get(0), read_entry(row, 1, row.get(0))?))).collect()
    }

    /// Writes locked entries back; `settled` has the versions of the entries that became clean.
    pub(crate) async fn put(
        &self,
        transaction: &Transaction<'_>,
        entries: &BTreeMap<String, Entry>,
        settled: &HashMap<&str, i64>,
    ) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let of = |entry: &Entry| (entry.open, entry.revision, entry.dirty, entry.deleted, entry.parked);
        let ids: Vec<&str> = entries.keys().map(String::as_str).collect();
        let open: Vec<i32> = entries.values().map(|entry| of(entry).0).collect();
        let revisions: Vec<i64> = entries.values().map(|entry| of(entry).1).collect();
        let dirty: Vec<bool> = entries.values().map(|entry| of(entry).2).collect();
        let deleted: Vec<bool> = entries.values().map(|entry| of(entry).3).collect();
        let parked: Vec<bool> = entries.values().map(|entry| of(entry).4).collect();
        let bytes = |hash: &Option<Hash>| hash.map(|hash| hash.0.to_vec());
        let content: Vec<Option<Vec<u8>>> =
            entries.values().map(|entry| bytes(&entry.content_hash)).collect();
        let metadata: Vec<Option<Vec<u8>>> =
            entries.values().map(|entry| bytes(&entry.metadata_hash)).collect();
        let versions: Vec<Option<i64>> = ids.iter().map(|id| settled.get(id).copied()).collect();
        transaction
            .execute(
                "UPDATE refarch.ledger l SET open = u.open, epoch = u.epoch, dirty = u.dirty, deleted = u.deleted, \
                        parked = u.parked, content_hash = u.content, metadata_hash = u.metadata, \
                        version = greatest(l.version, u.version), \
                        synced_at = CASE WHEN u.version IS NULL THEN l.synced_at ELSE clock_timestamp() END, \
                        tries = CASE WHEN u.version IS NULL THEN l.tries ELSE 0 END \
                 FROM unnest($2::text[], $3::integer[], $4::bigint[], $5::boolean[], $6::boolean[], $7::bytea[], \
                             $8::bytea[], $9::bigint[], $10::boolean[]) \
                      AS u(id, open, epoch, dirty, deleted, content, metadata, version, parked) \
                 WHERE l.target = $1 AND l.id = u.id",
                &[&self.0, &ids, &open, &revisions, &dirty, &deleted, &content, &metadata, &versions, &parked],
            )
            .await
            .map_err(fail("write the ledger"))?;
        Ok(())
    }
}

/// Reads the hash in column `at`.
pub(super) fn hash(row: &Row, at: usize, id: &str) -> Result<Option<Hash>> {
    row.get::<_, Option<&[u8]>>(at)
        .map(|bytes| {
            Hash::from_bytes(bytes).ok_or_else(|| {
                Error::new(
                    FailureKind::Malformed,
                    "read the ledger",
                    format!("row {id} has a hash of an unexpected length"),
                )
            })
        })
        .transpose()
}

/// Reads the columns of [`ENTRY`], beginning at column `at`.
pub(super) fn read_entry(row: &Row, at: usize, id: &str) -> Result<Entry> {
    Ok(Entry {
        open: row.get(at),
        revision: row.get(at + 1),
        dirty: row.get(at + 2),
        content_hash: hash(row, at + 3, id)?,
        metadata_hash: hash(row, at + 4, id)?,
        deleted: row.get(at + 5),
        parked: row.get(at + 6),
    })
}
