//! Tests that need PostgreSQL from the distribution: connections with TLS, a pooler, and types of extensions.
//!
//! `scripts/test` installs Debian's packages. The build of the private server has no TLS, no pooler and no extensions.

#[path = "../common/mod.rs"]
mod common;

mod extensions;
mod servers;
mod tls;
