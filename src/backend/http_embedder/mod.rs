//! Embedding on a server: `OpenAI`'s protocol, text-embeddings-inference, and Pinecone's hosted models.
//!
//! Texts are sent in batches within the provider's limits, several requests at once, within the rate limit. A
//! refused request may be the fault of one text; the error says so, and the worker finds the text. A refused
//! key or model is a fault for all texts ([`FailureKind`](crate::pipeline::failure::FailureKind) has the table). A text that is too long for the
//! server is cut until the server accepts it.

mod address;
mod embedder;
mod error_policy;
mod known;
mod provider;
mod server;
mod texts;

pub use embedder::HttpEmbedder;
pub use known::Known;
pub use server::Server;
