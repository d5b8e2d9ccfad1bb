//! Faults of workers, for `refarch status`.

use jiff::Timestamp;
use serde::Serialize;

use super::registry::WORKER_GONE_S;
use super::{Connection, Postgres, failure};
use crate::pipeline::failure::Result;
use crate::pipeline::fault::Fault;

/// A fault that lasts is written again after this many heartbeats.
const REFRESH_BEATS: u32 = 10;

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

/// A worker's faults as they were last written to the database.
#[derive(Debug, Default)]
pub(super) struct Written {
    faults: Vec<Fault>,
    beats: u32,
}

impl Written {
    /// Writes a worker's faults if they changed, and now and then if they last. Faults of other kinds under
    /// the worker's id are kept, since other code writes them.
    pub(super) async fn keep(
        &mut self,
        client: &Connection,
        worker: &str,
        current: Vec<Fault>,
    ) -> Result<()> {
        self.beats += 1;
        if current == self.faults && (current.is_empty() || self.beats < REFRESH_BEATS) {
            return Ok(());
        }
        let ended: Vec<&str> = self
            .faults
            .iter()
            .map(|fault| fault.kind)
            .filter(|kind| current.iter().all(|fault| fault.kind != *kind))
            .collect();
        let kinds: Vec<&str> = current.iter().map(|fault| fault.kind).collect();
        let messages: Vec<&str> = current.iter().map(|fault| fault.message.as_str()).collect();
        client
            .execute(
                "WITH ended AS (DELETE FROM refarch.fault WHERE worker_id = $1 AND kind = ANY ($2)) \
                 INSERT INTO refarch.fault AS f (worker_id, kind, message) \
                 SELECT $1, u.kind, u.message FROM unnest($3::text[], $4::text[]) AS u(kind, message) \
                 ON CONFLICT (worker_id, kind) DO UPDATE SET message = excluded.message, seen_at = clock_timestamp()",
                &[&worker, &ended, &kinds, &messages],
            )
            .await
            .map_err(|error| failure("write a fault", &error))?;
        (self.faults, self.beats) = (current, 0);
        Ok(())
    }
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
        .map_err(|error| failure("read the faults", &error))?;
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
