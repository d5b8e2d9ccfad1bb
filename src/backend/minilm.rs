//! The embedder for all-MiniLM-L6-v2 and other BERT models on this machine's CPU, with [`crate::encoder`].
//!
//! The weights are loaded once and shared. Each embedding thread computes alone, because two threads on one
//! batch of short texts wait for each other more than they work. Only the text of a search uses two threads,
//! because a person waits for the result.

mod embedding_threads;
mod identity;
mod model;

pub use embedding_threads::MiniLm;
pub use model::{Description, Model, ModelOptions};
