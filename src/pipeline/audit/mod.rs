//! The audit: source, ledger and index compared row by row, while writes go on.
//!
//! Two walks with bounded memory: over the source by its key, asking the index for each page's ids,
//! and over the index's ids, asking the source for theirs. What differs is a suspect, not yet a
//! difference: a change may be on its way. A suspect is looked at again until it agrees, or until its
//! difference is sure:
//!
//! - no attempt is open on it, and row and entry stay as they are around the look at the index;
//! - and either the ledger calls the entry clean and equal to the row, so that nobody will ever do
//!   anything about it; or nothing that was captured before the suspect was seen like this is left in
//!   outbox and queue. (What an overlap or a sweep puts back is captured in the transaction that
//!   makes the entry look like this, so it is covered.)
//!
//! What is not sure in time is undecided.

mod sample;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use sample::Sample;
use serde::Serialize;

use super::catalog::Hash;
use super::clock::Clock;
use super::embedder::Embedder;
use super::failure::Result;
use super::index::{Stored, VectorIndex, Writes};
use super::ledger::{Ledger, Peeked};
use super::queue::JobQueue;

/// Rows of one page.
const PAGE: usize = 500;

/// Suspects that are kept before they are settled: bounds the memory when everything differs.
const MAX_SUSPECTS: usize = 10_000;

/// How often suspects are looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// An index outside of the database may show a write a little later than it accepts it: a difference
/// to a clean entry must last this long.
const VISIBLE_AFTER: Duration = Duration::from_secs(5);

/// Differences that are named in the report.
const MAX_EXAMPLES: usize = 20;

/// What the audit needs of the settings.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Rows whose text is embedded anew, to compare the vectors.
    pub sample: usize,
    /// How long to wait for suspects to be settled.
    pub wait: Duration,
    /// Whether what differs is queued.
    pub repair: bool,
}

/// How an index can differ from its table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The row has a text, and the index has no record.
    Missing,
    /// The record is of another text or other metadata.
    Stale,
    /// There is a record, and no row with a text.
    Orphaned,
}

/// A difference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The row's id.
    pub id: String,
    /// How the index differs.
    pub kind: Kind,
}

/// What an audit found. All counts are ids.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Rows of the source.
    pub rows: u64,
    /// Records of the index.
    pub indexed: u64,
    /// Rows with a text and without a record.
    pub missing: u64,
    /// Records of another text or other metadata.
    pub stale: u64,
    /// Records without a row.
    pub orphaned: u64,
    /// Ids that differ and could not be settled in time.
    pub undecided: u64,
    /// Rows whose text was embedded anew.
    pub sampled: u64,
    /// Those whose vector the index has otherwise.
    pub vector_mismatch: u64,
    /// Ids that were queued to be done again.
    pub repaired: u64,
    /// Some of what differs.
    pub examples: Vec<Difference>,
}

impl Report {
    /// Ids that surely differ.
    #[must_use]
    pub fn differences(&self) -> u64 {
        self.missing + self.stale + self.orphaned + self.vector_mismatch
    }
}

impl fmt::Display for Report {
    /// A count a line, for people, and then some of what differs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [
            ("rows", self.rows),
            ("indexed", self.indexed),
            ("missing", self.missing),
            ("stale", self.stale),
            ("orphaned", self.orphaned),
            ("undecided", self.undecided),
            ("repaired", self.repaired),
        ];
        for (name, count) in counts {
            writeln!(f, "{name:<16} {count}")?;
        }
        writeln!(f, "{:<16} {} compared, {} otherwise", "vectors", self.sampled, self.vector_mismatch)?;
        self.examples.iter().try_for_each(|one| writeln!(f, "  {:<14} {:?}", one.id, one.kind))
    }
}

/// Compares source, ledger and index.
pub struct Auditor<'a> {
    /// Source and ledger.
    pub ledger: &'a dyn Ledger,
    /// The index.
    pub index: &'a dyn VectorIndex,
    /// The queue, to know what is on its way.
    pub queue: &'a dyn JobQueue,
    /// For the sample.
    pub embedder: Option<Arc<dyn Embedder>>,
    /// For waiting.
    pub clock: &'a dyn Clock,
    /// What is asked for.
    pub options: Options,
}

/// An id that differed when it was last seen.
struct Suspect {
    id: String,
    /// Epoch of the entry and hashes of the row, as last seen.
    state: State,
    /// Since when it has looked like this at the latest, by the database's clock: read after the
    /// state, so that whatever led to the state was captured before.
    since: Timestamp,
    /// Since when it has looked like this, by ours; none before it was looked at again.
    confirmed: Option<Duration>,
}

type State = (Option<i64>, Option<(Hash, Hash)>, Kind);

fn state(peeked: &Peeked, kind: Kind) -> State {
    let hashes = peeked.row.as_ref().map(|row| (row.content_hash, row.metadata_hash));
    (peeked.entry.as_ref().map(|entry| entry.epoch), hashes, kind)
}

/// How a record differs from its row, if it does.
fn difference(peeked: &Peeked, stored: Option<&Stored>) -> Option<Kind> {
    match (peeked.row.as_ref().filter(|row| row.has_text()), stored) {
        (None, None) => None,
        (None, Some(_)) => Some(Kind::Orphaned),
        (Some(_), None) => Some(Kind::Missing),
        (Some(row), Some(stored)) => {
            let same = stored.content_hash == Some(row.content_hash)
                && stored.metadata_hash.is_none_or(|hash| hash == row.metadata_hash);
            (!same).then_some(Kind::Stale)
        }
    }
}

impl Auditor<'_> {
    /// Walks source and index, settles what differs, and compares a sample of vectors. `progress` is
    /// told the rows and records seen so far.
    pub async fn run(&self, progress: &(dyn Fn(u64) + Sync)) -> Result<Report> {
        let mut report = Report::default();
        let mut suspects = Vec::new();
        let mut sample = Vec::new();
        self.walk_source(&mut report, &mut suspects, &mut sample, progress).await?;
        self.walk_index(&mut report, &mut suspects, progress).await?;
        self.settle(suspects, &mut report).await?;
        self.compare_vectors(sample, &mut report).await?;
        Ok(report)
    }

    async fn walk_source(
        &self,
        report: &mut Report,
        suspects: &mut Vec<Suspect>,
        sample: &mut Vec<Sample>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<()> {
        let mut after: Option<String> = None;
        loop {
            let page = self.ledger.rows_after(after.as_deref(), PAGE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = Some(last.id.clone());
            let ids: Vec<String> = page.iter().map(|peeked| peeked.id.clone()).collect();
            let mut stored = self.fetch(&ids).await?;
            let mut differing = Vec::new();
            for peeked in &page {
                report.rows += 1;
                let record = stored.remove(&peeked.id);
                match (difference(peeked, record.as_ref()), record) {
                    (Some(kind), _) => differing.push((peeked, kind)),
                    (None, Some(record)) => self.choose(sample, report.rows, peeked, record),
                    (None, None) => {}
                }
            }
            self.suspect(differing, suspects).await?;
            progress(report.rows);
            if suspects.len() >= MAX_SUSPECTS {
                self.settle(std::mem::take(suspects), report).await?;
            }
            if page.len() < PAGE {
                return Ok(());
            }
        }
    }

    /// Puts what differs among the suspects. The clock is read after they were seen.
    async fn suspect(&self, differing: Vec<(&Peeked, Kind)>, suspects: &mut Vec<Suspect>) -> Result<()> {
        if differing.is_empty() {
            return Ok(());
        }
        let since = self.ledger.pending().await?.now;
        suspects.extend(differing.into_iter().map(|(peeked, kind)| Suspect {
            id: peeked.id.clone(),
            state: state(peeked, kind),
            since,
            confirmed: None,
        }));
        Ok(())
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
            let peeked = self.ledger.peek(&page.ids).await?;
            report.indexed += peeked.len() as u64;
            let without_text = |one: &&Peeked| one.row.as_ref().is_none_or(|row| !row.has_text());
            let orphans = peeked.iter().filter(without_text).map(|one| (one, Kind::Orphaned)).collect();
            self.suspect(orphans, suspects).await?;
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

    /// Looks at suspects until each agrees, or differs for sure, or time is up.
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
            let mut sure = Vec::new();
            let mut unsure = Vec::new();
            // The outbox before the queue: what moves in between is seen twice, and not missed.
            let pending = self.ledger.pending().await?;
            let queued = self.queue.oldest().await?;
            let oldest = [pending.oldest, queued].into_iter().flatten().min();
            for chunk in chunks(suspects, PAGE) {
                self.look(chunk, oldest, &mut sure, &mut unsure).await?;
            }
            self.count(sure, report).await?;
            suspects = unsure;
            if over {
                report.undecided += suspects.len() as u64;
                return Ok(());
            }
            if !suspects.is_empty() {
                self.clock.sleep(LOOK_AGAIN).await;
            }
        }
        Ok(())
    }

    async fn look(
        &self,
        suspects: Vec<Suspect>,
        oldest: Option<Timestamp>,
        sure: &mut Vec<Difference>,
        unsure: &mut Vec<Suspect>,
    ) -> Result<()> {
        let ids: Vec<String> = suspects.iter().map(|suspect| suspect.id.clone()).collect();
        let before = self.ledger.peek(&ids).await?;
        let stored = self.fetch(&ids).await?;
        let after = self.ledger.peek(&ids).await?;
        let now = self.ledger.pending().await?.now;
        let visible_after =
            if matches!(self.index.writes(), Writes::Fenced(_)) { Duration::ZERO } else { VISIBLE_AFTER };
        for ((mut suspect, before), after) in suspects.into_iter().zip(before).zip(after) {
            let Some(kind) = difference(&after, stored.get(&suspect.id)) else {
                // A row that moves on while we look will be looked at again.
                if state(&before, Kind::Stale) != state(&after, Kind::Stale) {
                    unsure.push(suspect);
                }
                continue;
            };
            let seen = state(&after, kind);
            let is_open = after.entry.as_ref().is_some_and(|entry| entry.open > 0);
            if is_open || suspect.state != seen || state(&before, kind) != seen {
                suspect = Suspect { state: seen, since: now, confirmed: None, id: suspect.id };
                unsure.push(suspect);
                continue;
            }
            let confirmed = *suspect.confirmed.get_or_insert_with(|| self.clock.now());
            let lasting = self.clock.now().saturating_sub(confirmed) >= visible_after;
            let is_clean = after.entry.as_ref().is_some_and(|entry| entry.matches(after.row.as_ref()));
            let drained = oldest.is_none_or(|oldest| oldest > suspect.since);
            if lasting && (is_clean || drained) {
                sure.push(Difference { id: suspect.id, kind });
            } else {
                unsure.push(suspect);
            }
        }
        Ok(())
    }

    async fn count(&self, sure: Vec<Difference>, report: &mut Report) -> Result<()> {
        for difference in &sure {
            match difference.kind {
                Kind::Missing => report.missing += 1,
                Kind::Stale => report.stale += 1,
                Kind::Orphaned => report.orphaned += 1,
            }
        }
        if self.options.repair {
            let ids: Vec<String> = sure.iter().map(|difference| difference.id.clone()).collect();
            for ids in ids.chunks(PAGE) {
                self.ledger.requeue(ids).await?;
                report.repaired += ids.len() as u64;
            }
        }
        let room = MAX_EXAMPLES.saturating_sub(report.examples.len());
        report.examples.extend(sure.into_iter().take(room));
        Ok(())
    }

    async fn fetch(&self, ids: &[String]) -> Result<HashMap<String, Stored>> {
        let stored = self.index.fetch(ids).await?;
        Ok(stored.into_iter().map(|stored| (stored.id.clone(), stored)).collect())
    }
}

/// Parts of a list, by value.
fn chunks(mut list: Vec<Suspect>, size: usize) -> impl Iterator<Item = Vec<Suspect>> {
    std::iter::from_fn(move || {
        if list.is_empty() {
            return None;
        }
        let rest = list.split_off(list.len().min(size));
        Some(std::mem::replace(&mut list, rest))
    })
}
