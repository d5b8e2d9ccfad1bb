//! Faults of calls, drawn at random, and counts of calls.

use std::time::Duration;

use rand::RngExt as _;
use rand::rngs::StdRng;
use serde::Serialize;

/// Bytes that SQS bills as one request.
const BILLED: usize = 64 * 1024;

/// The probability of each fault, from 0 to 1. The sum of the first four is at most 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SqsFaults {
    /// The answer is 503, and nothing is done.
    pub unavailable: f64,
    /// The answer is `RequestThrottled`, and nothing is done.
    pub throttled: f64,
    /// The call is done, and the answer is 500.
    pub false_error: f64,
    /// The call is done, and the connection breaks without an answer.
    pub drop_connection: f64,
    /// An entry of a batch fails, half of the time after it was done.
    pub entry: f64,
    /// A received message stays visible to other receivers.
    pub duplicate: f64,
    /// The delay of every answer.
    pub latency: Duration,
}

/// The number of calls since the start, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs)]
pub struct SqsCounts {
    /// Calls that arrived, answered or not.
    pub arrived: u64,
    pub send: u64,
    pub receive: u64,
    pub delete: u64,
    pub extend: u64,
    pub other: u64,
    /// Billed requests: one for each 64 KB of a call's messages, at least one.
    pub billed: u64,
    /// Messages sent, received and deleted.
    pub messages_sent: u64,
    pub messages_received: u64,
    pub messages_deleted: u64,
    /// The number of each fault.
    pub unavailable: u64,
    pub throttled: u64,
    pub lied: u64,
    pub dropped: u64,
    pub entries_failed: u64,
    pub duplicated: u64,
}

impl SqsCounts {
    /// Counts a call and the bytes of its messages.
    pub(super) fn call(&mut self, operation: &str, bytes: usize) {
        let count = match operation {
            "SendMessage" | "SendMessageBatch" => &mut self.send,
            "ReceiveMessage" => &mut self.receive,
            "DeleteMessage" | "DeleteMessageBatch" => &mut self.delete,
            "ChangeMessageVisibility" | "ChangeMessageVisibilityBatch" => &mut self.extend,
            _ => &mut self.other,
        };
        *count += 1;
        self.billed += bytes.div_ceil(BILLED).max(1) as u64;
    }
}

/// The drawn outcome of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FaultDecision {
    Served,
    Unavailable,
    Throttled,
    FalseError,
    Dropped,
}

impl SqsFaults {
    pub(super) fn draw(&self, rng: &mut StdRng) -> FaultDecision {
        let mut left = rng.random::<f64>();
        let mut is = |chance: f64| {
            let hit = (0.0..chance).contains(&left);
            left -= chance;
            hit
        };
        if is(self.unavailable) {
            FaultDecision::Unavailable
        } else if is(self.throttled) {
            FaultDecision::Throttled
        } else if is(self.false_error) {
            FaultDecision::FalseError
        } else if is(self.drop_connection) {
            FaultDecision::Dropped
        } else {
            FaultDecision::Served
        }
    }
}
