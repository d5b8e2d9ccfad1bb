//! Suspects: ids that differed when they were last seen, and when their difference is sure.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use jiff::Timestamp;

use super::read;
use super::{Difference, Kind, LOOK_AGAIN, PAGE};
use crate::pipeline::catalog::{Hash, SourceRow};
use crate::pipeline::clock::Clock;
use crate::pipeline::failure::Result;
use crate::pipeline::index::{Stored, VectorIndex, Writes};
use crate::pipeline::ledger::{Ledger, Peeked};
use crate::pipeline::queue::QueueStats;
use crate::pipeline::unchanged::{Need, needed};

/// An index outside of the database may show a write a little later than it accepts it: a difference
/// to a clean entry must last this long.
const VISIBLE_AFTER: Duration = Duration::from_secs(5);

/// With many changes under way, a difference must last this many times as long as without.
const PATIENCE_UNDER_LOAD: u32 = 30;

/// Epoch of the entry and hashes of the row, and how they differ from the index.
pub(super) type State = (Option<i64>, Option<(Hash, Hash)>, Kind);

pub(super) fn state(peeked: &Peeked, kind: Kind) -> State {
    let hashes = peeked.row.as_ref().map(|row| (row.content_hash, row.metadata_hash));
    (peeked.entry.as_ref().map(|entry| entry.epoch), hashes, kind)
}

/// An id that differed when it was last seen.
pub(super) struct Suspect {
    pub(super) id: String,
    /// As last seen.
    pub(super) state: State,
    /// Since when it has looked like this at the latest, by the database's clock: read after the
    /// state, so that whatever led to the state was captured before.
    pub(super) since: Timestamp,
    /// Since when it has looked like this, by ours; none before it was looked at again.
    pub(super) confirmed: Option<Duration>,
    /// Whether the table was to be read anew when it was seen: a change of it is still to be captured, then.
    pub(super) waits: bool,
    /// When it was first seen, by our clock.
    pub(super) first: Duration,
    /// The page of rows that showed a row with a text: the id before the page, which is none for the
    /// first page, and how many rows it had.
    pub(super) page: Option<(Option<String>, usize)>,
}

/// How a record differs from its row, if it does.
pub(super) fn difference(peeked: &Peeked, stored: Option<&Stored>) -> Option<Kind> {
    match (peeked.row.as_ref().filter(|row| row.has_text()), stored) {
        (None, None) => None,
        (None, Some(_)) => Some(Kind::Orphaned),
        (Some(_), None) => Some(Kind::Missing),
        (Some(row), Some(stored)) => match needed(Some(row), stored.known()) {
            Need::Nothing => None,
            // Not every index keeps metadata.
            Need::Metadata if stored.metadata_hash.is_none() => None,
            _ => Some(Kind::Stale),
        },
    }
}

/// Whether the ledger does not say that the index holds this row: somebody must still see to the id.
pub(super) fn is_unsettled(peeked: &Peeked) -> bool {
    !peeked.is_in_sync()
}

/// What stands in the dead letters.
#[derive(Debug)]
pub(super) enum Letters {
    /// Nothing.
    None,
    /// Changes of these ids.
    Of(HashSet<String>),
    /// Something: reading it would keep it from others, or there is too much.
    Some,
}

/// What the continuous proof does beyond an audit.
pub(super) struct Proving {
    /// How long a difference must last until it is taken for a lost message.
    pub(super) patience: Duration,
    /// Whether hardly any changes are under way.
    pub(super) quiet: bool,
    pub(super) letters: Letters,
}

impl Proving {
    /// Whether an entry waits in the dead letters for somebody to bring it back.
    fn is_given_up(&self, peeked: &Peeked) -> bool {
        peeked.entry.as_ref().is_some_and(|entry| entry.parked)
            && match &self.letters {
                Letters::None => false,
                Letters::Of(ids) => ids.contains(&peeked.id),
                Letters::Some => true,
            }
    }
}

/// What looking at suspects came to.
#[derive(Default)]
pub(super) struct Looked {
    pub(super) sure: Vec<Difference>,
    pub(super) unsure: Vec<Suspect>,
    pub(super) unreadable: Vec<String>,
}

/// A look at suspects.
pub(super) struct Look<'a> {
    pub(super) ledger: &'a dyn Ledger,
    pub(super) index: &'a dyn VectorIndex,
    pub(super) queue: &'a dyn QueueStats,
    pub(super) clock: &'a dyn Clock,
    /// None for an audit.
    pub(super) proving: Option<Proving>,
}

impl Look<'_> {
    /// How an id differs. For the proof an entry that nobody has settled differs too: its message may be
    /// lost.
    pub(super) fn judge(&self, peeked: &Peeked, stored: Option<&Stored>) -> Option<Kind> {
        let Some(proving) = &self.proving else { return difference(peeked, stored) };
        if proving.is_given_up(peeked) {
            return None;
        }
        difference(peeked, stored).or_else(|| is_unsettled(peeked).then_some(Kind::Unsettled))
    }

    pub(super) async fn fetch(&self, ids: &[String]) -> Result<HashMap<String, Stored>> {
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        let stored = self.index.fetch(ids).await?;
        Ok(stored.into_iter().map(|stored| (stored.id.clone(), stored)).collect())
    }

    /// Makes suspects of ids that differ. The clock is read after they were seen.
    pub(super) async fn suspect(
        &self,
        differing: Vec<(&Peeked, Kind)>,
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
            confirmed: None,
            waits: pending.rereads,
            first,
            page: page.filter(|_| has_text(peeked)).cloned(),
        });
        Ok(suspects.collect())
    }

    /// Looks at all suspects once.
    pub(super) async fn all(&self, mut suspects: Vec<Suspect>) -> Result<Looked> {
        // The outbox before the queue: what moves in between is seen twice, and not missed.
        let pending = self.ledger.pending().await?;
        // What a table's being read anew puts into the outbox seems younger than the suspects that it is about.
        // When that is over, all of it is older than now.
        for suspect in &mut suspects {
            if pending.rereads {
                suspect.waits = true;
            } else if std::mem::take(&mut suspect.waits) {
                (suspect.since, suspect.confirmed) = (pending.now, None);
            }
        }
        let queued = self.queue.oldest().await?;
        let oldest = [pending.oldest, queued].into_iter().flatten().min();
        let mut looked = Looked::default();
        while !suspects.is_empty() {
            let rest = suspects.split_off(suspects.len().min(PAGE));
            self.some(std::mem::replace(&mut suspects, rest), oldest, &mut looked).await?;
        }
        Ok(looked)
    }

    async fn some(
        &self,
        suspects: Vec<Suspect>,
        oldest: Option<Timestamp>,
        looked: &mut Looked,
    ) -> Result<()> {
        let ids: Vec<String> = suspects.iter().map(|suspect| suspect.id.clone()).collect();
        let before = by_id(read::peek(self.ledger, &ids).await?.0);
        let stored = self.fetch(&ids).await?;
        let (after, unreadable) = read::peek(self.ledger, &ids).await?;
        let now = self.ledger.pending().await?.now;
        let after = by_id(after);
        looked.unreadable.extend(unreadable);
        let visible_after =
            if matches!(self.index.writes(), Writes::Fenced(_)) { Duration::ZERO } else { VISIBLE_AFTER };
        let mut vanished = Vec::new();
        for mut suspect in suspects {
            let Some(after) = after.get(&suspect.id) else { continue };
            let before = before.get(&suspect.id);
            let stands = |kind| before.is_some_and(|before| state(before, kind) == state(after, kind));
            let Some(kind) = self.judge(after, stored.get(&suspect.id)) else {
                // A row that moves on while we look will be looked at again.
                if !stands(Kind::Stale) {
                    looked.unsure.push(suspect);
                } else if after.row.is_none() && suspect.page.is_some() {
                    vanished.push(suspect);
                }
                continue;
            };
            let seen = state(after, kind);
            let is_open = after.entry.as_ref().is_some_and(|entry| entry.open > 0);
            if is_open || suspect.state != seen || !stands(kind) {
                looked.unsure.push(Suspect { state: seen, since: now, confirmed: None, ..suspect });
                continue;
            }
            let at = self.clock.now();
            let lasted = at.saturating_sub(*suspect.confirmed.get_or_insert(at));
            let is_clean = after.entry.as_ref().is_some_and(|entry| entry.matches(after.row.as_ref()));
            let drained = oldest.is_none_or(|oldest| oldest > suspect.since);
            let is_lost = !suspect.waits && (drained || self.outlasts(lasted));
            if lasted >= visible_after && (is_clean || is_lost) {
                looked.sure.push(Difference { id: suspect.id, kind });
            } else {
                looked.unsure.push(suspect);
            }
        }
        self.confirm_gone(vanished, looked).await
    }

    /// Whether a difference has lasted so long that its message must be lost. Doing it again is harmless,
    /// so that this may be wrong; but while a load waits its turn it would double the load.
    fn outlasts(&self, lasted: Duration) -> bool {
        self.proving.as_ref().is_some_and(|proving| {
            lasted >= proving.patience * if proving.quiet { 1 } else { PATIENCE_UNDER_LOAD }
        })
    }

    /// A row that a page showed and that a read by its id does not find is gone only if the page does not
    /// show it any more. Else reads by id lie, and every row would pass for one that is gone.
    async fn confirm_gone(&self, vanished: Vec<Suspect>, looked: &mut Looked) -> Result<()> {
        let mut by_page: BTreeMap<(Option<String>, usize), Vec<Suspect>> = BTreeMap::new();
        for suspect in vanished {
            if let Some(page) = suspect.page.clone() {
                by_page.entry(page).or_default().push(suspect);
            }
        }
        for ((after, limit), suspects) in by_page {
            let rows = read::rows_after(self.ledger, after.as_deref(), limit).await?.rows;
            let shown: HashSet<&str> = rows.iter().map(|row| row.id.as_str()).collect();
            for suspect in suspects.into_iter().filter(|suspect| shown.contains(suspect.id.as_str())) {
                let at = self.clock.now();
                let lasted = at.saturating_sub(suspect.confirmed.unwrap_or(at));
                // Once more, for a row that came back in between.
                if suspect.confirmed.is_some() && lasted >= LOOK_AGAIN {
                    looked.sure.push(Difference { id: suspect.id, kind: Kind::Missing });
                } else {
                    let confirmed = Some(suspect.confirmed.unwrap_or(at));
                    looked.unsure.push(Suspect { confirmed, ..suspect });
                }
            }
        }
        Ok(())
    }
}

fn by_id(peeked: Vec<Peeked>) -> HashMap<String, Peeked> {
    peeked.into_iter().map(|one| (one.id.clone(), one)).collect()
}
