//! When the HNSW graph over the vectors is built, and when it is dropped: loading into a graph is some four times
//! slower than loading and then building it.

use super::PgVector;
use crate::backend::postgres::failure;
use crate::pipeline::failure::Result;

/// A graph is dropped only for a reload of more changes than this, besides being larger than the
/// table: below, building it anew would cost more than it saves.
const MIN_RELOAD: u64 = 10_000;

/// Neighbours of a vector in the graph, and candidates for them while it is built. Among 10,000
/// products, one or two of 100 rows whose new text was unlike all others were not found with
/// pgvector's defaults (16 and 64) and 100 candidates in a search, and none with these and 200. Among
/// 100,000 some are missed all the same, which is why a graph is built for larger tables only.
const GRAPH_DEGREE: u32 = 32;
const GRAPH_CANDIDATES: u32 = 128;

impl PgVector {
    fn graph(&self) -> String {
        format!("vector_{}_graph", self.target)
    }

    /// Drops it before a large load, and builds it once the load has drained.
    pub(super) async fn look_after_graph(&self, backlog: u64) -> Result<()> {
        let fail = |error: tokio_postgres::Error| failure("look after the graph", &error);
        let client = self.postgres.client().await?;
        let graph = self.graph();
        let state = client
            .query_opt(
                "SELECT i.indisvalid FROM pg_index i WHERE i.indexrelid = to_regclass('refarch.' || $1::text)",
                &[&graph],
            )
            .await
            .map_err(fail)?
            .map(|row| row.get::<_, bool>(0));
        let at_least = async |rows: u64| -> Result<bool> {
            let sql = format!("SELECT count(*) FROM (SELECT FROM {} LIMIT $1) v", self.table);
            let row = client.query_one(&sql, &[&(rows as i64)]).await.map_err(fail)?;
            Ok(row.get::<_, i64>(0) as u64 >= rows)
        };
        // Only its owner can index a table; another role asks the database to.
        let owned: bool = client
            .query_one(
                "SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_class c WHERE c.oid = to_regclass($1)",
                &[&self.table],
            )
            .await
            .map_err(fail)?
            .get(0);
        let drop_graph = if owned {
            format!("DROP INDEX IF EXISTS refarch.{graph}")
        } else {
            format!("SELECT refarch.drop_graph({})", self.target)
        };
        let action = match state {
            Some(true) if backlog > MIN_RELOAD && !at_least(backlog).await? => drop_graph,
            Some(true) => return Ok(()),
            _ if backlog > self.options.graph_max_backlog
                || !at_least(self.options.graph_min_rows).await? =>
            {
                return Ok(());
            }
            // Left over by a build that was cut off.
            Some(false) => drop_graph,
            None if !owned => {
                format!("SELECT refarch.build_graph({}, {GRAPH_DEGREE}, {GRAPH_CANDIDATES})", self.target)
            }
            None => format!(
                "CREATE INDEX CONCURRENTLY IF NOT EXISTS {graph} ON {} USING hnsw (embedding halfvec_cosine_ops) \
                 WITH (m = {GRAPH_DEGREE}, ef_construction = {GRAPH_CANDIDATES})",
                self.table
            ),
        };
        drop(client);
        // A session of its own: the advisory lock goes with it, however this ends.
        let (session, connection) = self.postgres.dedicated().await.map_err(fail)?;
        let connection = tokio::spawn(connection);
        let locked = session
            .query_one("SELECT pg_try_advisory_lock(hashtext('refarch.graph'), $1)", &[&self.target])
            .await
            .map_err(fail)?
            .get::<_, bool>(0);
        if locked {
            let started = std::time::Instant::now();
            session.batch_execute(&action).await.map_err(fail)?;
            tracing::info!(
                statement = action,
                duration_ms = started.elapsed().as_millis() as u64,
                "looked after the graph"
            );
        }
        drop(session);
        let _ = connection.await;
        Ok(())
    }
}
