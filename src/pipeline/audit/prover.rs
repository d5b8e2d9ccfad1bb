//! The continuous proof: an audit that never ends, made of small steps.
//!
//! A round walks the index's ids, the rows of the source and the entries of the ledger, page by page with
//! pauses, so that it takes its period and a small share of the load. An id that differs becomes a
//! suspect, and is queued again by the audit's rules. In addition:
//!
//! - an unsettled entry is a suspect too, because its message may be lost;
//! - a difference that lasts much longer than a change takes is queued again even if the queue never
//!   drains: doing an id again is harmless;
//! - a dead-lettered change stays in the dead-letter queue; an entry marked so without a dead letter is
//!   queued.
//!
//! The [`RoundStore`] keeps the round's progress, so that another process can continue the round.
//!
//! In an index that is paid by the call, only the listed ids and a sample of the records are compared, unless
//! a full comparison is configured.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use super::pages;
use super::recheck::{DeadLetterIds, ProofContext, Recheck, Suspect};
use super::report::DifferenceKind;
use super::round::{ProofOptions, Round, RoundStore, SavedProgress, Walk};
use crate::pipeline::change::Lane;
use crate::pipeline::clock::Clock;
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::index::{VectorIndex, Writes};
use crate::pipeline::ledger::Ledger;
use crate::pipeline::queue::{DeadLetters, QueueStats};

/// How long the right to prove lasts without renewal: longer than a step takes.
const LEASE: Duration = Duration::from_secs(45);

/// The longest pause between steps; well within the lease.
const IDLE: Duration = Duration::from_secs(10);

/// How often suspects are compared again.
const RECHECK_EVERY: Duration = Duration::from_secs(1);

/// A step's pause is at least this many times as long as its work.
const REST: u32 = 9;

/// The longest pause between two pages: a small table is done sooner than its period.
const MAX_PAUSE: Duration = Duration::from_mins(1);

/// The share of a period that the walk takes; the rest is for suspects and for tables that grow.
const WALK_SHARE: f64 = 0.8;

/// Suspects at a time. While there are more, the walk waits.
const MAX_SUSPECTS: usize = 2_000;

/// While more changes than this are under way, the walk waits: they would all be suspects.
const QUIET: u64 = 1_000;

/// The longest wait for fewer changes under way. After it, a page is walked, because some queues always have many
/// changes.
const MAX_WAIT: Duration = Duration::from_mins(10);

/// Most dead letters that are read for their ids.
const MAX_LETTERS: usize = 10_000;

/// An id that no row has, recorded beside the listed ids. If it is gone, the listed ids are gone too.
const MARKER: &str = "\u{1}";

/// The round that this process works on.
pub(super) struct Running {
    pub(super) round: Round,
    suspects: Vec<Suspect>,
    /// How many rows to read at a time.
    pub(super) size: pages::Size,
    /// The pause for each row, record and entry that spreads the walk over the period.
    pause: Duration,
    next_page: Duration,
    next_recheck: Duration,
    /// Since when pages wait for fewer changes to be under way.
    waits_since: Option<Duration>,
}

impl Running {
    /// Whether pages have waited long enough for fewer changes to be under way.
    fn has_waited(&mut self, now: Duration) -> bool {
        now.saturating_sub(*self.waits_since.get_or_insert(now)) >= MAX_WAIT
    }
}

/// The continuous proof, step by step.
pub struct Prover {
    pub(super) ledger: Arc<dyn Ledger>,
    pub(super) index: Arc<dyn VectorIndex>,
    queue: Arc<dyn QueueStats>,
    dead_letters: Arc<dyn DeadLetters>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) store: Arc<dyn RoundStore>,
    pub(super) options: ProofOptions,
    running: Option<Running>,
    is_ours: bool,
}

impl Prover {
    /// A prover that has done nothing yet.
    #[must_use]
    pub fn new(
        ledger: Arc<dyn Ledger>,
        index: Arc<dyn VectorIndex>,
        queue: Arc<dyn QueueStats>,
        dead_letters: Arc<dyn DeadLetters>,
        clock: Arc<dyn Clock>,
        store: Arc<dyn RoundStore>,
        options: ProofOptions,
    ) -> Self {
        Self { ledger, index, queue, dead_letters, clock, store, options, running: None, is_ours: false }
    }

    /// Whether this worker had the right to prove at the last step.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.is_ours
    }

    /// Gives the right to prove back.
    pub async fn release(&self) -> Result<()> {
        if self.is_ours { self.store.release().await } else { Ok(()) }
    }

    /// Whether each row's record is fetched, so that listed ids need not be remembered.
    pub(super) fn fetches_all(&self) -> bool {
        self.options.full || matches!(self.index.writes(), Writes::Transactional(_))
    }

    /// Does one step. Returns how long to wait until the next one.
    pub async fn step(&mut self) -> Result<Duration> {
        let Some(saved) = self.store.acquire(LEASE).await? else {
            (self.is_ours, self.running) = (false, None);
            return Ok(IDLE);
        };
        self.is_ours = true;
        let Some(period) = self.options.period else { return Ok(IDLE) };
        let mut running = match self.running.take() {
            // The round continues unless another worker changed it meanwhile.
            Some(running) if saved.round.as_ref() == Some(&running.round) => running,
            _ => match self.open(&saved, period).await? {
                Ok(running) => running,
                Err(wait) => return Ok(wait),
            },
        };
        let wait = self.advance(&mut running).await?;
        let is_over = running.round.walk == Walk::Done && running.suspects.is_empty();
        if is_over {
            if self.store.end(&running.round).await? {
                self.store.forget_listed().await?;
                log_finished_round(&running.round);
            }
            return Ok(RECHECK_EVERY.min(period));
        }
        if saved.round.as_ref() == Some(&running.round) || self.store.save(&running.round).await? {
            self.running = Some(running);
        }
        Ok(wait)
    }

    /// The round under way, or a new round if it is due; otherwise the time until it is due.
    async fn open(&self, saved: &SavedProgress, period: Duration) -> Result<Result<Running, Duration>> {
        let resumed = match &saved.round {
            Some(round) if round.full == self.fetches_all() && self.remembers(round).await? => {
                Some(round.clone())
            }
            _ => None,
        };
        let round = if let Some(round) = resumed {
            round
        } else {
            // A beginning in the future comes from a wrong clock, and is ignored.
            let began = saved.last.map(|(began, _)| began).filter(|began| *began <= saved.now);
            let since = began.map(|began| elapsed(began, saved.now));
            if let Some(left) =
                since.and_then(|since| period.checked_sub(since)).filter(|left| !left.is_zero())
            {
                return Ok(Err(left.min(IDLE)));
            }
            self.check_reads().await?;
            self.begin(saved.now).await?
        };
        let pause = match saved.last {
            // The first round has no pauses, because nothing is proved until it ends.
            None => Duration::ZERO,
            Some((_, seen)) => {
                let expected = seen.max(3 * self.index.count().await?).max(1);
                period.mul_f64(WALK_SHARE / expected as f64)
            }
        };
        let mut running = Running {
            round,
            suspects: Vec::new(),
            size: pages::Size::default(),
            pause,
            next_page: Duration::ZERO,
            next_recheck: Duration::ZERO,
            waits_since: None,
        };
        self.recall(&mut running).await?;
        Ok(Ok(running))
    }

    async fn begin(&self, now: Timestamp) -> Result<Round> {
        let full = self.fetches_all();
        if !full {
            self.store.forget_listed().await?;
            self.store.record_listed(&[MARKER.to_owned()]).await?;
        }
        Ok(Round::new(now, full))
    }

    /// Whether the listed ids of the round still exist: a crash of the database may have removed them.
    async fn remembers(&self, round: &Round) -> Result<bool> {
        Ok(round.full || !self.store.listed(&[MARKER.to_owned()]).await?.is_empty())
    }

    /// Checks that reads by id find the rows that a page shows. With wrong reads, the proof would take every record
    /// for one without a row.
    async fn check_reads(&self) -> Result<()> {
        const SHOWN: usize = 10;
        for _ in 0..3 {
            let shown = pages::rows_after(&*self.ledger, None, SHOWN).await?.rows;
            let ids: Vec<String> = shown.into_iter().map(|row| row.id).collect();
            let (peeked, _) = pages::peek(&*self.ledger, &ids).await?;
            // All rows can be gone at once only if the table was emptied just now.
            if peeked.is_empty() || peeked.iter().any(|one| one.row.is_some()) {
                return Ok(());
            }
            self.clock.sleep(RECHECK_EVERY).await;
        }
        Err(Error::new(
            FailureKind::SourceChanged,
            "prove the index",
            "rows that a page of the table shows are not found by their ids: nothing is compared",
        ))
    }

    /// Makes suspects of the ids that an earlier process saved.
    async fn recall(&self, running: &mut Running) -> Result<()> {
        if running.round.suspects.is_empty() {
            return Ok(());
        }
        let recheck = self.recheck(DeadLetterIds::None, true);
        for ids in running.round.suspects.chunks(self.options.page.max(1)) {
            let peeked = pages::peek(&*self.ledger, ids).await?.0;
            // The next comparison finds how they differ.
            let differing = peeked.iter().map(|one| (one, DifferenceKind::Unsettled)).collect();
            running.suspects.extend(recheck.suspect(differing, None).await?);
        }
        Ok(())
    }

    fn recheck(&self, letters: DeadLetterIds, quiet: bool) -> Recheck<'_> {
        Recheck {
            ledger: &*self.ledger,
            index: &*self.index,
            queue: &*self.queue,
            clock: &*self.clock,
            proof: Some(ProofContext { lost_after: self.options.lost_after, quiet, letters }),
        }
    }

    /// Walks a page, compares suspects, both or neither.
    async fn advance(&self, running: &mut Running) -> Result<Duration> {
        let started = self.clock.now();
        let is_page_due = running.round.walk != Walk::Done
            && started >= running.next_page
            && running.suspects.len() < MAX_SUSPECTS;
        let is_recheck_due = !running.suspects.is_empty() && started >= running.next_recheck;
        if is_page_due || is_recheck_due {
            let quiet = self.backlog().await? <= QUIET;
            let recheck = self.recheck(self.letters().await?, quiet);
            let before = running.round.seen();
            let walks = is_page_due && (quiet || running.has_waited(started));
            if walks {
                running.waits_since = None;
                self.page(&recheck, running).await?;
            }
            let seen = running.round.seen().saturating_sub(before).max(1);
            if is_recheck_due {
                self.settle(&recheck, running).await?;
            }
            let worked = self.clock.now().saturating_sub(started);
            let rest = self.clock.now() + worked * REST;
            if is_page_due && !walks {
                running.next_page = rest.max(self.clock.now() + IDLE);
            } else if is_page_due {
                let pause = running.pause.saturating_mul(u32::try_from(seen).unwrap_or(u32::MAX));
                running.next_page = rest.max(self.clock.now() + pause.min(MAX_PAUSE));
            }
            running.next_recheck = rest.max(self.clock.now() + RECHECK_EVERY);
            running.round.suspects = running.suspects.iter().map(|suspect| suspect.id.clone()).collect();
        }
        let mut wait = IDLE;
        if running.round.walk != Walk::Done && running.suspects.len() < MAX_SUSPECTS {
            wait = wait.min(running.next_page.saturating_sub(self.clock.now()));
        }
        if !running.suspects.is_empty() {
            wait = wait.min(running.next_recheck.saturating_sub(self.clock.now()));
        }
        Ok(wait)
    }

    /// Changes in the outbox and the queue.
    async fn backlog(&self) -> Result<u64> {
        if self.ledger.pending().await?.rereads {
            // The number of rows still to come is unknown.
            return Ok(u64::MAX);
        }
        let mut sum = self.ledger.waiting().await?;
        for lane in Lane::ALL {
            sum += self.queue.backlog(lane).await?.total();
        }
        Ok(sum)
    }

    async fn letters(&self) -> Result<DeadLetterIds> {
        let count = self.dead_letters.count().await?;
        if count == 0 {
            return Ok(DeadLetterIds::None);
        }
        if !self.options.read_letters || count > MAX_LETTERS as u64 {
            return Ok(DeadLetterIds::Some);
        }
        let mut ids = HashSet::new();
        let mut after: Option<String> = None;
        loop {
            let letters = self.dead_letters.list(after.as_deref(), 1_000).await?;
            let Some(last) = letters.last() else { return Ok(DeadLetterIds::Of(ids)) };
            after = Some(last.id.clone());
            ids.extend(letters.into_iter().flat_map(|letter| letter.ids));
            if ids.len() > MAX_LETTERS {
                return Ok(DeadLetterIds::Some);
            }
        }
    }

    /// Walks one page.
    async fn page(&self, recheck: &Recheck<'_>, running: &mut Running) -> Result<()> {
        let suspects = match running.round.walk {
            Walk::Records => self.page_of_records(recheck, &mut running.round).await?,
            Walk::Rows => self.page_of_rows(recheck, running).await?,
            Walk::Entries => self.page_of_entries(recheck, &mut running.round).await?,
            Walk::Done => Vec::new(),
        };
        let known: HashSet<String> = running.suspects.iter().map(|suspect| suspect.id.clone()).collect();
        running.suspects.extend(suspects.into_iter().filter(|suspect| !known.contains(&suspect.id)));
        Ok(())
    }

    /// Compares the suspects again, and queues ids that certainly differ.
    async fn settle(&self, recheck: &Recheck<'_>, running: &mut Running) -> Result<()> {
        let rechecked = recheck.run(std::mem::take(&mut running.suspects)).await?;
        let ids: Vec<String> = rechecked.confirmed.iter().map(|difference| difference.id.clone()).collect();
        for ids in ids.chunks(self.options.page.max(1)) {
            self.ledger.requeue(ids).await?;
        }
        if !ids.is_empty() {
            let examples: Vec<String> = rechecked.confirmed.iter().take(5).map(ToString::to_string).collect();
            tracing::warn!(
                rows = ids.len(),
                examples = examples.join(", "),
                "the index differed from the table: these rows are queued again"
            );
        }
        running.round.differences += ids.len() as u64;
        running.round.mended += ids.len() as u64;
        // A row that always changes is always in work, so its suspect is dropped after some time.
        let give_up = self.clock.now().saturating_sub(self.options.lost_after * 3);
        let moves = |suspect: &Suspect| {
            suspect.first < give_up && suspect.stable_since.is_none_or(|since| since > give_up)
        };
        running.suspects = rechecked.unconfirmed.into_iter().filter(|suspect| !moves(suspect)).collect();
        Ok(())
    }
}

fn elapsed(from: Timestamp, to: Timestamp) -> Duration {
    Duration::try_from(to.duration_since(from)).unwrap_or_default()
}

fn log_finished_round(round: &Round) {
    tracing::info!(
        rows = round.rows,
        records = round.records,
        differences = round.differences,
        mended = round.mended,
        unreadable = round.unreadable,
        "the index was compared with the table"
    );
}
