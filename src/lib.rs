//! `refarch` keeps a semantic search index in sync with a PostgreSQL table, and proves it.
//!
//! # The promise
//!
//! Every committed insert, update and delete reaches the vector index at least once. Applying a change is
//! idempotent. When writes stop, the index **converges** to the table, even if messages were duplicated,
//! reordered or delayed and processes crashed or restarted. The only exceptions are the changes in the
//! dead-letter queue. `refarch verify` proves the promise row by row. A slow, continuous proof
//! ([`pipeline::audit`]) runs in the background and reports when it last compared everything. Freshness, from
//! statement to searchable, is measured and shown, not assumed.
//!
//! # Map
//!
//! - [`cli`], [`config`], [`secret`], [`telemetry`], [`shutdown`]: the start and the end of a process
//! - [`pipeline`]: the contract and the two steps, independent of every backend
//! - [`backend`]: one module for each backend: PostgreSQL, pgmq and SQS, pgvector and Pinecone, the model on
//!   this machine and models on servers, the private cluster
//! - [`encoder`]: the model's arithmetic, a separate crate (`src/encoder/`), the only one with `unsafe` code
//! - [`role`]: one module for each subcommand
//! - [`double`]: doubles of Pinecone, SQS and an embedding server, for the drill, the tests and the benches
//! - [`product`]: the rows of the reference architecture's table

#![forbid(unsafe_code)]

pub mod backend;
pub mod cli;
pub mod config;
pub mod double;
pub mod otlp;
pub mod pipeline;
pub mod product;
pub mod role;
pub mod secret;
pub mod shutdown;
pub mod telemetry;

pub use refarch_encoder as encoder;
