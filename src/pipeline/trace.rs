//! Traces: what happened to a change from its statement until it was searchable, as spans with a common trace id.
//!
//! The relay chooses the messages that are traced and puts a [`TraceContext`] into them. The indexer continues the trace
//! of such a message. All spans are made after the fact, from two times, and handed to a [`SpanSink`]. A message without
//! a context costs a comparison with `None`.

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use sha2::{Digest, Sha256};

use super::change::{Group, Job, Lane, MessageTrace};

/// Takes finished spans. Never blocks: spans that it has no room for are lost.
pub trait SpanSink: Send + Sync {
    /// Takes a span.
    fn record(&self, span: Span);
}

/// An identifier of a span.
pub type SpanId = [u8; 8];

/// A part of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The trace that it belongs to.
    pub trace: [u8; 16],
    /// Its own id.
    pub id: SpanId,
    /// The span that it is a part of; none for the first one.
    pub parent: Option<SpanId>,
    /// What was done.
    pub name: &'static str,
    /// When it began.
    pub start: SystemTime,
    /// When it ended.
    pub end: SystemTime,
    /// The lane of the message.
    pub lane: Lane,
    /// Changes that it was about.
    pub changes: u64,
}

/// The trace and the span that a message continues, as in the header `traceparent` of W3C Trace Context. Only sampled
/// traces travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace.
    pub trace: [u8; 16],
    /// The span before.
    pub span: SpanId,
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-01", u128::from_be_bytes(self.trace), u64::from_be_bytes(self.span))
    }
}

impl FromStr for TraceContext {
    type Err = ();

    /// Reads version 00. Later versions begin in the same way.
    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split('-');
        let mut hex = |digits: usize| {
            let part = parts.next().filter(|part| part.len() == digits).ok_or(())?;
            let is_hex = part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            is_hex.then(|| u128::from_str_radix(part, 16).map_err(|_| ())).ok_or(())?
        };
        let (version, trace, span, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
        if version == 0xff || trace == 0 || span == 0 || flags & 1 == 0 {
            return Err(());
        }
        Ok(Self { trace: trace.to_be_bytes(), span: (span as u64).to_be_bytes() })
    }
}

/// Chooses the messages that are traced.
#[derive(Clone)]
pub struct Sampler {
    /// The part of the messages, from 0 to 1.
    share: f64,
    sink: Arc<dyn SpanSink>,
}

impl Sampler {
    /// Traces this part of the messages.
    #[must_use]
    pub fn new(share: f64, sink: Arc<dyn SpanSink>) -> Self {
        Self { share, sink }
    }

    /// The context of a message, if it is traced. The same changes get the same ids: a message that is made again after
    /// a crash continues its trace.
    fn choose(&self, job: &Job) -> Option<TraceContext> {
        let first: &Group = job.groups.first()?;
        let mut hash = Sha256::new();
        hash.update(job.source.as_bytes());
        hash.update(first.version.to_be_bytes());
        hash.update(job.oldest.as_microsecond().to_be_bytes());
        hash.update(first.ids.first()?.as_bytes());
        let hash: [u8; 32] = hash.finalize().into();
        let (trace, rest) = hash.split_first_chunk()?;
        let (span, rest) = rest.split_first_chunk()?;
        let chance = u64::from_be_bytes(*rest.first_chunk()?) as f64 / u64::MAX as f64;
        (chance < self.share).then_some(TraceContext { trace: *trace, span: *span })
    }

    /// Puts contexts into the messages that are traced, and returns these traces.
    pub(super) fn mark(&self, jobs: &mut [Job]) -> Vec<Captured> {
        let mut captured = Vec::new();
        for job in jobs {
            let Some(context) = self.choose(job) else { continue };
            job.trace = Some(MessageTrace { parent: context.to_string(), packed: Timestamp::now() });
            captured.push(Captured {
                context,
                lane: job.lane,
                changes: job.changes() as u64,
                since: job.oldest,
            });
        }
        captured
    }

    /// Records that the changes of these messages were captured: from the statement until the transfer was committed.
    pub(super) fn transferred(&self, captured: Vec<Captured>) {
        let end = SystemTime::now();
        for Captured { context, lane, changes, since } in captured {
            let start = SystemTime::from(since).min(end);
            let TraceContext { trace, span } = context;
            self.sink.record(Span {
                trace,
                id: span,
                parent: None,
                name: "capture",
                start,
                end,
                lane,
                changes,
            });
        }
    }
}

/// A traced message of a transfer that is not committed yet.
pub(super) struct Captured {
    context: TraceContext,
    lane: Lane,
    changes: u64,
    /// When its oldest statement ran.
    since: Timestamp,
}

/// A traced message in a batch.
struct Traced {
    trace: [u8; 16],
    /// The span of waiting in the queue, and that of the work on the batch.
    queue: SpanId,
    apply: SpanId,
    changes: u64,
    ids: HashSet<String>,
}

/// The traces that a batch of messages continues; usually none.
#[derive(Default)]
pub(super) struct BatchTrace {
    sink: Option<Arc<dyn SpanSink>>,
    traced: Vec<Traced>,
    lane: Option<Lane>,
    received: Option<SystemTime>,
}

impl BatchTrace {
    /// The traces of messages that were received just now.
    pub(super) fn of<'a>(sink: Option<&Arc<dyn SpanSink>>, jobs: impl Iterator<Item = &'a Job>) -> Self {
        let Some(sink) = sink else { return Self::default() };
        let mut batch = Self::default();
        for job in jobs {
            let Some(message) = &job.trace else { continue };
            let Ok(TraceContext { trace, span }) = message.parent.parse() else { continue };
            let end = *batch.received.get_or_insert_with(SystemTime::now);
            let (queue, apply) = (rand::random(), rand::random());
            let changes = job.changes() as u64;
            let start = SystemTime::from(message.packed).min(end);
            let (lane, parent) = (job.lane, Some(span));
            sink.record(Span { trace, id: queue, parent, name: "queue", start, end, lane, changes });
            let ids = job.groups.iter().flat_map(|group| group.ids.iter().cloned()).collect();
            batch.traced.push(Traced { trace, queue, apply, changes, ids });
            batch.lane = Some(lane);
        }
        if !batch.traced.is_empty() {
            batch.sink = Some(Arc::clone(sink));
        }
        batch
    }

    /// The traces that a group of ids is about.
    pub(super) fn group(&self, ids: &[String]) -> GroupTrace {
        let (Some(sink), Some(lane)) = (&self.sink, self.lane) else { return GroupTrace::default() };
        let parents: Vec<([u8; 16], SpanId)> = self
            .traced
            .iter()
            .filter(|traced| ids.iter().any(|id| traced.ids.contains(id)))
            .map(|traced| (traced.trace, traced.apply))
            .collect();
        if parents.is_empty() {
            return GroupTrace::default();
        }
        GroupTrace(Some(Arc::new(TracedGroup {
            sink: Arc::clone(sink),
            lane,
            parents,
            changes: ids.len() as u64,
        })))
    }

    /// Records that the batch was worked off and acknowledged.
    pub(super) fn applied(&self) {
        let (Some(sink), Some(lane), Some(start)) = (&self.sink, self.lane, self.received) else { return };
        let end = SystemTime::now();
        for Traced { trace, queue, apply, changes, .. } in &self.traced {
            let (trace, id, parent, changes) = (*trace, *apply, Some(*queue), *changes);
            sink.record(Span { trace, id, parent, name: "apply", start, end, lane, changes });
        }
    }
}

/// The traces that a group of ids is about; usually none.
#[derive(Clone, Default)]
pub(super) struct GroupTrace(Option<Arc<TracedGroup>>);

struct TracedGroup {
    sink: Arc<dyn SpanSink>,
    lane: Lane,
    /// The trace and the parent of each span.
    parents: Vec<([u8; 16], SpanId)>,
    changes: u64,
}

impl GroupTrace {
    /// The present moment, if anything is traced.
    pub(super) fn now(&self) -> Option<SystemTime> {
        self.0.is_some().then(SystemTime::now)
    }

    /// Records what was done from `since` until now.
    pub(super) fn done(&self, name: &'static str, since: Option<SystemTime>) {
        let (Some(group), Some(start)) = (&self.0, since) else { return };
        let end = SystemTime::now().max(start);
        for (trace, parent) in &group.parents {
            group.sink.record(Span {
                trace: *trace,
                id: rand::random(),
                parent: Some(*parent),
                name,
                start,
                end,
                lane: group.lane,
                changes: group.changes,
            });
        }
    }

    /// Records what was done until now and took so long.
    pub(super) fn took(&self, name: &'static str, duration: Duration) {
        self.done(name, self.now().and_then(|now| now.checked_sub(duration)));
    }
}
