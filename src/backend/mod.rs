//! One module for each backend. The modules here that are no backend choose the backends by the settings. No role
//! does.

mod backends;
mod database;
pub mod embedded;
mod http;
pub mod http_embedder;
mod location;
mod migration;
pub mod minilm;
mod model;
pub mod parts;
pub mod pgmq;
pub mod pgvector;
pub mod pinecone;
pub mod postgres;
mod queue;
pub mod sqs;

pub use backends::Backends;
pub use database::{Database, with_connect_retry, with_start_retry};
pub use migration::{migrate, migrate_as_known, migrate_with, plan_migration, uninstall};
pub use model::{LoadedModel, index_shape, model_dir};
pub use queue::sqs_options;
