//! The pipeline: how a committed change becomes a vector, independent of every backend.
//!
//! Traits are the seams ([`outbox::Outbox`], [`queue::JobQueue`], [`queue::DeadLetters`],
//! [`queue::QueueStats`], [`ledger::Ledger`], [`embedder::Embedder`], [`index::VectorIndex`]); [`relay`] and
//! [`indexer`] are the two steps that move changes across them. Nothing in here knows PostgreSQL, SQS,
//! Pinecone or HTTP.

pub mod audit;
pub mod backlog;
pub mod change;
pub mod clock;
pub mod embed_scheduler;
pub mod embedder;
pub mod failure;
pub mod fault;
pub mod histogram;
pub mod index;
pub mod indexer;
pub mod lease;
pub mod ledger;
pub mod metrics;
pub mod outbox;
pub mod queue;
pub mod relay;
pub mod retry;
pub mod scaling;
pub mod source_row;
pub mod trace;
pub mod unchanged;
