//! Faults of workers, for `refarch status`.

use jiff::Timestamp;
use serde::Serialize;

use super::worker_registry::WORKER_GONE_S;
use super::{Postgres, failure};
use crate::pipeline::failure::Result;

/// A fault as shown. The same fault of several workers is one.
#[derive(Clone, Debug, Serialize)]
pub struct FaultStatus {
    /// Its kind.
    pub kind: String,
    /// Its message.
    pub message: String,
    /// When it began, by the database's clock.
    pub since: Timestamp,
    /// How many workers have it.
    pub workers: i64,
}

/// The faults of workers with a recent heartbeat.
pub async fn read(postgres: &Postgres) -> Result<Vec<FaultStatus>> {
    let client = postgres.client().await?;
    let rows = client
        .query(
            "SELECT f.kind, f.message, min(f.since), count(*) FROM refarch.fault f JOIN refarch.worker w USING (worker_id) \
             WHERE w.heartbeat_at > now() - make_interval(secs => $1) GROUP BY f.kind, f.message ORDER BY 3, 1, 2",
            &[&f64::from(WORKER_GONE_S)],
        )
        .await
        .map_err(|error| failure("read the faults", error))?;
    Ok(rows
        .iter()
        .map(|row| FaultStatus {
            kind: row.get(0),
            message: row.get(1),
            since: row.get(2),
            workers: row.get(3),
        })
        .collect())
}
