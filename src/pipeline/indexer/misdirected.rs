//! Messages that are somebody else's: of a later build, or of another source.
//!
//! During a rolling upgrade both builds receive from one queue, so such a message is no dead letter,
//! however often it comes: it is put back for a while that grows, for whoever can read it, and told of. It
//! waits for as long as the queue keeps it (SQS: the retention period, or its redrive policy).

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::Duration;

use super::Indexer;
use crate::pipeline::change::JOB_VERSION;
use crate::pipeline::failure::Result;
use crate::pipeline::fault;
use crate::pipeline::queue::Message;

/// How long such a message is put back for at first, and at most.
const FIRST_PAUSE: Duration = Duration::from_secs(30);
const LONGEST_PAUSE: Duration = Duration::from_mins(5);

/// A fault of this kind that no message confirms ends after this long.
const FORGOTTEN: Duration = Duration::from_mins(11);

/// Kinds that are told apart at most; names are foreign, so that there may be any number.
const MAX_KINDS: usize = 8;

/// Characters of a foreign name that are shown.
const MAX_NAME: usize = 60;

/// Which kinds have come, and when each last did, by the worker's clock.
pub(super) type Seen = BTreeMap<String, Duration>;

impl Indexer {
    /// What makes a message somebody else's, if anything does.
    pub(super) fn somebody_elses(&self, message: &Message) -> Option<String> {
        match &message.body {
            Ok(job) if job.source != self.options.source => {
                let name: String = job.source.chars().take(MAX_NAME).collect();
                Some(format!(
                    "of source {name:?}, and this worker is source {:?}'s: start one for it",
                    self.options.source
                ))
            }
            Err(undecodable) => undecodable.later.map(|version| {
                format!("of job version {version}, and this build reads {JOB_VERSION}: use the newer build")
            }),
            Ok(_) => None,
        }
    }

    /// Hides a message from everybody for a while, and tells of it.
    pub(super) async fn put_back(&self, message: &Message, whose: String) -> Result<()> {
        let doublings = message.receive_count.saturating_sub(1).min(10);
        let pause = FIRST_PAUSE.saturating_mul(1 << doublings).min(LONGEST_PAUSE);
        self.queue.extend_visibility(std::slice::from_ref(&message.receipt), pause).await?;
        let now = self.clock().now();
        let mut seen = self.misdirected.lock().unwrap_or_else(PoisonError::into_inner);
        seen.retain(|_, at| now.saturating_sub(*at) < FORGOTTEN);
        if !seen.contains_key(&whose) {
            tracing::warn!(
                message.id,
                retry_in_ms = pause.as_millis() as u64,
                "a message is {whose}: it was put back"
            );
        }
        if seen.len() < MAX_KINDS || seen.contains_key(&whose) {
            seen.insert(whose, now);
        }
        let kinds: Vec<&str> = seen.keys().map(String::as_str).collect();
        let message = format!("the queue holds messages {}", kinds.join("; "));
        self.faults.report_for(fault::MISDIRECTED, message, FORGOTTEN);
        Ok(())
    }

    /// Whether a message was put back lately, so that the queue need not become empty.
    pub(super) fn has_put_back(&self) -> bool {
        let now = self.clock().now();
        let seen = self.misdirected.lock().unwrap_or_else(PoisonError::into_inner);
        seen.values().any(|at| now.saturating_sub(*at) < FORGOTTEN)
    }
}
