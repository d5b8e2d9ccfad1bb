//! Writing to an index that applies what it is sent, whenever that arrives.
//!
//! The ids are opened in the ledger, *then* their rows are read, embedded and written, and then they
//! are closed. Safety rests on two rules: rows are read after the opening was committed, and whoever
//! was not alone between opening and closing knows nothing of the index afterwards. Take the last
//! attempt on an id to be opened: it read the row after every earlier opening. If it was alone from
//! opening to closing, nothing else was written meanwhile and its row is what the index holds; a row
//! that changed after the reading has a change of its own, behind it. If it was not alone, the entry
//! is dirty, and whoever brings `open` to zero puts the id into the outbox. Once faults end some
//! attempt is alone.
//!
//! Every point at which a worker can stop:
//!
//! - *before the opening is committed*: nothing happened. Told "failed" of an opening that was
//!   committed, the worker does not know its attempt; attempts have names that the worker chose
//!   beforehand, and what stands under its name and is not in its hand it disowns
//!   ([`disown`](crate::pipeline::ledger::Ledger::disown));
//! - *between opening and writing, or amid writing*: the attempt stands, so the entry is open and is
//!   neither dropped nor trusted by others. When the worker's session is gone, the attempt is swept
//!   once everything that it may have sent has been applied: the id goes back into the outbox, and
//!   nothing that it sent can come later;
//! - *frozen before a request*: the worker's lease is by a clock that goes on meanwhile; it writes
//!   again only after a heartbeat on the session that it opened the attempt with, which cannot have
//!   been swept. Frozen between that look and the sending, it writes late, finds its attempt gone at
//!   the closing, and puts it back to be swept anew. (Dying in between is the one residue that needs
//!   an index with conditions to close; `verify` finds it.)
//! - *told "failed" of a write that happened, or will*: the id is doubtful even if another try works:
//!   the closing leaves it open, as abandoned, until the settling time has passed;
//! - *before or amid the closing*: as amid writing. A closing that failed, or that nobody came to, is
//!   done again and again while the worker lives: were the attempt swept before, only the closing can
//!   tell that it wrote late. Told "failed" of a closing that was committed, it finds the attempt gone
//!   and takes it for swept: the ids are done once more. Or it finds it standing for what is in doubt
//!   alone, and then only that is closed again: the rest may be in others' attempts by now;
//! - *between closing and acknowledging*: the message comes again and finds the ids in sync.
//!
//! A TRUNCATE is expanded from the ledger: every id whose entry is not known to be deleted, *or is
//! open or dirty*. Without the last half a row could be re-inserted, read under an attempt, and
//! truncated, while its entry still says "deleted": no change would be left to take it out again.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

use super::batch::Batch;
use super::{Indexer, Round, is_in_sync};
use crate::pipeline::catalog::{Hash, SourceRow};
use crate::pipeline::change::Lane;
use crate::pipeline::embedder::Embedding;
use crate::pipeline::failure::{Class, Error, Result};
use crate::pipeline::index::{PlainWrite, Record};
use crate::pipeline::ledger::{Opened, Outcome};
use crate::pipeline::retry::Backoff;

/// Tries of one request before its attempt is closed: each later one needs the rows read anew.
const REQUEST_TRIES: u32 = 3;

/// An attempt that is being worked on.
struct InHand<'a> {
    indexer: &'a Indexer,
    name: String,
}

impl Drop for InHand<'_> {
    fn drop(&mut self) {
        self.indexer.in_hand().retain(|name| *name != self.name);
    }
}

/// What is written for an id, and what became of it.
struct Part {
    opened: Opened,
    row: Option<SourceRow>,
    outcome: Outcome,
}

impl Part {
    fn settled(&self, version: i64) -> Outcome {
        Outcome::Settled {
            content_hash: self.row.as_ref().map(|row| row.content_hash),
            metadata_hash: self.row.as_ref().map(|row| row.metadata_hash),
            deleted: self.row.is_none(),
            version,
        }
    }
}

/// One request to the index.
#[derive(Clone, Copy)]
enum Request<'a> {
    Upsert(&'a [Record]),
    Delete(&'a [String]),
}

/// What came of one request.
enum Sent {
    /// It was applied, and no earlier try of it is in doubt.
    Surely,
    /// It was applied, but an earlier try may be applied later.
    Doubtfully,
    /// It was refused for good.
    Refused(Error),
    /// It failed; whether it is in doubt stands in the first half.
    Failed(bool, Error),
}

impl Indexer {
    pub(super) async fn write_attempt(
        &self,
        plain: &dyn PlainWrite,
        lane: Lane,
        ids: &[String],
        batch: &mut Batch,
    ) -> Result<Round> {
        let peeked = self.ledger.peek(ids).await?;
        let ids: Vec<String> = peeked.into_iter().filter(|one| !is_in_sync(one)).map(|one| one.id).collect();
        if ids.is_empty() {
            return Ok(Round::default());
        }
        // An attempt of a worker without a session would be taken for a dead one's.
        let session = self.lease.current(plain.request_timeout()).await?;
        let attempt = self.take_in_hand();
        let opened = self.ledger.open(&attempt.name, &self.options.worker, &ids).await?;
        let mut parts: Vec<Part> = opened
            .into_iter()
            .map(|opened| Part { opened, row: None, outcome: Outcome::Unwritten })
            .collect();
        // Until it is closed: whatever ends this, somebody must still say that writes may be about.
        let doubtful = parts.iter().map(|part| (part.opened.clone(), Outcome::Doubtful)).collect();
        self.remember(&attempt.name, doubtful);
        let written = self.write_parts(plain, lane, session, &ids, &mut parts, batch).await;
        let closing: Vec<(Opened, Outcome)> =
            parts.into_iter().map(|part| (part.opened, part.outcome)).collect();
        self.remember(&attempt.name, closing.clone());
        let closed = self.ledger.close(&attempt.name, &self.options.worker, &closing).await;
        if closed.is_ok() {
            self.unclosed().remove(&attempt.name);
        }
        // The first failure is the one that tells most.
        let refused = written?;
        let closed = closed?;
        self.written(
            lane,
            closed.settled.iter().map(String::as_str),
            &batch.hints,
            (closed.clock_us, self.clock().now()),
        );
        Ok(Round {
            settled: closed.settled.len() as u64,
            applied: closed.settled.len() as u64 + closed.overlapped + closed.abandoned,
            refused,
            ..Round::default()
        })
    }

    fn unclosed(&self) -> MutexGuard<'_, BTreeMap<String, Vec<(Opened, Outcome)>>> {
        self.unclosed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, attempt: &str, closing: Vec<(Opened, Outcome)>) {
        self.unclosed().insert(attempt.to_owned(), closing);
    }

    /// Closes attempts that were left without a closing, or whose closing failed.
    pub(super) async fn close_left(&self) -> Result<()> {
        let left: Vec<(String, Vec<(Opened, Outcome)>)> = {
            let in_hand = self.in_hand();
            self.unclosed()
                .iter()
                .filter(|(name, _)| !in_hand.contains(name))
                .map(|(name, closing)| (name.clone(), closing.clone()))
                .collect()
        };
        for (name, closing) in left {
            self.ledger.close(&name, &self.options.worker, &closing).await?;
            self.unclosed().remove(&name);
        }
        Ok(())
    }

    /// Names of the attempts that are being worked on.
    fn in_hand(&self) -> MutexGuard<'_, Vec<String>> {
        self.in_hand.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names of the attempts that this worker will close.
    pub(super) fn own_attempts(&self) -> Vec<String> {
        let mut own = self.in_hand().clone();
        own.extend(self.unclosed().keys().cloned());
        own
    }

    fn take_in_hand(&self) -> InHand<'_> {
        let number = self.attempts.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}/{number}", self.options.worker);
        self.in_hand().push(name.clone());
        InHand { indexer: self, name }
    }

    /// Reads, embeds and writes; leaves each part's outcome in it. Returns the ids of a request that
    /// was refused; fails when nothing more can be sent.
    async fn write_parts(
        &self,
        plain: &dyn PlainWrite,
        lane: Lane,
        session: u64,
        ids: &[String],
        parts: &mut [Part],
        batch: &mut Batch,
    ) -> Result<Option<(Vec<String>, Error)>> {
        // After the opening was committed.
        for (part, peeked) in parts.iter_mut().zip(self.ledger.peek(ids).await?) {
            part.row = peeked.row;
        }
        let mut reused = self.reusable(parts).await?;
        let mut texts = BTreeMap::new();
        for part in parts.iter() {
            if let Some(row) = part.row.as_ref().filter(|row| row.has_text())
                && !reused.contains_key(&row.id)
            {
                texts.entry(row.content_hash).or_insert_with(|| row.text.clone());
            }
        }
        self.make(lane, texts, batch).await?;
        let version = |id: &str| batch.hints.get(id).map_or(0, |hint| hint.version);

        let mut records = Vec::new();
        let mut gone = Vec::new();
        let mut at: HashMap<String, usize> = HashMap::new();
        for (place, part) in parts.iter().enumerate() {
            at.insert(part.opened.id.clone(), place);
            match part.row.as_ref().filter(|row| row.has_text()) {
                None => gone.push(part.opened.id.clone()),
                Some(row) => {
                    let embedding =
                        reused.remove(&row.id).or_else(|| batch.made.get(&row.content_hash).cloned());
                    let embedding =
                        embedding.ok_or_else(|| Error::retryable("embed texts", "a text was left out"))?;
                    records.push(Record { embedding, row: row.clone(), version: version(&row.id) });
                }
            }
        }

        let mut refusal: Option<(Vec<String>, Error)> = None;
        let mut take = |ids: Vec<String>, sent: Sent| -> Result<()> {
            let mut set = |outcome: &dyn Fn(&Part) -> Outcome| {
                for id in &ids {
                    let part = &mut parts[at[id]];
                    part.outcome = outcome(part);
                }
            };
            match sent {
                Sent::Surely => set(&|part| part.settled(version(&part.opened.id))),
                Sent::Doubtfully => set(&|_| Outcome::Doubtful),
                Sent::Refused(error) => match &mut refusal {
                    Some((all, _)) => all.extend(ids),
                    None => refusal = Some((ids, error)),
                },
                Sent::Failed(doubtful, error) => {
                    if doubtful {
                        set(&|_| Outcome::Doubtful);
                    }
                    return Err(error);
                }
            }
            Ok(())
        };
        let mut rest = records.as_slice();
        while !rest.is_empty() {
            let (now, later) = rest.split_at(plain.fits(rest).clamp(1, rest.len()));
            let sent = self.send(plain, session, Request::Upsert(now)).await;
            take(now.iter().map(|record| record.row.id.clone()).collect(), sent)?;
            rest = later;
        }
        for ids in gone.chunks(plain.max_deletes().max(1)) {
            let sent = self.send(plain, session, Request::Delete(ids)).await;
            take(ids.to_vec(), sent)?;
        }
        Ok(refusal)
    }

    /// Vectors that the index holds and that still stand: the content hash was known, by an entry
    /// that nobody else had open, and the index's own copy carries it too. A dirty entry that has a hash is
    /// one of a database that went back: whatever else the index holds, a record is written whole, so that one with
    /// this hash has this text's vector.
    async fn reusable(&self, parts: &[Part]) -> Result<HashMap<String, Embedding>> {
        let wanted: HashMap<&str, Hash> = parts
            .iter()
            .filter(|part| !part.opened.shared)
            .filter_map(|part| {
                let row = part.row.as_ref().filter(|row| row.has_text())?;
                (part.opened.content_hash == Some(row.content_hash))
                    .then_some((part.opened.id.as_str(), row.content_hash))
            })
            .collect();
        if wanted.is_empty() {
            return Ok(HashMap::new());
        }
        let ids: Vec<String> = wanted.keys().map(|id| (*id).to_owned()).collect();
        let stored = match self.index.fetch(&ids).await {
            // Vectors that are not told are made anew. The write shows whether everything is refused.
            Err(error) if error.class != Class::Retryable => {
                tracing::debug!(%error, "cannot look for vectors that still stand");
                return Ok(HashMap::new());
            }
            stored => stored?,
        };
        Ok(stored
            .into_iter()
            .filter(|stored| stored.content_hash == wanted.get(stored.id.as_str()).copied())
            .map(|stored| (stored.id, stored.embedding))
            .collect())
    }

    /// Sends a request within the lease, a few times if need be.
    async fn send(&self, plain: &dyn PlainWrite, session: u64, request: Request<'_>) -> Sent {
        let mut doubtful = false;
        let mut backoff = Backoff::default();
        loop {
            if let Err(error) = self.lease.ensure(session, plain.request_timeout()).await {
                return Sent::Failed(doubtful, error);
            }
            let answer = match request {
                Request::Upsert(records) => plain.upsert(records).await,
                Request::Delete(ids) => plain.delete(ids).await,
            };
            let error = match answer {
                Ok(()) if doubtful => return Sent::Doubtfully,
                Ok(()) => return Sent::Surely,
                Err(error) => error,
            };
            // What would concern everything may be said of this request only, as by a filter before the index.
            let about_change = error.doubtful || error.class == Class::Fatal;
            let error = Error { about_change, ..error };
            doubtful |= error.doubtful;
            let over = backoff.failures() + 1 >= REQUEST_TRIES || self.health.is_outage();
            match error.class {
                // A refusal says nothing of an earlier try, and that one's ids must stay open.
                Class::Permanent if !doubtful => return Sent::Refused(error),
                Class::Retryable if !over => self.clock().sleep(backoff.next(&error, self.clock())).await,
                _ => return Sent::Failed(doubtful, error),
            }
        }
    }
}
