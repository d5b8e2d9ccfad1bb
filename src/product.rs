//! The rows of the reference architecture's table.

use serde::{Deserialize, Serialize};

/// A product row of the table. Every column except the id may be null.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Product {
    /// Primary key.
    pub id: i64,
    /// Name; not unique in the table.
    pub name: Option<String>,
    /// Stock keeping unit; not unique in the table.
    pub sku: Option<String>,
    /// The text that is embedded.
    pub description: Option<String>,
    /// Price with its currency, in PostgreSQL's text form of `money`: `$344.87`.
    pub price: Option<String>,
    /// Day of the last edit, `2023-09-20`.
    pub last_updated: Option<String>,
    /// Changes with every write to the row. An edit sends the revision that it is based on.
    pub revision: String,
}

/// A new product, not yet in the table and therefore without an id.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NewProduct {
    /// Name.
    pub name: String,
    /// Stock keeping unit.
    pub sku: String,
    /// The text that is embedded.
    pub description: String,
    /// Price, `$344.87`.
    pub price: String,
    /// Time of the last edit, `2023-09-20 22:51:32`.
    pub last_updated: String,
}
