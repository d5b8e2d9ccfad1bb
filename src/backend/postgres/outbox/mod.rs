//! The outbox: the relay claims changes that triggers captured, and hands them to the queue.
//!
//! A queue in the same database gets its messages in the transaction that claims the changes. For a queue
//! outside of the database, that transaction stores the packed messages as a shipment, and [`shipping`] sends
//! the shipment later. So no transaction stays open during a call: an open transaction holds back vacuum in
//! the whole database.

mod delivery;
mod pending;
mod shipping;
mod truncate;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::listener::{Listener, WakeUp};
use super::{Postgres, failure};
use crate::pipeline::change::Op;
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::outbox::{BuildJobs, ClaimRequest, Outbox, OutboxRow, Transferred};
use crate::pipeline::queue::JobQueue;
use delivery::{Delivery, count_lanes};
pub use pending::{PendingChanges, pending};
use shipping::Shipping;
use truncate::Truncate;

/// Channel on which a committing writer notifies a relay that waits.
const CHANNEL: &str = "refarch_outbox";

/// Large transactions that a claim skips. If there are more, the claim takes their rows like small ones.
const MAX_KNOWN_LARGE: usize = 16;

/// A row with more ids than this is large. No setting changes this, since the partial index `outbox_large`
/// has the same number. The lane of a change depends on the count of its transaction, not on this.
const LARGE_ROW: usize = 100;

/// Pages of 500 rows that one transaction of a backfill reads.
const BACKFILL_PAGES: i32 = 20;

/// A backfill waits while the outbox has at least this many rows.
const BACKFILL_BOUND: i64 = 400;

/// Pause of a backfill that cannot read the table now.
const BACKFILL_PAUSE: Duration = Duration::from_secs(1);

/// Claims small rows of transactions not known to be large, then rows of large statements and
/// transactions, and deletes them. `xid_changes` is counted up to one more than the bound. `$7` is the bound
/// plus one: each row has at least one id, so this many rows are enough. "100" is [`LARGE_ROW`].
/// FOR UPDATE SKIP LOCKED lets several relays claim at the same time.
const CLAIM: &str = "
WITH small AS MATERIALIZED (
    SELECT o.seq FROM unnest($3::text[]::xid8[], $4::text[]::xid8[]) AS gap(low, high),
    LATERAL (
        SELECT seq FROM refarch.outbox
        WHERE source = $1 AND xid > gap.low AND xid < gap.high AND cardinality(ids) <= 100
        ORDER BY xid, seq LIMIT $2 FOR UPDATE SKIP LOCKED
    ) o LIMIT $2
), large AS MATERIALIZED (
    SELECT seq FROM refarch.outbox WHERE source = $1 AND cardinality(ids) > 100
    ORDER BY seq LIMIT $5 FOR UPDATE SKIP LOCKED
), rest AS MATERIALIZED (
    SELECT o.seq FROM unnest($6::text[]::xid8[]) AS known(xid),
    LATERAL (
        SELECT seq FROM refarch.outbox
        WHERE source = $1 AND xid = known.xid AND cardinality(ids) <= 100
        ORDER BY seq LIMIT $2 FOR UPDATE SKIP LOCKED
    ) o LIMIT $2
), claimed AS MATERIALIZED (
    SELECT seq FROM small UNION ALL SELECT seq FROM large UNION ALL SELECT seq FROM rest
), taken AS (
    DELETE FROM refarch.outbox o USING claimed WHERE o.seq = claimed.seq
    RETURNING o.seq, o.op, o.ids, o.xid, o.changed_at
), totals AS (
    SELECT t.xid, (
        SELECT coalesce(sum(c.n), 0) FROM (
            SELECT cardinality(o.ids) AS n FROM refarch.outbox o WHERE o.source = $1 AND o.xid = t.xid LIMIT $7
        ) c
    ) AS changes
    FROM (SELECT DISTINCT xid FROM taken) t
)
SELECT t.seq, t.op::text, t.ids, t.xid::text, (extract(epoch FROM t.changed_at) * 1000000)::bigint,
       totals.changes::bigint, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
FROM taken t JOIN totals USING (xid) ORDER BY t.xid, t.seq";

/// The outbox of one source, for the relay that empties it.
pub struct PgOutbox {
    postgres: Postgres,
    source: String,
    delivery: Delivery,
    _listener: Listener,
    wake_up: WakeUp,
    /// Large transactions that still had rows in the outbox after a claim.
    known_large: Vec<u64>,
    /// Whether the flag in the database says that the relay is awake, so that writers need not notify.
    awake: bool,
    /// When the next backfill may start, if the last one could not read the table.
    held_until: Option<Instant>,
}

impl PgOutbox {
    /// The outbox of a source. Messages go to the queues of pgmq with the prefix `queue`.
    #[must_use]
    pub fn new(postgres: Postgres, source: &str, queue: &str) -> Self {
        Self::delivering(postgres, source, Delivery::Pgmq(queue.into()))
    }

    /// The outbox of a source. Messages go to a queue outside of its database.
    #[must_use]
    pub fn shipping(postgres: Postgres, source: &str, queue: Arc<dyn JobQueue>) -> Self {
        let shipping = Shipping::new(postgres.clone(), source, queue);
        Self::delivering(postgres, source, Delivery::Shipped(Box::new(shipping)))
    }

    fn delivering(postgres: Postgres, source: &str, delivery: Delivery) -> Self {
        let listener = Listener::start(postgres.clone(), CHANNEL);
        let wake_up = listener.wake_up();
        Self {
            postgres,
            source: source.into(),
            delivery,
            _listener: listener,
            wake_up,
            known_large: Vec::new(),
            // An earlier relay may have ended without a change of the flag.
            awake: true,
            held_until: None,
        }
    }

    /// Does a step of the backfill, if one was requested and the outbox has few rows.
    async fn backfill(&mut self) -> Result<()> {
        let fail = |error: tokio_postgres::Error| failure("backfill the table", error);
        if self.held_until.is_some_and(|until| Instant::now() < until) {
            return Ok(());
        }
        let client = self.postgres.client().await?;
        let due: bool = client
            .query_one(
                "SELECT (EXISTS (SELECT FROM refarch.backfill WHERE source = $1) OR EXISTS (SELECT FROM refarch.mark WHERE source = $1)) \
                   AND (SELECT count(*) FROM (SELECT FROM refarch.outbox WHERE source = $1 LIMIT $2) o) < $2",
                &[&self.source, &BACKFILL_BOUND],
            )
            .await
            .map_err(fail)?
            .get(0);
        if due {
            // Below zero: the step installed triggers on one table, in its own transaction. Another table may
            // lack triggers too.
            let mut queued: i64 = -1;
            while queued < 0 {
                queued = client
                    .query_one("SELECT refarch.backfill_step($1, $2)", &[&self.source, &BACKFILL_PAGES])
                    .await
                    .map_err(fail)?
                    .get(0);
            }
            self.held_until = (queued == 0).then(|| Instant::now() + BACKFILL_PAUSE);
        }
        Ok(())
    }

    async fn set_relay_asleep(&self, asleep: bool) -> Result<()> {
        let client = self.postgres.client().await?;
        client
            .execute(
                "INSERT INTO refarch.doorbell (asleep) VALUES ($1) \
                 ON CONFLICT (single) DO UPDATE SET asleep = excluded.asleep WHERE doorbell.asleep <> excluded.asleep",
                &[&asleep],
            )
            .await
            .map_err(|error| failure("set the relay's wake-up flag", error))?;
        Ok(())
    }
}

/// The gaps between known large transactions, as exclusive bounds.
fn gaps(known: &[u64]) -> (Vec<String>, Vec<String>) {
    let mut sorted = known.to_vec();
    sorted.sort_unstable();
    let low = std::iter::once(0).chain(sorted.iter().copied()).map(|xid| xid.to_string()).collect();
    let high = sorted.iter().copied().chain([u64::MAX]).map(|xid| xid.to_string()).collect();
    (low, high)
}

/// A claimed row of the outbox.
enum Claimed {
    Row(OutboxRow),
    Truncate(Truncate),
}

#[async_trait]
impl Outbox for PgOutbox {
    async fn transfer(&mut self, request: ClaimRequest, build_jobs: BuildJobs<'_>) -> Result<Transferred> {
        self.wake_up.arm();
        let mut done = Transferred::default();
        self.backfill().await?;
        if let Delivery::Shipped(shipping) = &mut self.delivery {
            shipping.make_room().await?;
            shipping.resume_leftover(&mut done).await?;
        }
        let fail = |what: &'static str| move |error: tokio_postgres::Error| failure(what, error);
        let (low, high) = gaps(&self.known_large);
        // Large transactions are skipped even if this claim wants none of their rows.
        let wanted = if request.large_rows > 0 { self.known_large.as_slice() } else { &[] };
        let known_text: Vec<String> = wanted.iter().map(u64::to_string).collect();

        let bound = i64::try_from(request.large_transaction).unwrap_or(i64::MAX).saturating_add(1);
        let mut client = self.postgres.client().await?;
        let statement = client.prepare_cached(CLAIM).await.map_err(fail("prepare the claim"))?;
        let transaction = client.transaction().await.map_err(fail("begin a transfer"))?;
        let rows = transaction
            .query(
                &statement,
                &[
                    &self.source,
                    &(request.small_rows as i64),
                    &low,
                    &high,
                    &(request.large_rows as i64),
                    &known_text,
                    &bound,
                ],
            )
            .await
            .map_err(fail("claim changes"))?;
        if rows.is_empty() {
            transaction.rollback().await.map_err(fail("end an empty claim"))?;
            if request.large_rows > 0 {
                self.known_large.clear();
            }
            if done.rows == 0
                && let Delivery::Shipped(shipping) = &mut self.delivery
            {
                shipping.finish().await?;
            }
            return Ok(done);
        }
        let now_us: i64 = rows[0].get(6);
        let claimed = rows.iter().map(read).collect::<Result<Vec<_>>>()?;
        done.rows += claimed.len();
        let mut plain = Vec::with_capacity(claimed.len());
        let mut large = Vec::new();
        for claimed in claimed {
            let changed_at_us = match claimed {
                Claimed::Row(row) => {
                    done.changes += row.ids.len() as u64;
                    if row.xid_changes > request.large_transaction && row.ids.len() <= LARGE_ROW {
                        large.push(row.xid);
                    }
                    let at = row.changed_at_us;
                    plain.push(row);
                    at
                }
                Claimed::Truncate(truncate) => {
                    let (source, delivery) = (&self.source, &mut self.delivery);
                    truncate.send_deletes(&transaction, source, build_jobs, delivery, &mut done).await?;
                    truncate.changed_at_us
                }
            };
            done.oldest_ms = done.oldest_ms.max(((now_us - changed_at_us) / 1000).max(0) as u64);
        }
        let jobs = build_jobs(plain);
        count_lanes(&jobs, &mut done);
        let mut shipment = None;
        match &self.delivery {
            Delivery::Pgmq(prefix) => crate::backend::pgmq::send_within(&transaction, prefix, &jobs).await?,
            Delivery::Shipped(shipping) => shipment = shipping.stage(&transaction, jobs).await?,
        }
        if matches!(self.delivery, Delivery::Pgmq(_)) {
            transaction
                .execute("SELECT pg_notify($1, '')", &[&crate::backend::pgmq::CHANNEL])
                .await
                .map_err(fail("notify the indexers"))?;
        }
        transaction.commit().await.map_err(fail("commit a transfer"))?;
        if let Delivery::Shipped(shipping) = &mut self.delivery {
            shipping.start(shipment);
        }

        self.known_large.append(&mut large);
        self.known_large.sort_unstable();
        self.known_large.dedup();
        self.known_large.truncate(MAX_KNOWN_LARGE);
        // After a full claim the relay claims again at once, so writers need not notify.
        let is_full = done.rows >= request.small_rows.min(request.large_rows);
        if is_full && !std::mem::replace(&mut self.awake, true) {
            self.set_relay_asleep(false).await?;
        }
        Ok(done)
    }

    async fn wait(&mut self, timeout: Duration) {
        if std::mem::take(&mut self.awake) {
            if let Err(error) = self.set_relay_asleep(true).await {
                tracing::debug!(%error, "cannot set the relay's wake-up flag");
                self.awake = true;
                tokio::time::sleep(timeout).await;
            }
            // A change may have been committed before the flag, without a notification: claim once more.
            return;
        }
        self.wake_up.wait(timeout).await;
    }
}

fn read(row: &tokio_postgres::Row) -> Result<Claimed> {
    let (seq, changed_at_us) = (row.get(0), row.get(4));
    let op = match row.get::<_, &str>(1) {
        "u" => Op::Upsert,
        "d" => Op::Delete,
        "t" => return Ok(Claimed::Truncate(Truncate { seq, changed_at_us })),
        other => {
            return Err(Error::new(
                FailureKind::Malformed,
                "read the outbox",
                format!("row {seq} has op {other:?}"),
            ));
        }
    };
    let xid = row.get::<_, &str>(3);
    Ok(Claimed::Row(OutboxRow {
        seq,
        op,
        ids: row.get(2),
        xid: xid.parse().map_err(|error| {
            Error::new(FailureKind::Malformed, "read the outbox", format!("xid {xid}: {error}"))
        })?,
        changed_at_us,
        xid_changes: row.get::<_, i64>(5).max(0) as u64,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_leave_out_exactly_the_known_transactions() {
        let (low, high) = gaps(&[9, 4]);
        assert_eq!(low, ["0", "4", "9"]);
        assert_eq!(high, ["4", "9", "18446744073709551615"]);
    }
}
