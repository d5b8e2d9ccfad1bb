//! The source's table: its description, and reads of its rows.

mod casts;
mod expression;
mod key;
mod name;
mod quote;
mod reader;
mod table;

pub use quote::quote_ident;
pub(crate) use reader::{MAX_REREADS, SourceRead, SourceReader, altered_too_often};
pub use table::SourceTable;
