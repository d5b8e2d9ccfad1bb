//! The command line and its settings, `scripts/setup` and `refarch health`.

#[path = "../common/mod.rs"]
mod common;

mod cli;
mod health;
mod logs;
mod metrics;
mod plan;
mod setup;
