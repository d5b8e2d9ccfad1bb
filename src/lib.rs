//! `refarch` keeps a semantic search index in step with a PostgreSQL table, and proves it.
//!
//! # The promise
//!
//! Every committed insert, update and delete reaches the vector index at least once; applying it is
//! idempotent; when writing stops, the index **converges** to the table, whatever was duplicated,
//! reordered, delayed, crashed or restarted in between, but for what stands in the dead-letter list.
//! `refarch verify` proves it row by row; a slow, continuous proof ([`pipeline::audit`]) runs by itself and
//! says when it last went round. Freshness, from statement to searchable, is measured and shown, not assumed.
//!
//! # Map
//!
//! - [`cli`], [`config`], [`secret`], [`telemetry`], [`shutdown`]: what a process is started with
//! - [`pipeline`]: the contract and the two steps, independent of every backend
//! - [`backend`]: one module for each backend: PostgreSQL, pgmq and SQS, pgvector and Pinecone, the model on this
//!   machine and those on servers, the private cluster
//! - [`encoder`]: the model's arithmetic, a crate of its own (`src/encoder/`): it alone has `unsafe` code
//! - [`role`]: one module a subcommand
//! - [`double`]: doubles of Pinecone, SQS and an embedding server, for the drill, the tests and the benches
//! - [`product`]: the rows of the reference architecture's table

#![forbid(unsafe_code)]

pub mod backend;
pub mod cli;
pub mod config;
pub mod double;
pub mod pipeline;
pub mod product;
pub mod role;
pub mod secret;
pub mod shutdown;
pub mod telemetry;

pub use refarch_encoder as encoder;
