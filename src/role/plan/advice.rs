//! What must change so that a deadline holds, and with how many workers it does.

use serde::Serialize;

use super::scenario::{Index, PINECONE_BYTES, PINECONE_REQUESTS, Queue, SQS_IN_FLIGHT, Scenario};
use super::simulate::simulate;
use super::timeline::Timeline;
use crate::pipeline::scaling::Policy;

/// The more the parts can take above the bare need, the fewer workers the ramp needs. Tried one after the other.
const HEADROOM: [f64; 8] = [1.01, 1.03, 1.06, 1.1, 1.2, 1.4, 2.0, 3.0];

/// Seconds that scaling takes before it asks for workers.
const FIRST_LOOK: f64 = 10.0;

/// No more workers than this are tried.
const MOST_WORKERS: f64 = 200_000.0;

/// A part of which more is needed.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Change {
    pub(super) part: &'static str,
    pub(super) from: f64,
    pub(super) to: f64,
    pub(super) reason: String,
}

/// How the deadline holds.
#[derive(Clone, Debug)]
pub(super) struct Remedy {
    /// Parts to enlarge or to partition.
    pub(super) changes: Vec<Change>,
    /// The most workers that scaling must allow.
    pub(super) workers: u32,
    /// Whether all of them must work from the start.
    pub(super) from_start: bool,
    /// Databases over which the table is spread, and rows a second that each must take.
    pub(super) databases: f64,
    pub(super) scenario: Scenario,
    pub(super) timeline: Timeline,
}

/// Why no number of workers holds the deadline.
pub(super) type Impossible = String;

/// What is needed for a deadline in seconds. `largest_database` is what the largest database takes.
pub(super) fn remedy(base: &Scenario, deadline: f64, largest_database: f64) -> Result<Remedy, Impossible> {
    let mut ways = HEADROOM.iter().map(|headroom| (*headroom, false)).collect::<Vec<_>>();
    // Where a worker starts too slowly, all must be there before.
    ways.extend(HEADROOM.iter().map(|headroom| (*headroom, true)));
    for (headroom, from_start) in ways {
        let lead = if from_start { 0.0 } else { base.startup + FIRST_LOOK };
        if lead >= deadline {
            continue;
        }
        let needed = (base.records / (deadline - lead) + base.edits) * headroom;
        let (scenario, changes, databases) = enlarged(base, needed, largest_database);
        if let Some((workers, scenario, timeline)) = fewest(&scenario, deadline, needed, from_start) {
            return Ok(Remedy { changes, workers, from_start, databases, scenario, timeline });
        }
    }
    Err("no number of workers is enough: edits alone may take what the parts can do".into())
}

/// The fewest workers with which the deadline holds.
fn fewest(
    scenario: &Scenario,
    deadline: f64,
    needed: f64,
    from_start: bool,
) -> Option<(u32, Scenario, Timeline)> {
    let with = |most: u32| {
        let all = most as usize;
        let least = if from_start { all } else { scenario.scaling.least.min(all) };
        let scaling = Policy { least, most: all, ..scenario.scaling };
        let scenario = Scenario { scaling, ..scenario.clone() };
        let timeline = simulate(&scenario);
        timeline.drained.is_some_and(|drained| drained <= deadline).then_some((most, scenario, timeline))
    };
    let (mut few, mut many) =
        (0, (3.0 * needed / scenario.worker_rate).ceil().clamp(1.0, MOST_WORKERS) as u32);
    let mut found = with(many)?;
    while few + 1 < many {
        let middle = few + (many - few) / 2;
        match with(middle) {
            Some(holds) => (many, found) = (middle, holds),
            None => few = middle,
        }
    }
    Some(found)
}

/// The scenario with every part large enough for so many rows a second, and what was changed.
fn enlarged(base: &Scenario, needed: f64, largest_database: f64) -> (Scenario, Vec<Change>, f64) {
    let mut scenario = base.clone();
    let mut changes = Vec::new();
    let mut databases = 1.0_f64;
    let mut raise = |part, from: f64, to: f64, reason: String| {
        if to > from {
            changes.push(Change { part, from, to, reason });
        }
        from.max(to)
    };
    let rows = super::text::amount;

    let reason = "more statements beside each other write the rows".to_owned();
    scenario.load_rate = raise("load rate", base.load_rate, needed.ceil(), reason);

    let busy = base.edits / base.relay_edit_rate;
    let relays = (needed / base.relay_bulk_rate + busy).ceil();
    let reason = format!("one moves {} rows/s of a load", rows(base.relay_bulk_rate));
    scenario.relays = raise("relays", base.relays, relays, reason);

    if let Queue::Sqs { queues } = base.queue {
        let each = SQS_IN_FLIGHT * base.pack / base.hold.max(0.001);
        let reason = format!("120,000 messages in flight are {} rows/s for each", rows(each));
        scenario.queue = Queue::Sqs { queues: raise("queues", queues, (needed / each).ceil(), reason) };
    }
    match base.index {
        Index::Pinecone { namespaces, wire_bytes } => {
            let by_bytes = PINECONE_BYTES / wire_bytes;
            let by_requests = PINECONE_REQUESTS * base.records_per_request();
            // Edits take an upsert each, up to half of them all.
            let of_bulk = (needed - base.edits) / by_requests;
            let wanted = (of_bulk + base.edits / PINECONE_REQUESTS).min(2.0 * of_bulk);
            let wanted = (needed / by_bytes).max(wanted).ceil();
            let reason = if by_bytes <= by_requests {
                format!("50 MB a second are {} rows/s for each", rows(by_bytes))
            } else {
                format!("100 upserts a second are {} rows/s for each", rows(by_requests))
            };
            let namespaces = raise("namespaces", namespaces, wanted, reason);
            scenario.index = Index::Pinecone { namespaces, wire_bytes };
        }
        Index::Pgvector { rate } => {
            databases = (needed / rate).ceil().max(1.0);
            scenario.index = Index::Pgvector { rate: rate * databases };
        }
    }
    databases = databases.max((needed / largest_database.max(base.database_rate)).ceil());
    if databases > 1.0 {
        let reason = match base.index {
            Index::Pgvector { rate } if rate <= largest_database => {
                format!("the search structure of one takes {} rows/s", rows(rate))
            }
            _ => format!("the largest takes {} rows/s", rows(largest_database)),
        };
        raise("databases", 1.0, databases, reason);
    }
    let each = needed / databases;
    if each > base.database_rate {
        let reason = "rows a second that each must take".to_owned();
        raise("database rate", base.database_rate, each.ceil(), reason);
    }
    scenario.database_rate = base.database_rate.max(each) * databases;
    (scenario, changes, databases)
}
