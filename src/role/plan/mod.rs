//! `refarch plan`: how long a load takes, what limits it, and what it costs.
//!
//! The model is in [`simulate`] and knows neither settings nor prices. [`advice`] runs it again until a deadline holds,
//! [`cost`] prices a run, [`report`] and [`chart`] show it. docs/plan.md tells what the model leaves out.

mod advice;
mod amounts;
mod chart;
mod cost;
mod prices;
mod report;
mod scenario;
mod simulate;
#[cfg(test)]
mod tests;
mod text;
mod timeline;

use anyhow::Context as _;

use crate::backend::Database;
use crate::backend::postgres::measured_rate;
use crate::cli::{self, PlanIndex, PlanQueue};
use crate::config::{Index as IndexSettings, SearchMethod, Settings};
use crate::pipeline::scaling::Policy;
use cost::Sizes;
use prices::{Instance, Prices};
use report::Report;
use scenario::{Index, Queue, Scenario};

/// Rows a second that a worker makes searchable: two cores of an Intel Xeon with AMX, 38 tokens a text.
const WORKER_RATE: f64 = 830.0;

/// Rows a second that one virtual CPU of the database takes: PostgreSQL took 12 % of two cores at 830 rows/s.
const ROWS_PER_VCPU: f64 = 3_400.0;

/// Rows a second that lists take, and a graph (a million vectors of 384 dimensions, two cores).
const LISTS_RATE: f64 = 9_600.0;
const GRAPH_RATE: f64 = 393.0;

/// Changes a second that a relay moves, by statements of many rows and of one.
const RELAY_BULK_RATE: f64 = 1_000_000.0;
const RELAY_EDIT_RATE: f64 = 108_000.0;

/// Freshness of an edit (99 %), while nothing else happens and beside a load, with pgvector.
const IDLE_FRESHNESS: f64 = 0.035;
const LOADED_FRESHNESS: f64 = 0.12;

/// The time between two samples of freshness in Pinecone, if the settings name another index, in seconds.
const FRESHNESS_SAMPLE: f64 = 60.0;

/// The least backlog that scaling can aim at, in seconds.
const LEAST_TARGET: f64 = 0.1;

/// Bytes of a number of a vector in JSON, and of a record's own keys.
const JSON_BYTES: f64 = 12.0;
const RECORD_KEYS: f64 = 250.0;

/// Plans a load, and prints the plan.
pub async fn run(args: &cli::Plan, settings: &Settings) -> anyhow::Result<()> {
    let prices = Prices::read(args.prices.as_deref(), &args.region)?;
    let instance = prices.instance(&args.database_class)?;
    let (worker_rate, rate_source) = if args.rate_from_status {
        (measured(settings).await?, "measured here in the last hour")
    } else if let Some(rate) = args.worker_rate {
        (rate, "as given")
    } else {
        (WORKER_RATE, "assumed: measure it")
    };
    let scenario = scenario(args, settings, worker_rate, instance);
    let report = plan(args, settings, &prices, instance, scenario, rate_source);
    if let Some(path) = &args.svg {
        let chart = chart::svg(&report);
        std::fs::write(path, chart).with_context(|| format!("cannot write the chart {}", path.display()))?;
    }
    let text = if args.json { report.json()? + "\n" } else { report.text() };
    super::output::print(text.as_bytes())
}

/// The rate of a worker by the loads of the last hour.
async fn measured(settings: &Settings) -> anyhow::Result<f64> {
    let rate = super::harness::with_database(settings, async |database: &Database| {
        Ok(measured_rate::of_worker(&database.postgres).await?)
    });
    rate.await?.context(
        "no worker applied a load in the last hour, so there is no measured rate: give one by --worker-rate",
    )
}

/// What the flags and the settings describe.
fn scenario(args: &cli::Plan, settings: &Settings, worker_rate: f64, instance: Instance) -> Scenario {
    let is_sqs = args.queue.map_or(!settings.queue.is_pgmq(), |queue| queue == PlanQueue::Sqs);
    let is_pinecone =
        args.index.map_or(settings.index.pinecone().is_some(), |index| index == PlanIndex::Pinecone);
    let dimensions = f64::from(args.dimensions);
    let index = if is_pinecone {
        let wire_bytes = JSON_BYTES * dimensions + f64::from(args.row_bytes) + RECORD_KEYS;
        Index::Pinecone { namespaces: f64::from(args.namespaces), wire_bytes }
    } else {
        Index::Pgvector { rate: args.index_rate.unwrap_or_else(|| structure_rate(settings)) }
    };
    let lag = if is_pinecone { freshness_every(settings) } else { 0.0 };
    Scenario {
        records: args.records as f64,
        edits: args.edits_per_second,
        load_rate: args.load_rate,
        relays: f64::from(args.relays),
        relay_bulk_rate: RELAY_BULK_RATE,
        relay_edit_rate: RELAY_EDIT_RATE,
        live_bound: settings.relay.live_bound as f64,
        queue: if is_sqs { Queue::Sqs { queues: f64::from(args.queues) } } else { Queue::Pgmq },
        pack: settings.relay.pack as f64,
        worker_rate,
        startup: args.startup.as_secs_f64(),
        hold: settings.indexer.hold.as_secs_f64(),
        database_rate: args.database_rate.unwrap_or(ROWS_PER_VCPU * f64::from(instance.vcpus)),
        index,
        scaling: Policy {
            cooldown_out: args.scale_out_cooldown,
            cooldown_in: args.scale_in_cooldown,
            growth: settings.scaling.growth,
            ..Policy::backlog(
                args.target.as_secs_f64().max(LEAST_TARGET),
                args.workers.0 as usize,
                args.workers.1 as usize,
            )
        },
        idle_freshness: IDLE_FRESHNESS + lag,
        loaded_freshness: LOADED_FRESHNESS + lag,
    }
}

/// Rows a second that pgvector's search structure takes, by the settings.
fn structure_rate(settings: &Settings) -> f64 {
    match &settings.index {
        IndexSettings::Pgvector(index) if index.search == SearchMethod::Graph => GRAPH_RATE,
        _ => LISTS_RATE,
    }
}

/// How finely freshness is measured in Pinecone, in seconds.
fn freshness_every(settings: &Settings) -> f64 {
    settings.index.pinecone().map_or(1.0, |index| index.freshness.as_secs_f64())
}

/// Runs the model, and what follows from it.
fn plan(
    args: &cli::Plan,
    settings: &Settings,
    prices: &Prices,
    instance: Instance,
    scenario: Scenario,
    rate_source: &'static str,
) -> Report {
    let sizes = Sizes {
        worker_vcpus: args.worker_vcpus,
        worker_memory: args.worker_memory,
        class: args.database_class.clone(),
        instance,
        databases: 1.0,
        dimensions: f64::from(args.dimensions),
        row_bytes: f64::from(args.row_bytes),
        freshness_sample: settings
            .index
            .pinecone()
            .map_or(FRESHNESS_SAMPLE, |index| index.freshness_sample.as_secs_f64()),
    };
    let timeline = simulate::simulate(&scenario);
    let costs = cost::items(&scenario, &timeline, &sizes, prices);
    let of_vcpu = scenario.database_rate / f64::from(instance.vcpus);
    let largest =
        prices.class_with(f64::INFINITY).map_or(0.0, |(_, largest)| f64::from(largest.vcpus) * of_vcpu);
    let deadline = args.deadline.map(|deadline| deadline.as_secs_f64());
    let remedy = deadline.map(|deadline| advice::remedy(&scenario, deadline, largest));
    let mut report = Report {
        database: args.database_class.clone(),
        remedy_database: None,
        remedy_costs: None,
        region: args.region.clone(),
        price_note: prices.note([args.database_class.as_str()]),
        scenario,
        timeline,
        deadline,
        remedy,
        costs,
        rate_source,
    };
    if let Some(Ok(remedy)) = &report.remedy {
        let each = remedy.scenario.database_rate / remedy.databases;
        let mut sizes = Sizes { databases: remedy.databases, ..sizes };
        if each > report.scenario.database_rate
            && let Some((class, instance)) = prices.class_with(each / of_vcpu)
        {
            (sizes.class, sizes.instance) = (class.to_owned(), instance);
        }
        if remedy.databases > 1.0 || sizes.class != report.database {
            report.remedy_database = Some(format!("{} of {}", remedy.databases, sizes.class));
        }
        report.remedy_costs = Some(cost::items(&remedy.scenario, &remedy.timeline, &sizes, prices));
        report.price_note = prices.note([args.database_class.as_str(), sizes.class.as_str()]);
    }
    report
}
