//! Suspects: ids that differed when they were last compared, and the rules by which a difference is certain.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use jiff::Timestamp;

use super::pages::{self, PAGE};
use super::report::{Difference, DifferenceKind};
use crate::pipeline::clock::Clock;
use crate::pipeline::failure::Result;
use crate::pipeline::index::{Stored, VectorIndex, Writes};
use crate::pipeline::ledger::{Ledger, Peeked};
use crate::pipeline::queue::QueueStats;
use crate::pipeline::source_row::{Hash, SourceRow};
use crate::pipeline::unchanged::{Need, needed};

/// How often suspects are compared again.
pub(super) const RECHECK_PAUSE: Duration = Duration::from_millis(250);

/// An index outside of the database may show a write some time after it accepted the write. So a difference from
/// a clean entry must last this long.
const VISIBLE_AFTER: Duration = Duration::from_secs(5);

/// While many changes are under way, a difference must last this many times longer.
const LOST_AFTER_UNDER_LOAD: u32 = 30;

/// Epoch of the entry and hashes of the row, and how they differ from the index.
pub(super) type State = (Option<i64>, Option<(Hash, Hash)>, DifferenceKind);

pub(super) fn state(peeked: &Peeked, kind: DifferenceKind) -> State {
    let hashes = peeked.row.as_ref().map(|row| (row.content_hash, row.metadata_hash));
    (peeked.entry.as_ref().map(|entry| entry.revision), hashes, kind)
}

/// An id that differed at its last comparison.
pub(super) struct Suspect {
    pub(super) id: String,
    /// The state at the last comparison.
    pub(super) state: State,
    /// A time at which the id was in this state, by the database's clock. The clock was read after the state, so
    /// every change that led to the state was captured before this time.
    pub(super) since: Timestamp,
    /// Since when the id has been in this state, by our clock; `None` before its second comparison.
    pub(super) stable_since: Option<Duration>,
    /// Whether the table had to be read again at the last comparison. Then a change of the id may not be captured
    /// yet.
    pub(super) waits: bool,
    /// When the id was first compared, by our clock.
    pub(super) first: Duration,
    /// The page of rows that showed the row with a text: the id before the page (`None` for the first page), and
    /// the number of rows of the page.
    pub(super) page: Option<(Option<String>, usize)>,
}

/// How a record differs from its row, if it does.
pub(super) fn difference(peeked: &Peeked, stored: Option<&Stored>) -> Option<DifferenceKind> {
    match (peeked.row.as_ref().filter(|row| row.has_text()), stored) {
        (None, None) => None,
        (None, Some(_)) => Some(DifferenceKind::Orphaned),
        (Some(_), None) => Some(DifferenceKind::Missing),
        (Some(row), Some(stored)) => match needed(Some(row), stored.known()) {
            Need::Nothing => None,
            // Not every index keeps metadata.
            Need::Metadata if stored.metadata_hash.is_none() => None,
            _ => Some(DifferenceKind::Stale),
        },
    }
}

/// Whether the id still needs work: the ledger does not say that the index holds this row.
pub(super) fn is_unsettled(peeked: &Peeked) -> bool {
    !peeked.is_in_sync()
}

/// The content of the dead-letter queue.
#[derive(Debug)]
pub(super) enum DeadLetterIds {
    /// Nothing.
    None,
    /// Changes of these ids.
    Of(HashSet<String>),
    /// Unknown dead letters: a read would hide them from other readers, or there are too many.
    Some,
}

/// The additional rules of the continuous proof.
pub(super) struct ProofContext {
    /// A difference that lasts at least this long counts as the result of a lost message.
    pub(super) lost_after: Duration,
    /// Whether hardly any changes are under way.
    pub(super) quiet: bool,
    pub(super) letters: DeadLetterIds,
}

impl ProofContext {
    /// Whether an entry's change waits in the dead-letter queue for a redrive.
    fn is_dead_lettered(&self, peeked: &Peeked) -> bool {
        peeked.entry.as_ref().is_some_and(|entry| entry.parked)
            && match &self.letters {
                DeadLetterIds::None => false,
                DeadLetterIds::Of(ids) => ids.contains(&peeked.id),
                DeadLetterIds::Some => true,
            }
    }
}

/// The result of comparing suspects again.
#[derive(Default)]
pub(super) struct Rechecked {
    pub(super) confirmed: Vec<Difference>,
    pub(super) unconfirmed: Vec<Suspect>,
    pub(super) unreadable: Vec<String>,
}

/// The comparison of suspects.
pub(super) struct Recheck<'a> {
    pub(super) ledger: &'a dyn Ledger,
    pub(super) index: &'a dyn VectorIndex,
    pub(super) queue: &'a dyn QueueStats,
    pub(super) clock: &'a dyn Clock,
    /// None for an audit.
    pub(super) proof: Option<ProofContext>,
}

impl Recheck<'_> {
    /// How an id differs. For the proof, an unsettled entry is a difference too, because its message may be lost.
    pub(super) fn classify(&self, peeked: &Peeked, stored: Option<&Stored>) -> Option<DifferenceKind> {
        let Some(proof) = &self.proof else { return difference(peeked, stored) };
        if proof.is_dead_lettered(peeked) {
            return None;
        }
        difference(peeked, stored).or_else(|| is_unsettled(peeked).then_some(DifferenceKind::Unsettled))
    }

    pub(super) async fn fetch(&self, ids: &[String]) -> Result<HashMap<String, Stored>> {
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        let stored = self.index.fetch(ids).await?;
        Ok(stored.into_iter().map(|stored| (stored.id.clone(), stored)).collect())
    }

    /// Makes suspects of ids that differ. The clock is read after the ids were compared.
    pub(super) async fn suspect(
        &self,
        differing: Vec<(&Peeked, DifferenceKind)>,
        page: Option<&(Option<String>, usize)>,
    ) -> Result<Vec<Suspect>> {
        if differing.is_empty() {
            return Ok(Vec::new());
        }
        let pending = self.ledger.pending().await?;
        let first = self.clock.now();
        let has_text = |peeked: &Peeked| peeked.row.as_ref().is_some_and(SourceRow::has_text);
        let suspects = differing.into_iter().map(|(peeked, kind)| Suspect {
            id: peeked.id.clone(),
            state: state(peeked, kind),
            since: pending.now,
            stable_since: None,
            waits: pending.rereads,
            first,
            page: page.filter(|_| has_text(peeked)).cloned(),
        });
        Ok(suspects.collect())
    }

    /// Compares all suspects once.
    pub(super) async fn run(&self, mut suspects: Vec<Suspect>) -> Result<Rechecked> {
        // The outbox is read before the queue. So a change that moves in between is counted twice, and not missed.
        let pending = self.ledger.pending().await?;
        // While a table is read again, changes of the suspects may come into the outbox with a later time than the
        // suspects have. After the table has been read, all of these changes are older than now.
        for suspect in &mut suspects {
            if pending.rereads {
                suspect.waits = true;
            } else if std::mem::take(&mut suspect.waits) {
                (suspect.since, suspect.stable_since) = (pending.now, None);
            }
        }
        let queued = self.queue.oldest().await?;
        let oldest = [pending.oldest, queued].into_iter().flatten().min();
        let mut rechecked = Rechecked::default();
        while !suspects.is_empty() {
            let rest = suspects.split_off(suspects.len().min(PAGE));
            self.recheck_page(std::mem::replace(&mut suspects, rest), oldest, &mut rechecked).await?;
        }
        Ok(rechecked)
    }

    async fn recheck_page(
        &self,
        suspects: Vec<Suspect>,
        oldest: Option<Timestamp>,
        rechecked: &mut Rechecked,
    ) -> Result<()> {
        let ids: Vec<String> = suspects.iter().map(|suspect| suspect.id.clone()).collect();
        let before = by_id(pages::peek(self.ledger, &ids).await?.0);
        let stored = self.fetch(&ids).await?;
        let (after, unreadable) = pages::peek(self.ledger, &ids).await?;
        let now = self.ledger.pending().await?.now;
        let after = by_id(after);
        rechecked.unreadable.extend(unreadable);
        let visible_after = if matches!(self.index.writes(), Writes::Transactional(_)) {
            Duration::ZERO
        } else {
            VISIBLE_AFTER
        };
        let mut vanished = Vec::new();
        for mut suspect in suspects {
            let Some(after) = after.get(&suspect.id) else { continue };
            let before = before.get(&suspect.id);
            let stands = |kind| before.is_some_and(|before| state(before, kind) == state(after, kind));
            let Some(kind) = self.classify(after, stored.get(&suspect.id)) else {
                // A row that changed during the comparison is compared again.
                if !stands(DifferenceKind::Stale) {
                    rechecked.unconfirmed.push(suspect);
                } else if after.row.is_none() && suspect.page.is_some() {
                    vanished.push(suspect);
                }
                continue;
            };
            let seen = state(after, kind);
            let is_open = after.entry.as_ref().is_some_and(|entry| entry.open > 0);
            if is_open || suspect.state != seen || !stands(kind) {
                rechecked.unconfirmed.push(Suspect {
                    state: seen,
                    since: now,
                    stable_since: None,
                    ..suspect
                });
                continue;
            }
            let at = self.clock.now();
            let lasted = at.saturating_sub(*suspect.stable_since.get_or_insert(at));
            let is_clean = after.entry.as_ref().is_some_and(|entry| entry.matches(after.row.as_ref()));
            let drained = oldest.is_none_or(|oldest| oldest > suspect.since);
            let is_lost = !suspect.waits && (drained || self.outlasts(lasted));
            if lasted >= visible_after && (is_clean || is_lost) {
                rechecked.confirmed.push(Difference { id: suspect.id, kind });
            } else {
                rechecked.unconfirmed.push(suspect);
            }
        }
        self.confirm_gone(vanished, rechecked).await
    }

    /// Whether a difference has lasted so long that its message counts as lost. A wrong answer does no harm, because
    /// an id may be done twice. But during a load, wrong answers would double the load.
    fn outlasts(&self, lasted: Duration) -> bool {
        self.proof.as_ref().is_some_and(|proof| {
            lasted >= proof.lost_after * if proof.quiet { 1 } else { LOST_AFTER_UNDER_LOAD }
        })
    }

    /// Checks rows that a page showed and that a read by id did not find. Such a row is gone only if the page does not
    /// show it any more. If the page still shows it, reads by id are wrong, and every row would look as if it were
    /// gone.
    async fn confirm_gone(&self, vanished: Vec<Suspect>, rechecked: &mut Rechecked) -> Result<()> {
        let mut by_page: BTreeMap<(Option<String>, usize), Vec<Suspect>> = BTreeMap::new();
        for suspect in vanished {
            if let Some(page) = suspect.page.clone() {
                by_page.entry(page).or_default().push(suspect);
            }
        }
        for ((after, limit), suspects) in by_page {
            let rows = pages::rows_after(self.ledger, after.as_deref(), limit).await?.rows;
            let shown: HashSet<&str> = rows.iter().map(|row| row.id.as_str()).collect();
            for suspect in suspects.into_iter().filter(|suspect| shown.contains(suspect.id.as_str())) {
                let at = self.clock.now();
                let lasted = at.saturating_sub(suspect.stable_since.unwrap_or(at));
                // The row is compared once more, because it may have been inserted again meanwhile.
                if suspect.stable_since.is_some() && lasted >= RECHECK_PAUSE {
                    rechecked.confirmed.push(Difference { id: suspect.id, kind: DifferenceKind::Missing });
                } else {
                    let stable_since = Some(suspect.stable_since.unwrap_or(at));
                    rechecked.unconfirmed.push(Suspect { stable_since, ..suspect });
                }
            }
        }
        Ok(())
    }
}

fn by_id(peeked: Vec<Peeked>) -> HashMap<String, Peeked> {
    peeked.into_iter().map(|one| (one.id.clone(), one)).collect()
}
