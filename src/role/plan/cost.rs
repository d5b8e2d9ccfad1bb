//! What the parts cost: the load itself, and each month after it.

use serde::Serialize;

use super::prices::{Instance, Prices};
use super::scenario::{Index, Queue, Scenario};
use super::text::amount;
use super::timeline::Timeline;

const HOUR: f64 = 3_600.0;
const HOURS_A_MONTH: f64 = 730.0;
const MONTH: f64 = HOURS_A_MONTH * HOUR;
const GB: f64 = 1e9;
const MILLION: f64 = 1e6;

/// A relay's task: virtual CPUs and GB of memory.
const RELAY: (f64, f64) = (0.5, 1.0);

/// Requests that SQS bills for a message of a load: 740 for 2,000 messages, as measured (see the README).
const REQUESTS_PER_MESSAGE: f64 = 0.37;

/// Requests for a message of edits: send, receive, delete.
const REQUESTS_PER_EDIT: f64 = 3.0;

/// Messages of edits in a second at most: edits that come closer together share one.
const EDIT_MESSAGES: f64 = 100.0;

/// Receives of an idle worker in a second: one in 20 seconds for each of two queues.
const IDLE_RECEIVES: f64 = 0.1;

/// Pinecone bills a write unit for each KB of a request, five at least, and for the record that is overwritten.
const WRITE_UNIT: f64 = 1_024.0;
const LEAST_WRITE_UNITS: f64 = 5.0;

/// Pinecone bills a query with a read unit for each GB of the namespace, a quarter at least.
const LEAST_READ_UNITS: f64 = 0.25;

/// Bytes of a row in the database beside its text and metadata: the table's own, ledger, statistics.
const BOOKS_BYTES: f64 = 300.0;

/// Bytes of a vector's place in pgvector's lists and table beside its numbers.
const LISTED_BYTES: f64 = 100.0;

/// Queries that follow a sample of the written changes until they find it: an index takes some seconds.
const QUERIES_PER_SAMPLE: f64 = 3.0;

/// The part that asks which writes queries can see.
pub(super) const FRESHNESS: &str = "index freshness";

/// What costs are made of, beside the scenario.
#[derive(Clone, Debug)]
pub(super) struct Sizes {
    pub(super) worker_vcpus: f64,
    pub(super) worker_memory: f64,
    pub(super) class: String,
    pub(super) instance: Instance,
    pub(super) databases: f64,
    pub(super) dimensions: f64,
    pub(super) row_bytes: f64,
    /// The time between two samples whose freshness is measured in Pinecone, for each lane of the fleet, in
    /// seconds.
    pub(super) freshness_sample: f64,
}

impl Sizes {
    /// Bytes of a record as Pinecone stores and bills it.
    fn record_bytes(&self) -> f64 {
        4.0 * self.dimensions + self.row_bytes
    }

    /// Bytes of a row in the database.
    fn database_bytes(&self, index: Index) -> f64 {
        let vector = match index {
            // Half precision, once in the table and once in the lists.
            Index::Pgvector { .. } => 2.0 * (2.0 * self.dimensions + LISTED_BYTES),
            Index::Pinecone { .. } => 0.0,
        };
        self.row_bytes + BOOKS_BYTES + vector
    }
}

/// A part and its cost in dollars.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Item {
    pub(super) part: &'static str,
    pub(super) quantity: String,
    /// For as long as the load takes.
    pub(super) load_usd: f64,
    /// For a month after it, with the same edits.
    pub(super) month_usd: f64,
}

/// The cost of each part.
pub(super) fn items(scenario: &Scenario, timeline: &Timeline, sizes: &Sizes, prices: &Prices) -> Vec<Item> {
    let took = timeline.duration();
    let hours = took / HOUR;
    let edits = scenario.edits;
    let task =
        |(vcpus, memory): (f64, f64)| vcpus * prices.fargate_vcpu_hour + memory * prices.fargate_gb_hour;
    let least = scenario.scaling.least as f64;

    let worker = task((sizes.worker_vcpus, sizes.worker_memory));
    let worker_hours = timeline.worker_seconds / HOUR;
    let mut items = vec![
        Item {
            part: "workers",
            quantity: format!(
                "{worker_hours:.1} h of {} vCPUs and {} GB",
                sizes.worker_vcpus, sizes.worker_memory
            ),
            load_usd: worker_hours * worker,
            month_usd: least * HOURS_A_MONTH * worker,
        },
        Item {
            part: "relays",
            quantity: format!("{} of {} vCPUs and {} GB", scenario.relays, RELAY.0, RELAY.1),
            load_usd: scenario.relays * hours * task(RELAY),
            month_usd: scenario.relays * HOURS_A_MONTH * task(RELAY),
        },
        Item {
            part: "database",
            quantity: format!("{} {}", sizes.databases, sizes.class),
            load_usd: sizes.databases * hours * sizes.instance.hour,
            month_usd: sizes.databases * HOURS_A_MONTH * sizes.instance.hour,
        },
    ];
    let stored = scenario.records * sizes.database_bytes(scenario.index) / GB;
    let month = stored * prices.rds_gb_month;
    items.push(Item {
        part: "database storage",
        quantity: format!("{stored:.1} GB"),
        load_usd: month * hours / HOURS_A_MONTH,
        month_usd: month,
    });
    if let Queue::Sqs { .. } = scenario.queue {
        let of_edits = edits.min(EDIT_MESSAGES) * REQUESTS_PER_EDIT;
        let requests = scenario.records / scenario.pack * REQUESTS_PER_MESSAGE + of_edits * took;
        let idle = least * IDLE_RECEIVES;
        let price = prices.sqs_million_requests / MILLION;
        items.push(Item {
            part: "queue",
            quantity: format!("{} requests", amount(requests)),
            load_usd: requests * price,
            month_usd: (of_edits + idle) * MONTH * price,
        });
    }
    if let Index::Pinecone { namespaces, .. } = scenario.index {
        items.extend(pinecone(scenario, timeline, sizes, prices, namespaces));
    }
    items
}

fn pinecone(
    scenario: &Scenario,
    timeline: &Timeline,
    sizes: &Sizes,
    prices: &Prices,
    namespaces: f64,
) -> [Item; 3] {
    let took = timeline.duration();
    let units = sizes.record_bytes() / WRITE_UNIT;
    // An edit overwrites a record of the same size.
    let units_of_edits = scenario.edits * (2.0 * units).max(LEAST_WRITE_UNITS);
    let written = scenario.records * units + units_of_edits * took;
    let stored = scenario.records * sizes.record_bytes() / GB;
    // One sample at a time for the whole fleet, however many workers there are; edits that come more rarely are
    // all sampled.
    let samples_of_edits = scenario.edits.min(1.0 / sizes.freshness_sample);
    let samples = (took / sizes.freshness_sample).ceil() + samples_of_edits * took;
    let queries = samples * QUERIES_PER_SAMPLE;
    let of_query = |size: f64| (size / namespaces).max(LEAST_READ_UNITS);
    // The namespaces grow from nothing to their size.
    let read = queries * of_query(stored / 2.0);
    let month = stored * prices.pinecone_gb_month;
    let (write, ask) =
        (prices.pinecone_million_write_units / MILLION, prices.pinecone_million_read_units / MILLION);
    [
        Item {
            part: "index writes",
            quantity: format!("{:.1} million write units", written / MILLION),
            load_usd: written * write,
            month_usd: units_of_edits * MONTH * write,
        },
        Item {
            part: FRESHNESS,
            quantity: format!("{} queries, {:.1} million read units", amount(queries), read / MILLION),
            load_usd: read * ask,
            month_usd: samples_of_edits * QUERIES_PER_SAMPLE * MONTH * of_query(stored) * ask,
        },
        Item {
            part: "index storage",
            quantity: format!("{stored:.1} GB"),
            load_usd: month * took / MONTH / 2.0,
            month_usd: month,
        },
    ]
}

/// The sums of both columns.
pub(super) fn total(items: &[Item]) -> (f64, f64) {
    items.iter().fold((0.0, 0.0), |(load, month), item| (load + item.load_usd, month + item.month_usd))
}
