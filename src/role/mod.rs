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
pub mod health;
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
pub mod setup;
pub mod status;
pub mod up;
pub mod verify;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
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
        Command::Man { dir } => manual(dir.as_deref()),
        Command::Setup(args) => setup::run(&args, &settings).await,
        Command::Health(args) => health::run(&args, &settings).await,
        Command::Psql(args) => psql::run(args, &settings).await,
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Prints the manual page, or writes the page of each command into a folder.
fn manual(dir: Option<&Path>) -> anyhow::Result<()> {
    let command = Cli::command();
    let Some(dir) = dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page)?;
        return print(&page);
    };
    let write = || std::fs::create_dir_all(dir).and_then(|()| clap_mangen::generate_to(command, dir));
    write().with_context(|| format!("cannot write manual pages into {}", dir.display()))
}
