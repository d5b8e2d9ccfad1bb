//! One module a subcommand.

pub mod chaos;
pub mod embed;
pub mod generate;
pub mod listen;
pub mod migrate;
pub mod progress;
pub mod prove;
pub mod psql;
pub mod redrive;
pub mod serve;
pub mod status;
pub mod up;
pub mod verify;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::CommandFactory;
use tokio_util::sync::CancellationToken;

use crate::backend::postgres::registry::Worker;
use crate::backend::postgres::target;
use crate::backend::{self, Backends, Database};
use crate::cli::{Cli, Command};
use crate::config::Settings;

/// Takes the role that the command line names, and tells how it ended where that is not just well.
pub async fn run(command: Command, settings: Settings) -> anyhow::Result<ExitCode> {
    let done = match command {
        Command::Verify(args) => return verify::run(&args, &settings).await,
        Command::Migrate(args) => return migrate::run(&args, &settings).await,
        Command::Chaos(args) => return Box::pin(chaos::run(&args, &settings)).await,
        Command::Generate(args) => generate::run(&args, &settings).await,
        Command::Listen(args) => listen::run(&args, &settings).await,
        Command::Embed(args) => embed::run(&args, &settings).await,
        Command::Serve(_) => serve::run(&settings).await,
        Command::Up(args) => up::run(&args, &settings).await,
        Command::Status(args) => status::run(&args, &settings).await,
        Command::Redrive(args) => redrive::run(&args, &settings).await,
        Command::Config => print(settings.as_toml().as_bytes()),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "refarch", &mut script);
            print(&script)
        }
        Command::Psql(args) => psql::run(args, &settings).await,
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Writes a command's result. `print!` would panic when nobody reads it.
fn print(result: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(result)?;
    Ok(stdout.flush()?)
}

/// Whether the error is only that whoever read our output stopped reading.
#[must_use]
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// Opens the database, does the work, and closes it again whatever comes of the work.
async fn with_database<T>(
    settings: &Settings,
    work: impl AsyncFnOnce(&Database) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let database = Database::open(settings).await?;
    let result = work(&database).await;
    let closed = database.close().await;
    result.and_then(|value| closed.map(|()| value))
}

/// Opens the backends. The private cluster is set up unasked; a database of the user's own is
/// changed by `refarch migrate` only.
async fn open(database: &Database, settings: &Settings) -> anyhow::Result<Backends> {
    if database.is_private() {
        let report = backend::migrate(&database.postgres, settings).await?;
        for warning in report.warnings {
            tracing::warn!(warning, "migrated");
        }
    }
    let opened = backend::patiently(settings, async || {
        target::follow_swap(&database.postgres, &settings.source.name).await;
        Backends::open(&database.postgres, settings).await
    });
    Ok(opened.await?)
}

/// Works with a heartbeat beside, which ends (and leaves the books) after the work.
async fn while_beating<T>(
    worker: &Worker,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let done = CancellationToken::new();
    let work = async {
        let result = work.await;
        done.cancel();
        result
    };
    let (result, ()) = tokio::join!(work, worker.run(&done));
    result
}
