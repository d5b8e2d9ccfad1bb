//! The command line and its settings, and `scripts/setup`.

#[path = "../common/mod.rs"]
mod common;

mod cli;
mod logs;
mod metrics;
mod setup;
