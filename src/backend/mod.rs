//! One file a backend. This module holds the only `match` on a backend's kind.

pub mod embedded;
