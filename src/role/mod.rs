//! One module a subcommand.

pub mod psql;

use std::io;

use anyhow::bail;

use crate::cli::Command;
use crate::config::Settings;

/// Takes the role that the command line names.
pub async fn run(command: Command, settings: Settings) -> anyhow::Result<()> {
    match command {
        Command::Config => {
            print!("{}", toml::to_string(&settings)?);
            Ok(())
        }
        Command::Psql(args) => psql::run(args, &settings).await,
        _ => bail!("not yet"),
    }
}

/// Whether the error is only that whoever read our output stopped reading.
#[must_use]
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}
