//! A batch of messages, from received to acknowledged: its remaining ids, and the groups to try.
//!
//! Plain data. [`groups`](super::groups) works it off, and [`poison`](super::poison) keeps in it
//! how often its changes were tried.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use super::tries::{Tries, is_redelivered};
use crate::pipeline::change::{Group, Job};
use crate::pipeline::embedder::Embedding;
use crate::pipeline::queue::{Message, Receipt};
use crate::pipeline::source_row::Hash;
use crate::pipeline::trace::BatchTrace;

/// The result of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepOutcome {
    /// Distinct ids in the messages.
    pub changes: u64,
    /// Ids that were written or deleted in the index.
    pub applied: u64,
    /// Distinct texts that went through the model.
    pub embedded: u64,
    /// Groups that had to be done again because a row or an entry changed meanwhile.
    pub conflicts: u64,
    /// Changes moved to the dead-letter queue.
    pub dead_lettered: u64,
}

/// A change as described by the messages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hint {
    pub(super) version: i64,
    /// When its statement ran, by the database's clock, in microseconds since the epoch.
    pub(super) changed_at_us: i64,
}

/// The newest change of each id.
pub(super) type Hints = BTreeMap<String, Hint>;

/// Vectors by the content hash of their text.
pub(super) type Vectors = HashMap<Hash, Embedding>;

/// Texts by their content hash, in an order that is the same every time.
pub(super) type Texts = BTreeMap<Hash, Arc<str>>;

/// Messages that are worked on together.
pub(super) struct Batch {
    /// Messages that are not acknowledged yet.
    messages: Vec<Message>,
    /// Receipts of the messages, shared with the task that extends their visibility.
    receipts_in_flight: Arc<Mutex<Vec<Receipt>>>,
    pub(super) hints: Hints,
    /// Vectors made for the batch, so that a text is embedded once, however often its change is tried.
    pub(super) vectors: Vectors,
    pub(super) done: StepOutcome,
    /// Ids to be tried together.
    groups: VecDeque<Vec<String>>,
    /// Ids that are not finished.
    remaining: HashSet<String>,
    pub(super) tries: Tries,
    /// The traces of the messages; none if nothing is traced.
    pub(super) trace: BatchTrace,
}

/// The ids of a job, one for each of its changes.
pub(super) fn ids(job: &Job) -> impl Iterator<Item = &String> {
    job.groups.iter().flat_map(|group| &group.ids)
}

impl Batch {
    /// A batch of these messages, as far as they are about `source`, in groups of `size` ids. An id of a
    /// message that was received too often is a group of its own.
    pub(super) fn new(source: &str, messages: &[Message], size: usize) -> Self {
        let mut hints = Hints::new();
        let mut redelivered = HashSet::new();
        for message in messages {
            let Ok(job) = &message.body else { continue };
            if job.source != source {
                continue;
            }
            if is_redelivered(message) {
                redelivered.extend(ids(job).cloned());
            }
            let oldest_us = job.oldest.as_microsecond();
            for group in &job.groups {
                // The message may contain any number.
                let after_us = i64::try_from(group.after_ms).unwrap_or(i64::MAX).saturating_mul(1000);
                let hint = Hint { version: group.version, changed_at_us: oldest_us.saturating_add(after_us) };
                // No row's id has a NUL.
                for id in group.ids.iter().filter(|id| !id.contains('\0')) {
                    let known = hints.entry(id.clone()).or_insert(hint);
                    if hint.version > known.version {
                        *known = hint;
                    }
                }
            }
        }
        let (alone, together): (BTreeSet<String>, BTreeSet<String>) =
            hints.keys().cloned().partition(|id| redelivered.contains(id));
        let together: Vec<String> = together.into_iter().collect();
        let mut groups: VecDeque<Vec<String>> = together.chunks(size.max(1)).map(<[_]>::to_vec).collect();
        groups.extend(alone.into_iter().map(|id| vec![id]));
        Self {
            messages: messages.to_vec(),
            receipts_in_flight: Arc::new(Mutex::new(
                messages.iter().map(|message| message.receipt.clone()).collect(),
            )),
            done: StepOutcome { changes: hints.len() as u64, ..StepOutcome::default() },
            remaining: hints.keys().cloned().collect(),
            hints,
            vectors: Vectors::new(),
            groups,
            tries: Tries::new(redelivered),
            trace: BatchTrace::default(),
        }
    }

    /// Whether every message is acknowledged.
    pub(super) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// The messages that are not acknowledged yet.
    pub(super) fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Receipts of the messages that are not acknowledged yet.
    pub(super) fn receipts(&self) -> Vec<Receipt> {
        self.messages.iter().map(|message| message.receipt.clone()).collect()
    }

    /// The same receipts, kept up to date.
    pub(super) fn receipts_in_flight(&self) -> Arc<Mutex<Vec<Receipt>>> {
        Arc::clone(&self.receipts_in_flight)
    }

    /// Keeps only some messages. The visibility of the removed messages is not extended any more.
    pub(super) fn retain(&mut self, is_kept: impl FnMut(&Message) -> bool) {
        self.messages.retain(is_kept);
        *self.receipts_in_flight.lock().unwrap_or_else(PoisonError::into_inner) = self.receipts();
    }

    /// Receipts of messages without remaining ids.
    pub(super) fn done_with(&self) -> Vec<Receipt> {
        let is_done = |message: &&Message| {
            message.body.as_ref().is_ok_and(|job| ids(job).all(|id| !self.remaining.contains(id)))
        };
        self.messages.iter().filter(is_done).map(|message| message.receipt.clone()).collect()
    }

    /// A message that carries a change of this id, with the part of it that is about the id.
    pub(super) fn part_about(&self, id: &str) -> Option<(&Message, Job)> {
        self.messages.iter().find_map(|message| Some((message, part_of(message, id)?)))
    }

    /// Whether the id is not finished.
    pub(super) fn has(&self, id: &str) -> bool {
        self.remaining.contains(id)
    }

    /// Marks an id as finished.
    pub(super) fn finish(&mut self, id: &str) {
        self.remaining.remove(id);
    }

    /// Removes finished ids from the groups.
    pub(super) fn drop_finished(&mut self) {
        let remaining = &self.remaining;
        for group in &mut self.groups {
            group.retain(|id| remaining.contains(id));
        }
        self.groups.retain(|group| !group.is_empty());
    }

    /// Version of the newest change of an id, for display.
    pub(super) fn version(&self, id: &str) -> i64 {
        self.hints.get(id).map_or(0, |hint| hint.version)
    }

    /// Takes the group that is tried next.
    pub(super) fn next_group(&mut self) -> Option<Vec<String>> {
        self.groups.pop_front()
    }

    /// How many groups wait to be tried.
    pub(super) fn groups(&self) -> usize {
        self.groups.len()
    }

    /// Lets a group be tried next.
    pub(super) fn try_next(&mut self, group: Vec<String>) {
        self.groups.push_front(group);
    }

    /// Lets a group be tried once all others were.
    pub(super) fn try_last(&mut self, group: Vec<String>) {
        self.groups.push_back(group);
    }

    /// Lets no group be tried that holds this id only.
    pub(super) fn drop_alone(&mut self, id: &str) {
        self.groups.retain(|group| *group != [id]);
    }

    /// Lets the halves of a group be tried next.
    pub(super) fn split_next(&mut self, group: Vec<String>) {
        let (first, second) = halves(group);
        for half in [second, first].into_iter().filter(|half| !half.is_empty()) {
            self.try_next(half);
        }
    }

    /// Lets the halves of a group be tried once all others were.
    pub(super) fn split_last(&mut self, group: Vec<String>) {
        let (first, second) = halves(group);
        for half in [first, second].into_iter().filter(|half| !half.is_empty()) {
            self.try_last(half);
        }
    }
}

fn halves(mut group: Vec<String>) -> (Vec<String>, Vec<String>) {
    let second = group.split_off(group.len().div_ceil(2));
    (group, second)
}

/// The part of a message that is about one id.
fn part_of(message: &Message, id: &str) -> Option<Job> {
    let job = message.body.as_ref().ok()?;
    let groups: Vec<Group> = job
        .groups
        .iter()
        .filter(|group| group.ids.iter().any(|one| one == id))
        .map(|group| Group { ids: vec![id.to_owned()], ..group.clone() })
        .collect();
    (!groups.is_empty()).then(|| Job { groups, ..job.clone() })
}
