//! The audit: source, ledger and index compared row by row, while writes go on.
//!
//! Two walks with bounded memory: over the rows of the source by key, with a fetch of each page's ids from
//! the index, and over the ids of the index, with a read of their rows. An id that differs is a suspect, not
//! yet a difference: its change may be under way. A suspect is compared again until it agrees, or until its
//! difference is certain:
//!
//! - no attempt is open on the id, and row and entry do not change around the fetch from the index;
//! - and one of two holds. Either the entry is clean and equal to the row, so that no worker will ever repair
//!   the difference. Or outbox and queue hold no change that was captured before the suspect was seen in this
//!   state. (Ids that an overlap or a sweep puts back are captured in the transaction that gives the entry
//!   this state.)
//!
//! A suspect that is not certain in time is undecided.

mod pages;
mod prover;
mod recheck;
mod report;
mod round;
mod sample;
mod walk;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::clock::Clock;
use super::embedder::Embedder;
use super::failure::Result;
use super::index::VectorIndex;
use super::ledger::{Ledger, Peeked};
use super::queue::QueueStats;
use pages::PAGE;
use recheck::{RECHECK_PAUSE, Recheck, Suspect, difference};
use report::MAX_EXAMPLES;
use sample::Sample;

pub use prover::Prover;
pub use report::{Difference, DifferenceKind, Report};
pub use round::{ProofOptions, Round, RoundStore, SavedProgress, Walk};

/// The most suspects that are kept before they are settled. Limits the memory if everything differs.
const MAX_SUSPECTS: usize = 10_000;

/// Options of the audit.
#[derive(Clone, Copy, Debug)]
pub struct AuditOptions {
    /// The number of rows whose text is embedded again, to compare the vectors.
    pub sample: usize,
    /// How long to wait for suspects to be settled.
    pub wait: Duration,
    /// Whether ids that differ are queued again.
    pub repair: bool,
}

/// Compares source, ledger and index.
pub struct Auditor<'a> {
    /// Source and ledger.
    pub ledger: &'a dyn Ledger,
    /// The index.
    pub index: &'a dyn VectorIndex,
    /// The queue, to know how old the changes are that are on their way.
    pub queue: &'a dyn QueueStats,
    /// Embeds the sample.
    pub embedder: Option<Arc<dyn Embedder>>,
    /// Measures pauses.
    pub clock: &'a dyn Clock,
    /// The options.
    pub options: AuditOptions,
}

impl Auditor<'_> {
    /// Walks source and index, settles the suspects, and compares a sample of vectors. `progress` gets the numbers of
    /// rows and records read so far.
    pub async fn run(&self, progress: &(dyn Fn(u64) + Sync)) -> Result<Report> {
        let mut report = Report::default();
        let mut suspects = Vec::new();
        let mut sample = Vec::new();
        self.walk_source(&mut report, &mut suspects, &mut sample, progress).await?;
        self.walk_index(&mut report, &mut suspects, progress).await?;
        self.settle(suspects, &mut report).await?;
        self.compare_vectors(&sample, &mut report).await?;
        Ok(report)
    }

    async fn walk_source(
        &self,
        report: &mut Report,
        suspects: &mut Vec<Suspect>,
        sample: &mut Vec<Sample>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<()> {
        let wanted = if self.embedder.is_some() { self.options.sample } else { 0 };
        let mut after: Option<String> = None;
        let mut size = pages::Size::default();
        loop {
            let limit = size.of(PAGE);
            let page = pages::rows_after(self.ledger, after.as_deref(), limit).await?;
            let Some(last) = page.last else { return Ok(()) };
            size.saw(&page.rows);
            let began = (after.replace(last), limit);
            let ids: Vec<String> = page.rows.iter().map(|peeked| peeked.id.clone()).collect();
            let mut stored = self.recheck().fetch(&ids).await?;
            let mut differing = Vec::new();
            report.rows += page.unreadable.len() as u64;
            report.name_unreadable(page.unreadable);
            for peeked in &page.rows {
                report.rows += 1;
                let record = stored.remove(&peeked.id);
                match (difference(peeked, record.as_ref()), record) {
                    (Some(kind), _) => differing.push((peeked, kind)),
                    (None, Some(record)) => {
                        sample::choose(sample, wanted, report.rows, self.clock, peeked, record);
                    }
                    (None, None) => {}
                }
            }
            suspects.extend(self.recheck().suspect(differing, Some(&began)).await?);
            progress(report.rows);
            if suspects.len() >= MAX_SUSPECTS {
                self.settle(std::mem::take(suspects), report).await?;
            }
            if !page.is_full {
                return Ok(());
            }
        }
    }

    fn recheck(&self) -> Recheck<'_> {
        let Self { ledger, index, queue, clock, .. } = *self;
        Recheck { ledger, index, queue, clock, proof: None }
    }

    async fn walk_index(
        &self,
        report: &mut Report,
        suspects: &mut Vec<Suspect>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<()> {
        let mut cursor: Option<String> = None;
        loop {
            let page = self.index.list(cursor.as_deref(), PAGE).await?;
            // The walk over the rows has named unreadable rows already.
            let (peeked, _) = pages::peek(self.ledger, &page.ids).await?;
            report.indexed += page.ids.len() as u64;
            let without_text = |one: &&Peeked| one.row.as_ref().is_none_or(|row| !row.has_text());
            let orphans =
                peeked.iter().filter(without_text).map(|one| (one, DifferenceKind::Orphaned)).collect();
            suspects.extend(self.recheck().suspect(orphans, None).await?);
            progress(report.rows + report.indexed);
            if suspects.len() >= MAX_SUSPECTS {
                self.settle(std::mem::take(suspects), report).await?;
            }
            cursor = page.next;
            if cursor.is_none() {
                return Ok(());
            }
        }
    }

    /// Compares suspects until each agrees, or differs for certain, or the time is over.
    async fn settle(&self, suspects: Vec<Suspect>, report: &mut Report) -> Result<()> {
        let mut by_id: HashMap<String, Suspect> = HashMap::new();
        for suspect in suspects {
            by_id.entry(suspect.id.clone()).or_insert(suspect);
        }
        let mut suspects: Vec<Suspect> = by_id.into_values().collect();
        suspects.sort_by(|a, b| a.id.cmp(&b.id));
        let started = self.clock.now();
        while !suspects.is_empty() {
            let over = self.clock.now().saturating_sub(started) >= self.options.wait;
            let rechecked = self.recheck().run(suspects).await?;
            report.name_unreadable(rechecked.unreadable);
            self.count(rechecked.confirmed, report).await?;
            suspects = rechecked.unconfirmed;
            if over {
                report.undecided += suspects.len() as u64;
                return Ok(());
            }
            if !suspects.is_empty() {
                self.clock.sleep(RECHECK_PAUSE).await;
            }
        }
        Ok(())
    }

    /// Compares the sample, and queues rows whose vector differs if the audit repairs.
    async fn compare_vectors(&self, sample: &[Sample], report: &mut Report) -> Result<()> {
        let Some(embedder) = &self.embedder else { return Ok(()) };
        let differ = sample::compare(sample, &**embedder, report).await;
        if self.options.repair && !differ.is_empty() {
            self.ledger.requeue(&differ).await?;
            report.repaired += differ.len() as u64;
        }
        Ok(())
    }

    async fn count(&self, confirmed: Vec<Difference>, report: &mut Report) -> Result<()> {
        for difference in &confirmed {
            match difference.kind {
                DifferenceKind::Missing => report.missing += 1,
                DifferenceKind::Stale => report.stale += 1,
                DifferenceKind::Orphaned => report.orphaned += 1,
                DifferenceKind::Unsettled | DifferenceKind::Unreadable => {}
            }
        }
        if self.options.repair {
            let ids: Vec<String> = confirmed.iter().map(|difference| difference.id.clone()).collect();
            for ids in ids.chunks(PAGE) {
                self.ledger.requeue(ids).await?;
                report.repaired += ids.len() as u64;
            }
        }
        let room = MAX_EXAMPLES.saturating_sub(report.examples.len());
        report.examples.extend(confirmed.into_iter().take(room));
        Ok(())
    }
}
