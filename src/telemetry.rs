//! Logs: text for people, JSON for machines, always on standard error.

use std::io::IsTerminal;

use anyhow::Context;
use tracing_subscriber::EnvFilter;

use crate::config::Log;
use crate::secret::Redacting;

/// Installs the log subscriber of the process. `quiet` raises the default level to warnings, for commands
/// whose standard output is their result.
///
/// # Errors
///
/// If `log.level` is not a valid filter.
pub fn init(log: &Log, quiet: bool) -> anyhow::Result<()> {
    let level = if quiet && log.level == "info" { "warn" } else { &log.level };
    let filter = EnvFilter::try_new(level).with_context(|| {
        format!("log.level = {level:?} is not a filter such as info or refarch=debug,warn")
    })?;
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Redacting(std::io::stderr()));
    if log.format == "json" {
        builder.json().flatten_event(true).with_target(false).init();
    } else {
        builder.with_ansi(wants_color()).with_target(false).init();
    }
    Ok(())
}

/// Whether standard error takes colour: it is a terminal, and `NO_COLOR` is not set.
#[must_use]
pub fn wants_color() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}
