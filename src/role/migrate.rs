//! `refarch migrate`: the schema, and capture armed on the table.

use std::fmt::Write as _;

use crate::backend::postgres::migrate::Report;
use crate::backend::{self, Database};
use crate::cli;
use crate::config::Settings;

/// Migrates and says what was done.
pub async fn run(args: &cli::Migrate, settings: &Settings) -> anyhow::Result<()> {
    super::with_database(settings, async |database: &Database| {
        let report = backend::migrate(&database.postgres, settings).await?;
        for warning in &report.warnings {
            eprintln!("warning: {warning}");
        }
        let text = if args.json {
            serde_json::to_string(&report)? + "\n"
        } else {
            text(&report, &database.postgres.address())
        };
        super::print(text.as_bytes())
    })
    .await
}

fn text(report: &Report, address: &str) -> String {
    let mut text = String::new();
    for (what, names) in
        [("applied", &report.applied), ("created", &report.created), ("armed", &report.armed)]
    {
        if !names.is_empty() {
            // Writing to a string can't fail.
            let _ = writeln!(text, "{what}: {}", names.join(", "));
        }
    }
    if report.queued > 0 {
        let _ = writeln!(text, "queued: {} rows that were there already", report.queued);
    }
    if text.is_empty() {
        let _ = writeln!(text, "nothing to do: {address} is up to date");
    }
    text
}
