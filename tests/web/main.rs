//! The HTTP API, the `serve` role, and the page in a real browser.

#[path = "../common/mod.rs"]
mod common;

mod browser;
mod http;
mod serve;
