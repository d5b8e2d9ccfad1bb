//! `refarch chaos`: faults on purpose, and what is left of the promises afterwards.

pub mod double;
