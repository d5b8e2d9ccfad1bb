//! One module for each subcommand.

mod activity;
pub mod admin;
pub mod chaos;
pub mod continuous_proof;
pub mod embed;
mod embedded_metrics;
pub mod events;
mod fleet;
pub mod generate;
mod harness;
mod http_server;
pub mod listen;
pub mod migrate;
mod output;
pub mod plan;
mod process;
pub mod progress;
pub mod psql;
pub mod redrive;
mod retention;
mod scaling;
pub mod serve;
pub mod status;
pub mod up;
pub mod verify;

use std::process::ExitCode;

use clap::CommandFactory;

use crate::cli::{Cli, Command};
use crate::config::Settings;
use output::print;

pub use output::is_broken_pipe;

/// Runs the role that the command line names, and returns the exit code of the process.
pub async fn run(cli: Cli, settings: Settings) -> anyhow::Result<ExitCode> {
    let done = match cli.command {
        Command::Verify(args) => return verify::run(&args, &settings).await,
        Command::Migrate(args) => return migrate::run(&args, &settings).await,
        Command::Chaos(args) => return Box::pin(chaos::run(&args, &settings)).await,
        Command::Generate(args) => generate::run(&args, &settings).await,
        Command::Listen(args) => listen::run(&args, &settings).await,
        Command::Embed(args) => embed::run(&args, &settings).await,
        Command::Serve(_) => serve::run(&settings).await,
        Command::Up(args) => up::run(&args, &cli.global, &settings).await,
        Command::Status(args) => status::run(&args, &settings).await,
        Command::Events(args) => events::run(&args, &settings).await,
        Command::Redrive(args) => redrive::run(&args, &settings).await,
        Command::Plan(args) => plan::run(&args, &settings).await,
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
