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

mod comparison;
mod environment;
mod fault_injector;
mod fault_schedule;
mod operator;
mod processes;
mod report;
mod workload;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::sync::{Mutex, RwLock, mpsc};
use tokio_util::sync::CancellationToken;

use super::generate;
use super::harness::Process;
use super::progress::Progress;
use crate::backend::postgres::Postgres;
use crate::backend::{Backends, LoadedModel};
use crate::cli;
use crate::config::Settings;
use crate::double::pinecone::{PineconeDouble, PineconeFaults};
use crate::double::sqs::{SqsDouble, SqsFaults};
use crate::pipeline::audit::{AuditOptions, Auditor};
use crate::pipeline::clock::BootClock;
use crate::pipeline::failure::chain;
use crate::telemetry;
use comparison::{count_differing_rows, index_differs};
use environment::Environment;
use fault_injector::{FaultInjector, InjectedFaults};
use operator::{OperationCounts, Operator};
use processes::RoleProcesses;
use report::ChaosReport;
use workload::{TableShape, Workload};

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

/// Runs the command.
pub async fn run(args: &cli::Chaos, settings: &Settings) -> anyhow::Result<ExitCode> {
    let process = Process::start("chaos", settings).await?;
    let stop = process.stop.clone();
    let environment = Box::pin(Environment::create(settings, args)).await?;
    let outcome = Box::pin(run_experiment(args, &environment, &stop)).await;
    let clean = outcome.as_ref().is_ok_and(|outcome| outcome.as_ref().is_none_or(|o| o.code() == 0));
    let dir = environment.dir.clone();
    environment.tear_down(!clean).await?;
    if !clean {
        telemetry::notice("WARN", format_args!("the logs of the roles are in {}", dir.display()));
    }
    let Some(outcome) = outcome? else {
        telemetry::notice("WARN", "chaos was stopped before its end: nothing was compared");
        return Ok(ExitCode::from(2));
    };
    let json = serde_json::to_string(&outcome)? + "\n";
    super::output::print(if args.json { json } else { report::text(&outcome) }.as_bytes())?;
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
            let message = format!(
                "{left} changes are still under way after {STUCK_AFTER:?} without progress; comparing anyway"
            );
            telemetry::notice("WARN", message);
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
