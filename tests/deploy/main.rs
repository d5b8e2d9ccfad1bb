//! What is shipped.

#[path = "../common/mod.rs"]
mod common;

mod aws;
mod containers;
