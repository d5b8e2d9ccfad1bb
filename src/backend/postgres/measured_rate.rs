//! The rate of a worker, as its heartbeats recorded it.

use super::{Postgres, fail};
use crate::pipeline::failure::Result;

/// Samples further apart do not tell how long the work between them took. Heartbeats come each second.
const MAX_GAP_S: f64 = 3.0;

/// Changes a second that one worker applied while it applied loads, over the kept samples. None if there was no load.
pub async fn of_worker(postgres: &Postgres) -> Result<Option<f64>> {
    let client = postgres.client().await?;
    let row = client
        .query_one(
            "SELECT sum(s.applied)::float8 / nullif(sum(s.seconds), 0)::float8 FROM ( \
               SELECT applied, bulk_counts, \
                      extract(epoch FROM at - lag(at) OVER (PARTITION BY worker_id ORDER BY at)) AS seconds \
               FROM refarch.sample) s \
             WHERE s.seconds < $1::float8 AND cardinality(s.bulk_counts) > 0",
            &[&MAX_GAP_S],
        )
        .await
        .map_err(fail("read the rate of the workers"))?;
    Ok(row.get::<_, Option<f64>>(0).filter(|rate| *rate > 0.0))
}
