//! Reads the ownership record of the index, and compares it with the database.

use std::time::SystemTime;

use super::database_epoch::{Check, DatabaseEpoch, read};
use crate::backend::postgres::{Postgres, failure};
use crate::pipeline::failure::Result;
use crate::pipeline::index::{OwnershipStore, VectorIndex};

/// Whether the index belongs to the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// The index belongs to this database.
    Owned,
    /// The index holds no record, and the ledger knows of no write to the index.
    Unclaimed,
    /// The index belongs to another database or to a later state of this one, or it was created again.
    NotOwned,
}

/// Reads the record and compares it. `lost` is a heartbeat that the database has lost.
pub(super) async fn read_and_check(
    postgres: &Postgres,
    generation: i32,
    store: &dyn OwnershipStore,
    lost: Option<SystemTime>,
) -> Result<(DatabaseEpoch, Option<String>, Check)> {
    let before = read(postgres, generation).await?;
    let record = store.record().await?;
    // A worker may advance the epoch meanwhile. So the database is read again after the record: the record is
    // not ahead of that state. A missing record counts as missing only if something was written before.
    let state = match record {
        Some(_) => DatabaseEpoch { written: before.written, ..read(postgres, generation).await? },
        None => before,
    };
    let found = match state.check(record.as_deref()) {
        Check::Owned if state.went_back(lost) => Check::IndexAhead(state.epoch),
        found => found,
    };
    Ok((state, record, found))
}

/// Compares the ownership record of the index with the database.
pub async fn compare(postgres: &Postgres, generation: i32, index: &dyn VectorIndex) -> Result<Ownership> {
    let Some(store) = index.ownership_store() else { return Ok(Ownership::Owned) };
    Ok(match read_and_check(postgres, generation, store, None).await?.2 {
        // After a change of server, records may be ahead of the ledger. The caller compares records and finds
        // them.
        Check::Owned | Check::ServerChanged => Ownership::Owned,
        Check::Unclaimed => Ownership::Unclaimed,
        Check::IndexAhead(_) | Check::OtherDatabase | Check::RecordMissing => Ownership::NotOwned,
    })
}

/// Whether the index holds a record of the source's database: then this database wrote to the index, whatever
/// the address of the index is now.
pub async fn is_owned_by(postgres: &Postgres, source: &str, index: &dyn VectorIndex) -> Result<bool> {
    let Some(store) = index.ownership_store() else { return Ok(false) };
    let client = postgres.client().await?;
    let sql = "SELECT l.name FROM refarch.lineage l JOIN refarch.target t ON t.id = l.target \
               WHERE t.source = $1 AND t.state = 'active'";
    let row = client
        .query_opt(sql, &[&source])
        .await
        .map_err(|error| failure("read the owner of the index", error))?;
    let Some(name) = row.map(|row| row.get::<_, String>(0)) else { return Ok(false) };
    let record = store.record().await?;
    Ok(record.is_some_and(|record| {
        record.rsplit_once('/').is_some_and(|(recorded_name, _)| recorded_name == name)
    }))
}
