//! The state of the double.

use std::collections::HashMap;

use rand::rngs::StdRng;
use serde_json::Value;

use super::faults::{SqsCounts, SqsFaults};
use super::queue::Queue;

/// The account id in every queue's URL and ARN.
pub(super) const ACCOUNT: &str = "123456789012";
/// The region in every ARN.
pub(super) const REGION: &str = "us-east-1";

/// The queues, and the faults.
pub(super) struct State {
    pub(super) queues: HashMap<String, Queue>,
    pub(super) moves: Vec<Value>,
    pub(super) rng: StdRng,
    pub(super) faults: SqsFaults,
    pub(super) counts: SqsCounts,
}
