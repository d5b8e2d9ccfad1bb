//! Writing to an index that shares a transaction with source and ledger.
//!
//! The worker peeks at row and entry, and makes the vector. Then one transaction locks the entry, reads the
//! row again, and writes index and ledger only where both are unchanged. So, with the entry locked, the index
//! goes from one state that the ledger describes to the next:
//!
//! - A worker that dies or freezes before the commit has written nothing, and the message comes again. If the
//!   worker writes later, after a freeze, it finds another revision or another row.
//! - A worker that gets an error for a commit that happened peeks again, and finds the ids in sync.
//! - A row that changes after the commit has its own change in the outbox.

use std::collections::HashSet;

use super::batch::{Batch, Texts, Vectors};
use super::group_failure::Failure;
use super::writer::{Writer, Written};
use crate::pipeline::change::Lane;
use crate::pipeline::failure::Result;
use crate::pipeline::index::{Desired, Planned, TransactionalWrite};
use crate::pipeline::ledger::Peeked;
use crate::pipeline::source_row::Hash;
use crate::pipeline::unchanged::Need;

/// The content hash of the text whose vector a write wants, if it wants one.
type Wants = Option<Hash>;

impl Writer {
    pub(super) async fn write_transactional(
        &self,
        index: &dyn TransactionalWrite,
        lane: Lane,
        ids: &[String],
        batch: &mut Batch,
    ) -> Result<Written, Failure> {
        let trace = batch.trace.group(ids);
        let begun = trace.now();
        let peeked = self.ledger.peek(ids).await?;
        let unchanged = peeked.iter().filter(|one| one.keeps_vector()).count() as u64;
        self.metrics.unchanged.add(unchanged);
        trace.done("read", begun);
        let (planned, texts) = plan(peeked, batch);
        let wanted = planned.iter().filter(|(_, wants)| wants.is_some()).count();
        self.metrics.same_text.add((wanted - texts.len()) as u64);
        if planned.is_empty() {
            return Ok(Written::default());
        }
        let begun = trace.now();
        self.embed_texts(lane, texts, batch).await?;
        trace.done("embed", begun);
        let planned = with_vectors(planned, &batch.vectors);
        let begun = trace.now();
        let started = self.clock().now();
        let applied = index.apply(&planned).await;
        self.metrics.writes.observe(self.clock().now().saturating_sub(started).as_secs_f64());
        let applied = applied?;
        trace.done("write", begun);
        let conflicted: HashSet<&str> = applied.conflicted.iter().map(String::as_str).collect();
        let written = planned.iter().map(|write| write.id.as_str()).filter(|id| !conflicted.contains(id));
        self.freshness.record(lane, written, &batch.hints, applied.clock_us, trace);
        let settled = (planned.len() - applied.conflicted.len()) as u64;
        Ok(Written { conflicted: applied.conflicted, applied: settled, settled, ..Written::default() })
    }
}

/// Decides what is to be done for each id, dropping those that are in sync, and lists the distinct
/// texts whose vectors are wanted.
fn plan(peeked: Vec<Peeked>, batch: &Batch) -> (Vec<(Planned, Wants)>, Texts) {
    let mut planned = Vec::new();
    let mut texts = Texts::new();
    for one in peeked {
        let need = one.need();
        if need == Need::Nothing {
            continue;
        }
        let Peeked { id, row, entry } = one;
        let mut wants = None;
        let desired = match row {
            None => Desired::Absent,
            Some(row) if need == Need::Delete => Desired::Textless { row },
            Some(row) => {
                if need == Need::Vector {
                    texts.entry(row.content_hash).or_insert_with(|| row.text.clone());
                    wants = Some(row.content_hash);
                }
                Desired::Present { row, embedding: None }
            }
        };
        let version = batch.version(&id);
        planned.push((Planned { id, revision: entry.map(|entry| entry.revision), version, desired }, wants));
    }
    (planned, texts)
}

/// Gives each write the vector that it wants.
fn with_vectors(planned: Vec<(Planned, Wants)>, vectors: &Vectors) -> Vec<Planned> {
    planned
        .into_iter()
        .map(|(mut write, wants)| {
            if let Desired::Present { embedding, .. } = &mut write.desired {
                *embedding = wants.and_then(|hash| vectors.get(&hash).cloned());
            }
            write
        })
        .collect()
}
