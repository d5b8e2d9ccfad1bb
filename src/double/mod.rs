//! Test doubles of services, in this process. The drill, the tests and the benchmarks use them. They keep the
//! services' limits, and inject faults on request.

pub mod embedder;
pub mod pinecone;
pub mod sqs;
