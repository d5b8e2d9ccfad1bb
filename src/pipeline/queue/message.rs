//! A message as it is received, and what its body says.

use crate::pipeline::change::{JOB_VERSION, Job, Lane};
use crate::pipeline::failure::Result;

/// A received message. Others do not see it until its visibility timeout ends.
#[derive(Clone, Debug)]
pub struct Message {
    /// The queue's name for the message, for logs and dead letters.
    pub id: String,
    /// What acknowledges, extends or releases this receipt of the message.
    pub receipt: Receipt,
    /// How often the message has been received, this time included.
    pub receive_count: u32,
    /// The decoded body, or why it could not be decoded together with the body as it came.
    pub body: Result<Job, Undecodable>,
}

/// A receipt handle. Only the queue that issued it can read it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Receipt {
    /// The lane that the message came from.
    pub lane: Lane,
    /// The handle itself.
    pub handle: String,
}

/// A body that is not a [`Job`] that this build can read, kept whole.
#[derive(Clone, Debug)]
pub struct Undecodable {
    /// Why it could not be read.
    pub reason: String,
    /// The job's version, if it is a later one than this build reads: a later build can read it. Anything
    /// else can be read by nobody, and is dead-lettered with its reason.
    pub later: Option<u64>,
    /// The body as it came.
    pub body: String,
}

/// Reads a message's body. A later version than ours may have any shape.
pub fn decode(body: String) -> Result<Job, Undecodable> {
    let not_a_job = |error: serde_json::Error| (format!("not a job: {error}"), None);
    let read = || {
        // There may be JSON that serde does not take: numbers beyond `f64`, any depth.
        let value: serde_json::Value = serde_json::from_str(&body).map_err(not_a_job)?;
        match value.get("v").and_then(serde_json::Value::as_u64) {
            Some(v) if v > u64::from(JOB_VERSION) => {
                Err((format!("job version {v}; this build reads {JOB_VERSION}"), Some(v)))
            }
            Some(1..) => serde_json::from_value(value).map_err(not_a_job),
            Some(0) => Err(("not a job: its version is 0".into(), None)),
            None => Err(("not a job: it has no version".into(), None)),
        }
    };
    read().map_err(|(reason, later)| Undecodable { reason, later, body })
}
