//! The rows of the reference architecture's table.

use serde::{Deserialize, Serialize};

/// A product, as the table holds it. Every column but the id may be null.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Product {
    /// Primary key.
    pub id: i64,
    /// Name; many products may bear the same.
    pub name: Option<String>,
    /// Stock keeping unit; not unique in the table.
    pub sku: Option<String>,
    /// What is embedded.
    pub description: Option<String>,
    /// Price with its currency, as PostgreSQL prints `money`: `$344.87`.
    pub price: Option<String>,
    /// Day of the last edit, `2023-09-20`.
    pub last_updated: Option<String>,
    /// Changes with every write to the row: what an edit names to say which state it is based on.
    pub revision: String,
}

/// A new product, before the table has given it an id.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NewProduct {
    /// Name.
    pub name: String,
    /// Stock keeping unit.
    pub sku: String,
    /// What is embedded.
    pub description: String,
    /// Price, `$344.87`.
    pub price: String,
    /// When it was last edited, `2023-09-20 22:51:32`.
    pub last_updated: String,
}
