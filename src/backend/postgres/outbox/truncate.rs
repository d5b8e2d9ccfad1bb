//! A TRUNCATE becomes deletes of the rows that the ledger knows.
//!
//! No trigger sees the rows that a TRUNCATE removes, so capture inserts a row without ids into the outbox.
//! The ledger knows every row that may be in the index.

use tokio_postgres::Transaction;

use super::delivery::{Delivery, count_lanes};
use crate::backend::postgres::failure;
use crate::pipeline::change::{MAX_CHANGES_PER_JOB, Op};
use crate::pipeline::failure::Result;
use crate::pipeline::outbox::{BuildJobs, OutboxRow, Transferred};

/// Ids that are read from the ledger and sent at a time.
const PAGE: i64 = 5_000;

/// Rows in the ledger, without rows whose deletion is settled. If an entry is open or dirty, the index may
/// hold the row although the entry says that the row is deleted.
const KNOWN_ROWS: &str = "SELECT l.target, l.id FROM refarch.ledger l JOIN refarch.target t ON t.id = l.target \
    WHERE t.source = $1 AND t.state <> 'retired' AND NOT (l.deleted AND l.open = 0 AND NOT l.dirty) \
      AND (l.target, l.id) > ($2, $3) \
    ORDER BY l.target, l.id LIMIT $4";

/// A TRUNCATE in the outbox.
#[derive(Clone, Copy, Debug)]
pub(super) struct Truncate {
    pub(super) seq: i64,
    pub(super) changed_at_us: i64,
}

impl Truncate {
    /// Sends a delete for every row of `source` that may be in the index. The indexer reads each row and sees
    /// whether the row is gone.
    pub(super) async fn send_deletes(
        self,
        transaction: &Transaction<'_>,
        source: &str,
        build_jobs: BuildJobs<'_>,
        delivery: &mut Delivery,
        done: &mut Transferred,
    ) -> Result<()> {
        let mut after = (0_i32, String::new());
        loop {
            let page = transaction
                .query(KNOWN_ROWS, &[&source, &after.0, &after.1, &PAGE])
                .await
                .map_err(|error| failure("expand a truncation", error))?;
            let Some(last) = page.last() else { return Ok(()) };
            after = (last.get(0), last.get(1));
            let ids: Vec<String> = page.iter().map(|row| row.get(1)).collect();
            done.changes += ids.len() as u64;
            let rows = ids.chunks(MAX_CHANGES_PER_JOB).map(|ids| self.delete(ids)).collect();
            let jobs = build_jobs(rows);
            count_lanes(&jobs, done);
            match delivery {
                Delivery::Pgmq(prefix) => {
                    crate::backend::pgmq::send_within(transaction, prefix, &jobs).await?;
                }
                Delivery::Shipped(shipping) => shipping.stage_unleased(transaction, &jobs).await?,
            }
        }
    }

    /// The deletes of some rows, as if a statement had deleted them.
    fn delete(self, ids: &[String]) -> OutboxRow {
        OutboxRow {
            seq: self.seq,
            op: Op::Delete,
            ids: ids.to_vec(),
            xid: 0,
            changed_at_us: self.changed_at_us,
            // Nobody edits by TRUNCATE, so the deletes go to the bulk lane, however few they are.
            xid_changes: u64::MAX,
        }
    }
}
