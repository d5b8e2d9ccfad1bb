//! The whole loop: it keeps the index in step, holds under faults, and proves it.

#[path = "../common/mod.rs"]
mod common;

mod faults;
mod freshness;
mod harness;
mod panics;
mod proof;
mod retention;
mod scaling;
mod shop;
mod sync;
mod trace;
mod twisted;
mod up;
mod verify;
