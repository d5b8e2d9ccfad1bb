//! The job queue on Amazon SQS: a queue a lane (or one for both), and a dead-letter queue.
//!
//! SQS is at least once and unordered, which the contract allows; it bills by the request, which is why
//! everything here goes in batches of ten and receives wait.

mod batch;
mod client;
mod dead_letters;
mod density;
mod error_policy;
mod options;
mod queue;
mod receive;
mod stats;

pub use client::{configuration_warnings, connect, connect_to};
pub use options::{MAX_BYTES, SqsOptions};
pub use queue::Sqs;
