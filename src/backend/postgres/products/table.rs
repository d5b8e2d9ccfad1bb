//! Reads and edits of the reference architecture's table.

use std::collections::{HashMap, HashSet};

use deadpool_postgres::Pool;
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

use super::columns::{COLUMNS, LEGACY};
use super::vectors::InDatabase;
use crate::backend::postgres::connection::Connection;
use crate::backend::postgres::{client, failure};
use crate::pipeline::failure::{Class, Error, FailureKind, Result};
use crate::product::Product;

/// The time limit of one statement, so that a page never holds a connection for long.
pub(super) const STATEMENT_TIMEOUT: &str = "5s";

/// The time limit of a search for an exact SKU or name. Without indexes on `lower(sku)` and `lower(name)`
/// such a search reads the whole table: measured on two cores, 0.2 s for a million rows, twice that on a busy
/// machine.
const EXACT_TIMEOUT: &str = "600ms";

/// Rows with the same name that are listed first.
pub(super) const EXACT_LIMIT: i64 = 20;

/// How a row matches a search term exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exact {
    /// By its SKU.
    Sku,
    /// By its name.
    Name,
}

/// Columns to write: `None` keeps a column as it is, `Some(None)` writes null.
#[allow(clippy::option_option)] // JSON's three cases: no key, null, a value.
#[derive(Clone, Debug, Default)]
pub struct Edit {
    /// Name, at most 255 characters.
    pub name: Option<Option<String>>,
    /// SKU, at most 255 characters.
    pub sku: Option<Option<String>>,
    /// Description.
    pub description: Option<Option<String>>,
    /// Price, in any form that `money` reads.
    pub price: Option<Option<String>>,
}

/// The result of an edit.
#[derive(Debug)]
pub enum Edited<T> {
    /// The edit was made.
    Done(T),
    /// Another edit came first: the row as it is now.
    Stale(Product),
    /// There is no such row.
    Gone,
}

/// The table of products.
#[derive(Clone)]
pub struct Products {
    pub(super) pool: Pool,
    pub(super) relation: String,
    pub(super) in_database: Option<InDatabase>,
}

impl Products {
    /// The products in a table, whose name is quoted.
    #[must_use]
    pub fn new(pool: Pool, relation: &str) -> Self {
        Self { pool, relation: relation.into(), in_database: None }
    }

    /// Whether the table has the columns of the reference architecture's.
    pub async fn check(&self) -> Result<()> {
        self.query(&format!("SELECT {COLUMNS}, {LEGACY} FROM {} p LIMIT 0", self.relation), &[]).await.map(drop).map_err(
            |error| {
                let hint = "the page needs the reference architecture's columns id, created_at, name, sku, description, price, last_updated, uuid";
                Error::new(FailureKind::WrongShape, format!("read {}", self.relation), format!("{}; {hint}", error.message())).because(error)
            },
        )
    }

    /// One row.
    pub async fn get(&self, id: i64) -> Result<Option<Product>> {
        let sql = format!("SELECT {COLUMNS} FROM {} p WHERE p.id = $1::bigint", self.relation);
        Ok(self.query(&sql, &[&id]).await?.first().map(product))
    }

    /// Rows in the order of the given ids, without ids that have no row.
    pub async fn by_ids(&self, ids: &[i64]) -> Result<Vec<Product>> {
        let sql = format!("SELECT {COLUMNS} FROM {} p WHERE p.id = ANY ($1::bigint[])", self.relation);
        let rows = self.query(&sql, &[&ids]).await?;
        let mut by_id: HashMap<i64, Product> = rows.iter().map(product).map(|row| (row.id, row)).collect();
        Ok(ids.iter().filter_map(|id| by_id.remove(id)).collect())
    }

    /// The given ids that have a row.
    pub async fn existing(&self, ids: &[i64]) -> Result<HashSet<i64>> {
        let sql = format!("SELECT p.id::bigint FROM {} p WHERE p.id = ANY ($1::bigint[])", self.relation);
        Ok(self.query(&sql, &[&ids]).await?.iter().map(|row| row.get(0)).collect())
    }

    /// Rows whose SKU or name equals the term, ignoring case: SKU matches first, then by id. `None` if the
    /// table is too large to be read in time.
    pub async fn exact(&self, term: &str) -> Result<Option<Vec<(i64, Exact)>>> {
        match self.exact_within(EXACT_TIMEOUT, term, None).await {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.class() == Class::Retryable => {
                tracing::debug!(%error, "the search for exact matches took too long: searching among the nearest only; indexes on lower(sku) and lower(name) would help");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The same as [`Self::exact`], among these ids.
    pub async fn exact_among(&self, term: &str, ids: &[i64]) -> Result<Vec<(i64, Exact)>> {
        self.exact_within(STATEMENT_TIMEOUT, term, Some(ids)).await
    }

    async fn exact_within(
        &self,
        timeout: &str,
        term: &str,
        among: Option<&[i64]>,
    ) -> Result<Vec<(i64, Exact)>> {
        if term.contains('\0') {
            return Ok(Vec::new());
        }
        let sql = format!(
            "SELECT p.id::bigint, lower(p.sku) = lower($1) IS TRUE AS by_sku FROM {} p \
             WHERE (lower(p.sku) = lower($1) OR lower(p.name) = lower($1)) {} ORDER BY 2 DESC, 1 LIMIT $2",
            self.relation,
            if among.is_some() { "AND p.id = ANY ($3::bigint[])" } else { "" },
        );
        let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&term, &EXACT_LIMIT];
        parameters.extend(among.iter().map(|ids| ids as &(dyn ToSql + Sync)));
        let rows = self.query_within(timeout, &sql, &parameters).await?;
        Ok(rows.iter().map(|row| (row.get(0), if row.get(1) { Exact::Sku } else { Exact::Name })).collect())
    }

    /// Adds a row. Columns that the edit leaves out are null.
    pub async fn create(&self, edit: Edit) -> Result<Product> {
        check(&edit)?;
        let sql = format!(
            "INSERT INTO {} AS p (name, sku, description, price, last_updated) \
             VALUES ($1, $2, $3, $4::text::money, current_date) RETURNING {COLUMNS}",
            self.relation
        );
        let values =
            [edit.name.flatten(), edit.sku.flatten(), edit.description.flatten(), edit.price.flatten()];
        let rows = self.query(&sql, &[&values[0], &values[1], &values[2], &values[3]]).await?;
        rows.first()
            .map(product)
            .ok_or_else(|| Error::new(FailureKind::UnexpectedAnswer, "add a row", "nothing came back"))
    }

    /// Edits a row if it still has this revision.
    pub async fn patch(&self, id: i64, revision: &str, edit: Edit) -> Result<Edited<Product>> {
        check(&edit)?;
        let sql = format!(
            "UPDATE {} p SET name = CASE WHEN $3 THEN $4 ELSE p.name END, sku = CASE WHEN $5 THEN $6 ELSE p.sku END, \
               description = CASE WHEN $7 THEN $8 ELSE p.description END, \
               price = CASE WHEN $9 THEN $10::text::money ELSE p.price END, last_updated = current_date \
             WHERE p.id = $1::bigint AND p.xmin::text = $2 RETURNING {COLUMNS}",
            self.relation
        );
        let Edit { name, sku, description, price } = edit;
        let given = [name.is_some(), sku.is_some(), description.is_some(), price.is_some()];
        let (name, sku, description, price) =
            (name.flatten(), sku.flatten(), description.flatten(), price.flatten());
        let rows = self
            .query(
                &sql,
                &[
                    &id,
                    &revision,
                    &given[0],
                    &name,
                    &given[1],
                    &sku,
                    &given[2],
                    &description,
                    &given[3],
                    &price,
                ],
            )
            .await?;
        match rows.first() {
            Some(row) => Ok(Edited::Done(product(row))),
            None => self.refused(id).await,
        }
    }

    /// Deletes a row if it still has this revision.
    pub async fn delete(&self, id: i64, revision: &str) -> Result<Edited<()>> {
        let sql = format!(
            "DELETE FROM {} p WHERE p.id = $1::bigint AND p.xmin::text = $2 RETURNING p.id::bigint",
            self.relation
        );
        match self.query(&sql, &[&id, &revision]).await?.first() {
            Some(_) => Ok(Edited::Done(())),
            None => self.refused(id).await,
        }
    }

    /// Why a conditional write changed no row.
    async fn refused<T>(&self, id: i64) -> Result<Edited<T>> {
        Ok(self.get(id).await?.map_or(Edited::Gone, Edited::Stale))
    }

    pub(super) async fn query(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>> {
        self.query_within(STATEMENT_TIMEOUT, sql, parameters).await
    }

    /// Runs one statement, which PostgreSQL ends after `timeout`. Triggers of the table run with the role's own
    /// search path, as for any other client.
    async fn query_within(
        &self,
        timeout: &str,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>> {
        let client = Connection::new(client(&self.pool).await?, time_limits(timeout).into());
        client.query(sql, parameters).await.map_err(failed)
    }
}

/// Replaces the role's own time limits in a transaction. A wait for a lock counts towards `timeout`.
pub(super) fn time_limits(timeout: &str) -> String {
    format!("SET LOCAL statement_timeout = '{timeout}'; SET LOCAL lock_timeout = 0")
}

/// An error of the database. If the client can correct the cause, the message is PostgreSQL's own, or that of
/// the table's triggers.
pub(super) fn failed(error: tokio_postgres::Error) -> Error {
    let said = error.as_db_error().map(|said| {
        let detail = said.detail().map(|detail| format!(" ({detail})"));
        let text = format!("{}{}", said.message(), detail.unwrap_or_default());
        (said.code() == &SqlState::RAISE_EXCEPTION, text)
    });
    let failure = failure("read or write products", error);
    match said {
        Some((is_raised, text)) if is_raised || failure.class() == Class::Permanent => {
            Error::new(FailureKind::RefusedData, "PostgreSQL refuses this", text).because(failure)
        }
        _ => failure,
    }
}

pub(super) fn as_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(super) fn product(row: &Row) -> Product {
    Product {
        id: row.get(0),
        name: row.get(1),
        sku: row.get(2),
        description: row.get(3),
        price: row.get(4),
        last_updated: row.get(5),
        revision: row.get(6),
    }
}

/// Refuses values that PostgreSQL's text cannot hold or that are too long, with messages of our own.
fn check(edit: &Edit) -> Result<()> {
    let limited = [
        ("name", &edit.name, Some(255)),
        ("sku", &edit.sku, Some(255)),
        ("description", &edit.description, None),
        ("price", &edit.price, None),
    ];
    for (column, value, limit) in limited {
        if let Some(Some(text)) = value {
            check_text(column, text, limit)?;
        }
    }
    Ok(())
}

pub(super) fn check_text(column: &str, text: &str, limit: Option<usize>) -> Result<()> {
    if text.contains('\0') {
        return Err(Error::new(
            FailureKind::RefusedData,
            format!("write {column}"),
            "text cannot hold the character NUL",
        ));
    }
    match limit {
        Some(limit) if text.chars().count() > limit => Err(Error::new(
            FailureKind::RefusedData,
            format!("write {column}"),
            format!("it is longer than {limit} characters"),
        )),
        _ => Ok(()),
    }
}
