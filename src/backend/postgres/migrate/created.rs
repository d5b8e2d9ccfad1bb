//! The record of objects that refarch made outside of its schema, so that an uninstallation removes no others.

use tokio_postgres::Transaction;

use crate::backend::postgres::failure;
use crate::pipeline::failure::Result;

/// Kinds of objects.
pub(super) const PGMQ: &str = "schema";
pub(super) const QUEUE: &str = "queue";
pub(super) const EXTENSION: &str = "extension";

/// Records an object that was made outside of our schema.
pub(super) async fn record(transaction: &Transaction<'_>, what: &str, name: &str) -> Result<()> {
    transaction
        .execute(
            "INSERT INTO refarch.made (what, name) VALUES ($1, $2) ON CONFLICT DO NOTHING",
            &[&what, &name],
        )
        .await
        .map(drop)
        .map_err(|error| failure("record the created objects", error))
}

/// Kinds and names of objects that refarch made; `None` if they were made by a version that recorded none.
pub(super) async fn read(transaction: &Transaction<'_>) -> Result<Option<Vec<(String, String)>>> {
    let fail = |error: tokio_postgres::Error| failure("read the record of created objects", error);
    let remembered: bool = transaction
        .query_one("SELECT to_regclass('refarch.made') IS NOT NULL", &[])
        .await
        .map_err(fail)?
        .get(0);
    if !remembered {
        return Ok(None);
    }
    let rows = transaction.query("SELECT what, name FROM refarch.made", &[]).await.map_err(fail)?;
    Ok(Some(rows.iter().map(|row| (row.get(0), row.get(1))).collect()))
}

/// Whether `created`, as [`read`] returned it, has this object.
pub(super) fn contains(created: Option<&[(String, String)]>, what: &str, name: &str) -> bool {
    created.is_some_and(|created| created.iter().any(|(kind, named)| kind == what && named == name))
}
