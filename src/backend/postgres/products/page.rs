//! Pages of the table, in the order of the ids. No page reads all rows before it.

use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::columns::{COLUMNS, LEGACY};
use super::table::{Products, as_i64, product};
use crate::backend::postgres::source_rows::{COUNT_UP_TO, ESTIMATE, ESTIMATE_IS_OFF};
use crate::pipeline::failure::Result;
use crate::product::Product;
use serde_json::Value;

/// How many rows are counted off, from the beginning or from the end of the table, to find a page by its number. The
/// place of a page further in is estimated.
pub const LISTED: u64 = 10_000;

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// By its number, from 1.
    Number(u64),
    /// The rows after this id.
    After(i64),
    /// The rows before this id.
    Before(i64),
}

/// A page of the table.
#[derive(Debug)]
pub struct Page {
    /// Rows, by id.
    pub rows: Vec<Product>,
    /// Number of rows in the table.
    pub total: u64,
    /// Whether `total` is the planner's estimate.
    pub total_estimated: bool,
    /// Whether the place of the page is an estimate: other rows may be before it than its number says.
    pub approximate: bool,
    /// The page of the rows that follow is [`Place::After`] this id. `None` at the end of the table.
    pub next: Option<i64>,
    /// The page of the rows before is [`Place::Before`] this id. `None` at the beginning of the table.
    pub previous: Option<i64>,
}

impl Products {
    /// A page of `per_page` rows, by id.
    pub async fn page(&self, place: Place, per_page: u64) -> Result<Page> {
        let (total, total_estimated) = self.total().await?;
        let (rows, approximate) = match place {
            Place::Number(page) => self.numbered(COLUMNS, page, per_page, (total, total_estimated)).await?,
            Place::After(id) => (self.beside("p.id > $2::bigint", "ASC", id, per_page).await?, false),
            Place::Before(id) => (self.beside("p.id < $2::bigint", "DESC", id, per_page).await?, false),
        };
        let rows: Vec<Product> = rows.iter().map(product).collect();
        let (previous, next) = self.cursors(place, &rows).await?;
        Ok(Page { rows, total, total_estimated, approximate, next, previous })
    }

    /// A page of the table with all columns, by its number.
    pub async fn legacy_page(&self, page: u64, per_page: u64) -> Result<Vec<Value>> {
        // Near the beginning, the number of rows does not matter.
        let total = if page.saturating_mul(per_page) <= LISTED { (0, false) } else { self.total().await? };
        let (rows, _) = self.numbered(LEGACY, page, per_page, total).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Rows of the table, and whether that is the planner's estimate.
    async fn total(&self) -> Result<(u64, bool)> {
        let estimate = self.query(ESTIMATE, &[&self.relation]).await?;
        let estimate: f64 = estimate.first().map_or(0.0, |row| row.get(0));
        if estimate > COUNT_UP_TO {
            return Ok((estimate as u64, true));
        }
        let count = self.query(&format!("SELECT count(*) FROM {}", self.relation), &[]).await?;
        Ok((count.first().map_or(0, |row| row.get::<_, i64>(0)) as u64, false))
    }

    /// Rows of a page, and whether its place is an estimate. `total` is the number of rows, and whether that is one.
    async fn numbered(
        &self,
        columns: &str,
        page: u64,
        per_page: u64,
        (total, total_estimated): (u64, bool),
    ) -> Result<(Vec<Row>, bool)> {
        let offset = (page - 1).saturating_mul(per_page);
        if offset < LISTED {
            return Ok((self.counted_off(columns, "ASC", offset, per_page).await?, false));
        }
        let mut left = total.saturating_sub(offset);
        if left == 0 {
            // An estimate may be somewhat low: then this is the last page.
            if !total_estimated || offset as f64 > total as f64 * (1.0 + ESTIMATE_IS_OFF) {
                return Ok((Vec::new(), false));
            }
            left = per_page;
        }
        if left <= LISTED {
            let count = left.min(per_page);
            let rows = self.counted_off(columns, "DESC", left - count, count).await?;
            return Ok((rows, total_estimated));
        }
        let Some(first) = self.id_at(offset as f64 / total as f64).await? else {
            return Ok((Vec::new(), false));
        };
        let sql = format!(
            "SELECT {columns} FROM {} p WHERE p.id >= $2::bigint ORDER BY p.id LIMIT $1",
            self.relation
        );
        Ok((self.query(&sql, &[&as_i64(per_page), &first]).await?, true))
    }

    /// Rows by id, so many rows from one end of the table. Of the rows before them, only the id is read.
    async fn counted_off(&self, columns: &str, order: &str, offset: u64, count: u64) -> Result<Vec<Row>> {
        let sql = format!(
            "SELECT {columns} FROM {table} p JOIN (SELECT id FROM {table} ORDER BY id {order} LIMIT $1 OFFSET $2) k ON k.id = p.id \
             ORDER BY p.id",
            table = self.relation
        );
        self.query(&sql, &[&as_i64(count), &as_i64(offset)]).await
    }

    /// The rows next to an id, on one side of it.
    async fn beside(&self, side: &str, order: &str, id: i64, count: u64) -> Result<Vec<Row>> {
        let sql =
            format!("SELECT {COLUMNS} FROM {} p WHERE {side} ORDER BY p.id {order} LIMIT $1", self.relation);
        let mut rows = self.query(&sql, &[&as_i64(count), &id]).await?;
        if order == "DESC" {
            rows.reverse();
        }
        Ok(rows)
    }

    /// The cursors to the pages before and after. An empty page has them too, if there are rows on that side.
    async fn cursors(&self, place: Place, rows: &[Product]) -> Result<(Option<i64>, Option<i64>)> {
        let (first, last) = match (rows, place) {
            ([first, .., last], _) => (first.id, last.id),
            ([only], _) => (only.id, only.id),
            ([], Place::Number(_)) => (i64::MAX, i64::MAX),
            ([], Place::After(id)) => (id.saturating_add(1), id),
            ([], Place::Before(id)) => (id, id.saturating_sub(1)),
        };
        let sql = format!(
            "SELECT (SELECT max(p.id)::bigint FROM {table} p WHERE p.id < $1::bigint), \
                    (SELECT min(p.id)::bigint FROM {table} p WHERE p.id > $2::bigint)",
            table = self.relation
        );
        let found = self.query(&sql, &[&first, &last]).await?;
        let (before, after): (Option<i64>, Option<i64>) =
            found.first().map_or((None, None), |row| (row.get(0), row.get(1)));
        Ok(if rows.is_empty() {
            (before.map(|id| id.saturating_add(1)), after.map(|id| id.saturating_sub(1)))
        } else {
            (before.map(|_| first), after.map(|_| last))
        })
    }

    /// About the id before which this part of the rows is, by the planner's statistics; without them as if the ids
    /// were spread evenly. `None` for an empty table.
    async fn id_at(&self, part: f64) -> Result<Option<i64>> {
        let histogram = "SELECT s.histogram_bounds::text::bigint[] FROM pg_catalog.pg_stats s \
             JOIN pg_catalog.pg_namespace n ON n.nspname = s.schemaname \
             JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = s.tablename \
             WHERE c.oid = $1::text::regclass AND s.attname = 'id' AND s.histogram_bounds IS NOT NULL \
             ORDER BY s.inherited DESC LIMIT 1";
        let bounds = self.query(histogram, &[&self.relation]).await?;
        if let Some(row) = bounds.first() {
            return Ok(between(&row.get::<_, Vec<i64>>(0), part));
        }
        let ends = format!("SELECT min(p.id)::bigint, max(p.id)::bigint FROM {} p", self.relation);
        let parameters: &[&(dyn ToSql + Sync)] = &[];
        let ends = self.query(&ends, parameters).await?;
        let ends =
            ends.first().and_then(|row| Some([row.get::<_, Option<i64>>(0)?, row.get::<_, Option<i64>>(1)?]));
        Ok(ends.and_then(|ends| between(&ends, part)))
    }
}

/// The value at this part of the way through bounds between which equally many rows are.
fn between(bounds: &[i64], part: f64) -> Option<i64> {
    let steps = bounds.len().checked_sub(1)? as f64;
    let at = part.clamp(0.0, 1.0) * steps;
    let low = bounds[at as usize];
    let high = *bounds.get(at as usize + 1).unwrap_or(&low);
    Some(low.saturating_add((high.saturating_sub(low) as f64 * at.fract()) as i64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_interpolated_between_bounds() {
        let bounds = [0, 100, 1_000];
        let at: Vec<_> = [0.0, 0.25, 0.5, 0.75, 1.0].map(|part| between(&bounds, part)).into();
        assert_eq!(at, [Some(0), Some(50), Some(100), Some(550), Some(1_000)]);
        assert_eq!((between(&[7], 0.5), between(&[], 0.5)), (Some(7), None));
        assert_eq!(between(&[i64::MIN, i64::MAX], 1.0), Some(i64::MAX));
    }
}
