//! One module for each subcommand.

pub mod chaos;
pub mod continuous_proof;
pub mod embed;
pub mod generate;
pub mod listen;
pub mod migrate;
pub mod progress;
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

use crate::backend::postgres::generation;
use crate::backend::postgres::worker_registry::WorkerRegistration;
use crate::backend::{self, Backends, Database, LoadedModel};
use crate::cli::{Cli, Command};
use crate::config::{EmbedderKind, Settings};

/// Runs the role that the command line names, and returns the exit code of the process.
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

/// Writes a command's result to standard output. `print!` would panic on a closed pipe.
fn print(result: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(result)?;
    Ok(stdout.flush()?)
}

/// Whether the error means only that the reader of our output closed the pipe.
#[must_use]
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// Opens the database, does the work, and closes the database, even if the work fails.
async fn with_database<T>(
    settings: &Settings,
    work: impl AsyncFnOnce(&Database) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let database = Database::open(settings).await?;
    let result = work(&database).await;
    let closed = database.close().await;
    result.and_then(|value| closed.map(|()| value))
}

/// Like [`with_database`], with the model beside the database. A missing local model is reported before a
/// database is started. A server's model needs the database first, because the database records facts about
/// it.
async fn with_model<T>(
    settings: &Settings,
    work: impl AsyncFnOnce(&Database, &LoadedModel) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let local = match settings.embedder.kind {
        EmbedderKind::Minilm(_) => Some(LoadedModel::load(settings).await?),
        EmbedderKind::Openai(_) | EmbedderKind::Tei(_) | EmbedderKind::Pinecone(_) => None,
    };
    with_database(settings, async |database: &Database| {
        let load = async || LoadedModel::load_known(&database.postgres, settings).await;
        let model = match local {
            Some(model) => model,
            None => backend::with_connect_retry(settings, load).await?,
        };
        work(database, &model).await
    })
    .await
}

/// Opens the backends, with a model if the role has one. A private cluster is migrated automatically. Only
/// `refarch migrate` changes the schema of a configured database.
async fn open_backends(
    database: &Database,
    settings: &Settings,
    model: Option<&LoadedModel>,
) -> anyhow::Result<Backends> {
    if database.is_private() {
        let report = backend::migrate_as_known(&database.postgres, settings).await?;
        for warning in report.warnings {
            tracing::warn!(warning, "migrated");
        }
    }
    let opened = backend::with_connect_retry(settings, async || {
        generation::follow_swap(&database.postgres, &settings.source.name).await;
        Backends::open_for(&database.postgres, settings, model).await
    });
    Ok(opened.await?)
}

/// Sends heartbeats during the work. After the work, the worker leaves the worker registry.
async fn with_heartbeat<T>(
    worker: &WorkerRegistration,
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
