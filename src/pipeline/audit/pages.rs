//! Reading pages of rows. Rows may be large, and a row may be unreadable.
//!
//! A `json` value with `\u0000` has no text that PostgreSQL can give: a statement that reads the row fails,
//! whatever else it reads. So a page that is refused permanently is read in halves, down to the rows at
//! fault. The ids of these rows can be read.

use crate::pipeline::failure::{Class, Error, Result};
use crate::pipeline::ledger::{Ledger, Peeked};
use crate::pipeline::source_row::SourceRow;

/// The most rows of a page.
pub(super) const PAGE: usize = 500;

/// The number of rows of the first page.
const FIRST: usize = 10;

/// The wanted size of a page's texts and metadata, in bytes. The size of earlier rows serves as the estimate.
const PAGE_BYTES: usize = 8 << 20;

/// A page may have at most this many times the rows of the page before, because its rows may be larger.
const GROWTH: usize = 4;

/// The number of rows of a page, chosen so that a page of large rows fits into the memory.
pub(super) struct Size(usize);

impl Default for Size {
    fn default() -> Self {
        Self(FIRST)
    }
}

impl Size {
    /// The number of rows to read, at most `most`.
    pub(super) fn of(&self, most: usize) -> usize {
        self.0.min(most).max(1)
    }

    /// Chooses the size of the next page by the rows of this page.
    pub(super) fn saw(&mut self, rows: &[Peeked]) {
        let weight = |row: &SourceRow| row.text.len() + row.metadata.len();
        let bytes: usize = rows.iter().filter_map(|one| one.row.as_ref()).map(weight).sum();
        let fitting = PAGE_BYTES / bytes.div_ceil(rows.len().max(1)).max(1);
        self.0 = fitting.clamp(1, (self.0 * GROWTH).min(PAGE));
    }
}

/// Removes a row's text and metadata, but keeps whether the row has a text.
fn lighten(peeked: &mut Peeked) {
    if let Some(row) = &mut peeked.row {
        row.text = if row.has_text() { "text" } else { "" }.into();
        row.metadata = "{}".into();
    }
}

/// The most consecutive unreadable rows. If there are more, the rows are not the cause.
const MAX_UNREADABLE: usize = 100;

/// How often a row that fails is read again, because the server may have caused the failure.
const TRIES: usize = 3;

/// Rows of a page, and ids of those that cannot be read.
pub(super) struct Page {
    pub(super) rows: Vec<Peeked>,
    pub(super) unreadable: Vec<String>,
    /// The last id of the page; `None` if no row is left.
    pub(super) last: Option<String>,
    /// Whether more may follow.
    pub(super) is_full: bool,
}

/// The next rows of the source.
pub(super) async fn rows_after(ledger: &dyn Ledger, after: Option<&str>, limit: usize) -> Result<Page> {
    let failed = match ledger.rows_after(after, limit).await {
        Ok(rows) => {
            let last = rows.last().map(|row| row.id.clone());
            let is_full = rows.len() == limit;
            return Ok(Page { rows, unreadable: Vec::new(), last, is_full });
        }
        Err(error) if may_be_of_a_row(&error) => error,
        Err(error) => return Err(error),
    };
    let ids = ledger.ids_after(after, limit).await?;
    if ids.is_empty() {
        return Err(failed);
    }
    let (rows, unreadable) = peek(ledger, &ids).await?;
    Ok(Page { rows, unreadable, last: ids.last().cloned(), is_full: ids.len() == limit })
}

/// Whether one of the requested rows may be at fault.
fn may_be_of_a_row(error: &Error) -> bool {
    error.class() == Class::Permanent || error.is_about_change()
}

/// Whether a row always fails while the database answers other reads. If not, another try may succeed.
async fn fails_alone(ledger: &dyn Ledger, part: &[String]) -> Result<bool> {
    for _ in 0..TRIES {
        ledger.pending().await?;
        match ledger.peek(part).await {
            Ok(_) => return Ok(false),
            Err(error) if may_be_of_a_row(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// Rows and entries of these ids, and the ids of rows that cannot be read. The rows have no texts, but they still show
/// whether they had one.
pub(super) async fn peek(ledger: &dyn Ledger, ids: &[String]) -> Result<(Vec<Peeked>, Vec<String>)> {
    let mut rows = Vec::with_capacity(ids.len());
    let mut unreadable = Vec::new();
    let mut size = Size::default();
    // The next part to read is last in `parts`, so that the rows come in the order of `ids`.
    let mut parts = vec![ids];
    while let Some(part) = parts.pop() {
        if part.is_empty() {
            continue;
        }
        let (part, rest) = part.split_at(size.of(part.len()));
        parts.push(rest);
        match ledger.peek(part).await {
            Ok(mut peeked) => {
                size.saw(&peeked);
                peeked.iter_mut().for_each(lighten);
                rows.extend(peeked);
            }
            Err(error) if may_be_of_a_row(&error) && part.len() == 1 => {
                if error.class() != Class::Permanent && !fails_alone(ledger, part).await? {
                    parts.push(part);
                    continue;
                }
                if rows.is_empty() && unreadable.len() == MAX_UNREADABLE {
                    return Err(error);
                }
                tracing::debug!(row.id = part[0], %error, "a row cannot be read");
                unreadable.push(part[0].clone());
            }
            Err(error) if may_be_of_a_row(&error) => {
                let (first, second) = part.split_at(part.len() / 2);
                parts.extend([second, first]);
            }
            Err(error) => return Err(error),
        }
    }
    Ok((rows, unreadable))
}
