//! `refarch` keeps a semantic search index in step with a PostgreSQL table, and proves it.
//!
//! # The promise
//!
//! Every committed insert, update and delete reaches the vector index at least once; applying it is
//! idempotent; when writing stops, the index **converges** to the table, whatever was duplicated,
//! reordered, delayed, crashed or restarted in between, but for what stands in the dead-letter list.
//! Freshness, from statement to searchable, is measured and shown, not assumed.
//!
//! # Map
//!
//! - [`cli`], [`config`], [`secret`], [`telemetry`], [`shutdown`]: what a process is started with
//! - [`pipeline`]: the contract and the two steps, independent of every backend
//! - [`backend`]: one file a backend: PostgreSQL, pgmq, pgvector, the model, the private cluster
//! - [`encoder`]: the model's arithmetic; the only module with `unsafe` code
//! - [`role`]: one module a subcommand
//! - [`product`]: the rows of the reference architecture's table

// The encoder alone allows it, which `forbid` would not let it; each of the other modules forbids it.
#![deny(unsafe_code)]

#[forbid(unsafe_code)]
pub mod backend;
#[forbid(unsafe_code)]
pub mod cli;
#[forbid(unsafe_code)]
pub mod config;
pub mod encoder;
#[forbid(unsafe_code)]
pub mod pipeline;
#[forbid(unsafe_code)]
pub mod product;
#[forbid(unsafe_code)]
pub mod role;
#[forbid(unsafe_code)]
pub mod secret;
#[forbid(unsafe_code)]
pub mod shutdown;
#[forbid(unsafe_code)]
pub mod telemetry;
