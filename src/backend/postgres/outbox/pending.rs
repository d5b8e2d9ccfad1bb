//! How many changes wait in the outbox.

use crate::backend::postgres::connection::Connection;
use crate::backend::postgres::{Postgres, failure};
use crate::pipeline::failure::Result;

/// Rows of the outbox that are counted for the status, and pages that are read where more wait.
const COUNTED_ROWS: i64 = 2_000;
const SAMPLED_PAGES: f64 = 200.0;

/// Changes that wait in the outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingChanges {
    /// How many.
    pub changes: u64,
    /// Whether that is an estimate, since so many wait.
    pub estimated: bool,
}

/// Changes in the outbox or on their way to the queue; a truncation counts as one, and so does a table that is to be
/// read anew. Where more than [`COUNTED_ROWS`] rows wait, their number is estimated from some pages of the outbox.
pub async fn pending(postgres: &Postgres, source: &str) -> Result<PendingChanges> {
    let fail = |error: tokio_postgres::Error| failure("count the outbox", error);
    let client = postgres.client().await?;
    let row = client
        .query_one(
            "SELECT count(*), coalesce(sum(greatest(cardinality(o.ids), 1)), 0)::bigint, \
               (SELECT coalesce(sum(changes), 0) FROM refarch.shipment WHERE source = $1)::bigint \
               + (EXISTS (SELECT FROM refarch.backfill WHERE source = $1) OR EXISTS (SELECT FROM refarch.mark WHERE source = $1))::int \
             FROM (SELECT ids FROM refarch.outbox WHERE source = $1 LIMIT $2::bigint + 1) o",
            &[&source, &COUNTED_ROWS],
        )
        .await
        .map_err(fail)?;
    let (rows, counted, beside): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
    let estimated = rows > COUNTED_ROWS;
    let changes =
        if estimated { counted.max(sampled(&client, source).await.map_err(fail)?) } else { counted };
    Ok(PendingChanges { changes: (changes + beside).try_into().unwrap_or_default(), estimated })
}

/// Changes in the outbox, from a sample of its pages.
async fn sampled(client: &Connection, source: &str) -> Result<i64, tokio_postgres::Error> {
    let percent = "SELECT least(100, 100 * $1::float8 / greatest(pg_relation_size('refarch.outbox') / current_setting('block_size')::float8, 1))";
    let percent: f64 = client.query_one(percent, &[&SAMPLED_PAGES]).await?.get(0);
    let row = client
        .query_one(
            "SELECT (coalesce(sum(greatest(cardinality(o.ids), 1)), 0) * 100 / $2::float8)::bigint \
             FROM refarch.outbox o TABLESAMPLE SYSTEM ($2::float8) WHERE o.source = $1",
            &[&source, &percent],
        )
        .await?;
    Ok(row.get(0))
}
