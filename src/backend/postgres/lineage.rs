//! Which database, and which state of it, an index outside of it belongs to.
//!
//! A restore to an earlier point leaves the index ahead of the ledger: rows that the ledger calls
//! settled may be anything there. So the database has a name and a mark that grows, and the index
//! keeps a note of both, written after the database committed them. An index whose note has another
//! name, or a higher mark, was written to by another database or by a later state of this one; then no
//! entry of the ledger can be trusted. What is written between the last mark and a restore is not
//! noticed by this; `verify` compares the records themselves.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{Postgres, failure};
use crate::pipeline::failure::{Error, Result};
use crate::pipeline::index::{Notes, VectorIndex};

/// How often a mark is made: the most that a restore can go back without being noticed.
const MARK_EVERY: Duration = Duration::from_mins(1);

/// How an index and the database stand to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The index is this database's.
    Ours,
    /// The index holds no note, and nothing was written to it as far as the ledger knows.
    New,
    /// The index belongs to another database, or to a later state of this one, or was made anew.
    Foreign,
}

/// Name and mark, and whether the index was ever written to as far as the ledger knows.
async fn marked(postgres: &Postgres, target: i32) -> Result<(String, i64, bool)> {
    let client = postgres.client().await?;
    let row = client
        .query_one(
            "INSERT INTO refarch.lineage (target) VALUES ($1) \
             ON CONFLICT (target) DO UPDATE SET mark = lineage.mark \
             RETURNING name, mark, EXISTS (SELECT FROM refarch.ledger l WHERE l.target = $1 AND l.epoch > 0)",
            &[&target],
        )
        .await
        .map_err(|error| failure("read the lineage", &error))?;
    Ok((row.get(0), row.get(1), row.get(2)))
}

/// Compares the index's note with the database.
pub async fn compare(postgres: &Postgres, target: i32, index: &dyn VectorIndex) -> Result<Standing> {
    let Some(notes) = index.notes() else { return Ok(Standing::Ours) };
    let (name, before, written) = marked(postgres, target).await?;
    let note = notes.note().await?;
    // A worker may make a mark meanwhile. The note that was read is not ahead of what is read after
    // it, and one that was missing is missed only if something was written before.
    let mark = if note.is_some() { marked(postgres, target).await?.1 } else { before };
    Ok(stand(&name, mark, written, note.as_deref()))
}

fn stand(name: &str, mark: i64, written: bool, note: Option<&str>) -> Standing {
    let Some(note) = note else {
        // A mark alone says nothing: the note that goes with it may have failed.
        return if written { Standing::Foreign } else { Standing::New };
    };
    match note.rsplit_once('/').map(|(name, mark)| (name, mark.parse::<i64>())) {
        Some((noted, Ok(seen))) if noted == name && seen <= mark => Standing::Ours,
        _ => Standing::Foreign,
    }
}

/// Makes a mark, first in the database and then in the index.
pub async fn mark(postgres: &Postgres, target: i32, notes: &dyn Notes) -> Result<()> {
    let client = postgres.client().await?;
    let row = client
        .query_one(
            "INSERT INTO refarch.lineage (target, mark) VALUES ($1, 1) \
             ON CONFLICT (target) DO UPDATE SET mark = lineage.mark + 1 RETURNING name, mark",
            &[&target],
        )
        .await
        .map_err(|error| failure("mark the lineage", &error))?;
    let note = format!("{}/{}", row.get::<_, &str>(0), row.get::<_, i64>(1));
    notes.set_note(&note).await
}

/// Queues every row and every entry of the ledger as not to be trusted; returns the rows.
async fn distrust(postgres: &Postgres, target: i32) -> Result<u64> {
    let client = postgres.client().await?;
    let row = client
        .query_one("SELECT refarch.distrust($1)", &[&target])
        .await
        .map_err(|error| failure("queue every row", &error))?;
    Ok(row.get::<_, i64>(0).try_into().unwrap_or_default())
}

/// Sees to it that the index is this database's, before anything is written to it.
pub async fn claim(postgres: &Postgres, target: i32, index: &dyn VectorIndex) -> Result<()> {
    let Some(notes) = index.notes() else { return Ok(()) };
    // A session of its own: the lock goes with it, however this ends.
    let fail = |error: tokio_postgres::Error| failure("claim the index", &error);
    let (session, connection) = postgres.dedicated().await.map_err(fail)?;
    let connection = tokio::spawn(connection);
    session
        .execute("SELECT pg_advisory_lock(hashtext('refarch.lineage'), $1)", &[&target])
        .await
        .map_err(fail)?;
    if compare(postgres, target, index).await? == Standing::Foreign {
        let rows = distrust(postgres, target).await?;
        tracing::warn!(
            rows,
            "the index belongs to another database or to a later state of this one, as after a restore: every row is written anew"
        );
    }
    mark(postgres, target, notes).await?;
    drop(session);
    connection.await.map_err(|error| Error::retryable("claim the index", error))?.map_err(fail)
}

/// Makes a mark every now and then, until `stop`.
pub async fn keep(postgres: &Postgres, target: i32, index: &dyn VectorIndex, stop: &CancellationToken) {
    let Some(notes) = index.notes() else { return };
    while stop.run_until_cancelled(tokio::time::sleep(MARK_EVERY)).await.is_some() {
        if let Err(error) = mark(postgres, target, notes).await {
            tracing::debug!(%error, "cannot mark the lineage");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_that_is_ahead_or_not_ours_is_foreign() {
        assert_eq!(stand("a", 0, false, None), Standing::New);
        assert_eq!(stand("a", 3, false, None), Standing::New);
        assert_eq!(stand("a", 3, true, None), Standing::Foreign);
        assert_eq!(stand("a", 3, true, Some("a/3")), Standing::Ours);
        assert_eq!(stand("a", 3, true, Some("a/2")), Standing::Ours);
        assert_eq!(stand("a", 3, true, Some("a/4")), Standing::Foreign);
        assert_eq!(stand("a", 3, true, Some("b/3")), Standing::Foreign);
        assert_eq!(stand("a", 3, true, Some("nonsense")), Standing::Foreign);
    }
}
