//! Periodic work that one worker does for all.

use std::time::Duration;

use super::{Postgres, fail};
use crate::pipeline::failure::Result;

/// Claims a chore that is to be done once in `every`. True for one worker in that time. A worker that dies
/// meanwhile leaves the chore to the next time.
///
/// The row is the lock: of two workers that claim at once, the second one waits for the first, and then sees
/// that the chore is not due any more.
pub async fn claim(postgres: &Postgres, name: &str, every: Duration) -> Result<bool> {
    let client = postgres.client().await?;
    let claimed = client
        .query_opt(
            "INSERT INTO refarch.chore AS c (name, begun_at) VALUES ($1, clock_timestamp()) \
             ON CONFLICT (name) DO UPDATE SET begun_at = excluded.begun_at \
             WHERE c.begun_at < clock_timestamp() - make_interval(secs => $2) OR c.begun_at > clock_timestamp() + make_interval(secs => $2) \
             RETURNING true",
            &[&name, &every.as_secs_f64()],
        )
        .await
        .map_err(fail("claim a periodic work"))?;
    Ok(claimed.is_some())
}
