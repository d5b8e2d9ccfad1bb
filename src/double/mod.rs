//! Doubles of services in this process, for the drill, the tests and the benches: they keep the services' limits, and
//! fail as they are told to.

pub mod embedder;
pub mod pinecone;
pub mod sqs;
