//! Records.

use serde_json::{Map, Value};

/// A stored record.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// The vector.
    pub values: Vec<f32>,
    /// The metadata.
    pub metadata: Map<String, Value>,
}
