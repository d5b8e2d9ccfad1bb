//! `refarch setup`: brings the parts that the binary lacks.

use crate::backend::parts::{self, Origin};
use crate::cli;
use crate::config::Settings;

/// Installs PostgreSQL with pgvector, and the model, under the runtime folder.
pub async fn run(args: &cli::Setup, settings: &Settings) -> anyhow::Result<()> {
    let origin = Origin { model: args.model.clone(), wheels: args.wheels.clone(), index: args.index.clone() };
    let runtime = settings.runtime.dir.join("runtime");
    parts::install(&runtime, &origin, |step| eprintln!("setup: {step}")).await
}
