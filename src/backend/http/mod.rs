//! The common parts of all backends that use HTTP: the client, rate limits, retries, and the meaning of
//! statuses.

pub(super) mod client;
pub(super) mod rate_limit;
pub(super) mod retry;
pub(super) mod status;
mod throughput;
pub(super) mod unanswered;
