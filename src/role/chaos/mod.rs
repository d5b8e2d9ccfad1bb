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

mod crew;
mod lab;
mod operator;
mod schedule;
mod torment;
mod writer;

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
use crate::double::pinecone::{Counts, Double, Faults};
use crate::double::sqs::{QueueCounts, QueueDouble, QueueFaults};
use crate::pipeline::audit::{Auditor, Options, Report};
use crate::pipeline::clock::BootClock;
use crate::shutdown;
use crew::Crew;
use lab::Lab;
use operator::{Operated, Operator};
use torment::{Done, Torment};
use writer::{Form, Model, Writer, Written};

/// The roles that run, one process each.
const ROLES: &[&[&str]] = &[&["listen"], &["listen"], &["embed"], &["embed"]];

/// How long draining may make no progress.
const STUCK_AFTER: Duration = Duration::from_mins(3);

/// How often the backlog is polled while it drains.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Number of rows whose vectors are compared.
const SAMPLE: usize = 200;

/// How long a round of the continuous proof may take. Its period is a minute here, or less.
const PROOF_WAIT: Duration = Duration::from_mins(6);

/// How long the audit waits for changes that are under way.
const WAIT: Duration = Duration::from_mins(2);

/// The report: what was done, and the comparisons.
#[derive(Debug, Serialize)]
struct Outcome {
    seed: u64,
    minutes: f64,
    products: u64,
    /// Faults that were injected.
    faults: Done,
    /// Operations on the database, as operators do them.
    operated: Operated,
    /// Processes that refused settings which differed from those of the fleet.
    configurations_refused: u64,
    /// Requests to the Pinecone double and its faults; none with pgvector.
    index: Option<Counts>,
    /// Requests to the SQS double and its faults; none with pgmq.
    queue: Option<QueueCounts>,
    /// Statements of the application.
    written: Written,
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

impl Outcome {
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
    let lab = Box::pin(Lab::set_up(settings, args)).await?;
    let outcome = Box::pin(drill(args, &lab, &stop)).await;
    let clean = outcome.as_ref().is_ok_and(|outcome| outcome.as_ref().is_none_or(|o| o.code() == 0));
    let dir = lab.dir.clone();
    lab.tear_down(!clean).await?;
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

async fn drill(args: &cli::Chaos, lab: &Lab, stop: &CancellationToken) -> anyhow::Result<Option<Outcome>> {
    let table = &lab.settings.source.table;
    let client = lab.client().await?;
    let progress = Progress::new("loading products", args.products);
    generate::load(&client, table, args.products, args.seed, &progress).await?;
    progress.finish();
    drop(client);

    let lasting = Duration::from_secs_f64(args.minutes * 60.0);
    let crew = Mutex::new(Crew::new(ROLES, lab.env(), &lab.dir));
    let faults = schedule::schedule(args.seed, lasting, ROLES.len(), &args.faults);
    let form: Arc<RwLock<Form>> = Arc::default();
    let mut writer = Writer::new(lab.application_url(), args.seed, Arc::clone(&form)).await?;
    let truncate = AtomicBool::new(false);
    let (over, written_out) = (stop.child_token(), stop.child_token());
    crew.lock().await.tend()?;
    let progress = Progress::new("seconds of chaos", lasting.as_secs());
    let (operations, ordered) = mpsc::unbounded_channel();
    let mut torment = Torment { lab, crew: &crew, operations, truncate: &truncate, done: Done::default() };
    let mut operator = Operator { lab, crew: &crew, form: &form, done: Operated::default() };
    let tormented = async {
        let result = torment.run(faults, lasting, stop, &progress).await;
        over.cancel();
        result
    };
    // The application writes until the operator has restored the table's form.
    let operated = async {
        let result = operator.run(ordered, &over).await;
        written_out.cancel();
        result
    };
    let (tormented, operated, wrote) = tokio::join!(
        tormented,
        operated,
        writer.run(&written_out, || truncate.swap(false, Ordering::Relaxed))
    );
    let (done, operated_on) = (torment.done, operator.done);
    progress.finish();
    tormented?;
    operated?;
    wrote?;
    let mut crew = crew.into_inner();

    if let Some(double) = &lab.double {
        double.set_faults(Faults::default());
    }
    if let Some(double) = &lab.queue_double {
        double.set_faults(QueueFaults::default());
    }
    if let Some(double) = &lab.embedder_double {
        double.refuse(Duration::ZERO);
    }
    crew.thaw_all();
    let counts = lab.double.as_ref().map(Double::counts);
    let queue_counts = lab.queue_double.as_ref().map(QueueDouble::counts);
    let quiet = Instant::now();
    let postgres = Postgres::new(lab.url(), &lab.settings.database)?;
    let backends = open(lab, &postgres, &mut crew).await?;
    if !drain(&backends, &mut crew, stop).await? {
        return Ok(None);
    }
    let drained_s = quiet.elapsed().as_secs_f64();
    let proved = if args.no_proof { Proved::None } else { prove(&backends, &mut crew, stop).await? };
    let proved_s = match proved {
        Proved::None => None,
        Proved::Stopped => return Ok(None),
        Proved::Round => Some(quiet.elapsed().as_secs_f64()),
    };
    let proof_differences = if proved_s.is_some() { differences_of_the_proof(&backends).await? } else { 0 };
    // The differences that the proof queued must drain as well.
    if proved_s.is_some() && !drain(&backends, &mut crew, stop).await? {
        return Ok(None);
    }

    let model = LoadedModel::load(&lab.settings_now()).await?;
    let auditor = Auditor {
        ledger: &*backends.ledger,
        index: &*backends.index,
        queue: &*backends.queue.stats,
        embedder: Some(model.start(lab.settings.indexer.worker_count())),
        clock: &BootClock,
        options: Options { sample: SAMPLE, wait: WAIT, repair: false },
    };
    let report = auditor.run(&|_| {}).await?;
    let dead_letters = backends.queue.dead_letters.count().await?;
    crew.stop().await?;
    let table = Writer::new(lab.url().clone(), 0, Arc::default()).await?.model;
    let outcome = Outcome {
        seed: args.seed,
        minutes: args.minutes,
        products: args.products,
        faults: done,
        operated: operated_on,
        configurations_refused: crew.refused,
        index: counts,
        queue: queue_counts,
        written: writer.written,
        failures: std::mem::take(&mut writer.failures),
        proved_s,
        proof_differences,
        drained_s,
        dead_letters,
        ended: std::mem::take(&mut crew.ended),
        table_differs: differing(&writer.model, &table),
        index_differs: index_differs(lab, &backends, &writer.model).await?,
        report,
    };
    postgres.pool.close();
    Ok(Some(outcome))
}

/// How waiting for a round of the continuous proof ended.
enum Proved {
    /// A whole round began and ended after the faults.
    Round,
    /// There is no continuous proof.
    None,
    /// The command was stopped.
    Stopped,
}

/// Waits for a round of the continuous proof that began after this call.
async fn prove(backends: &Backends, crew: &mut Crew, stop: &CancellationToken) -> anyhow::Result<Proved> {
    let ask = async |sql: &str| -> anyhow::Result<bool> {
        let client = backends.postgres.client().await?;
        Ok(client.query_one(sql, &[]).await.context("look for the continuous proof")?.get(0))
    };
    if !ask("SELECT to_regclass('refarch.proof_round') IS NOT NULL").await? {
        return Ok(Proved::None);
    }
    let client = backends.postgres.client().await?;
    let now = client.query_one("SELECT clock_timestamp()::text", &[]).await.context("ask the time")?;
    let now: String = now.get(0);
    drop(client);
    let round =
        format!("SELECT EXISTS (SELECT FROM refarch.proof_round WHERE began_at >= '{now}'::timestamptz)");
    let started = Instant::now();
    while !ask(&round).await? {
        crew.tend()?;
        anyhow::ensure!(
            started.elapsed() < PROOF_WAIT,
            "the continuous proof did not finish a round within {PROOF_WAIT:?}: see the logs of embed"
        );
        if stop.run_until_cancelled(tokio::time::sleep(LOOK_EVERY)).await.is_none() {
            return Ok(Proved::Stopped);
        }
    }
    Ok(Proved::Round)
}

/// Opens the backends. Retries until the roles have followed the last swap of the table.
async fn open(lab: &Lab, postgres: &Postgres, crew: &mut Crew) -> anyhow::Result<Backends> {
    let started = Instant::now();
    loop {
        match lab.backends(postgres).await {
            Err(error) if started.elapsed() < STUCK_AFTER => {
                tracing::debug!(error = format!("{error:#}"), "cannot open the backends yet");
                crew.tend()?;
                tokio::time::sleep(LOOK_EVERY).await;
            }
            opened => return opened,
        }
    }
}

/// Differences that the continuous proof found, in all of its rounds.
async fn differences_of_the_proof(backends: &Backends) -> anyhow::Result<u64> {
    let client = backends.postgres.client().await?;
    let sql = "SELECT coalesce(sum(differences), 0)::bigint FROM refarch.proof_round";
    let row = client.query_one(sql, &[]).await.context("read the rounds of the continuous proof")?;
    Ok(row.get::<_, i64>(0).try_into().unwrap_or_default())
}

/// Waits until nothing is under way; false if stopped before.
async fn drain(backends: &Backends, crew: &mut Crew, stop: &CancellationToken) -> anyhow::Result<bool> {
    let mut least = u64::MAX;
    let mut progressed = Instant::now();
    let mut most = 0;
    let progress = Progress::new("draining changes", 0);
    loop {
        crew.tend()?;
        let left = backends.status().await?.outstanding() + attempts(backends).await?;
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
        if stop.run_until_cancelled(tokio::time::sleep(LOOK_EVERY)).await.is_none() {
            return Ok(false);
        }
    }
}

async fn attempts(backends: &Backends) -> anyhow::Result<u64> {
    let client = backends.postgres.client().await?;
    let sql = "SELECT coalesce(sum(cardinality(ids)), 0)::bigint FROM refarch.attempt WHERE target = $1";
    let row = client.query_one(sql, &[&backends.target.id]).await.context("count the attempts")?;
    Ok(row.get::<_, i64>(0).try_into().unwrap_or_default())
}

fn differing(a: &Model, b: &Model) -> u64 {
    let ids: std::collections::BTreeSet<&i64> = a.keys().chain(b.keys()).collect();
    ids.into_iter().filter(|id| a.get(id) != b.get(id)).count() as u64
}

/// Counts differences between the index itself and the writer's memory, without ledger and audit.
async fn index_differs(lab: &Lab, backends: &Backends, model: &Model) -> anyhow::Result<u64> {
    let wanted = |id: &str| {
        let product = id.parse().ok().and_then(|id: i64| model.get(&id));
        product.filter(|p| p.description.as_ref().is_some_and(|text| !text.trim().is_empty()))
    };
    let searchable = model.keys().filter(|id| wanted(&id.to_string()).is_some()).count() as u64;
    let mut agree = 0_u64;
    let mut held = 0_u64;
    if let Some(double) = &lab.double {
        for (id, record) in double.snapshot("") {
            held += 1;
            let text =
                |key: &str| record.metadata.get(key).and_then(|value| value.as_str()).map(str::to_owned);
            let same = |product: &writer::Product| {
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

fn text(outcome: &Outcome) -> String {
    let Outcome { faults, written, report, .. } = outcome;
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
