//! The indexes that the control plane knows.

use std::collections::BTreeMap;

/// An index as it was created.
#[derive(Clone, Debug)]
pub(super) struct IndexDescription {
    pub(super) dimension: usize,
    pub(super) metric: String,
    pub(super) cloud: String,
    pub(super) region: String,
    pub(super) protected: bool,
    /// How many more times the index is described as not ready.
    pub(super) unready: u32,
}

/// The indexes by name.
pub(super) type Indexes = BTreeMap<String, IndexDescription>;
