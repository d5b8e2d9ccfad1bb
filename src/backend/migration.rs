//! Migrates database and index, and removes what a migration made.

use std::time::Duration;

use super::location::{compared_location, named_index};
use super::model::{index_shape, known_shape};
use super::postgres::Postgres;
use super::postgres::generation::IndexShape;
use super::postgres::migrate::uninstall::{self, UninstallOptions, Uninstalled};
use super::postgres::migrate::{self, Report};
use super::queue::sqs_options;
use super::{pinecone, sqs};
use crate::config::{QueueKind, Settings};
use crate::pipeline::failure::Result;

/// How long a migration waits for a check of the queues. The migration does not need the check.
const QUEUE_CHECK_TIMEOUT: Duration = Duration::from_secs(15);

/// Brings the database up to date with these settings, and makes a missing index.
pub async fn migrate(postgres: &Postgres, settings: &Settings) -> Result<Report> {
    migrate_with(postgres, settings, &migrate::MigrateOptions::default()).await
}

/// The same with options.
pub async fn migrate_with(
    postgres: &Postgres,
    settings: &Settings,
    options: &migrate::MigrateOptions,
) -> Result<Report> {
    migrate_to(postgres, settings, index_shape(settings).await?, options).await
}

/// The same where no other model is to be looked for: an embedding server is only asked for what the database does
/// not know of its model.
pub async fn migrate_as_known(postgres: &Postgres, settings: &Settings) -> Result<Report> {
    let shape = known_shape(postgres, settings).await?;
    migrate_to(postgres, settings, shape, &migrate::MigrateOptions::default()).await
}

async fn migrate_to(
    postgres: &Postgres,
    settings: &Settings,
    mut shape: IndexShape,
    options: &migrate::MigrateOptions,
) -> Result<Report> {
    shape.location = compared_location(postgres, settings, &shape).await?;
    // The index comes before the database, so that an index of the wrong shape does not cost the rows that
    // are indexed so far. A rehearsal comes before the index, so that a migration that is refused makes no
    // index.
    let created = match named_index(settings, shape.dimensions) {
        Some(named) => {
            migrate::rehearse(postgres, &settings.source, &settings.queue, &shape, options).await?;
            let created = pinecone::control::ensure(&named).await?;
            shape.location.host = pinecone::location::normalize_host(&pinecone::control::host(&named).await?);
            created
        }
        None => false,
    };
    let report = migrate::migrate_with(postgres, &settings.source, &settings.queue, &shape, options).await?;
    Ok(with_queues(with_index(report, settings, created), settings).await)
}

/// Reports what [`migrate_with`] would do. Nothing is changed.
pub async fn plan_migration(
    postgres: &Postgres,
    settings: &Settings,
    options: &migrate::MigrateOptions,
) -> Result<Report> {
    let mut shape = index_shape(settings).await?;
    shape.location = compared_location(postgres, settings, &shape).await?;
    let missing = match named_index(settings, shape.dimensions) {
        Some(options) => !pinecone::control::exists(&options).await?,
        None => false,
    };
    let report = migrate::plan(postgres, &settings.source, &settings.queue, &shape, options).await?;
    Ok(with_queues(with_index(report, settings, missing), settings).await)
}

fn with_index(mut report: Report, settings: &Settings, created: bool) -> Report {
    if created {
        let name = settings.index.pinecone().map_or("", |index| &index.name);
        report.created.push(format!("index {name}"));
    }
    report
}

/// Adds warnings about the queues' own configuration. The role that migrates need not have access to the
/// queues.
async fn with_queues(mut report: Report, settings: &Settings) -> Report {
    if let QueueKind::Sqs(queue) = &settings.queue.kind {
        let options = sqs_options(settings, queue);
        let remarks = async { sqs::configuration_warnings(&sqs::connect(&options).await?, &options).await };
        match tokio::time::timeout(QUEUE_CHECK_TIMEOUT, remarks).await {
            Ok(Ok((warnings, notes))) => {
                report.warnings.extend(warnings);
                report.notes.extend(notes);
            }
            Ok(Err(error)) => report.warnings.push(format!("cannot check the queues: {error}")),
            Err(_) => report.warnings.push("cannot check the queues: no answer in time".into()),
        }
    }
    report
}

/// Removes everything of ours from the database, except for the user's table.
pub async fn uninstall(
    postgres: &Postgres,
    settings: &Settings,
    options: UninstallOptions,
) -> Result<Uninstalled> {
    let mut done = uninstall::uninstall(postgres, &settings.queue, options).await?;
    if settings.index.pinecone().is_some() && !done.removed.is_empty() {
        done.notes.push("records in Pinecone stay: delete the index or its namespaces there".into());
    }
    Ok(done)
}
