//! What is planned: the load, the parts of the system, and what each part takes.
//!
//! Amounts are rows, times are seconds, rates are a second; all are `f64`, since the model is a fluid one.

use serde::Serialize;

use crate::pipeline::scaling::Policy;

/// Messages in flight that a queue of SQS allows.
pub(super) const SQS_IN_FLIGHT: f64 = 120_000.0;

/// Upserts a second that Pinecone takes for a namespace.
pub(super) const PINECONE_REQUESTS: f64 = 100.0;

/// Bytes of upserts a second that Pinecone takes for a namespace.
pub(super) const PINECONE_BYTES: f64 = 50e6;

/// Bytes of records in one upsert, and records in it, as the client for Pinecone packs them.
const REQUEST_BYTES: f64 = 1_900_000.0;
const REQUEST_RECORDS: f64 = 1_000.0;

/// A worker writes groups of rows that take this long to embed, of so many rows.
const GROUP_SECONDS: f64 = 0.5;
const GROUP_ROWS: (f64, f64) = (32.0, 1_000.0);

/// The part of an index's upserts that edits take at most: beyond it, edits share upserts.
const LIVE_REQUESTS: f64 = 0.5;

/// The part of the workers' time that edits get while a load waits: seven slices of eight.
pub(super) const LIVE_SHARE: f64 = 7.0 / 8.0;

/// What a relay claims in one step: rows of the outbox that are edits, and rows of a load.
const CLAIM_EDITS: f64 = 2_000.0;
const CLAIM_BULK: f64 = 100_000.0;

/// The queue between relays and workers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Queue {
    /// In the database: no limit of its own.
    Pgmq,
    /// So many queues for the bulk lane.
    Sqs { queues: f64 },
}

/// The vector index.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Index {
    /// Rows a second that the search structure takes, in all.
    Pgvector { rate: f64 },
    /// Namespaces, and bytes of a record on the wire.
    Pinecone { namespaces: f64, wire_bytes: f64 },
}

/// The whole of what is planned.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Scenario {
    /// Rows of the load.
    pub(super) records: f64,
    /// Edits of single rows.
    pub(super) edits: f64,
    /// Rows that the load writes into the table.
    pub(super) load_rate: f64,
    pub(super) relays: f64,
    /// Changes of loads that one relay moves, and edits.
    pub(super) relay_bulk_rate: f64,
    pub(super) relay_edit_rate: f64,
    /// Edits that may wait in the live lane; more go to the bulk lane.
    pub(super) live_bound: f64,
    pub(super) queue: Queue,
    /// Changes in a message of a load.
    pub(super) pack: f64,
    /// Rows that one worker makes searchable.
    pub(super) worker_rate: f64,
    /// How long a worker takes until it works.
    pub(super) startup: f64,
    /// How long a worker holds a message of a load.
    pub(super) hold: f64,
    /// Rows that the database takes: reads, ledger, and vectors and messages if they are in it.
    pub(super) database_rate: f64,
    pub(super) index: Index,
    /// How workers come and go.
    pub(super) scaling: Policy,
    /// Freshness of an edit that waits for nothing: while nothing else happens, and beside a load.
    pub(super) idle_freshness: f64,
    pub(super) loaded_freshness: f64,
}

/// What can limit the flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Stage {
    /// The statements that write the rows.
    Load,
    Relay,
    /// SQS: messages that were received and not deleted.
    QueueInFlight,
    Workers,
    Database,
    /// pgvector: the search structure.
    IndexInserts,
    /// Pinecone: upserts a second and namespace.
    IndexRequests,
    /// Pinecone: bytes a second and namespace.
    IndexBytes,
    /// Nothing waits anywhere.
    None,
}

impl Stage {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Load => "load into the table",
            Self::Relay => "relay",
            Self::QueueInFlight => "queue: messages in flight",
            Self::Workers => "workers",
            Self::Database => "database",
            Self::IndexInserts => "index: inserts",
            Self::IndexRequests => "index: upserts a second",
            Self::IndexBytes => "index: bytes a second",
            Self::None => "nothing",
        }
    }
}

/// What a stage takes, in rows a second.
pub(super) type Ceiling = (Stage, f64);

impl Scenario {
    /// What the stages from the queue on take of loads and edits together.
    pub(super) fn ceilings(&self, workers: f64) -> Vec<Ceiling> {
        let mut ceilings =
            vec![(Stage::Workers, workers * self.worker_rate), (Stage::Database, self.database_rate)];
        if let Queue::Sqs { queues } = self.queue {
            // Little's law: what may be in flight, over how long it stays there.
            let in_flight = queues * SQS_IN_FLIGHT * self.pack;
            ceilings.push((Stage::QueueInFlight, in_flight / self.hold.max(0.001)));
        }
        match self.index {
            Index::Pgvector { rate } => ceilings.push((Stage::IndexInserts, rate)),
            Index::Pinecone { namespaces, wire_bytes } => {
                ceilings.push((Stage::IndexBytes, namespaces * PINECONE_BYTES / wire_bytes));
            }
        }
        ceilings
    }

    /// What the index's limit on requests leaves for rows of a load, beside so many edits.
    pub(super) fn request_ceiling(&self, edits: f64) -> Option<f64> {
        let Index::Pinecone { namespaces, .. } = self.index else { return None };
        let all = namespaces * PINECONE_REQUESTS;
        Some((all - edits.min(all * LIVE_REQUESTS)) * self.records_per_request())
    }

    /// Rows of a load in one upsert: a group is cut where a request is full.
    pub(super) fn records_per_request(&self) -> f64 {
        let Index::Pinecone { wire_bytes, .. } = self.index else { return f64::INFINITY };
        let group = (self.worker_rate * GROUP_SECONDS).clamp(GROUP_ROWS.0, GROUP_ROWS.1);
        let fits = (REQUEST_BYTES / wire_bytes).floor().clamp(1.0, REQUEST_RECORDS);
        group / (group / fits).ceil()
    }

    /// Edits that the relays move, while a load waits in the outbox or not: a claim holds some of each.
    pub(super) fn relay_edits(&self, has_load: bool) -> f64 {
        let alone = self.relays * self.relay_edit_rate;
        if !has_load {
            return alone;
        }
        let claim = CLAIM_EDITS / self.relay_edit_rate + CLAIM_BULK / self.relay_bulk_rate;
        self.relays * CLAIM_EDITS / claim
    }

    /// Changes of a load that the relays move beside so many edits.
    pub(super) fn relay_bulk(&self, edits: f64) -> f64 {
        let busy = edits / (self.relays * self.relay_edit_rate);
        self.relays * self.relay_bulk_rate * (1.0 - busy).max(0.0)
    }
}
