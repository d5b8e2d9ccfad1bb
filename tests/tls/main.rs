//! A PostgreSQL with TLS, and a pooler before it.

#[path = "../common/mod.rs"]
mod common;

mod tls;
