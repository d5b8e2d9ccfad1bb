//! What all services that are reached over HTTP share: the client, how fast they are asked, how often a request is
//! tried, and what their answers mean.

pub(super) mod client;
pub(super) mod rate_limit;
pub(super) mod retry;
pub(super) mod status;
mod throughput;
pub(super) mod unanswered;
