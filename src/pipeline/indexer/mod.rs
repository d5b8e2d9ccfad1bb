//! The indexer: applies messages from the queue to the index.
//!
//! A message is a hint: rows are read here, never taken from the message. A message is acknowledged only when
//! one of three holds for each of its ids: the index holds the row, the ledger says that the id will be done
//! again, or the change is in the dead-letter queue. A crash at any point repeats work, which is idempotent.
//!
//! A [`Receiver`] for each lane receives messages. The messages of one receive are a [`batch`], which is
//! [`run`] until nothing of it is left, in [`groups`] of ids. The [`writer`] writes one group, in the way
//! that the index allows: [`transactional`] or [`tracked`]; each module says why it is safe. [`poison`] finds
//! the change that fails by itself, and [`misdirected`] the message for another worker. [`freshness`]
//! measures, [`visibility`] hides the messages in work from other workers, and [`workers`] are the loops that
//! embed. [`panics`] starts them again.

mod batch;
mod freshness;
mod group_failure;
mod groups;
mod health;
mod misdirected;
mod open_writes;
mod panic_reports;
mod panics;
mod poison;
mod receiver;
mod run;
mod spawn;
mod step;
mod throughput;
mod tracked;
mod transactional;
mod tries;
mod visibility;
mod worker_count;
mod workers;
mod writer;

pub use batch::StepOutcome;
pub use receiver::Receiver;
pub use spawn::{Spawn, Task, TokioTasks};
pub use step::{Indexer, IndexerOptions};
