//! The reference architecture's table, as the page and the API read and edit it.

mod columns;
mod legacy;
mod page;
mod search;
mod table;
mod vectors;

pub(in crate::backend::postgres) use columns::INDEXES_LOWER_CASE;
pub use legacy::EditedBySku;
pub use page::{Page, Place};
pub use search::Found;
pub use table::{Edit, Edited, Exact, Products};
pub use vectors::{SecondLook, VectorSource, VectorTable};
