//! Embedders and vector indexes: their contracts, Pinecone's protocol, and what a search finds.

#[path = "../common/mod.rs"]
mod common;

mod embedders;
mod index;
mod lists;
mod pinecone;
mod quality;
