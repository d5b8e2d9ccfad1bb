//! The schema `refarch`: versioned and idempotent. One migration runs at a time.

mod adopt;
mod content;
mod created;
mod generation;
mod lock_retry;
mod options;
mod product_indexes;
mod queues;
mod report;
mod triggers;
pub mod uninstall;

use tokio_postgres::Transaction;

use super::generation::{IndexShape, PGVECTOR};
use super::source::SourceTable;
use super::{Postgres, capture, failure, schema_version};
use crate::backend::pgvector;
use crate::config;
use crate::pipeline::failure::{Error, FailureKind, Result};
use content::RecordedSource;
use lock_retry::LockRetrySession;
pub use options::{MigrateOptions, PARTS};
pub use report::Report;

/// The reference architecture's table.
const PRODUCTS: &str = include_str!("../schema/products.sql");

/// Brings the database up to date with this build and these settings.
pub async fn migrate(
    postgres: &Postgres,
    source: &config::Source,
    queue: &config::Queue,
    shape: &IndexShape,
) -> Result<Report> {
    migrate_with(postgres, source, queue, shape, &MigrateOptions::default()).await
}

/// The same with options.
///
/// One short transaction does everything that needs no lock on the user's table. Then triggers are installed
/// table by table, and existing rows are queued in many short transactions. If a migration is interrupted,
/// the next one does the rest.
pub async fn migrate_with(
    postgres: &Postgres,
    source: &config::Source,
    queue: &config::Queue,
    shape: &IndexShape,
    options: &MigrateOptions,
) -> Result<Report> {
    postgres.check().await?;
    let mut session = LockRetrySession::open(postgres).await?;
    let done = session
        .with_lock_retry(None, false, async |transaction| {
            prepare(transaction, source, queue, shape, options).await
        })
        .await?;
    let Prepared { table, mut report, stands, .. } = done;
    triggers::install_triggers(&mut session, &table, stands, &mut report).await?;
    triggers::remove_stray_triggers(&mut session, &table, &mut report).await?;
    session.close().await;
    triggers::backfill(postgres, &table, &mut report).await?;
    product_indexes::create(postgres, source, &mut report).await?;
    Ok(report)
}

/// Reports what [`migrate_with`] would do. The table is not locked.
pub async fn plan(
    postgres: &Postgres,
    source: &config::Source,
    queue: &config::Queue,
    shape: &IndexShape,
    options: &MigrateOptions,
) -> Result<Report> {
    let (mut report, counted) = rehearse(postgres, source, queue, shape, options).await?;
    // Counting a large table takes long, so the rehearsal's transaction has ended. It took back a table that
    // migrate would make, so the table may not exist.
    if let Some(table) = counted {
        let fail = |error: tokio_postgres::Error| failure("count the existing rows", error);
        let client = postgres.client().await?;
        let there = client.query_one("SELECT to_regclass($1) IS NOT NULL", &[&table]).await.map_err(fail)?;
        if there.get(0) {
            let sql = format!("SELECT count(*) FROM {table}");
            let rows: i64 = client.query_one(&sql, &[]).await.map_err(fail)?.get(0);
            report.queued = rows.try_into().unwrap_or_default();
        }
    }
    Ok(report)
}

/// Does the first part of [`migrate_with`] and rolls it back. Fails where [`migrate_with`] would fail.
/// Returns what would be done, and the table whose rows would be queued.
pub async fn rehearse(
    postgres: &Postgres,
    source: &config::Source,
    queue: &config::Queue,
    shape: &IndexShape,
    options: &MigrateOptions,
) -> Result<(Report, Option<String>)> {
    postgres.check().await?;
    let mut session = LockRetrySession::open(postgres).await?;
    let rehearsed = session
        .with_lock_retry(None, true, async |transaction| {
            let Prepared { table, mut report, asked, .. } =
                prepare(transaction, source, queue, shape, options).await?;
            report.armed = capture::tables_without_triggers_in(transaction, &table).await?;
            adopt::report(&adopt::find(transaction, &table).await?, &mut report);
            product_indexes::plan(transaction, source, &mut report).await?;
            let strays = triggers::stray_triggers(transaction, &table).await?;
            report.removed.extend(strays.iter().map(|name| format!("capture triggers on {name}")));
            let counted = (asked || !report.armed.is_empty()).then_some(table.relation);
            Ok((report, counted))
        })
        .await?;
    session.close().await;
    Ok(rehearsed)
}

/// Results of the work that needs no lock on the table.
struct Prepared {
    table: SourceTable,
    report: Report,
    /// Whether the target existed.
    stands: bool,
    /// Whether existing rows are queued even if no trigger is missing.
    asked: bool,
}

async fn prepare(
    transaction: &Transaction<'_>,
    source: &config::Source,
    queue: &config::Queue,
    shape: &IndexShape,
    options: &MigrateOptions,
) -> Result<Prepared> {
    let fail = |error: tokio_postgres::Error| failure("prepare change capture", error);
    let mut report = Report { applied: schema_version::apply(transaction).await?, ..Report::default() };
    create_products(transaction, source, &mut report).await?;
    let left_behind = queues::switch(transaction, queue, &mut report).await?;
    if queue.is_pgmq() {
        queues::create(transaction, queue, &mut report).await?;
    }
    if shape.kind == PGVECTOR {
        create_extension(transaction, &mut report).await?;
    }
    let table = SourceTable::find_by_search_path(transaction, source).await?;
    let known = RecordedSource::read(transaction, source, &table).await?;
    write_source(transaction, source, &table).await?;
    let stands =
        content::settle_generation(transaction, &table, shape, known.as_ref(), options, &mut report).await?;
    transaction
        .execute(
            "SELECT refarch.make_capture($1, $2::text::regclass, $3, $4), refarch.note_columns($1, $2::text::regclass, $3, $4)",
            &[&table.name, &table.relation, &source.id, &table.watched],
        )
        .await
        .map_err(fail)?;
    let (is_other, columns_changed, metadata_changed) = known.map_or((false, false, false), |known| {
        (known.is_other, known.columns_changed, known.metadata_changed)
    });
    // Changes may not have been captured. A change of metadata columns alone deletes no row. Ids that are
    // queued twice could be indexed twice at once, and their texts would be embedded again.
    let unseen = left_behind || columns_changed || is_other;
    let is_smaller: bool = transaction
        .query_one("SELECT refarch.forget_gone($1, $2::text::regclass)", &[&table.name, &table.relation])
        .await
        .map_err(fail)?
        .get(0);
    if is_smaller && !unseen {
        transaction.execute("SELECT refarch.expand_ledger($1)", &[&table.name]).await.map_err(fail)?;
    }
    let asked = !stands || unseen || metadata_changed;
    if asked {
        transaction
            .execute("SELECT refarch.request_backfill($1, true, $2)", &[&table.name, &(stands && unseen)])
            .await
            .map_err(fail)?;
    }
    give_rights(transaction, options).await?;
    report.warnings.extend(capture::warnings(transaction, &table).await?);
    Ok(Prepared { table, report, stands, asked })
}

async fn write_source(
    transaction: &Transaction<'_>,
    source: &config::Source,
    table: &SourceTable,
) -> Result<()> {
    transaction
        .execute(
            "INSERT INTO refarch.source AS s (name, relation, table_name, id_column, text_columns, metadata_columns, watched) \
             VALUES ($1, $2::text::regclass, $2::text::regclass::text, $3, $4, $5, $6) \
             ON CONFLICT (name) DO UPDATE SET relation = excluded.relation, table_name = excluded.table_name, \
               id_column = excluded.id_column, text_columns = excluded.text_columns, \
               metadata_columns = excluded.metadata_columns, watched = excluded.watched \
             WHERE (s.relation, s.table_name, s.id_column, s.text_columns, s.metadata_columns, s.watched) IS DISTINCT FROM \
               (excluded.relation, excluded.table_name, excluded.id_column, excluded.text_columns, excluded.metadata_columns, excluded.watched)",
            &[&table.name, &table.relation, &source.id, &source.text, &source.metadata, &table.watched],
        )
        .await
        .map(drop)
        .map_err(|error| failure("record the source", error))
}

/// Gives roles of the database the rights that their parts need, and revokes the right to call our functions
/// from everyone else.
async fn give_rights(transaction: &Transaction<'_>, options: &MigrateOptions) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("grant rights to roles", error);
    for (part, name) in &options.roles {
        let there: bool = transaction
            .query_one("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", &[name])
            .await
            .map_err(fail)?
            .get(0);
        if !there {
            return Err(Error::new(
                FailureKind::MissingResource,
                "grant rights to roles",
                format!("there is no role {name} in the database: create it with CREATE ROLE {name} LOGIN"),
            ));
        }
        transaction
            .execute(
                "INSERT INTO refarch.granted (part, name) VALUES ($1, $2) ON CONFLICT DO NOTHING",
                &[part, name],
            )
            .await
            .map_err(fail)?;
    }
    transaction.execute("SELECT refarch.give_rights()", &[]).await.map(drop).map_err(fail)
}

async fn create_products(
    transaction: &Transaction<'_>,
    source: &config::Source,
    report: &mut Report,
) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("create the table of products", error);
    if source.table != product_indexes::PRODUCTS_TABLE {
        return Ok(());
    }
    let there: bool = transaction
        .query_one("SELECT to_regclass($1) IS NOT NULL", &[&product_indexes::PRODUCTS_TABLE])
        .await
        .map_err(fail)?
        .get(0);
    if !there {
        transaction.batch_execute(PRODUCTS).await.map_err(fail)?;
        report.created.push(product_indexes::PRODUCTS_TABLE.into());
    }
    Ok(())
}

async fn create_extension(transaction: &Transaction<'_>, report: &mut Report) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("create the extension vector", error);
    let version = "SELECT extversion FROM pg_extension WHERE extname = 'vector'";
    let mut row = transaction.query_opt(version, &[]).await.map_err(fail)?;
    if row.is_none() {
        // Without SCHEMA, the extension may go into our schema (for a user named refarch) and be dropped with
        // it.
        let schemas = "SELECT to_regnamespace('public') IS NOT NULL";
        let public: bool = transaction.query_one(schemas, &[]).await.map_err(fail)?.get(0);
        let sql = if public { "CREATE EXTENSION vector SCHEMA public" } else { "CREATE EXTENSION vector" };
        transaction.batch_execute(sql).await.map_err(fail)?;
        created::record(transaction, created::EXTENSION, "vector").await?;
        report.created.push("extension vector".into());
        row = transaction.query_opt(version, &[]).await.map_err(fail)?;
    }
    let version: String = row.map(|row| row.get(0)).unwrap_or_default();
    let found = pgvector::parse_version(&version);
    let (major, minor, patch) = pgvector::MIN_VERSION;
    if found < pgvector::MIN_VERSION {
        return Err(Error::new(
            FailureKind::WrongVersion,
            "check pgvector",
            format!(
                "pgvector {version} has no halfvec, and {major}.{minor}.{patch} or later is needed: run ALTER EXTENSION vector UPDATE"
            ),
        ));
    }
    let (major, minor, patch) = pgvector::MIN_GRAPH_VERSION;
    if found < pgvector::MIN_GRAPH_VERSION {
        report.warnings.push(format!(
            "pgvector {version} has bugs that corrupt HNSW graphs, so no graph is built and searches read all vectors: \
             install pgvector {major}.{minor}.{patch} or later, then run ALTER EXTENSION vector UPDATE"
        ));
    }
    Ok(())
}
