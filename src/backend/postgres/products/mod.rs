//! The reference architecture's table, as the page and the API read and edit it.

mod columns;
mod legacy;
mod search;
mod table;
mod vectors;

pub use legacy::EditedBySku;
pub use search::Found;
pub use table::{Edit, Edited, Exact, LISTED, Page, Products};
pub use vectors::{VectorSource, VectorTable};
