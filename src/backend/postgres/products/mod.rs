//! The reference architecture's table, as the page and the API read and edit it.

mod columns;
mod legacy;
mod table;

pub use legacy::EditedBySku;
pub use table::{Edit, Edited, Exact, LISTED, Page, Products};
