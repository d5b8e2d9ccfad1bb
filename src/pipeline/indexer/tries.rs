//! How often the changes of a batch were tried.

use std::collections::{HashMap, HashSet};

use crate::pipeline::queue::Message;

/// From this receive on, a message is worked change by change.
const ONE_BY_ONE_FROM: u32 = 3;

/// Whether a message was received so often that its changes are tried one by one.
pub(super) fn is_redelivered(message: &Message) -> bool {
    message.receive_count >= ONE_BY_ONE_FROM
}

/// The tries of the changes of a batch that may be poison.
#[derive(Debug, Default)]
pub(super) struct Tries {
    /// Ids of messages that were received too often.
    pub(super) redelivered: HashSet<String>,
    /// Ids that failed by themselves, and how often that was counted here.
    pub(super) failed_alone: HashMap<String, u32>,
    /// Ids that were refused for good, while a canary went through.
    pub(super) refused: HashSet<String>,
    /// Ids whose next try may be in the ledger's count already.
    pub(super) counted: HashSet<String>,
    /// The id whose try is in the ledger's count and has not ended.
    pub(super) in_try: Option<String>,
}

impl Tries {
    /// The tries of a new batch, in which these ids were redelivered.
    pub(super) fn new(redelivered: HashSet<String>) -> Self {
        Self { redelivered, ..Self::default() }
    }

    /// The id of a group whose tries are counted: it is alone, and failed alone before or was received too
    /// often.
    pub(super) fn counts<'a>(&self, group: &'a [String]) -> Option<&'a String> {
        let [id] = group else { return None };
        (self.redelivered.contains(id) || self.failed_alone.contains_key(id)).then_some(id)
    }
}
