//! `refarch migrate`: the schema, and capture armed on the table.

use crate::backend::{self, Database};
use crate::cli;
use crate::config::Settings;

/// Migrates and says what was done.
pub async fn run(args: &cli::Migrate, settings: &Settings) -> anyhow::Result<()> {
    super::with_database(settings, async |database: &Database| {
        let report = backend::migrate(&database.postgres, settings).await?;
        if args.json {
            println!("{}", serde_json::to_string(&report)?);
            return Ok(());
        }
        let list = |what: &str, names: &[String]| {
            if !names.is_empty() {
                println!("{what}: {}", names.join(", "));
            }
        };
        list("applied", &report.applied);
        list("created", &report.created);
        list("armed", &report.armed);
        if report.queued > 0 {
            println!("queued: {} rows that were there already", report.queued);
        }
        for warning in &report.warnings {
            eprintln!("warning: {warning}");
        }
        if report == backend::postgres::migrate::Report::default() {
            println!("nothing to do: {} is up to date", database.postgres.address());
        }
        Ok(())
    })
    .await
}
