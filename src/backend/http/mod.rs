//! What all services that are reached over HTTP share: what their answers mean, and what no answer means.

pub(super) mod status;
pub(super) mod unanswered;
