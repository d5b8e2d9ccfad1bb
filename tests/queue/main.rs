//! Job queues: their contract, the dead letters, what is shipped to queues outside of the database, and separate roles over SQS.

#[path = "../common/mod.rs"]
mod common;

mod cloud;
mod dead_letters;
mod queue;
mod shipping;
