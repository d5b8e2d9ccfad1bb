//! `refarch chaos`: injects faults, then compares table and index.
//!
//! The roles run as separate processes, as in production, on a private database. The index is by default a
//! double of Pinecone that can fail. A writer changes the table and remembers which rows must be searchable.
//! While it writes, the faults of the schedule are injected. Then faults and writer stop, the roles drain,
//! and three comparisons are made: the audit's, the writer's memory with the table, and the writer's memory
//! with the index itself.
//!
//! The processes of the roles have only the database rights that `refarch migrate --roles` gives. The
//! application has its own database role. `refarch chaos` itself connects as the superuser.

mod environment;
mod fault_injector;
mod fault_schedule;
mod operator;
mod processes;
mod workload;

use std::fmt::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;
use tokio::sync::{Mutex, RwLock, mpsc};
use tokio_util::sync::CancellationToken;

use super::generate;
use super::progress::Progress;
use crate::backend::postgres::Postgres;
use crate::backend::{Backends, LoadedModel};
use crate::cli;
use crate::config::Settings;
use crate::double::pinecone::{PineconeCounts, PineconeDouble, PineconeFaults};
use crate::double::sqs::{SqsCounts, SqsDouble, SqsFaults};
use crate::pipeline::audit::{AuditOptions, Auditor, Report};
use crate::pipeline::clock::BootClock;
use crate::pipeline::failure::chain;
use crate::shutdown;
use environment::Environment;
use fault_injector::{FaultInjector, InjectedFaults};
use operator::{OperationCounts, Operator};
use processes::RoleProcesses;
use workload::{ExpectedRows, TableShape, Workload, WorkloadCounts};

/// The roles that run, one process each.
const ROLES: &[&[&str]] = &[&["listen"], &["listen"], &["embed"], &["embed"]];

/// How long draining may make no progress.
const STUCK_AFTER: Duration = Duration::from_mins(3);

/// How often the backlog is polled while it drains.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Number of rows whose vectors are compared.
const SAMPLE: usize = 200;

/// How long a round of the continuous proof may take. Its period is a minute here, or less.
const PROOF_WAIT: Duration = Duration::from_mins(6);

/// How long the audit waits for changes that are under way.
const WAIT: Duration = Duration::from_mins(2);

/// The report: what was done, and the comparisons.
#[derive(Debug, Serialize)]
struct ChaosReport {
    seed: u64,
    minutes: f64,
    products: u64,
    /// Faults that were injected.
    faults: InjectedFaults,
    /// Operations on the database, as operators do them.
    operated: OperationCounts,
    /// Processes that refused settings which differed from those of the fleet.
    configurations_refused: u64,
    /// Requests to the Pinecone double and its faults; none with pgvector.
    index: Option<PineconeCounts>,
    /// Requests to the SQS double and its faults; none with pgmq.
    queue: Option<SqsCounts>,
    /// Statements of the application.
    written: WorkloadCounts,
    /// Errors of the application's statements, the first few.
    failures: Vec<String>,
    /// Seconds from the end of the faults to the end of a round of the continuous proof; none without the
    /// proof.
    proved_s: Option<f64>,
    /// Differences that the proof found and queued again, also during the faults.
    proof_differences: u64,
    /// Seconds from the end of the faults until nothing was under way.
    drained_s: f64,
    /// Number of dead letters.
    dead_letters: u64,
    /// Processes that ended by themselves, with their exit status.
    ended: Vec<String>,
    /// Rows that differ between the table and the writer's memory.
    table_differs: u64,
    /// Records that differ between the index and the writer's memory.
    index_differs: u64,
    #[serde(flatten)]
    report: Report,
}

impl ChaosReport {
    fn code(&self) -> u8 {
        let differs = self.report.differences()
            + self.dead_letters
            + self.table_differs
            + self.index_differs
            + self.operated.rows_hidden_untold
            + self.written.writes_failed;
        if differs > 0 || !self.ended.is_empty() {
            1
        } else if self.report.undecided + self.report.unsampled > 0 {
            2
        } else {
            0
        }
    }
}

/// Runs the command.
pub async fn run(args: &cli::Chaos, settings: &Settings) -> anyhow::Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    let environment = Box::pin(Environment::create(settings, args)).await?;
    let outcome = Box::pin(run_experiment(args, &environment, &stop)).await;
    let clean = outcome.as_ref().is_ok_and(|outcome| outcome.as_ref().is_none_or(|o| o.code() == 0));
    let dir = environment.dir.clone();
    environment.tear_down(!clean).await?;
    if !clean {
        eprintln!("the logs of the roles are in {}", dir.display());
    }
    let Some(outcome) = outcome? else {
        eprintln!("chaos was stopped before its end: nothing was compared");
        return Ok(ExitCode::from(2));
    };
    let json = serde_json::to_string(&outcome)? + "\n";
    super::print(if args.json { json } else { text(&outcome) }.as_bytes())?;
    Ok(ExitCode::from(outcome.code()))
}

async fn run_experiment(
    args: &cli::Chaos,
    environment: &Environment,
    stop: &CancellationToken,
) -> anyhow::Result<Option<ChaosReport>> {
    let table = &environment.settings.source.table;
    let client = environment.client().await?;
    let progress = Progress::new("loading products", args.products);
    generate::load(&client, table, args.products, args.seed, &progress).await?;
    progress.finish();
    drop(client);

    let lasting = Duration::from_secs_f64(args.minutes * 60.0);
    let processes = Mutex::new(RoleProcesses::new(ROLES, environment.variables(), &environment.dir));
    let faults = fault_schedule::generate(args.seed, lasting, ROLES.len(), &args.faults);
    let table_shape: Arc<RwLock<TableShape>> = Arc::default();
    let mut workload =
        Workload::new(environment.application_url(), args.seed, Arc::clone(&table_shape)).await?;
    let truncate = AtomicBool::new(false);
    let (over, workload_stop) = (stop.child_token(), stop.child_token());
    processes.lock().await.supervise()?;
    let progress = Progress::new("seconds of chaos", lasting.as_secs());
    let (operations, ordered) = mpsc::unbounded_channel();
    let mut injector = FaultInjector {
        environment,
        processes: &processes,
        operations,
        truncate: &truncate,
        done: InjectedFaults::default(),
    };
    let mut operator = Operator {
        environment,
        processes: &processes,
        table_shape: &table_shape,
        done: OperationCounts::default(),
    };
    let injected = async {
        let result = injector.run(faults, lasting, stop, &progress).await;
        over.cancel();
        result
    };
    // The application writes until the operator has restored the table's form.
    let operated = async {
        let result = operator.run(ordered, &over).await;
        workload_stop.cancel();
        result
    };
    let (injected, operated, wrote) = tokio::join!(
        injected,
        operated,
        workload.run(&workload_stop, || truncate.swap(false, Ordering::Relaxed))
    );
    let (done, operated_on) = (injector.done, operator.done);
    progress.finish();
    injected?;
    operated?;
    wrote?;
    let mut processes = processes.into_inner();

    if let Some(double) = &environment.pinecone_double {
        double.set_faults(PineconeFaults::default());
    }
    if let Some(double) = &environment.sqs_double {
        double.set_faults(SqsFaults::default());
    }
    if let Some(double) = &environment.embedder_double {
        double.refuse(Duration::ZERO);
    }
    processes.thaw_all();
    let counts = environment.pinecone_double.as_ref().map(PineconeDouble::counts);
    let queue_counts = environment.sqs_double.as_ref().map(SqsDouble::counts);
    let quiet = Instant::now();
    let postgres = Postgres::new(environment.url(), &environment.settings.database)?;
    let backends = open(environment, &postgres, &mut processes).await?;
    if !drain(&backends, &mut processes, stop).await? {
        return Ok(None);
    }
    let drained_s = quiet.elapsed().as_secs_f64();
    let proved =
        if args.no_proof { ProofWait::None } else { wait_for_proof(&backends, &mut processes, stop).await? };
    let proved_s = match proved {
        ProofWait::None => None,
        ProofWait::Stopped => return Ok(None),
        ProofWait::Round => Some(quiet.elapsed().as_secs_f64()),
    };
    let proof_differences = if proved_s.is_some() { count_proof_differences(&backends).await? } else { 0 };
    // The differences that the proof queued must drain as well.
    if proved_s.is_some() && !drain(&backends, &mut processes, stop).await? {
        return Ok(None);
    }

    let model = LoadedModel::load(&environment.settings_now()).await?;
    let auditor = Auditor {
        ledger: &*backends.ledger,
        index: &*backends.index,
        queue: &*backends.queue.stats,
        embedder: Some(model.start(environment.settings.indexer.worker_count())),
        clock: &BootClock,
        options: AuditOptions { sample: SAMPLE, wait: WAIT, repair: false },
    };
    let report = auditor.run(&|_| {}).await?;
    let dead_letters = backends.queue.dead_letters.count().await?;
    processes.stop().await?;
    let table = Workload::new(environment.url().clone(), 0, Arc::default()).await?.expected;
    let outcome = ChaosReport {
        seed: args.seed,
        minutes: args.minutes,
        products: args.products,
        faults: done,
        operated: operated_on,
        configurations_refused: processes.refused,
        index: counts,
        queue: queue_counts,
        written: workload.counts,
        failures: std::mem::take(&mut workload.failures),
        proved_s,
        proof_differences,
        drained_s,
        dead_letters,
        ended: std::mem::take(&mut processes.ended),
        table_differs: count_differing_rows(&workload.expected, &table),
        index_differs: index_differs(environment, &backends, &workload.expected).await?,
        report,
    };
    postgres.pool.close();
    Ok(Some(outcome))
}

/// How waiting for a round of the continuous proof ended.
enum ProofWait {
    /// A whole round began and ended after the faults.
    Round,
    /// There is no continuous proof.
    None,
    /// The command was stopped.
    Stopped,
}

/// Waits for a round of the continuous proof that began after this call.
async fn wait_for_proof(
    backends: &Backends,
    processes: &mut RoleProcesses,
    stop: &CancellationToken,
) -> anyhow::Result<ProofWait> {
    let ask = async |sql: &str| -> anyhow::Result<bool> {
        let client = backends.postgres.client().await?;
        Ok(client.query_one(sql, &[]).await.context("look for the continuous proof")?.get(0))
    };
    if !ask("SELECT to_regclass('refarch.proof_round') IS NOT NULL").await? {
        return Ok(ProofWait::None);
    }
    let client = backends.postgres.client().await?;
    let now = client.query_one("SELECT clock_timestamp()::text", &[]).await.context("ask the time")?;
    let now: String = now.get(0);
    drop(client);
    let round =
        format!("SELECT EXISTS (SELECT FROM refarch.proof_round WHERE began_at >= '{now}'::timestamptz)");
    let started = Instant::now();
    while !ask(&round).await? {
        processes.supervise()?;
        anyhow::ensure!(
            started.elapsed() < PROOF_WAIT,
            "the continuous proof did not finish a round within {PROOF_WAIT:?}: see the logs of embed"
        );
        if stop.run_until_cancelled(tokio::time::sleep(POLL_INTERVAL)).await.is_none() {
            return Ok(ProofWait::Stopped);
        }
    }
    Ok(ProofWait::Round)
}

/// Opens the backends. Retries until the roles have followed the last swap of the table.
async fn open(
    environment: &Environment,
    postgres: &Postgres,
    processes: &mut RoleProcesses,
) -> anyhow::Result<Backends> {
    let started = Instant::now();
    loop {
        match environment.backends(postgres).await {
            Err(error) if started.elapsed() < STUCK_AFTER => {
                tracing::debug!(error = chain(error.as_ref()), "cannot open the backends yet");
                processes.supervise()?;
                tokio::time::sleep(POLL_INTERVAL).await;
            }
            opened => return opened,
        }
    }
}

/// Differences that the continuous proof found, in all of its rounds.
async fn count_proof_differences(backends: &Backends) -> anyhow::Result<u64> {
    let client = backends.postgres.client().await?;
    let sql = "SELECT coalesce(sum(differences), 0)::bigint FROM refarch.proof_round";
    let row = client.query_one(sql, &[]).await.context("read the rounds of the continuous proof")?;
    Ok(row.get::<_, i64>(0).try_into().unwrap_or_default())
}

/// Waits until nothing is under way; false if stopped before.
async fn drain(
    backends: &Backends,
    processes: &mut RoleProcesses,
    stop: &CancellationToken,
) -> anyhow::Result<bool> {
    let mut least = u64::MAX;
    let mut progressed = Instant::now();
    let mut most = 0;
    let progress = Progress::new("draining changes", 0);
    loop {
        processes.supervise()?;
        let left = backends.status().await?.outstanding() + count_tracked_writes(backends).await?;
        most = most.max(left);
        progress.set_total(most);
        progress.set(most - left);
        if left == 0 {
            progress.finish();
            return Ok(true);
        }
        if left < least {
            least = left;
            progressed = Instant::now();
        }
        if progressed.elapsed() > STUCK_AFTER {
            // The audit names them.
            progress.finish();
            eprintln!(
                "{left} changes are still under way after {STUCK_AFTER:?} without progress; comparing anyway"
            );
            return Ok(true);
        }
        if stop.run_until_cancelled(tokio::time::sleep(POLL_INTERVAL)).await.is_none() {
            return Ok(false);
        }
    }
}

async fn count_tracked_writes(backends: &Backends) -> anyhow::Result<u64> {
    let client = backends.postgres.client().await?;
    let sql = "SELECT coalesce(sum(cardinality(ids)), 0)::bigint FROM refarch.attempt WHERE target = $1";
    let row = client.query_one(sql, &[&backends.generation.id]).await.context("count the attempts")?;
    Ok(row.get::<_, i64>(0).try_into().unwrap_or_default())
}

fn count_differing_rows(a: &ExpectedRows, b: &ExpectedRows) -> u64 {
    let ids: std::collections::BTreeSet<&i64> = a.keys().chain(b.keys()).collect();
    ids.into_iter().filter(|id| a.get(id) != b.get(id)).count() as u64
}

/// Counts differences between the index itself and the writer's memory, without ledger and audit.
async fn index_differs(
    environment: &Environment,
    backends: &Backends,
    expected: &ExpectedRows,
) -> anyhow::Result<u64> {
    let wanted = |id: &str| {
        let product = id.parse().ok().and_then(|id: i64| expected.get(&id));
        product.filter(|p| p.description.as_ref().is_some_and(|text| !text.trim().is_empty()))
    };
    let searchable = expected.keys().filter(|id| wanted(&id.to_string()).is_some()).count() as u64;
    let mut agree = 0_u64;
    let mut held = 0_u64;
    if let Some(double) = &environment.pinecone_double {
        for (id, record) in double.snapshot("") {
            held += 1;
            let text =
                |key: &str| record.metadata.get(key).and_then(|value| value.as_str()).map(str::to_owned);
            let same = |product: &workload::ExpectedRow| {
                product.name == text("name") && product.description == text("description")
            };
            agree += u64::from(wanted(&id).is_some_and(same));
        }
    } else {
        let mut cursor = None;
        loop {
            let page = backends.index.list(cursor.as_deref(), 1_000).await?;
            held += page.ids.len() as u64;
            agree += page.ids.iter().filter(|id| wanted(id).is_some()).count() as u64;
            cursor = page.next;
            if cursor.is_none() {
                break;
            }
        }
    }
    Ok((searchable - agree) + (held - agree))
}

fn text(outcome: &ChaosReport) -> String {
    let ChaosReport { faults, written, report, .. } = outcome;
    let index = outcome.index.map_or_else(String::new, |index| {
        format!(
            "index            {} requests: {} unavailable, {} rate limited, {} delayed, {} applied but reported as failed, {} applied late, {} connections cut\n",
            index.requests, index.unavailable, index.rate_limited, index.hung, index.lied, index.late, index.dropped
        )
    });
    let calls = outcome.queue.map_or_else(String::new, |queue| {
        format!(
            "queue's calls    {} send, {} receive, {} delete, {} extend: {} unavailable, {} throttled, {} applied but reported as failed, {} connections cut, {} entries failed, {} delivered twice\n",
            queue.send, queue.receive, queue.delete, queue.extend, queue.unavailable, queue.throttled, queue.lied,
            queue.dropped, queue.entries_failed, queue.duplicated
        )
    });
    let refused = outcome.configurations_refused;
    let operated = outcome.operated;
    let operations = format!(
        "operators        {} columns added to the metadata, {} columns renamed, {} keys widened, {} tables swapped, {} times triggers disabled, {} times rows hidden ({} not reported), {} databases restored, {} migrations ({} refused), {} times other settings for half of the fleet ({refused} processes refused)\n",
        operated.metadata_added,
        operated.columns_renamed,
        operated.keys_widened,
        operated.tables_swapped,
        operated.triggers_disabled,
        operated.rows_hidden,
        operated.rows_hidden_untold,
        operated.databases_restored,
        operated.migrations,
        operated.migrations_refused,
        operated.fleets_of_two_configurations,
    );
    let failures = outcome.failures.iter().fold(String::new(), |mut text, failure| {
        // Writing to a string can't fail.
        let _ = writeln!(text, "failed           {failure}");
        text
    });
    let proved = outcome.proved_s.map_or_else(String::new, |s| {
        let healed = outcome.proof_differences;
        format!(
            "proved           after {s:.1} s; the proof found {healed} differences and queued them again\n"
        )
    });
    let ended = if outcome.ended.is_empty() {
        String::new()
    } else {
        format!("ended            {}\n", outcome.ended.join(", "))
    };
    let verdict = match outcome.code() {
        0 => "nothing is missing, stale or orphaned",
        1 => "index and table differ",
        _ => "could not tell",
    };
    format!(
        "chaos            {} minutes on {} products, seed {}\n\
         processes        {} kills, {} freezes\n\
         database         {} crashes, {} restarts, {} connections cut\n\
         queue            {} messages duplicated, {} delayed, {} made visible early, {} purged\n\
         embedder         refused every text, {} times\n\
         {operations}{calls}{index}{ended}\
         written          {} statements: {} rows inserted, {} updated, {} deleted, {} inserted again, {} truncations; {} failed\n\
         {failures}\
         drained          in {:.1} s\n\
         {proved}\
         {report}\
         dead letters     {}\n\
         writer's memory  {} rows differ in the table, {} records differ in the index\n\
         {verdict}\n",
        outcome.minutes,
        outcome.products,
        outcome.seed,
        faults.kills,
        faults.freezes,
        faults.database_crashes,
        faults.database_restarts,
        faults.connections_cut,
        faults.messages_duplicated,
        faults.messages_delayed,
        faults.messages_hurried,
        faults.messages_purged,
        faults.embedder_refusals,
        written.statements,
        written.inserted,
        written.updated,
        written.deleted,
        written.reinserted,
        written.truncations,
        written.writes_failed,
        outcome.drained_s,
        outcome.dead_letters,
        outcome.table_differs,
        outcome.index_differs,
    )
}
