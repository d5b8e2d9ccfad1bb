//! Builds and drops the HNSW graph over the vectors. Loading into a graph is about four times slower than
//! loading first and building the graph afterwards.

use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use super::{MIN_GRAPH_VERSION, PgVector};
use crate::backend::postgres::failure;
use crate::pipeline::failure::{Error, FailureKind, Result};

/// A graph is dropped only before a load of more changes than this, and only if the load has more changes
/// than the table has rows. Below that, building the graph again would cost more than it saves.
const MIN_RELOAD: u64 = 10_000;

/// Neighbours of a vector in the graph, and candidates for them during the build. Measured among 10,000
/// products: of 100 rows whose new text was unlike all other texts, one or two were not found with pgvector's
/// defaults (16 and 64) and 100 candidates in a search. With these values and 200 candidates, all were found.
/// Among 100,000 products some are missed all the same, so a graph is built for larger tables only.
const GRAPH_DEGREE: u32 = 32;
const GRAPH_CANDIDATES: u32 = 128;

/// Pause after a failed build; it doubles with each failure.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_hours(1);

/// Settings of the session that builds. They cannot be set for the statement alone, which runs outside of a
/// transaction.
const SESSION: &str = "SET search_path = pg_catalog, pg_temp; SET statement_timeout = 0; SET lock_timeout = 0; \
    SET default_transaction_isolation = 'read committed'; SET default_transaction_read_only = off; \
    SELECT set_config('transaction_timeout', '0', false) WHERE current_setting('transaction_timeout', true) IS NOT NULL";

/// Failures of past builds.
#[derive(Debug, Default)]
pub(super) struct BuildHistory {
    failures: u32,
    /// No build starts before this time.
    not_before: Duration,
    /// The reason that was logged last.
    logged: Option<String>,
}

impl BuildHistory {
    /// Records a failed build. Returns the pause before the next build, and whether the reason is new.
    fn failed(&mut self, reason: &str, now: Duration) -> (Duration, bool) {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(16)).min(LONGEST_PAUSE);
        self.failures += 1;
        self.not_before = now + pause;
        let is_news = self.logged.as_deref() != Some(reason);
        self.logged = Some(reason.to_owned());
        (pause, is_news)
    }
}

/// The next step for the graph.
enum Action {
    Build,
    Drop,
}

impl PgVector {
    fn graph(&self) -> String {
        format!("vector_{}_graph", self.generation)
    }

    fn builds(&self) -> MutexGuard<'_, BuildHistory> {
        self.builds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops the graph before a large load, and builds it after the load. If a build fails, the reason is
    /// logged once, and the pauses between attempts grow. Searches read all vectors meanwhile.
    pub(super) async fn maintain_graph(&self, backlog: u64) -> Result<()> {
        if self.clock.now() < self.builds().not_before {
            return Ok(());
        }
        let Some(action) = self.next_action(backlog).await? else { return Ok(()) };
        match self.act(&action).await {
            Ok(is_built) => {
                if is_built {
                    *self.builds() = BuildHistory::default();
                }
            }
            Err(error) => {
                let reason = error.to_string();
                let (pause, is_news) = self.builds().failed(&reason, self.clock.now());
                let retry_in_s = pause.as_secs();
                if is_news {
                    tracing::warn!(
                        table = self.table,
                        reason,
                        retry_in_s,
                        "cannot build the graph: searches read all vectors until a build succeeds"
                    );
                } else {
                    tracing::debug!(table = self.table, reason, retry_in_s, "cannot build the graph");
                }
            }
        }
        Ok(())
    }

    async fn next_action(&self, backlog: u64) -> Result<Option<Action>> {
        let fail = |error: tokio_postgres::Error| failure("check the graph", error);
        let client = self.postgres.client().await?;
        let state = client
            .query_opt(
                "SELECT i.indisvalid FROM pg_index i WHERE i.indexrelid = to_regclass('refarch.' || $1::text)",
                &[&self.graph()],
            )
            .await
            .map_err(fail)?
            .map(|row| row.get::<_, bool>(0));
        let at_least = async |rows: u64| -> Result<bool> {
            let sql = format!("SELECT count(*) FROM (SELECT FROM {} LIMIT $1) v", self.table);
            let row = client.query_one(&sql, &[&(rows as i64)]).await.map_err(fail)?;
            Ok(row.get::<_, i64>(0) as u64 >= rows)
        };
        Ok(match state {
            Some(true) if backlog > MIN_RELOAD && !at_least(backlog).await? => Some(Action::Drop),
            Some(true) => None,
            _ if backlog > self.options.graph_max_backlog
                || !at_least(self.options.graph_min_rows).await? =>
            {
                None
            }
            // An interrupted build left an invalid index.
            Some(false) => Some(Action::Drop),
            None => Some(Action::Build),
        })
    }

    /// Builds or drops the graph, unless another worker does. Returns whether the graph was built.
    async fn act(&self, action: &Action) -> Result<bool> {
        let what = "build the graph";
        let fail = |error: tokio_postgres::Error| failure(what, error);
        let graph = self.graph();
        // Looked up again, since the extension may have been updated after the start.
        let extension = self.installed().await?;
        // Only a table's owner can index it; another role calls a function of the owner.
        let is_owned: bool = self
            .postgres
            .client()
            .await?
            .query_one(
                "SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_class c WHERE c.oid = to_regclass($1)",
                &[&self.table],
            )
            .await
            .map_err(fail)?
            .get(0);
        let statement = match action {
            Action::Drop if !is_owned => format!("SELECT refarch.drop_graph({})", self.generation),
            Action::Drop => format!("DROP INDEX IF EXISTS refarch.{graph}"),
            Action::Build if extension.version < MIN_GRAPH_VERSION => {
                let (major, minor, patch) = extension.version;
                return Err(Error::new(
                    FailureKind::Unsupported,
                    what,
                    format!(
                        "pgvector {major}.{minor}.{patch} has bugs that corrupt HNSW graphs: install a newer version, then run ALTER EXTENSION vector UPDATE"
                    ),
                ));
            }
            Action::Build if !is_owned => {
                format!("SELECT refarch.build_graph({}, {GRAPH_DEGREE}, {GRAPH_CANDIDATES})", self.generation)
            }
            Action::Build => format!(
                "CREATE INDEX CONCURRENTLY IF NOT EXISTS {graph} ON {} USING hnsw (embedding {}.halfvec_cosine_ops) \
                 WITH (m = {GRAPH_DEGREE}, ef_construction = {GRAPH_CANDIDATES})",
                self.table, extension.schema
            ),
        };
        // Through a pooler in transaction mode, the settings of this session could end up in another
        // client's.
        if !self.postgres.supports_sessions().await? {
            return Err(Error::new(
                FailureKind::Unsupported,
                what,
                "database.url leads to a pooler in transaction mode: use the address of the server itself",
            ));
        }
        // A session of its own: the session's end releases the advisory lock, whatever happens.
        let (session, connection) = self.postgres.dedicated().await.map_err(fail)?;
        let connection = tokio::spawn(connection);
        session.batch_execute(SESSION).await.map_err(fail)?;
        let locked = session
            .query_one("SELECT pg_try_advisory_lock(hashtext('refarch.graph'), $1)", &[&self.generation])
            .await
            .map_err(fail)?
            .get::<_, bool>(0);
        if locked {
            let started = std::time::Instant::now();
            session.batch_execute(&statement).await.map_err(fail)?;
            tracing::info!(
                statement,
                duration_ms = started.elapsed().as_millis() as u64,
                "built or dropped the graph"
            );
        }
        drop(session);
        let _ = connection.await;
        Ok(locked && matches!(action, Action::Build))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_a_reason_is_news_once() {
        let mut builds = BuildHistory::default();
        let seconds: Vec<(u64, bool)> = (0..4)
            .map(|_| builds.failed("timeout", Duration::ZERO))
            .map(|(pause, is_news)| (pause.as_secs(), is_news))
            .collect();
        assert_eq!(seconds, [(10, true), (20, false), (40, false), (80, false)]);
        (0..40).for_each(|_| assert!(builds.failed("other", Duration::ZERO).0 <= LONGEST_PAUSE));
        assert_eq!(builds.not_before, LONGEST_PAUSE);
    }
}
