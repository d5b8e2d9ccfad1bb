//! What needs the distribution's PostgreSQL: connections with TLS, a pooler before it, and types of extensions.
//!
//! Debian's packages, which `scripts/test` installs: the private server's build has none of these.

#[path = "../common/mod.rs"]
mod common;

mod extensions;
mod servers;
mod tls;
