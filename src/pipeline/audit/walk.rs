//! The three parts of a round: records, rows and entries. Each part goes page by page.

use std::collections::HashSet;

use super::pages;
use super::prover::{Prover, Running};
use super::recheck::{Recheck, Suspect, is_unsettled};
use super::report::DifferenceKind;
use super::round::{Round, Walk};
use crate::pipeline::failure::{Class, Result};
use crate::pipeline::ledger::Peeked;
use crate::pipeline::source_row::SourceRow;

/// The number of records of a page that are fetched at random, if not all are fetched.
const SAMPLE: usize = 5;

impl Prover {
    /// Compares a page of the index's ids with the rows. Finds records that have no row.
    pub(super) async fn page_of_records(
        &self,
        recheck: &Recheck<'_>,
        round: &mut Round,
    ) -> Result<Vec<Suspect>> {
        let page = match self.index.list(round.cursor.as_deref(), self.options.page).await {
            Ok(page) => page,
            // The index may accept a place in a listing for a limited time only.
            Err(error) if error.class() == Class::Permanent && round.cursor.is_some() => {
                tracing::debug!(%error, "the listing of the index begins anew");
                (round.cursor, round.records) = (None, 0);
                return Ok(Vec::new());
            }
            Err(error) => return Err(error),
        };
        // The number of unreadable rows is dropped here: `page_of_rows` counts them.
        let (peeked, _) = pages::peek(&*self.ledger, &page.ids).await?;
        if !self.fetches_all() && !page.ids.is_empty() {
            self.store.record_listed(&page.ids).await?;
        }
        round.records += page.ids.len() as u64;
        round.cursor = page.next;
        if round.cursor.is_none() {
            round.walk = Walk::Rows;
        }
        let without_text = |one: &&Peeked| one.row.as_ref().is_none_or(|row| !row.has_text());
        let orphans = peeked.iter().filter(without_text).map(|one| (one, DifferenceKind::Orphaned)).collect();
        recheck.suspect(orphans, None).await
    }

    /// Compares a page of rows with the records. Finds records that are missing or have another text, and
    /// entries that are not settled.
    pub(super) async fn page_of_rows(
        &self,
        recheck: &Recheck<'_>,
        running: &mut Running,
    ) -> Result<Vec<Suspect>> {
        let Running { round, size, .. } = running;
        let began = (round.cursor.clone(), size.of(self.options.page));
        let page = pages::rows_after(&*self.ledger, began.0.as_deref(), began.1).await?;
        size.saw(&page.rows);
        let fetched: HashSet<String> = if self.fetches_all() {
            page.rows.iter().map(|row| row.id.clone()).collect()
        } else {
            self.chosen(&page.rows).await?
        };
        let ids: Vec<String> =
            page.rows.iter().map(|row| row.id.clone()).filter(|id| fetched.contains(id)).collect();
        let stored = recheck.fetch(&ids).await?;
        let differing = page
            .rows
            .iter()
            .filter_map(|row| {
                let kind = if fetched.contains(&row.id) {
                    recheck.classify(row, stored.get(&row.id))
                } else {
                    is_unsettled(row).then_some(DifferenceKind::Unsettled)
                };
                Some((row, kind?))
            })
            .collect();
        let suspects = recheck.suspect(differing, Some(&began)).await?;
        round.rows += (page.rows.len() + page.unreadable.len()) as u64;
        round.unreadable += page.unreadable.len() as u64;
        if page.last.is_some() {
            round.cursor = page.last;
        }
        if !page.is_full {
            (round.walk, round.cursor) = (Walk::Entries, None);
        }
        Ok(suspects)
    }

    /// Chooses the rows whose records are fetched, if not all are fetched: rows that the index did not list, and
    /// [`SAMPLE`] rows at random.
    async fn chosen(&self, rows: &[Peeked]) -> Result<HashSet<String>> {
        let with_text: Vec<String> = rows
            .iter()
            .filter(|one| one.row.as_ref().is_some_and(SourceRow::has_text))
            .map(|one| one.id.clone())
            .collect();
        let listed = self.store.listed(&with_text).await?;
        let mut chosen: HashSet<String> =
            with_text.iter().filter(|id| !listed.contains(*id)).cloned().collect();
        for _ in 0..SAMPLE.min(with_text.len()) {
            let index = (self.clock.chance() * with_text.len() as f64) as usize;
            chosen.extend(with_text.get(index).cloned());
        }
        Ok(chosen)
    }

    /// Checks a page of the ledger's entries. Finds unsettled entries whose row is gone. Entries that have a row
    /// were checked together with the row.
    pub(super) async fn page_of_entries(
        &self,
        recheck: &Recheck<'_>,
        round: &mut Round,
    ) -> Result<Vec<Suspect>> {
        let ids = self.ledger.entries_after(round.cursor.as_deref(), self.options.page).await?;
        let (peeked, _) = pages::peek(&*self.ledger, &ids).await?;
        round.entries += ids.len() as u64;
        let is_full = ids.len() == self.options.page;
        round.cursor = ids.into_iter().next_back();
        if !is_full {
            (round.walk, round.cursor) = (Walk::Done, None);
        }
        let differing = peeked
            .iter()
            .filter(|one| one.row.is_none() && is_unsettled(one))
            .map(|one| (one, DifferenceKind::Unsettled))
            .collect();
        recheck.suspect(differing, None).await
    }
}
