//! Parse, settings, telemetry, runtime, role, exit code.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use refarch::cli::Cli;
use refarch::config::{File, Settings};
use refarch::pipeline::failure::chain;
use refarch::{role, telemetry};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) if role::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            telemetry::notice("ERROR", format_args!("refarch: {}", chain(error.as_ref())));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let file = File::find(cli.global.config.as_deref())?;
    // No setting of refarch has a name or a value that is not UTF-8.
    let env = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let settings = Settings::load(file.as_ref(), &env, &cli.overrides())?;
    telemetry::init(&settings.log, cli.is_quiet(), cli.command.name())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(role::run(cli, settings))
}
