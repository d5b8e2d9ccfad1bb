//! The parts that run in PostgreSQL: capture, the ledger, migrations, reading of rows, and the private cluster.

#[path = "../common/mod.rs"]
mod common;

mod capture;
mod counts;
mod embedded;
mod ledger;
mod live;
mod migrate;
mod reading;
