//! The reference architecture's own responses and its one edit, for its clients.

use std::collections::HashMap;

use serde_json::Value;

use super::columns::LEGACY;
use super::table::{Products, STATEMENT_TIMEOUT, check_text, failed, time_limits};
use crate::backend::postgres::client;
use crate::pipeline::failure::Result;

/// The result of an edit by SKU.
#[derive(Debug)]
pub enum EditedBySku {
    /// The row as it is now.
    Done(Value),
    /// No row has the SKU.
    Unknown,
    /// This many rows have the SKU; none was changed.
    Ambiguous(usize),
}

impl Products {
    /// Rows with all columns, in the order of their ids.
    pub async fn legacy_by_ids(&self, ids: &[i64]) -> Result<Vec<Value>> {
        let sql =
            format!("SELECT p.id::bigint, {LEGACY} FROM {} p WHERE p.id = ANY ($1::bigint[])", self.relation);
        let rows = self.query(&sql, &[&ids]).await?;
        let mut by_id: HashMap<i64, Value> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        Ok(ids.iter().filter_map(|id| by_id.remove(id)).collect())
    }

    /// Changes the description of the one row that bears the SKU.
    pub async fn describe_by_sku(&self, sku: &str, description: &str) -> Result<EditedBySku> {
        check_text("sku", sku, Some(255))?;
        check_text("description", description, None)?;
        let fail = |error: tokio_postgres::Error| failed(error);
        let mut client = client(&self.pool).await?;
        let transaction = client.transaction().await.map_err(fail)?;
        transaction.batch_execute(&time_limits(STATEMENT_TIMEOUT)).await.map_err(fail)?;
        let sql = format!("SELECT id::bigint FROM {} WHERE sku = $1 FOR UPDATE", self.relation);
        let rows = transaction.query(&sql, &[&sku]).await.map_err(fail)?;
        let [row] = rows.as_slice() else {
            return Ok(if rows.is_empty() {
                EditedBySku::Unknown
            } else {
                EditedBySku::Ambiguous(rows.len())
            });
        };
        let id: i64 = row.get(0);
        let sql = format!(
            "UPDATE {} p SET description = $2, last_updated = current_date WHERE p.id = $1::bigint RETURNING {LEGACY}",
            self.relation
        );
        let row = transaction.query_one(&sql, &[&id, &description]).await.map_err(fail)?;
        transaction.commit().await.map_err(fail)?;
        Ok(EditedBySku::Done(row.get(0)))
    }
}
