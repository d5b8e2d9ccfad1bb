//! How many rows a source's table has, without counting a large table each time somebody asks.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::counts::Counts;
use super::generation::Generation;
use super::{Postgres, failure};
use crate::pipeline::failure::{Error, Result};

/// A table with more rows than this by the planner's estimate, or with an unknown number of rows, and with more than
/// this many bytes is not counted each time. The estimate alone may be far off; the size decides what counting costs.
pub(super) const COUNT_UP_TO: f64 = 200_000.0;
const COUNT_UP_TO_BYTES: i64 = 32 << 20;

/// A process counts a table up to this size before it says anything, and a larger one only if there is no number that
/// could stand in for the count.
const COUNT_FIRST_UP_TO: f64 = 2_000_000.0;

/// How long the count of a large table is used, and how many times as long as it took.
const COUNTED_FOR: Duration = Duration::from_mins(1);
const COUNTED_FOR_COST: u32 = 100;

/// How far the planner's estimate of a large table may be off. If the ledger differs by more, the table is counted.
pub(super) const ESTIMATE_IS_OFF: f64 = 0.1;

/// Rows of a table and of the tables below it by the planner's estimate (0: unknown), and their size in bytes. `$1` is the
/// quoted name.
pub(super) const ESTIMATE: &str = "WITH RECURSIVE tree(oid) AS ( \
       SELECT $1::text::regclass::oid UNION SELECT i.inhrelid FROM tree JOIN pg_inherits i ON i.inhparent = tree.oid) \
     SELECT coalesce(sum(greatest(c.reltuples, 0)), 0)::float8, coalesce(sum(pg_relation_size(c.oid)), 0)::bigint \
     FROM tree JOIN pg_class c USING (oid) WHERE c.relkind IN ('r', 'm')";

/// The number of rows, and how far it can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceRows {
    /// The number of rows.
    pub rows: u64,
    /// Whether that is the planner's estimate, the ledger's count, or an earlier count.
    pub estimated: bool,
    /// Whether the last count differs from the ledger's, and the ledger's has not changed since.
    pub differs: bool,
}

/// A count of a large table.
#[derive(Clone, Copy, Debug)]
struct Count {
    rows: u64,
    /// Settled entries of the ledger in the same snapshot.
    settled: u64,
    until: Instant,
}

#[derive(Debug, Default)]
struct State {
    last: Option<Count>,
    /// Whether a count is under way.
    counting: bool,
}

/// The last count of a large table's rows.
#[derive(Debug, Default)]
pub struct Counted(Mutex<State>);

impl Counted {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts rows and settled entries in one snapshot.
    async fn count(&self, postgres: &Postgres, generation: &Generation) -> Result<Count> {
        let started = Instant::now();
        let client = postgres.client().await?;
        let sql = format!(
            "SELECT (SELECT count(*) FROM {}), \
               (SELECT coalesce(sum(d.settled), 0)::bigint FROM refarch.count_delta d WHERE d.target = $1)",
            generation.table.relation
        );
        let row = client.query_one(&sql, &[&generation.id]).await.map_err(fail)?;
        let number = |at| u64::try_from(row.get::<_, i64>(at)).unwrap_or_default();
        let until = Instant::now() + COUNTED_FOR.max(started.elapsed() * COUNTED_FOR_COST);
        let count = Count { rows: number(0), settled: number(1), until };
        self.state().last = Some(count);
        Ok(count)
    }

    /// Counts in the background, unless that is under way.
    fn count_meanwhile(self: &Arc<Self>, postgres: &Postgres, generation: &Generation) {
        if std::mem::replace(&mut self.state().counting, true) {
            return;
        }
        let (counted, postgres, generation) = (Arc::clone(self), postgres.clone(), generation.clone());
        tokio::spawn(async move {
            let _counting = Counting(&counted);
            let done = counted.count(&postgres, &generation).await;
            let mut state = counted.state();
            if let Err(error) = done {
                tracing::debug!(%error, "cannot count the rows of the table: the last count is used on");
                if let Some(last) = &mut state.last {
                    last.until = Instant::now() + COUNTED_FOR;
                }
            }
        });
    }
}

/// A count that is under way, until it ends: also by a panic.
struct Counting<'a>(&'a Counted);

impl Drop for Counting<'_> {
    fn drop(&mut self) {
        self.0.state().counting = false;
    }
}

fn fail(error: tokio_postgres::Error) -> Error {
    failure("count the rows", error)
}

/// Rows of the source. `counts` were read just before.
pub async fn read(
    postgres: &Postgres,
    generation: &Generation,
    counts: &Counts,
    counted: &Arc<Counted>,
) -> Result<SourceRows> {
    let (estimate, bytes) = {
        let client = postgres.client().await?;
        let size = client.query_one(ESTIMATE, &[&generation.table.relation]).await.map_err(fail)?;
        (size.get::<_, f64>(0), size.get::<_, i64>(1))
    };
    let is_small = bytes <= COUNT_UP_TO_BYTES || (estimate > 0.0 && estimate <= COUNT_UP_TO);
    if is_small {
        let client = postgres.client().await?;
        let sql = format!("SELECT count(*) FROM {}", generation.table.relation);
        let rows: i64 = client.query_one(&sql, &[]).await.map_err(fail)?.get(0);
        return Ok(SourceRows {
            rows: rows.try_into().unwrap_or_default(),
            estimated: false,
            differs: false,
        });
    }
    let last = counted.state().last;
    if let Some(last) = last {
        if Instant::now() >= last.until {
            counted.count_meanwhile(postgres, generation);
        }
        return Ok(since(&last, counts));
    }
    if estimate > COUNT_FIRST_UP_TO {
        // No change is on its way: then the ledger is more exact than the planner, unless they are far apart.
        let is_near = (counts.settled as f64 - estimate).abs() <= estimate * ESTIMATE_IS_OFF;
        if counts.unsettled > 0 || is_near {
            counted.count_meanwhile(postgres, generation);
            let rows = if counts.unsettled > 0 { estimate as u64 } else { counts.settled };
            return Ok(SourceRows { rows, estimated: true, differs: false });
        }
    }
    Ok(since(&counted.count(postgres, generation).await?, counts))
}

/// The number of rows by an earlier count. If the ledger had as many, the number follows the ledger.
fn since(last: &Count, now: &Counts) -> SourceRows {
    let agreed = last.rows == last.settled;
    SourceRows {
        rows: if agreed { now.settled } else { last.rows.max(now.settled) },
        estimated: true,
        // A change that was on its way has changed the ledger since, or is still on its way.
        differs: !agreed && now.settled == last.settled,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_follows_the_ledger_and_a_difference_stays_until_the_ledger_moves() {
        let until = Instant::now();
        let now = |settled| Counts { settled, with_text: settled, unsettled: 0, records: settled };
        let agreed = Count { rows: 10, settled: 10, until };
        assert_eq!(since(&agreed, &now(12)), SourceRows { rows: 12, estimated: true, differs: false });
        let behind = Count { rows: 10, settled: 4, until };
        assert_eq!(since(&behind, &now(4)), SourceRows { rows: 10, estimated: true, differs: true });
        assert_eq!(since(&behind, &now(10)), SourceRows { rows: 10, estimated: true, differs: false });
        assert_eq!(since(&behind, &now(11)), SourceRows { rows: 11, estimated: true, differs: false });
    }
}
