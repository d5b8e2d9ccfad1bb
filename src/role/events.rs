//! `refarch events`: what happened.

use std::time::Duration;

use crate::backend::Database;
use crate::backend::postgres::event::{Event, Follow};
use crate::cli;
use crate::config::Settings;
use crate::pipeline::failure::Class;
use crate::shutdown;

/// Time between two looks of `--follow`.
const FOLLOW_EVERY: Duration = Duration::from_millis(500);

/// Prints events, once or until stopped.
pub async fn run(args: &cli::Events, settings: &Settings) -> anyhow::Result<()> {
    let stop = shutdown::on_signal()?;
    super::harness::with_database(settings, async |database: &Database| {
        let mut follow = Follow::since(args.since);
        loop {
            match follow.next(&database.postgres).await {
                Ok(events) => {
                    let lines: String =
                        events.iter().map(|event| line(event, args.json)).collect::<Result<_, _>>()?;
                    super::output::print(lines.as_bytes())?;
                }
                // A database that restarts is soon back.
                Err(error) if args.follow && error.class() == Class::Retryable => {
                    tracing::warn!(%error, "cannot read the events yet");
                }
                Err(error) => return Err(error.into()),
            }
            if !args.follow || stop.run_until_cancelled(tokio::time::sleep(FOLLOW_EVERY)).await.is_none() {
                return Ok(());
            }
        }
    })
    .await
}

fn line(event: &Event, json: bool) -> anyhow::Result<String> {
    if json {
        return Ok(serde_json::to_string(event)? + "\n");
    }
    let text = event.text.replace(['\n', '\r'], " ");
    Ok(format!("{:.3}  {:<11}  {text}\n", event.at, event.kind))
}
