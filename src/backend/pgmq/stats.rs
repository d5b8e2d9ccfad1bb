//! How full pgmq's queues are. Changes are counted from the messages' headers.

use async_trait::async_trait;
use jiff::Timestamp;

use super::queue::Pgmq;
use crate::backend::postgres::{Postgres, failure};
use crate::pipeline::change::Lane;
use crate::pipeline::failure::Result;
use crate::pipeline::queue::{Backlog, QueueStats};

#[async_trait]
impl QueueStats for Pgmq {
    async fn backlog(&self, lane: Lane) -> Result<Backlog> {
        count(&self.postgres, self.names.lane(lane)).await
    }

    async fn oldest(&self) -> Result<Option<Timestamp>> {
        let client = self.postgres.client().await?;
        // Without their `Z`, these texts sort like the times they name. A cast to a time would fail the whole
        // query for one malformed body. An impossible date (30 February) matches the pattern, so several rows
        // are read and the first that parses counts.
        let sql = format!(
            "SELECT oldest FROM ( \
               SELECT message ->> 'oldest' AS oldest FROM pgmq.q_{} UNION ALL SELECT message ->> 'oldest' FROM pgmq.q_{} \
             ) m WHERE oldest ~ '^\\d{{4}}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\d([.]\\d+)?Z$' \
             ORDER BY rtrim(oldest, 'Z') COLLATE \"C\" LIMIT 100",
            self.names.lane(Lane::Live),
            self.names.lane(Lane::Bulk)
        );
        let rows =
            client.query(&sql, &[]).await.map_err(|error| failure("look for the oldest job", error))?;
        Ok(rows.iter().find_map(|row| row.get::<_, &str>(0).parse().ok()))
    }
}

/// Messages of a queue that are counted, and pages that are read where there are more.
const COUNTED_MESSAGES: i64 = 10_000;
const SAMPLED_PAGES: f64 = 200.0;

/// Changes in one of the queues. Where more than [`COUNTED_MESSAGES`] messages are, their number is estimated from some
/// pages of the queue.
pub(super) async fn count(postgres: &Postgres, queue: &str) -> Result<Backlog> {
    let fail = |error: tokio_postgres::Error| failure("count a queue", error);
    let client = postgres.client().await?;
    // refarch made the name, of lower-case letters, digits and underscores. Anybody may have written the
    // headers: a count in another form is taken as 1, and cannot make the queue look full.
    let sums = |from: &str| {
        format!(
            "SELECT coalesce(sum(n) FILTER (WHERE due), 0)::bigint, coalesce(sum(n) FILTER (WHERE NOT due), 0)::bigint, count(*) FROM ( \
               SELECT CASE WHEN headers ->> 'changes' ~ '^[0-9]{{1,4}}$' THEN (headers ->> 'changes')::bigint ELSE 1 END AS n, \
                      vt <= clock_timestamp() AS due FROM {from} \
             ) q"
        )
    };
    let table = format!("pgmq.q_{queue}");
    let some = sums(&format!("{table} LIMIT $1::bigint + 1"));
    let row = client.query_one(&some, &[&COUNTED_MESSAGES]).await.map_err(fail)?;
    let number = |row: &tokio_postgres::Row, at, factor: f64| {
        (u64::try_from(row.get::<_, i64>(at)).unwrap_or_default() as f64 * factor) as u64
    };
    if row.get::<_, i64>(2) <= COUNTED_MESSAGES {
        return Ok(Backlog::counted(number(&row, 0, 1.0), number(&row, 1, 1.0)));
    }
    let percent = "SELECT least(100, 100 * $2::float8 / greatest(pg_relation_size($1::text::regclass) / current_setting('block_size')::float8, 1))";
    let percent: f64 = client.query_one(percent, &[&table, &SAMPLED_PAGES]).await.map_err(fail)?.get(0);
    let sampled = sums(&format!("{table} TABLESAMPLE SYSTEM ($1::float8)"));
    let row = client.query_one(&sampled, &[&percent]).await.map_err(fail)?;
    let factor = 100.0 / percent;
    Ok(Backlog::estimated(number(&row, 0, factor), number(&row, 1, factor)))
}
