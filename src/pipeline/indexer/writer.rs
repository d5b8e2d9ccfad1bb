//! The writer: writes one group of ids to the index.
//!
//! [`transactional`] writes to an index that shares a transaction with source and ledger, and [`tracked`] to
//! any other index. Each of them says why it is safe.
//!
//! [`transactional`]: super::transactional
//! [`tracked`]: super::tracked

use std::sync::Arc;
use std::time::Duration;

use super::batch::{Batch, Texts};
use super::freshness::FreshnessTracker;
use super::group_failure::Failure;
use super::health::Health;
use super::open_writes::OpenWrites;
use crate::pipeline::change::Lane;
use crate::pipeline::clock::Clock;
use crate::pipeline::embed_scheduler::EmbedScheduler;
use crate::pipeline::failure::{Error, Result};
use crate::pipeline::index::{VectorIndex, Writes};
use crate::pipeline::lease::Lease;
use crate::pipeline::ledger::Ledger;
use crate::pipeline::metrics::Metrics;
use crate::pipeline::source_row::Hash;

/// Bytes of rows that are read together. A row is held a few times over (as it came, as it is hashed, and
/// as it is read again under its lock), and each lane has a few batches under way.
const GROUP_BYTES: u64 = 8 << 20;

/// Up to this many rows are read without asking for their size first.
const UNASKED: usize = 2;

/// An id that the canary looks up. No row has it, of whatever type ids are.
const CANARY_ID: &str = "\0";

/// The canary's text, which any embedder can take.
const CANARY_TEXT: &str = "a plain text";

/// The result of writing a group.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// Ids that changed meanwhile: to be done again.
    pub(super) conflicted: Vec<String>,
    /// Ids that were not read, because their rows are too large to be read together with the other rows.
    pub(super) unread: Vec<String>,
    /// Ids of a request that was refused for good, and why.
    pub(super) refused: Option<(Vec<String>, Error)>,
    /// Ids written.
    pub(super) applied: u64,
    /// Number of these ids whose entry is clean now.
    pub(super) settled: u64,
}

/// The parts of a writer.
pub(super) struct Parts {
    pub(super) ledger: Arc<dyn Ledger>,
    pub(super) index: Arc<dyn VectorIndex>,
    pub(super) scheduler: EmbedScheduler,
    pub(super) metrics: Arc<Metrics>,
    pub(super) lease: Arc<Lease>,
    pub(super) health: Arc<Health>,
    /// This worker's name: tracked writes stand under it.
    pub(super) worker: String,
    /// After this long an accepted write has been applied, or never will be.
    pub(super) settle: Duration,
    /// How often an index whose queries are behind is asked at most how far they are.
    pub(super) freshness_poll: Duration,
}

/// Writes groups of ids to one index.
pub(super) struct Writer {
    pub(super) ledger: Arc<dyn Ledger>,
    pub(super) index: Arc<dyn VectorIndex>,
    pub(super) scheduler: EmbedScheduler,
    pub(super) metrics: Arc<Metrics>,
    /// The right to send a tracked write.
    pub(super) lease: Arc<Lease>,
    pub(super) health: Arc<Health>,
    pub(super) freshness: FreshnessTracker,
    pub(super) open_writes: OpenWrites,
    pub(super) settle: Duration,
}

impl Writer {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { ledger, index, scheduler, metrics, lease, health, worker, settle, freshness_poll } =
            parts;
        let freshness = FreshnessTracker::new(
            Arc::clone(&index),
            Arc::clone(&metrics),
            Arc::clone(lease.clock()),
            freshness_poll,
        );
        let scheduler = scheduler.measuring(Arc::clone(&metrics));
        let open_writes = OpenWrites::new(worker);
        Self { ledger, index, scheduler, metrics, lease, health, freshness, open_writes, settle }
    }

    /// Whether the index shares a transaction with source and ledger.
    pub(super) fn is_transactional(&self) -> bool {
        matches!(self.index.writes(), Writes::Transactional(_))
    }

    /// Writes a group of ids, except ids that are in sync.
    pub(super) async fn write(
        &self,
        lane: Lane,
        ids: &[String],
        batch: &mut Batch,
    ) -> Result<Written, Failure> {
        let (now, later) = ids.split_at(self.fits(ids).await?);
        let mut written = match self.index.writes() {
            Writes::Transactional(index) => self.write_transactional(index, lane, now, batch).await,
            Writes::External(index) => self.write_tracked(index, lane, now, batch).await,
        }?;
        written.unread = later.to_vec();
        self.metrics.applied[lane].add(written.applied);
        Ok(written)
    }

    /// How many of the first ids can be read together.
    pub(super) async fn fits(&self, ids: &[String]) -> Result<usize> {
        if ids.len() <= UNASKED {
            return Ok(ids.len());
        }
        Ok(self.ledger.fits(ids, GROUP_BYTES).await?.clamp(1, ids.len()))
    }

    /// Makes the vectors of texts that the batch has not made yet.
    pub(super) async fn embed_texts(
        &self,
        lane: Lane,
        texts: Texts,
        batch: &mut Batch,
    ) -> Result<(), Failure> {
        let (hashes, texts): (Vec<Hash>, Vec<Arc<str>>) =
            texts.into_iter().filter(|(hash, _)| !batch.vectors.contains_key(hash)).unzip();
        if texts.is_empty() {
            return Ok(());
        }
        let embedded = self.scheduler.embed(lane, texts).await;
        let vectors = embedded.map_err(|error| Failure::at_embedder(error.over_the_change()))?;
        self.health.embedded();
        batch.done.embedded += hashes.len() as u64;
        self.metrics.embedded[lane].add(hashes.len() as u64);
        batch.vectors.extend(hashes.into_iter().zip(vectors));
        Ok(())
    }

    /// Sends a harmless change the whole way: read, embedded and written; with `among_records` to where
    /// records are.
    pub(super) async fn send_canary(&self, lane: Lane, among_records: bool) -> Result<(), Failure> {
        self.ledger.peek(&[CANARY_ID.into()]).await?;
        self.scheduler.embed(lane, vec![CANARY_TEXT.into()]).await.map_err(Failure::at_embedder)?;
        self.index.ready().await;
        self.index.check_writable().await?;
        if let Writes::External(index) = self.index.writes()
            && among_records
        {
            index.probe_record().await?;
        }
        Ok(())
    }

    pub(super) fn clock(&self) -> &dyn Clock {
        &**self.lease.clock()
    }
}
