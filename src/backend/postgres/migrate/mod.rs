//! The schema: versioned, idempotent, one migration at a time whoever starts.

mod adopt;
pub mod uninstall;

use serde::Serialize;
use tokio_postgres::Transaction;

use super::source::SourceTable;
use super::target::{self, IndexShape};
use super::{Postgres, capture, failure};
use crate::backend::pgmq::Names;
use crate::backend::pgvector;
use crate::config;
use crate::pipeline::failure::{Error, Result};

/// The migrations of schema `refarch`, in order. One that has been released is never edited.
const MIGRATIONS: &[(i32, &str, &str)] = &[
    (1, "core", include_str!("../schema/0001_core.sql")),
    (2, "attempts", include_str!("../schema/0002_attempts.sql")),
    (3, "shipments", include_str!("../schema/0003_shipments.sql")),
    (4, "made", include_str!("../schema/0004_made.sql")),
    (6, "faults", include_str!("../schema/0006_faults.sql")),
];

/// pgmq, as its authors publish it.
const PGMQ: &str = include_str!("../schema/pgmq.sql");

/// The reference architecture's table.
const PRODUCTS: &str = include_str!("../schema/products.sql");

/// The table that [`PRODUCTS`] makes; any other table must be there.
const PRODUCTS_TABLE: &str = "public.products_with_increment";

/// How long a migration waits for the locks that it needs, and a plan, which makes others wait meanwhile.
const PATIENCE_S: u32 = 60;
const PLAN_PATIENCE_S: u32 = 3;

/// What a migration did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Migrations applied, by name.
    pub applied: Vec<String>,
    /// Tables, queues and extensions made.
    pub created: Vec<String>,
    /// What was taken off: triggers of a system that this one takes over from.
    pub removed: Vec<String>,
    /// Tables on which capture was armed.
    pub armed: Vec<String>,
    /// Rows queued because they were there before capture was.
    pub queued: u64,
    /// What is not kept in step, and why.
    pub warnings: Vec<String>,
    /// What is left to the user to do or to know.
    pub notes: Vec<String>,
}

/// Brings the database up to date with this build and these settings.
pub async fn migrate(
    postgres: &Postgres,
    source: &config::Source,
    queue: &config::Queue,
    shape: &IndexShape,
) -> Result<Report> {
    run(postgres, source, queue, shape, false).await
}

/// What [`migrate`] would do. Does it, short of queueing rows, and takes it back.
pub async fn plan(
    postgres: &Postgres,
    source: &config::Source,
    queue: &config::Queue,
    shape: &IndexShape,
) -> Result<Report> {
    run(postgres, source, queue, shape, true).await
}

/// A session of its own, in which one transaction does all: with it go the lock and, when it fails or is
/// only a plan, everything that was done.
async fn run(
    postgres: &Postgres,
    source: &config::Source,
    queue: &config::Queue,
    shape: &IndexShape,
    is_plan: bool,
) -> Result<Report> {
    let fail = |error: tokio_postgres::Error| failure("wait for other migrations", &error);
    postgres.check().await?;
    let (mut client, connection) =
        postgres.dedicated().await.map_err(|error| failure("connect to the database", &error))?;
    let connection = tokio::spawn(connection);
    let transaction = client.transaction().await.map_err(fail)?;
    let patience_s = if is_plan { PLAN_PATIENCE_S } else { PATIENCE_S };
    // Of the transaction, not the session: a pooler may give the session to others.
    transaction
        .batch_execute(&format!(
            "SET LOCAL lock_timeout = '{patience_s}s'; SELECT pg_advisory_xact_lock(hashtext('refarch.migrate'))"
        ))
        .await
        .map_err(fail)?;
    let mut report = Report::default();
    apply_migrations(&transaction, &mut report).await?;
    create_products(&transaction, source, &mut report).await?;
    if queue.kind == config::QueueKind::Pgmq {
        create_queues(&transaction, queue, &mut report).await?;
    }
    if shape.kind == target::PGVECTOR {
        create_extension(&transaction, &mut report).await?;
    }
    let table = SourceTable::find(&transaction, source).await?;
    adopt::take_over(&transaction, &table, &mut report).await?;
    arm(&transaction, source, &table, shape, is_plan, &mut report).await?;
    let ended = if is_plan { transaction.rollback().await } else { transaction.commit().await };
    ended.map_err(|error| failure("commit a migration", &error))?;
    drop(client);
    let _ = connection.await;
    Ok(report)
}

async fn apply_migrations(transaction: &Transaction<'_>, report: &mut Report) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("migrate the schema", &error);
    let there: bool = transaction
        .query_one("SELECT to_regclass('refarch.migration') IS NOT NULL", &[])
        .await
        .map_err(fail)?
        .get(0);
    if !there {
        transaction
            .batch_execute(
                "CREATE SCHEMA IF NOT EXISTS refarch; \
                 CREATE TABLE refarch.migration ( \
                   version integer PRIMARY KEY, name text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())",
            )
            .await
            .map_err(fail)?;
    }
    let newest: i32 = transaction
        .query_one("SELECT coalesce(max(version), 0) FROM refarch.migration", &[])
        .await
        .map_err(fail)?
        .get(0);
    let known = MIGRATIONS.last().map_or(0, |(version, _, _)| *version);
    if newest > known {
        return Err(Error::fatal(
            "migrate the schema",
            format!("the database is at version {newest} and this build knows {known}: use a newer refarch"),
        ));
    }
    for (version, name, sql) in MIGRATIONS.iter().filter(|(version, _, _)| *version > newest) {
        transaction.batch_execute(sql).await.map_err(fail)?;
        transaction
            .execute("INSERT INTO refarch.migration (version, name) VALUES ($1, $2)", &[version, name])
            .await
            .map_err(fail)?;
        report.applied.push(format!("{version:04}_{name}"));
    }
    Ok(())
}

/// Remembers what was made outside of our schema.
async fn remember(transaction: &Transaction<'_>, what: &str, name: &str) -> Result<()> {
    transaction
        .execute(
            "INSERT INTO refarch.made (what, name) VALUES ($1, $2) ON CONFLICT DO NOTHING",
            &[&what, &name],
        )
        .await
        .map(drop)
        .map_err(|error| failure("remember what was made", &error))
}

async fn create_products(
    transaction: &Transaction<'_>,
    source: &config::Source,
    report: &mut Report,
) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("create the table of products", &error);
    if source.table != PRODUCTS_TABLE {
        return Ok(());
    }
    let there: bool = transaction
        .query_one("SELECT to_regclass($1) IS NOT NULL", &[&PRODUCTS_TABLE])
        .await
        .map_err(fail)?
        .get(0);
    if !there {
        transaction.batch_execute(PRODUCTS).await.map_err(fail)?;
        report.created.push(PRODUCTS_TABLE.into());
    }
    Ok(())
}

async fn create_queues(
    transaction: &Transaction<'_>,
    queue: &config::Queue,
    report: &mut Report,
) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("install pgmq", &error);
    let there: bool = transaction
        .query_one("SELECT to_regprocedure('pgmq.send_batch(text, jsonb[], jsonb[])') IS NOT NULL", &[])
        .await
        .map_err(fail)?
        .get(0);
    if !there {
        transaction.batch_execute(PGMQ).await.map_err(fail)?;
        remember(transaction, uninstall::PGMQ, "pgmq").await?;
        report.created.push("pgmq".into());
    }
    for name in Names::new(&queue.name).all() {
        let there: bool = transaction
            .query_one("SELECT EXISTS (SELECT FROM pgmq.meta WHERE queue_name = $1)", &[&name])
            .await
            .map_err(fail)?
            .get(0);
        if !there {
            transaction
                .execute("SELECT pgmq.create($1)", &[&name])
                .await
                .map_err(|error| failure("create a queue", &error))?;
            remember(transaction, uninstall::QUEUE, name).await?;
            report.created.push(name.into());
        }
    }
    Ok(())
}

async fn create_extension(transaction: &Transaction<'_>, report: &mut Report) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("create the extension vector", &error);
    let version = "SELECT extversion FROM pg_extension WHERE extname = 'vector'";
    let mut row = transaction.query_opt(version, &[]).await.map_err(fail)?;
    if row.is_none() {
        // By default it would go into our own schema for a user of its name, and with that schema again.
        let schemas = "SELECT to_regnamespace('public') IS NOT NULL";
        let public: bool = transaction.query_one(schemas, &[]).await.map_err(fail)?.get(0);
        let sql = if public { "CREATE EXTENSION vector SCHEMA public" } else { "CREATE EXTENSION vector" };
        transaction.batch_execute(sql).await.map_err(fail)?;
        remember(transaction, uninstall::EXTENSION, "vector").await?;
        report.created.push("extension vector".into());
        row = transaction.query_opt(version, &[]).await.map_err(fail)?;
    }
    let version: String = row.map(|row| row.get(0)).unwrap_or_default();
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or_default());
    let mut next = || parts.next().unwrap_or_default();
    let found = (next(), next(), next());
    let (major, minor, patch) = pgvector::MIN_VERSION;
    if found < pgvector::MIN_VERSION {
        return Err(Error::fatal(
            "check pgvector",
            format!(
                "version {version} has known corruption; {major}.{minor}.{patch} or later is needed: ALTER EXTENSION vector UPDATE"
            ),
        ));
    }
    Ok(())
}

async fn arm(
    transaction: &Transaction<'_>,
    source: &config::Source,
    table: &SourceTable,
    shape: &IndexShape,
    is_plan: bool,
    report: &mut Report,
) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("arm change capture", &error);
    let salt = table.salt(&shape.model);
    let same_source: bool = transaction
        .query_one(
            "SELECT EXISTS (SELECT FROM refarch.source WHERE name = $1 AND relation = $2::text::regclass AND id_column = $3)",
            &[&table.name, &table.relation, &source.id],
        )
        .await
        .map_err(fail)?
        .get(0);
    transaction
        .execute(
            "INSERT INTO refarch.source AS s (name, relation, id_column, text_columns, metadata_columns) \
             VALUES ($1, $2::text::regclass, $3, $4, $5) \
             ON CONFLICT (name) DO UPDATE SET relation = excluded.relation, id_column = excluded.id_column, \
               text_columns = excluded.text_columns, metadata_columns = excluded.metadata_columns \
             WHERE (s.relation, s.id_column, s.text_columns, s.metadata_columns) IS DISTINCT FROM \
               (excluded.relation, excluded.id_column, excluded.text_columns, excluded.metadata_columns)",
            &[&table.name, &table.relation, &source.id, &source.text, &source.metadata],
        )
        .await
        .map_err(fail)?;
    let active = transaction
        .query_opt(
            "SELECT id, kind = $2 AND salt = $3 AND dimensions = $4 FROM refarch.target WHERE source = $1 AND state = 'active'",
            &[&table.name, &shape.kind, &salt.as_str(), &(shape.dimensions as i32)],
        )
        .await
        .map_err(fail)?;
    let stands =
        active.as_ref().filter(|row| same_source && row.get::<_, bool>(1)).map(|row| row.get::<_, i32>(0));
    if stands.is_none() {
        if let Some(old) = active {
            target::retire(transaction, old.get(0), report).await?;
        }
        target::create(transaction, table, shape, &salt, report).await?;
    }

    let armed = transaction
        .query(
            "SELECT a::text FROM refarch.arm($1, $2::text::regclass, $3, $4) AS a",
            &[&table.name, &table.relation, &source.id, &table.watched],
        )
        .await
        .map_err(fail)?;
    report.armed = armed.iter().map(|row| row.get(0)).collect();
    report.warnings.extend(capture::warnings(transaction, table).await?);

    // Rows may have come, changed or gone unseen.
    if is_plan && (stands.is_none() || !armed.is_empty()) {
        let sql = format!("SELECT count(*) FROM {}", table.relation);
        let rows: i64 = transaction.query_one(&sql, &[]).await.map_err(fail)?.get(0);
        report.queued = rows.try_into().unwrap_or_default();
    } else if stands.is_none() || !armed.is_empty() {
        let queued: i64 = transaction
            .query_one(
                "SELECT refarch.backfill($1, $2::text::regclass, $3)",
                &[&table.name, &table.relation, &source.id],
            )
            .await
            .map_err(|error| failure("queue the rows that are there", &error))?
            .get(0);
        report.queued = queued.try_into().unwrap_or_default();
        if stands.is_some() {
            transaction
                .execute(
                    "INSERT INTO refarch.outbox (source, op, ids) VALUES ($1, 't', '{}')",
                    &[&table.name],
                )
                .await
                .map_err(|error| failure("queue the rows that may be gone", &error))?;
        }
    }
    Ok(())
}
