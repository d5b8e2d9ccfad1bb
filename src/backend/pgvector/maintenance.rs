//! Maintains the index on the vectors. Builds the index when searches would be slow. Measures how many of the nearest
//! vectors searches find. If searches find too few, they read more lists; if more lists do not help, the lists are
//! built again.

use super::method::{Action, Presence, Situation};
use super::observations::BuildHistory;
use super::table::PgVector;
use crate::backend::postgres::search_index::{self, SearchIndex};
use crate::backend::postgres::{counts, failure};
use crate::config::SearchMethod;
use crate::pipeline::failure::Result;

/// Below this many rows, no exact search is timed.
const MIN_TIMED_ROWS: u64 = 2_000;

/// An exact search is timed again once the table has grown by this factor.
const RETIME_GROWTH: f64 = 1.5;

/// Lists are built again once a search must read this many times the lists that it read after the build.
const PROBES_GROWTH: i32 = 2;

/// Lists are built again once their sizes are this many times as uneven as after the build.
const SKEW_GROWTH: f32 = 2.0;

/// Lists that find too little are built again only if this part of the rows was written since the build: the same rows
/// would give the same lists.
const MIN_REBUILD_WRITES: f64 = 0.1;

impl PgVector {
    /// Takes the next step, if a step is due. If the step fails, the reason is logged once, and the pauses between
    /// attempts grow. Until a step succeeds, searches read all vectors or use the older index. Returns whether a step
    /// was taken.
    pub(super) async fn maintain_search(&self, backlog: u64) -> Result<bool> {
        if self.clock.now() < self.builds().not_before {
            return Ok(false);
        }
        let (situation, seen) = self.look(backlog).await?;
        let Some(action) = situation.next_action() else {
            let is_due = situation.lists == Presence::Valid
                && search_index::is_check_due(&self.postgres, self.generation).await?;
            if is_due {
                self.check_alone(situation.rows, seen).await?;
            }
            return Ok(is_due);
        };
        if let Err(error) = self.take(action, situation.rows).await {
            let reason = error.to_string();
            let (pause, is_news) = self.builds().failed(&reason, self.clock.now());
            let retry_in_ms = pause.as_millis() as u64;
            if is_news {
                tracing::warn!(
                    table = self.table,
                    reason,
                    retry_in_ms,
                    "cannot build the search index: searches read all vectors, or use the older index, until a build succeeds"
                );
            } else {
                tracing::debug!(table = self.table, reason, retry_in_ms, "cannot build the search index");
            }
            return Ok(false);
        }
        Ok(true)
    }

    async fn take(&self, action: Action, rows: u64) -> Result<()> {
        let Some(done) = self.act(action, rows).await? else { return Ok(()) };
        match action {
            Action::BuildLists | Action::AdoptLists => {
                search_index::built(&self.postgres, self.generation, done.lists, done.rows, done.duration_ms)
                    .await?;
            }
            Action::DropLists => search_index::dropped(&self.postgres, self.generation).await?,
            Action::BuildGraph | Action::DropGraph => {}
        }
        *self.builds() = BuildHistory::default();
        Ok(())
    }

    /// Checks the lists, unless another worker checks them now. The lock ends with its session, so it also ends if
    /// the worker stops.
    async fn check_alone(&self, rows: u64, seen: Option<SearchIndex>) -> Result<()> {
        let fail = |error: tokio_postgres::Error| failure("check the search index", error);
        if !self.postgres.supports_sessions().await? {
            return self.check(rows, seen).await;
        }
        let (session, connection) = self.postgres.dedicated().await.map_err(fail)?;
        let connection = tokio::spawn(connection);
        let is_alone: bool = session
            .query_one(
                "SELECT pg_catalog.pg_try_advisory_lock(pg_catalog.hashtext('refarch.search_check'), $1)",
                &[&self.generation],
            )
            .await
            .map_err(fail)?
            .get(0);
        if is_alone {
            self.check(rows, seen).await?;
        }
        drop(session);
        let _ = connection.await;
        Ok(())
    }

    /// Measures how many of the nearest vectors searches find, and chooses the number of probes.
    async fn check(&self, rows: u64, seen: Option<SearchIndex>) -> Result<()> {
        let Some(mut seen) = seen else { return Ok(()) };
        let sample = self.draw_sample(rows).await?;
        let is_first = seen.recall.is_none();
        let before = if is_first { 0.0 } else { self.recall_with(&sample, seen.probes).await? };
        let skew = self.list_skew(&sample, rows, seen.lists).await?;
        let mut found = before;
        if is_first || before < self.options.recall {
            (seen.probes, found) = self.choose_probes(&sample, seen.lists).await?;
        }
        if is_first {
            (seen.probes_at_build, seen.skew_at_build) = (seen.probes, Some(skew));
        }
        let changed = seen.written as f64 / rows.max(1) as f64 > MIN_REBUILD_WRITES;
        let is_uneven = seen.skew_at_build.is_some_and(|at_build| skew > at_build * SKEW_GROWTH);
        let reads_more = seen.probes > seen.probes_at_build * PROBES_GROWTH;
        seen.is_degraded = changed && (found < self.options.recall || reads_more || is_uneven);
        (seen.recall, seen.skew) = (Some(found as f32), Some(skew));
        search_index::checked(&self.postgres, self.generation, &seen).await?;
        tracing::info!(
            table = self.table,
            recall = found,
            recall_before = (!is_first).then_some(before),
            probes = seen.probes,
            lists = seen.lists,
            skew,
            is_degraded = seen.is_degraded,
            "checked how much searches find"
        );
        self.check_outliers(rows, &seen).await
    }

    /// Reads the state of the table, of its indexes and of the record of the lists.
    async fn look(&self, backlog: u64) -> Result<(Situation, Option<SearchIndex>)> {
        let fail = |error: tokio_postgres::Error| failure("look at the search index", error);
        let lists = format!("refarch.vector_{}_lists", self.generation);
        let graph = format!("refarch.vector_{}_graph", self.generation);
        let sql = "SELECT (SELECT i.indisvalid FROM pg_index i WHERE i.indexrelid = to_regclass($1)), \
                     (SELECT i.indisvalid FROM pg_index i WHERE i.indexrelid = to_regclass($2))";
        let row = self.postgres.client().await?.query_one(sql, &[&lists, &graph]).await.map_err(fail)?;
        let presence = |valid: Option<bool>| match valid {
            None => Presence::Absent,
            Some(false) => Presence::Invalid,
            Some(true) => Presence::Valid,
        };
        let (lists, graph) = (presence(row.get(0)), presence(row.get(1)));
        let rows = counts::read(&self.postgres, self.generation).await?.records;
        let seen = match lists {
            Presence::Absent => None,
            _ => search_index::read(&self.postgres, self.generation).await?,
        };
        let situation = Situation {
            method: self.options.method,
            rows,
            backlog,
            exact: self.exact_time(rows).await?,
            exact_limit: self.options.exact_limit,
            graph_min_rows: self.options.graph_min_rows,
            graph_max_backlog: self.options.graph_max_backlog,
            lists,
            listed_rows: seen.as_ref().map(|seen| seen.rows_at_build.unsigned_abs()),
            is_degraded: seen.as_ref().is_some_and(|seen| seen.is_degraded),
            graph,
        };
        Ok((situation, seen))
    }

    /// How long an exact search takes among this many rows.
    async fn exact_time(&self, rows: u64) -> Result<Option<std::time::Duration>> {
        let mut observations = self.observations.lock().await;
        if self.options.method != SearchMethod::Auto {
            return Ok(None);
        }
        if rows < MIN_TIMED_ROWS {
            return Ok(Some(std::time::Duration::ZERO));
        }
        let is_old = observations.exact.is_none_or(|(timed, _)| rows as f64 > timed as f64 * RETIME_GROWTH);
        if is_old && let Some(took) = self.time_exact(rows).await? {
            observations.exact = Some((rows, took));
        }
        Ok(observations.exact_at(rows))
    }
}
