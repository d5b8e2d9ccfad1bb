//! Reading pages in which a row may be that cannot be read.
//!
//! A `json` value with `\u0000` has no text that PostgreSQL can give: a statement that reads the row
//! fails, whatever else it reads. So a page that is refused for good is read in halves, down to the rows
//! at fault. Their ids can be read.

use crate::pipeline::failure::{Class, Result};
use crate::pipeline::ledger::{Ledger, Peeked};

/// Rows in a row that cannot be read: more have a cause of their own, which is not the rows'.
const MAX_UNREADABLE: usize = 100;

/// Rows of a page, and ids of those that cannot be read.
pub(super) struct Page {
    pub(super) rows: Vec<Peeked>,
    pub(super) unreadable: Vec<String>,
    /// The page's last id; none when nothing is left.
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
        Err(error) if error.class == Class::Permanent => error,
        Err(error) => return Err(error),
    };
    let ids = ledger.ids_after(after, limit).await?;
    if ids.is_empty() {
        return Err(failed);
    }
    let (rows, unreadable) = peek(ledger, &ids).await?;
    Ok(Page { rows, unreadable, last: ids.last().cloned(), is_full: ids.len() == limit })
}

/// Rows and entries of these ids, and the ids that cannot be read.
pub(super) async fn peek(ledger: &dyn Ledger, ids: &[String]) -> Result<(Vec<Peeked>, Vec<String>)> {
    let mut rows = Vec::with_capacity(ids.len());
    let mut unreadable = Vec::new();
    // The next part to read is on top, so that rows come in the order asked.
    let mut parts = vec![ids];
    while let Some(part) = parts.pop() {
        if part.is_empty() {
            continue;
        }
        match ledger.peek(part).await {
            Ok(peeked) => rows.extend(peeked),
            Err(error) if error.class == Class::Permanent && part.len() == 1 => {
                if rows.is_empty() && unreadable.len() == MAX_UNREADABLE {
                    return Err(error);
                }
                tracing::debug!(row.id = part[0], %error, "a row cannot be read");
                unreadable.push(part[0].clone());
            }
            Err(error) if error.class == Class::Permanent => {
                let (first, second) = part.split_at(part.len() / 2);
                parts.extend([second, first]);
            }
            Err(error) => return Err(error),
        }
    }
    Ok((rows, unreadable))
}
