//! Writing to an index that applies a request whenever the request arrives.
//!
//! A tracked write (an *attempt*) opens the ids in the ledger, *then* reads their rows, embeds and writes
//! them, and then closes the ids. Safety rests on two rules. Rows are read after the opening was committed.
//! An attempt that overlapped with another one knows nothing of the index afterwards. Take the last attempt
//! on an id to be opened: it read the row after every earlier opening. If no other attempt was open between
//! its opening and its closing, nothing else was written meanwhile, and the index holds the row that it read.
//! A row that changed after the read has a later change of its own. If attempts overlapped, the entry is
//! dirty, and the attempt that brings `open` to zero puts the id into the outbox. Once faults end, some
//! attempt does not overlap.
//!
//! A worker can stop at any of these points:
//!
//! - *Before the opening is committed*: nothing happened. If the opening was committed but the worker got an
//!   error, the worker does not count the attempt among its own. The worker chose the attempt's name
//!   beforehand, so the ledger marks attempts of this worker that the worker does not know as abandoned
//!   ([`abandon_orphans`](crate::pipeline::ledger::Ledger::abandon_orphans)).
//! - *Between opening and writing, or amid writing*: the attempt stays, so the entry is open. Other workers
//!   neither drop it nor trust it. When the worker's session is gone, the attempt is swept once every request
//!   that it may have sent has been applied. The id goes back into the outbox, and no request of the attempt
//!   can arrive later.
//! - *Frozen before a request*: the worker's lease uses a clock that also counts during a freeze. The worker
//!   writes again only after a heartbeat on the session with which it opened the attempt. Such an attempt
//!   cannot have been swept. If the worker is frozen between this check and the request, it writes late,
//!   finds at the closing that the attempt is gone, and puts the attempt back to be swept again. (If the
//!   worker dies in between, only an index with conditional writes could help; `verify` finds the
//!   difference.)
//! - *A write that was applied, or will be, returned an error*: the id is doubtful even if another try
//!   succeeds. The closing leaves it open, as abandoned, until the settling time has passed.
//! - *Before or amid the closing*: as amid writing. A closing that failed or did not run is repeated while
//!   the worker lives: if the attempt was swept before, only the closing can tell that the worker wrote late.
//!   If a closing was committed but returned an error, the repeated closing finds the attempt gone and treats
//!   it as swept: the ids are done once more. Or it finds the attempt with only its doubtful ids. Then only
//!   these are closed again, because the other ids may be in attempts of other workers by now.
//! - *Between closing and acknowledging*: the message comes again, and its ids are in sync.
//!
//! A TRUNCATE is expanded from the ledger to every id whose entry is not known to be deleted, *or is open or
//! dirty*. Without the second half, a row could be inserted again, read by an attempt, and truncated, while
//! its entry still says "deleted". Then no change would delete its record.

use std::collections::HashMap;

use super::batch::{Batch, Texts};
use super::group_failure::Failure;
use super::open_writes::Closing;
use super::writer::{Writer, Written};
use crate::pipeline::change::Lane;
use crate::pipeline::embedder::Embedding;
use crate::pipeline::failure::{Class, Error, FailureKind, Result};
use crate::pipeline::index::{ExternalWrite, Record};
use crate::pipeline::ledger::{Opened, Outcome, Swept};
use crate::pipeline::retry::Backoff;
use crate::pipeline::source_row::SourceRow;
use crate::pipeline::unchanged::needed;

/// Tries of one request before its attempt is closed: each later one needs the rows read anew.
const REQUEST_TRIES: u32 = 3;

/// Abandoned writes that are swept in one go.
const SWEEP_AT_ONCE: usize = 100;

/// What is written for an id, and what became of it.
struct Part {
    opened: Opened,
    row: Option<SourceRow>,
    outcome: Outcome,
}

impl Part {
    /// The row, if it has a text and so a record.
    fn row_with_text(&self) -> Option<&SourceRow> {
        self.row.as_ref().filter(|row| row.has_text())
    }

    fn settled(&self, version: i64) -> Outcome {
        Outcome::Settled {
            content_hash: self.row.as_ref().map(|row| row.content_hash),
            metadata_hash: self.row.as_ref().map(|row| row.metadata_hash),
            deleted: self.row.is_none(),
            version,
        }
    }
}

/// Ids of requests that were refused for good, and why.
type Refusal = Option<(Vec<String>, Error)>;

/// One request to the index.
#[derive(Clone, Copy)]
enum Request<'a> {
    Upsert(&'a [Record]),
    Delete(&'a [String]),
}

/// What came of one request.
enum SendResult {
    /// It was applied, and no earlier try of it is in doubt.
    Applied,
    /// It was applied, but an earlier try may be applied later.
    InDoubt,
    /// It was refused for good.
    Refused(Error),
    /// It failed; whether it is in doubt stands in the first half.
    Failed(bool, Error),
}

impl Writer {
    pub(super) async fn write_tracked(
        &self,
        index: &dyn ExternalWrite,
        lane: Lane,
        ids: &[String],
        batch: &mut Batch,
    ) -> Result<Written, Failure> {
        let peeked = self.ledger.peek(ids).await?;
        let in_step = peeked.iter().filter(|one| one.is_in_sync() && one.keeps_vector()).count();
        self.metrics.unchanged.add(in_step as u64);
        let ids: Vec<String> = peeked.into_iter().filter(|one| !one.is_in_sync()).map(|one| one.id).collect();
        if ids.is_empty() {
            return Ok(Written::default());
        }
        // An attempt of a worker without a session would be taken for a dead one's.
        let term = self.lease.current(index.request_timeout()).await?;
        let write = self.open_writes.begin();
        let worker = self.open_writes.worker();
        let opened = self.ledger.open(&write.id, worker, &ids).await?;
        let mut parts: Vec<Part> = opened
            .into_iter()
            .map(|opened| Part { opened, row: None, outcome: Outcome::Unwritten })
            .collect();
        // Until it is closed: whatever ends this, somebody must still say that writes may be about.
        let doubtful = parts.iter().map(|part| (part.opened.clone(), Outcome::Doubtful)).collect();
        self.open_writes.keep_closing(&write.id, doubtful);
        let written = self.write_parts(index, lane, term, &ids, &mut parts, batch).await;
        let closing: Closing = parts.into_iter().map(|part| (part.opened, part.outcome)).collect();
        self.open_writes.keep_closing(&write.id, closing.clone());
        let trace = batch.trace.group(&ids);
        let begun = trace.now();
        let closed = self.ledger.close(&write.id, worker, &closing).await;
        trace.done("close", begun);
        if closed.is_ok() {
            self.open_writes.forget(&write.id);
        }
        // The first failure is the one that tells most.
        let refused = written?;
        let closed = closed?;
        let settled = closed.settled.iter().map(String::as_str);
        self.freshness.record(lane, settled, &batch.hints, closed.clock_us, trace);
        Ok(Written {
            settled: closed.settled.len() as u64,
            applied: closed.settled.len() as u64 + closed.overlapped + closed.abandoned,
            refused,
            ..Written::default()
        })
    }

    /// Closes writes that were left without a closing, or whose closing failed.
    pub(super) async fn close_leftover(&self) -> Result<()> {
        for (id, closing) in self.open_writes.leftover() {
            self.ledger.close(&id, self.open_writes.worker(), &closing).await?;
            self.open_writes.forget(&id);
        }
        Ok(())
    }

    /// Closes writes that were left, sweeps those that nobody will close, and disowns what the ledger has of
    /// this worker and this worker does not know of.
    pub(super) async fn sweep(&self) -> Result<Swept> {
        if self.is_transactional() {
            return Ok(Swept::default());
        }
        self.close_leftover().await?;
        self.ledger.abandon_orphans(self.open_writes.worker(), &self.open_writes.ids()).await?;
        let swept = self.ledger.sweep(self.settle, SWEEP_AT_ONCE).await?;
        if swept.writes > 0 || swept.abandoned > 0 {
            tracing::info!(
                writes = swept.writes,
                abandoned = swept.abandoned,
                requeued = swept.requeued,
                "swept attempts that nobody closed"
            );
        }
        Ok(swept)
    }

    /// Reads, embeds and writes; leaves each part's outcome in it. Returns the ids of a request that
    /// was refused; fails when nothing more can be sent.
    async fn write_parts(
        &self,
        index: &dyn ExternalWrite,
        lane: Lane,
        term: u64,
        ids: &[String],
        parts: &mut [Part],
        batch: &mut Batch,
    ) -> Result<Refusal, Failure> {
        let trace = batch.trace.group(ids);
        let begun = trace.now();
        // After the opening was committed.
        for (part, peeked) in parts.iter_mut().zip(self.ledger.peek(ids).await?) {
            part.row = peeked.row;
        }
        let mut reused = self.reusable_vectors(parts).await?;
        trace.done("read", begun);
        self.metrics.unchanged.add(reused.len() as u64);
        let (mut texts, mut wanted) = (Texts::new(), 0);
        for row in parts.iter().filter_map(Part::row_with_text) {
            if !reused.contains_key(&row.id) {
                wanted += 1;
                texts.entry(row.content_hash).or_insert_with(|| row.text.clone());
            }
        }
        self.metrics.same_text.add(wanted - texts.len() as u64);
        let begun = trace.now();
        self.embed_texts(lane, texts, batch).await?;
        trace.done("embed", begun);

        let begun = trace.now();
        let mut records = Vec::new();
        let mut gone = Vec::new();
        for part in parts.iter() {
            let Some(row) = part.row_with_text() else {
                gone.push(part.opened.id.clone());
                continue;
            };
            let embedding =
                reused.remove(&row.id).or_else(|| batch.vectors.get(&row.content_hash).cloned()).ok_or_else(
                    || Error::new(FailureKind::UnexpectedAnswer, "embed texts", "a text was left out"),
                )?;
            records.push(Record { embedding, row: row.clone(), version: batch.version(&row.id) });
        }

        let mut outcomes = Outcomes::new(parts, batch);
        let mut rest = records.as_slice();
        while !rest.is_empty() {
            let (now, later) = rest.split_at(index.fits(rest).clamp(1, rest.len()));
            let sent = self.send(index, term, Request::Upsert(now)).await;
            outcomes.take(now.iter().map(|record| record.row.id.clone()).collect(), sent)?;
            rest = later;
        }
        for ids in gone.chunks(index.max_deletes().max(1)) {
            let sent = self.send(index, term, Request::Delete(ids)).await;
            outcomes.take(ids.to_vec(), sent)?;
        }
        trace.done("write", begun);
        Ok(outcomes.refusal)
    }

    /// Vectors that the index holds and that still stand: the content hash was known, by an entry that
    /// nobody else had open, and the index's own copy carries it too. A dirty entry that has a hash is one
    /// of a database that went back: whatever else the index holds, a record is written whole, so that one
    /// with this hash has this text's vector.
    async fn reusable_vectors(&self, parts: &[Part]) -> Result<HashMap<String, Embedding>> {
        let stands = |row: &SourceRow, known| needed(Some(row), known).keeps_vector();
        let wanted: HashMap<&str, &SourceRow> = parts
            .iter()
            .filter_map(|part| Some((part.row_with_text()?, part.opened.known())))
            .filter(|(row, known)| stands(row, *known))
            .map(|(row, _)| (row.id.as_str(), row))
            .collect();
        if wanted.is_empty() {
            return Ok(HashMap::new());
        }
        let ids: Vec<String> = wanted.keys().map(|id| (*id).to_owned()).collect();
        self.index.ready().await;
        let stored = match self.index.fetch(&ids).await {
            // Vectors that are not told are made anew. The write shows whether everything is refused.
            Err(error) if error.class() != Class::Retryable => {
                tracing::debug!(%error, "cannot look for vectors that still stand");
                return Ok(HashMap::new());
            }
            stored => stored?,
        };
        Ok(stored
            .into_iter()
            .filter(|stored| wanted.get(stored.id.as_str()).is_some_and(|row| stands(row, stored.known())))
            .map(|stored| (stored.id, stored.embedding))
            .collect())
    }

    /// Sends a request within the lease, a few times if need be.
    async fn send(&self, index: &dyn ExternalWrite, term: u64, request: Request<'_>) -> SendResult {
        let mut doubtful = false;
        let mut backoff = Backoff::default();
        loop {
            // Not with the lease in hand: an index may ask to be left alone for longer than that lasts.
            self.index.ready().await;
            if let Err(error) = self.lease.ensure(term, index.request_timeout()).await {
                return SendResult::Failed(doubtful, error);
            }
            let started = self.clock().now();
            let (answer, times) = match request {
                Request::Upsert(records) => (index.upsert(records).await, &self.metrics.writes),
                Request::Delete(ids) => (index.delete(ids).await, &self.metrics.deletes),
            };
            times.observe(self.clock().now().saturating_sub(started).as_secs_f64());
            let error = match answer {
                Ok(()) if doubtful => return SendResult::InDoubt,
                Ok(()) => return SendResult::Applied,
                Err(error) => error,
            };
            // What would concern everything may be said of this request only, as by a filter before the
            // index.
            let is_about_change = error.is_doubtful() || error.class() == Class::Fatal;
            doubtful |= error.is_doubtful();
            let error = if is_about_change { error.over_the_change() } else { error };
            let over = backoff.failures() + 1 >= REQUEST_TRIES || self.health.is_outage();
            match error.class() {
                // A refusal says nothing of an earlier try, and that one's ids must stay open.
                Class::Permanent if !doubtful => return SendResult::Refused(error),
                Class::Retryable if !over => {
                    self.metrics.apply_retries.count(error.kind());
                    let pause = backoff.next(self.clock());
                    // The index itself says when it is ready again.
                    if error.kind() != FailureKind::RateLimited {
                        self.clock().sleep(pause).await;
                    }
                }
                _ => return SendResult::Failed(doubtful, error),
            }
        }
    }
}

/// Puts what came of requests into the parts of a write.
struct Outcomes<'a> {
    parts: &'a mut [Part],
    /// Where each id's part is.
    at: HashMap<String, usize>,
    batch: &'a Batch,
    refusal: Refusal,
}

impl<'a> Outcomes<'a> {
    fn new(parts: &'a mut [Part], batch: &'a Batch) -> Self {
        let at = parts.iter().enumerate().map(|(at, part)| (part.opened.id.clone(), at)).collect();
        Self { parts, at, batch, refusal: None }
    }

    /// Takes what came of a request for these ids; fails when nothing more can be sent.
    fn take(&mut self, ids: Vec<String>, sent: SendResult) -> Result<()> {
        match sent {
            SendResult::Applied => {
                for id in &ids {
                    let part = &mut self.parts[self.at[id]];
                    part.outcome = part.settled(self.batch.version(id));
                }
            }
            SendResult::InDoubt => self.doubt(&ids),
            SendResult::Refused(error) => match &mut self.refusal {
                Some((all, _)) => all.extend(ids),
                None => self.refusal = Some((ids, error)),
            },
            SendResult::Failed(doubtful, error) => {
                if doubtful {
                    self.doubt(&ids);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn doubt(&mut self, ids: &[String]) {
        for id in ids {
            self.parts[self.at[id]].outcome = Outcome::Doubtful;
        }
    }
}
