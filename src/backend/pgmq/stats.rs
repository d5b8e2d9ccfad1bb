//! How full pgmq's queues are. Changes are counted from the messages' headers.

use async_trait::async_trait;
use jiff::Timestamp;

use super::Pgmq;
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

/// Counts the changes in a queue.
pub(super) async fn count(postgres: &Postgres, queue: &str) -> Result<Backlog> {
    let client = postgres.client().await?;
    // The name is not from a user: it holds only lower-case letters, digits and underscores. Headers may come
    // from any program: a malformed count counts as 1, and cannot make the queue look full.
    let sql = format!(
        "SELECT coalesce(sum(n) FILTER (WHERE due), 0)::bigint, coalesce(sum(n) FILTER (WHERE NOT due), 0)::bigint FROM ( \
           SELECT CASE WHEN headers ->> 'changes' ~ '^[0-9]{{1,4}}$' THEN (headers ->> 'changes')::bigint ELSE 1 END AS n, \
                  vt <= clock_timestamp() AS due FROM pgmq.q_{queue} \
         ) q"
    );
    let row = client.query_one(&sql, &[]).await.map_err(|error| failure("count a queue", error))?;
    let number = |at| u64::try_from(row.get::<_, i64>(at)).unwrap_or_default();
    Ok(Backlog { visible: number(0), in_flight: number(1) })
}
