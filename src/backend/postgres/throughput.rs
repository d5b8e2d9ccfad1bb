//! The rate at which the fleet applies changes.

use super::{Postgres, failure};
use crate::pipeline::failure::Result;

/// The period that is looked at.
const WINDOW: &str = "2 minutes";

/// Changes a second that the workers applied together, over the last two minutes; none if they applied nothing.
///
/// Each second counts by its changes: the rate is the one that a typical change met, so that quiet seconds, and single
/// edits before a load, do not hide how fast the fleet is.
pub async fn recent(postgres: &Postgres) -> Result<Option<f64>> {
    let sql = format!(
        "SELECT sum(s.applied * s.applied)::float8 / nullif(sum(s.applied), 0)::float8 FROM ( \
           SELECT sum(applied)::float8 AS applied FROM refarch.sample \
           WHERE at > now() - interval '{WINDOW}' GROUP BY date_trunc('second', at)) s"
    );
    let client = postgres.client().await?;
    let row = client.query_one(&sql, &[]).await.map_err(|error| failure("read the fleet's rate", error))?;
    Ok(row.get(0))
}
