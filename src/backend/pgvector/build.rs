//! Builds and drops the indexes on the vectors. Searches go on meanwhile, and writes too if the role owns the table.

use std::time::Instant;

use super::method::{Action, lists_for};
use super::table::{MIN_GRAPH_VERSION, PgVector};
use crate::backend::postgres::connection::BUILD_SESSION;
use crate::backend::postgres::failure;
use crate::pipeline::failure::{Error, FailureKind, Result};

/// The number of neighbours of a vector in the graph, and of candidates for them during the build. Measured among 10,000
/// products: of 100 rows whose new text was unlike all other texts, one or two were not found with pgvector's
/// defaults (16 and 64) and 100 candidates in a search. With these values and 200 candidates, all were found.
/// Among 100,000 products some rows are missed even so. Therefore a graph is built only if the settings ask for
/// it.
const GRAPH_DEGREE: u32 = 32;
const GRAPH_CANDIDATES: u32 = 128;

/// Memory that a build needs besides k-means, for sorting and writing the vectors.
const BUILD_SPARE: u64 = 64 << 20;

/// A finished step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    /// The lists that were built or adopted; 0 for any other step.
    pub(super) lists: i32,
    /// Vectors when the lists were built.
    pub(super) rows: i64,
    /// How long the step took, in milliseconds.
    pub(super) duration_ms: i64,
}

/// The statements of a step, and the memory for it.
struct Plan {
    statements: Vec<String>,
    memory: u64,
    lists: i32,
    rows: i64,
}

impl PgVector {
    /// Does the step. Returns `None` if another worker does a step now.
    pub(super) async fn act(&self, action: Action, rows: u64) -> Result<Option<Done>> {
        let what = "build the search index";
        let fail = |error: tokio_postgres::Error| failure(what, error);
        let plan = self.plan(action, rows, what).await?;
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
        session.batch_execute(BUILD_SESSION).await.map_err(fail)?;
        let memory = format!("{}kB", (plan.memory >> 10).max(1_024));
        session
            .execute("SELECT set_config('maintenance_work_mem', $1, false)", &[&memory])
            .await
            .map_err(fail)?;
        let locked = session
            .query_one("SELECT pg_try_advisory_lock(hashtext('refarch.graph'), $1)", &[&self.generation])
            .await
            .map_err(fail)?
            .get::<_, bool>(0);
        let started = Instant::now();
        if locked {
            for statement in &plan.statements {
                session.batch_execute(statement).await.map_err(fail)?;
            }
        }
        let duration_ms = started.elapsed().as_millis() as i64;
        drop(session);
        let _ = connection.await;
        if locked {
            let step = format!("{action:?}");
            tracing::info!(
                table = self.table,
                step,
                lists = plan.lists,
                duration_ms,
                "changed the search index"
            );
        }
        Ok(locked.then_some(Done { lists: plan.lists, rows: plan.rows, duration_ms }))
    }

    async fn plan(&self, action: Action, rows: u64, what: &'static str) -> Result<Plan> {
        // The version is looked up again, because the extension may have been updated after the start.
        let extension = self.installed().await?;
        let (is_owned, dimensions) = self.ownership_and_dimensions(what).await?;
        let (generation, table, schema) = (self.generation, &self.table, &extension.schema);
        let memory = self.options.build_memory << 20;
        let drop_lists = |name: &str| format!("DROP INDEX IF EXISTS refarch.vector_{generation}_{name}");
        let mut rows_at_build = i64::try_from(rows).unwrap_or(i64::MAX);
        let (statements, memory, lists) = match action {
            Action::AdoptLists => {
                let (lists, rows) = self.unrecorded_lists(what).await?;
                rows_at_build = rows.unwrap_or(rows_at_build);
                (Vec::new(), 0, lists)
            }
            Action::DropGraph if !is_owned => {
                (vec![format!("SELECT refarch.drop_graph({generation}, 'graph')")], 0, 0)
            }
            Action::DropLists if !is_owned => {
                (vec![format!("SELECT refarch.drop_graph({generation}, 'lists')")], 0, 0)
            }
            Action::DropGraph => (vec![drop_lists("graph")], 0, 0),
            Action::DropLists => (vec![drop_lists("lists_new"), drop_lists("lists")], 0, 0),
            Action::BuildGraph if extension.version < MIN_GRAPH_VERSION => {
                let (major, minor, patch) = extension.version;
                return Err(Error::new(
                    FailureKind::Unsupported,
                    what,
                    format!(
                        "pgvector {major}.{minor}.{patch} has bugs that corrupt HNSW graphs: install a newer version, then run ALTER EXTENSION vector UPDATE"
                    ),
                ));
            }
            Action::BuildGraph if !is_owned => (
                vec![format!("SELECT refarch.build_graph({generation}, {GRAPH_DEGREE}, {GRAPH_CANDIDATES})")],
                memory,
                0,
            ),
            Action::BuildGraph => (
                vec![format!(
                    "CREATE INDEX CONCURRENTLY IF NOT EXISTS vector_{generation}_graph ON {table} \
                     USING hnsw (embedding {schema}.halfvec_cosine_ops) \
                     WITH (m = {GRAPH_DEGREE}, ef_construction = {GRAPH_CANDIDATES})"
                )],
                memory,
                0,
            ),
            Action::BuildLists => {
                let (lists, needed) = lists_for(rows, dimensions, memory.saturating_sub(BUILD_SPARE));
                let statements = if is_owned {
                    vec![
                        drop_lists("lists_new"),
                        format!(
                            "CREATE INDEX CONCURRENTLY vector_{generation}_lists_new ON {table} \
                             USING ivfflat (embedding {schema}.halfvec_cosine_ops) WITH (lists = {lists})"
                        ),
                        // Searches and writes of vectors wait for this statement. The lock timeout limits the wait.
                        format!(
                            "BEGIN; SET LOCAL lock_timeout = '5s'; {}; \
                             ALTER INDEX refarch.vector_{generation}_lists_new RENAME TO vector_{generation}_lists; COMMIT",
                            drop_lists("lists")
                        ),
                    ]
                } else {
                    vec![format!("SELECT refarch.build_graph({generation}, {lists})")]
                };
                (statements, needed + BUILD_SPARE, lists as i32)
            }
        };
        Ok(Plan { statements, memory, lists, rows: rows_at_build })
    }

    /// The number of lists by the catalog, and of the vectors when they were built, if it is known.
    async fn unrecorded_lists(&self, what: &'static str) -> Result<(i32, Option<i64>)> {
        let name = format!("refarch.vector_{}_lists", self.generation);
        // pgvector makes 100 lists if an index names no number.
        let sql = "SELECT coalesce((SELECT o.option_value::integer FROM pg_options_to_table(c.reloptions) o \
                     WHERE o.option_name = 'lists'), 100), CASE WHEN c.reltuples > 0 THEN c.reltuples::bigint END \
                   FROM pg_class c WHERE c.oid = to_regclass($1)";
        let client = self.postgres.client().await?;
        let row = client.query_one(sql, &[&name]).await.map_err(|error| failure(what, error))?;
        Ok((row.get(0), row.get(1)))
    }

    /// Returns whether the role may index the table, and the number of dimensions. Only the table's owner may index
    /// it; another role calls a function of the owner.
    async fn ownership_and_dimensions(&self, what: &'static str) -> Result<(bool, u64)> {
        let row = self
            .postgres
            .client()
            .await?
            .query_one(
                "SELECT pg_has_role(c.relowner, 'USAGE'), a.atttypmod FROM pg_class c \
                 JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'embedding' WHERE c.oid = to_regclass($1)",
                &[&self.table],
            )
            .await
            .map_err(|error| failure(what, error))?;
        Ok((row.get(0), row.get::<_, i32>(1).max(1) as u64))
    }
}
