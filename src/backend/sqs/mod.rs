//! The job queue on Amazon SQS: one queue for each lane, or one queue for both, and a dead-letter queue.
//!
//! SQS delivers at least once and in no order, which the contract of
//! [`JobQueue`](crate::pipeline::queue::JobQueue) allows. SQS bills by the request, so all calls here carry up
//! to ten messages, and receives use long polling.

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
