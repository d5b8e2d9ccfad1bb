//! `refarch verify`: compares index and table row by row.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use serde::Serialize;

use super::progress::Progress;
use crate::backend::postgres::ownership::{self, Ownership};
use crate::backend::postgres::{Postgres, capture, counts};
use crate::backend::{self, Backends, Database, LoadedModel};
use crate::cli;
use crate::config::Settings;
use crate::pipeline::audit::{AuditOptions, Auditor, Report};
use crate::pipeline::clock::BootClock;
use crate::pipeline::failure::chain;
use crate::telemetry;

/// Exit codes, as in the help of the command.
const DIFFERENT: u8 = 1;
const UNDECIDED: u8 = 2;

/// The name under which the worker registry shows that `verify` armed capture.
const WORKER: &str = "verify";

/// The report of the audit, and further reasons why index and table may differ.
#[derive(Debug, Serialize)]
struct VerifyReport {
    #[serde(flatten)]
    report: Report,
    /// Changes in the dead-letter queue.
    dead_letters: u64,
    /// Why changes were not all captured.
    capture_faults: Vec<String>,
    /// Whether the index belonged to another database, or to a later state of this one.
    foreign: bool,
    /// Whether `--repair` was given.
    #[serde(skip)]
    repair: bool,
}

impl VerifyReport {
    fn code(&self) -> u8 {
        if self.report.differences() > 0 || !self.capture_faults.is_empty() || self.foreign {
            DIFFERENT
        } else if self.report.is_partial() {
            UNDECIDED
        } else {
            0
        }
    }
}

/// Verifies, and returns the exit code for the result. A failure gives the code for "could not tell".
pub async fn run(args: &cli::Verify, settings: &Settings) -> anyhow::Result<ExitCode> {
    let verified = super::harness::with_database(settings, async |database: &Database| {
        let faults = capture::faults(&database.postgres, &settings.source).await;
        let told = faults.as_deref().unwrap_or_default();
        let opened = async {
            if args.repair && !told.is_empty() {
                // Arm before the comparison, so that changes during it are captured.
                arm(&database.postgres, settings, told).await?;
            }
            let model = match args.sample {
                0 => None,
                _ => Some(LoadedModel::load_known(&database.postgres, settings).await?),
            };
            let backends = Backends::open_for(&database.postgres, settings, model.as_ref()).await?;
            anyhow::Ok((backends, model))
        };
        let (backends, model) = opened.await.inspect_err(|_| {
            // The faults may explain the failure.
            for fault in told {
                telemetry::notice("WARN", format_args!("not captured: {fault}"));
            }
        })?;
        verify(args, settings, &backends, model.as_ref(), faults?).await
    })
    .await;
    match verified {
        Ok(verified) => {
            let json = serde_json::to_string(&verified)? + "\n";
            super::output::print(if args.json { json } else { text(&verified) }.as_bytes())?;
            Ok(ExitCode::from(verified.code()))
        }
        // The exit code of any other error is 1. A script would read 1 as "index and table differ".
        Err(error) if !super::output::is_broken_pipe(&error) => {
            telemetry::notice(
                "ERROR",
                format_args!(
                    "error: could not tell whether index and table agree: {}",
                    chain(error.as_ref())
                ),
            );
            Ok(ExitCode::from(UNDECIDED))
        }
        Err(error) => Err(error),
    }
}

/// Arms capture where that repairs the faults, and requests that rows that may have changed unseen are
/// queued.
async fn arm(postgres: &Postgres, settings: &Settings, faults: &[String]) -> anyhow::Result<()> {
    let armed = backend::with_connect_retry(settings, async || {
        capture::restore(postgres, &settings.source, WORKER, faults).await
    });
    if armed.await.context("arm change capture")? {
        telemetry::notice(
            "INFO",
            "repaired: change capture is armed; refarch listen queues what may have changed unseen",
        );
    }
    Ok(())
}

async fn verify(
    args: &cli::Verify,
    settings: &Settings,
    backends: &Backends,
    model: Option<&LoadedModel>,
    capture_faults: Vec<String>,
) -> anyhow::Result<VerifyReport> {
    let embedder = model.map(|model| model.start(settings.indexer.worker_count()));
    let generation = &backends.generation;
    let foreign =
        ownership::compare(&backends.postgres, generation.id, &*backends.index).await? == Ownership::NotOwned;
    if args.repair && foreign {
        let settle = settings.indexer.attempt();
        ownership::claim(&backends.postgres, generation.id, &*backends.index, settle, &|_| ()).await?;
        telemetry::notice("INFO", "repaired: every row is queued");
    }
    // A role that may only read cannot correct the counts, and can compare all the same.
    match counts::recount(&backends.postgres, generation).await {
        Ok(true) => telemetry::notice("WARN", "the counts that status shows were wrong, and are corrected"),
        Ok(false) => {}
        Err(error) => tracing::debug!(%error, "cannot count the ledger anew"),
    }
    let expected = backends.status().await?;
    let progress = Progress::new(
        "comparing rows and records",
        expected.source_rows + expected.indexed.unwrap_or_default(),
    );
    let auditor = Auditor {
        ledger: &*backends.ledger,
        index: &*backends.index,
        queue: &*backends.queue.stats,
        embedder,
        clock: &BootClock,
        options: AuditOptions {
            sample: args.sample,
            wait: Duration::from_secs(args.wait),
            repair: args.repair,
        },
    };
    let report = auditor.run(&|seen| progress.set(seen)).await?;
    progress.finish();
    let dead_letters = backends.queue.dead_letters.count().await?;
    Ok(VerifyReport { report, dead_letters, capture_faults, foreign, repair: args.repair })
}

fn text(verified: &VerifyReport) -> String {
    let VerifyReport { report, dead_letters, capture_faults, foreign, repair } = verified;
    let mut text = format!("{report}dead letters     {dead_letters}\n");
    // Writing to a string can't fail.
    for fault in capture_faults {
        let _ = writeln!(text, "not captured     {fault}");
    }
    if *foreign {
        let _ = writeln!(
            text,
            "foreign          the index belongs to another database or to a later state of this database"
        );
    }
    let verdict = match verified.code() {
        0 => "index and table agree",
        DIFFERENT if report.differences() == 0 && !foreign => {
            "what was compared agrees, and changes are not all captured: see above"
        }
        DIFFERENT if *repair => {
            "index and table differed: the differing rows are queued; verify again after they are applied"
        }
        DIFFERENT => "index and table differ: run verify --repair to queue the differing rows",
        _ if report.undecided > 0 => {
            "could not tell: changes are under way; wait longer (--wait), or look for stopped workers (refarch status)"
        }
        _ if report.unreadable > 0 => {
            "could not tell: the rows named above cannot be read; all other rows agree"
        }
        _ => {
            "could not tell: vectors were not compared (the reason is above; --sample 0 leaves them out); all else agrees"
        }
    };
    let _ = writeln!(text, "{verdict}");
    text
}
