//! `refarch verify`: whether index and table agree, row by row.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use serde::Serialize;

use super::progress::Progress;
use crate::backend::postgres::capture;
use crate::backend::postgres::lineage::{self, Standing};
use crate::backend::{Backends, Database, LoadedModel};
use crate::cli;
use crate::config::Settings;
use crate::pipeline::audit::{Auditor, Options, Report};
use crate::pipeline::clock::BootClock;

/// Exit codes: see the command's help.
const DIFFERENT: u8 = 1;
const UNDECIDED: u8 = 2;

/// The audit's report, with what else stands between table and index.
#[derive(Debug, Serialize)]
struct Verified {
    #[serde(flatten)]
    report: Report,
    /// Changes in the dead letters.
    dead_letters: u64,
    /// Tables whose changes were not captured.
    unarmed: Vec<String>,
    /// Whether the index belonged to another database, or to a later state of this one.
    foreign: bool,
    /// Whether that was to be repaired.
    #[serde(skip)]
    repair: bool,
}

impl Verified {
    fn code(&self) -> u8 {
        if self.report.differences() > 0 || !self.unarmed.is_empty() || self.foreign {
            DIFFERENT
        } else if self.report.is_partial() {
            UNDECIDED
        } else {
            0
        }
    }
}

/// Verifies, and exits with what came of it: an error means that it could not be told.
pub async fn run(args: &cli::Verify, settings: &Settings) -> anyhow::Result<ExitCode> {
    let verified = super::with_database(settings, async |database: &Database| {
        let model = match args.sample {
            0 => None,
            _ => Some(LoadedModel::load_known(&database.postgres, settings).await?),
        };
        let backends = Backends::open_for(&database.postgres, settings, model.as_ref()).await?;
        verify(args, settings, &backends, model.as_ref()).await
    })
    .await;
    match verified {
        Ok(verified) => {
            let json = serde_json::to_string(&verified)? + "\n";
            super::print(if args.json { json } else { text(&verified) }.as_bytes())?;
            Ok(ExitCode::from(verified.code()))
        }
        // Whoever scripts this must not take "could not look" for "they differ".
        Err(error) if !super::is_broken_pipe(&error) => {
            eprintln!("error: could not tell whether index and table agree: {error:#}");
            Ok(ExitCode::from(UNDECIDED))
        }
        Err(error) => Err(error),
    }
}

async fn verify(
    args: &cli::Verify,
    settings: &Settings,
    backends: &Backends,
    model: Option<&LoadedModel>,
) -> anyhow::Result<Verified> {
    let embedder = model.map(|model| model.start(settings.indexer.worker_count()));
    let target = &backends.target;
    let unarmed = capture::unarmed(&backends.postgres, &target.table).await?;
    let foreign =
        lineage::compare(&backends.postgres, target.id, &*backends.index).await? == Standing::Foreign;
    if args.repair && !unarmed.is_empty() {
        // Before the walk, so that what changes during it is captured.
        crate::backend::migrate_as_known(&backends.postgres, settings).await.context("arm change capture")?;
        eprintln!("repaired: change capture is armed on {}", unarmed.join(", "));
    }
    if args.repair && foreign {
        lineage::claim(&backends.postgres, target.id, &*backends.index).await?;
        eprintln!("repaired: every row is queued");
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
        options: Options { sample: args.sample, wait: Duration::from_secs(args.wait), repair: args.repair },
    };
    let report = auditor.run(&|seen| progress.set(seen)).await?;
    progress.finish();
    let dead_letters = backends.queue.dead_letters.count().await?;
    Ok(Verified { report, dead_letters, unarmed, foreign, repair: args.repair })
}

fn text(verified: &Verified) -> String {
    let Verified { report, dead_letters, unarmed, foreign, repair } = verified;
    let mut text = format!("{report}dead letters     {dead_letters}\n");
    // Writing to a string can't fail.
    for table in unarmed {
        let _ = writeln!(text, "not captured     {table}");
    }
    if *foreign {
        let _ = writeln!(
            text,
            "foreign          the index belongs to another database or to a later state of this one"
        );
    }
    let verdict = match verified.code() {
        0 => "index and table agree",
        DIFFERENT if *repair => {
            "index and table differed: what did is queued; verify again once it is applied"
        }
        DIFFERENT => "index and table differ: --repair queues what differs",
        _ if report.undecided > 0 => {
            "could not tell: changes are under way; wait longer (--wait), or look for stopped workers (refarch status)"
        }
        _ if report.unreadable > 0 => {
            "could not tell: rows cannot be read (they are named above); the others agree"
        }
        _ => {
            "could not tell: vectors were not compared (the reason is above; --sample 0 leaves them out); all else agrees"
        }
    };
    let _ = writeln!(text, "{verdict}");
    text
}
