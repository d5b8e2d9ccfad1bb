//! Logs: text for people, JSON for machines, always on standard error.

mod identity;
mod json_lines;

use std::fmt;
use std::io::{IsTerminal, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use tracing_subscriber::EnvFilter;

use crate::config::Log;
use crate::secret::{Redacting, without_secrets};

pub use identity::{identify, service_of, worker};
use json_lines::{JsonLine, JsonLines};

/// Whether everything that is written to standard error is JSON.
static IS_JSON: AtomicBool = AtomicBool::new(false);

/// Installs the log subscriber of the process, whose role is `role`. `quiet` raises the default level to warnings, for
/// commands whose standard output is their result.
///
/// # Errors
///
/// If `log.level` is not a valid filter.
pub fn init(log: &Log, quiet: bool, role: &str) -> anyhow::Result<()> {
    let level = if quiet && log.level == "info" { "warn" } else { &log.level };
    let filter = EnvFilter::try_new(level).with_context(|| {
        format!("log.level = {level:?} is not a filter such as info or refarch=debug,warn")
    })?;
    identity::begin(role);
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Redacting(std::io::stderr()));
    if log.format == "json" {
        IS_JSON.store(true, Ordering::Relaxed);
        std::panic::set_hook(Box::new(|panic| notice("ERROR", panic)));
        builder.event_format(JsonLines).init();
    } else {
        builder.with_ansi(wants_color()).with_target(false).init();
    }
    Ok(())
}

/// Tells the user something on standard error, whatever the log's level: a line of text, or a line of JSON if the log
/// is JSON.
pub fn notice(level: &str, message: impl fmt::Display) {
    let message = without_secrets(&message.to_string());
    let line = if IS_JSON.load(Ordering::Relaxed) {
        let mut line = JsonLine::begin(level, None);
        line.add("message", &message);
        line.end()
    } else {
        message + "\n"
    };
    // Nobody can be told that standard error is closed.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Whether standard error takes colour: it is a terminal, and `NO_COLOR` is not set.
#[must_use]
pub fn wants_color() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}
