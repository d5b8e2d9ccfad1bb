//! The job queue on pgmq, in the source's database.
//!
//! pgmq is plain SQL (its authors' script, installed by the migrations). Each message's headers hold the
//! number of its changes, so that a backlog is counted without reading bodies.

mod dead;
mod queue;
mod stats;

pub(crate) use queue::{CHANNEL, send_within};
pub use queue::{Names, Pgmq};
