//! `refarch migrate`: creates the schema, arms change capture on the table, and uninstalls both.

use std::fmt::Write as _;
use std::process::ExitCode;

use crate::backend::postgres::migrate::uninstall::{UninstallOptions, Uninstalled};
use crate::backend::postgres::migrate::{MigrateOptions, Report};
use crate::backend::{self, Database};
use crate::cli;
use crate::config::Settings;
use crate::telemetry;

/// Exit code of `--uninstall` without `--yes`.
const NOT_CONFIRMED: u8 = 2;

/// Migrates or uninstalls, and prints the steps that were done, or would be done in a dry run.
pub async fn run(args: &cli::Migrate, settings: &Settings) -> anyhow::Result<ExitCode> {
    super::harness::with_database(settings, async |database: &Database| {
        if args.uninstall {
            uninstall(args, settings, database).await
        } else {
            migrate(args, settings, database).await
        }
    })
    .await
}

async fn migrate(args: &cli::Migrate, settings: &Settings, database: &Database) -> anyhow::Result<ExitCode> {
    let options = MigrateOptions { rebuild: args.rebuild, roles: args.roles.clone() };
    let report = if args.dry_run {
        backend::plan_migration(&database.postgres, settings, &options).await?
    } else {
        backend::migrate_with(&database.postgres, settings, &options).await?
    };
    for warning in &report.warnings {
        telemetry::notice("WARN", format_args!("warning: {warning}"));
    }
    let text = if args.json {
        serde_json::to_string(&report)? + "\n"
    } else {
        text(&report, &database.postgres.address(), args.dry_run)
    };
    super::output::print(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

async fn uninstall(
    args: &cli::Migrate,
    settings: &Settings,
    database: &Database,
) -> anyhow::Result<ExitCode> {
    let options = UninstallOptions { is_plan: !args.yes, force: args.force };
    let done = backend::uninstall(&database.postgres, settings, options).await?;
    let text = if args.json {
        serde_json::to_string(&done)? + "\n"
    } else {
        uninstall_text(&done, &database.postgres.address(), options.is_plan)
    };
    super::output::print(text.as_bytes())?;
    if args.yes || args.dry_run || done.removed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    telemetry::notice("WARN", "nothing was removed: add --yes to uninstall");
    Ok(ExitCode::from(NOT_CONFIRMED))
}

fn text(report: &Report, address: &str, is_plan: bool) -> String {
    let mut text = String::new();
    let verbs = if is_plan {
        ["would apply", "would create", "would remove", "would arm", "would queue"]
    } else {
        ["applied", "created", "removed", "armed", "queued"]
    };
    let lists = [&report.applied, &report.created, &report.removed, &report.armed];
    for (verb, names) in verbs.iter().zip(lists) {
        if !names.is_empty() {
            // Writing to a string can't fail.
            let _ = writeln!(text, "{verb}: {}", names.join(", "));
        }
    }
    if report.queued > 0 {
        let _ = writeln!(
            text,
            "{}: {} rows that {} there already",
            verbs[4],
            report.queued,
            if is_plan { "are" } else { "were" }
        );
    }
    if text.is_empty() {
        let _ = writeln!(text, "nothing to do: {address} is up to date");
    }
    for note in &report.notes {
        let _ = writeln!(text, "note: {note}");
    }
    text
}

fn uninstall_text(done: &Uninstalled, address: &str, is_plan: bool) -> String {
    if done.removed.is_empty() {
        return format!("nothing to do: refarch is not installed in {address}\n");
    }
    let mut text = String::new();
    for name in &done.removed {
        let _ = writeln!(text, "{} {name}", if is_plan { "would remove" } else { "removed" });
    }
    for note in &done.notes {
        let _ = writeln!(text, "note: {note}");
    }
    text
}
