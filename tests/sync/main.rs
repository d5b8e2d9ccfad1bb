//! The whole loop: it keeps the index in step, holds under faults, and proves it.

#[path = "../common/mod.rs"]
mod common;

mod faults;
mod harness;
mod proof;
mod retention;
mod scaling;
mod shop;
mod sync;
mod trace;
mod twisted;
mod verify;
