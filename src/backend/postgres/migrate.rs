//! The schema: versioned, idempotent, one migration at a time whoever starts.

use serde::Serialize;
use tokio_postgres::{Client, GenericClient, Transaction};

use super::source::SourceTable;
use super::{Postgres, failure};
use crate::backend::pgmq::Names;
use crate::backend::pgvector;
use crate::config;
use crate::pipeline::catalog::ContentSalt;
use crate::pipeline::failure::{Error, Result};

/// The migrations of schema `refarch`, in order. One that has been released is never edited.
const MIGRATIONS: &[(i32, &str, &str)] = &[
    (1, "core", include_str!("schema/0001_core.sql")),
    (2, "attempts", include_str!("schema/0002_attempts.sql")),
    (3, "shipments", include_str!("schema/0003_shipments.sql")),
];

/// pgmq, as its authors publish it.
const PGMQ: &str = include_str!("schema/pgmq.sql");

/// The reference architecture's table.
const PRODUCTS: &str = include_str!("schema/products.sql");

/// The table that [`PRODUCTS`] makes; any other table must be there.
const PRODUCTS_TABLE: &str = "public.products_with_increment";

/// The kind of index whose vectors are in this database.
const PGVECTOR: &str = "pgvector";

/// What the index will hold.
#[derive(Clone, Debug)]
pub struct IndexShape {
    /// The index's kind, such as `pgvector`.
    pub kind: String,
    /// Model and precision.
    pub model: String,
    /// Length of a vector.
    pub dimensions: usize,
}

/// What a migration did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Migrations applied, by name.
    pub applied: Vec<String>,
    /// Tables, queues and extensions made.
    pub created: Vec<String>,
    /// Tables on which capture was armed.
    pub armed: Vec<String>,
    /// Rows queued because they were there before capture was.
    pub queued: u64,
    /// What is not kept in step, and why.
    pub warnings: Vec<String>,
}

/// The source and the target that feed and make the index, as the schema knows them.
#[derive(Clone, Debug)]
pub struct Target {
    /// The target's id.
    pub id: i32,
    /// The source's table.
    pub table: SourceTable,
    /// What its content hashes are salted with.
    pub salt: ContentSalt,
    /// Length of a vector.
    pub dimensions: usize,
}

/// Brings the database up to date with this build and these settings.
pub async fn migrate(
    postgres: &Postgres,
    source: &config::Source,
    queue: &config::Queue,
    shape: &IndexShape,
) -> Result<Report> {
    postgres.check().await?;
    // A session of its own: the lock goes with it, however this ends.
    let (mut client, connection) =
        postgres.dedicated().await.map_err(|error| failure("connect to the database", &error))?;
    let connection = tokio::spawn(connection);
    client
        .batch_execute("SET lock_timeout = '60s'; SELECT pg_advisory_lock(hashtext('refarch.migrate'))")
        .await
        .map_err(|error| failure("wait for other migrations", &error))?;
    let mut report = Report::default();
    apply_migrations(&mut client, &mut report).await?;
    let transaction = client.transaction().await.map_err(|error| failure("begin a migration", &error))?;
    create_products(&transaction, source, &mut report).await?;
    if queue.kind == config::QueueKind::Pgmq {
        create_queues(&transaction, queue, &mut report).await?;
    }
    if shape.kind == PGVECTOR {
        create_extension(&transaction, &mut report).await?;
    }
    let table = SourceTable::find(&transaction, source).await?;
    arm(&transaction, source, &table, shape, &mut report).await?;
    transaction.commit().await.map_err(|error| failure("commit a migration", &error))?;
    drop(client);
    let _ = connection.await;
    Ok(report)
}

async fn apply_migrations(client: &mut Client, report: &mut Report) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("migrate the schema", &error);
    client
        .batch_execute(
            "CREATE SCHEMA IF NOT EXISTS refarch; \
             CREATE TABLE IF NOT EXISTS refarch.migration ( \
               version integer PRIMARY KEY, name text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())",
        )
        .await
        .map_err(fail)?;
    let newest: i32 = client
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
        let transaction = client.transaction().await.map_err(fail)?;
        transaction.batch_execute(sql).await.map_err(fail)?;
        transaction
            .execute("INSERT INTO refarch.migration (version, name) VALUES ($1, $2)", &[version, name])
            .await
            .map_err(fail)?;
        transaction.commit().await.map_err(fail)?;
        report.applied.push(format!("{version:04}_{name}"));
    }
    Ok(())
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
        transaction.batch_execute("CREATE EXTENSION vector").await.map_err(fail)?;
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
            retire(transaction, old.get(0), report).await?;
        }
        create_target(transaction, table, shape, &salt, report).await?;
    }

    let armed = transaction
        .query(
            "SELECT a::text FROM refarch.arm($1, $2::text::regclass, $3, $4) AS a",
            &[&table.name, &table.relation, &source.id, &table.watched],
        )
        .await
        .map_err(fail)?;
    report.armed = armed.iter().map(|row| row.get(0)).collect();
    report.warnings = warnings(transaction, table).await?;

    // Rows may have come, changed or gone unseen.
    if stands.is_none() || !armed.is_empty() {
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

/// A model or text template that changed needs all vectors anew; the old ones are no use meanwhile,
/// since a query's vector is of the new model.
async fn retire(transaction: &Transaction<'_>, target: i32, report: &mut Report) -> Result<()> {
    let sql = format!("DROP TABLE IF EXISTS {}", pgvector::table_name(target));
    let fail = |error: tokio_postgres::Error| failure("retire the old index", &error);
    transaction.batch_execute(&sql).await.map_err(fail)?;
    transaction.execute("DELETE FROM refarch.target WHERE id = $1", &[&target]).await.map_err(fail)?;
    report.warnings.push(
        "model, text columns or table changed: every row is embedded anew, and found again when it has been"
            .into(),
    );
    Ok(())
}

async fn create_target(
    transaction: &Transaction<'_>,
    table: &SourceTable,
    shape: &IndexShape,
    salt: &ContentSalt,
    report: &mut Report,
) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("create the index", &error);
    let dimensions = shape.dimensions as i32;
    let id: i32 = transaction
        .query_one(
            "INSERT INTO refarch.target (source, kind, name, model, dimensions, salt) VALUES ($1, $2, 'vector', $3, $4, $5) \
             RETURNING id",
            &[&table.name, &shape.kind, &shape.model, &dimensions, &salt.as_str()],
        )
        .await
        .map_err(fail)?
        .get(0);
    if shape.kind != PGVECTOR {
        return Ok(());
    }
    let name = pgvector::table_name(id);
    // EXTERNAL would move vectors out of line; MAIN keeps 776 bytes in the row, where a scan reads them.
    let sql = format!(
        "CREATE TABLE {name} (id text PRIMARY KEY, embedding halfvec({dimensions}) NOT NULL, content_hash bytea NOT NULL); \
         ALTER TABLE {name} ALTER embedding SET STORAGE MAIN"
    );
    transaction.batch_execute(&sql).await.map_err(fail)?;
    report.created.push(name);
    Ok(())
}

/// Tables of a source, down to every leaf, whose changes are not captured: a trigger is missing, is
/// disabled, or calls something else.
pub async fn unarmed(postgres: &Postgres, table: &SourceTable) -> Result<Vec<String>> {
    let client = postgres.client().await?;
    let rows = client
        .query(
            "WITH RECURSIVE tree(oid) AS ( \
               SELECT $1::text::regclass::oid UNION SELECT i.inhrelid FROM tree JOIN pg_inherits i ON i.inhparent = tree.oid) \
             SELECT c.oid::regclass::text FROM tree JOIN pg_class c USING (oid) \
             WHERE c.relkind IN ('r', 'p') AND EXISTS ( \
               SELECT FROM unnest(ARRAY['insert', 'update', 'delete', 'truncate']) AS kind WHERE NOT EXISTS ( \
                 SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid \
                 WHERE t.tgrelid = c.oid AND t.tgname = 'refarch_' || $2 || '_' || kind \
                   AND p.proname = 'capture_' || $2 || '_' || kind \
                   AND p.pronamespace = 'refarch'::regnamespace AND t.tgenabled IN ('O', 'A'))) \
             ORDER BY 1",
            &[&table.relation, &table.name],
        )
        .await
        .map_err(|error| failure("look at the capture triggers", &error))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

async fn warnings(client: &impl GenericClient, table: &SourceTable) -> Result<Vec<String>> {
    let fail = |error: tokio_postgres::Error| failure("look for changes that capture can't see", &error);
    let mut warnings = Vec::new();
    let foreign = client
        .query(
            "WITH RECURSIVE tree(oid) AS ( \
               SELECT $1::text::regclass::oid UNION SELECT i.inhrelid FROM tree JOIN pg_inherits i ON i.inhparent = tree.oid) \
             SELECT c.oid::regclass::text FROM tree JOIN pg_class c USING (oid) WHERE c.relkind NOT IN ('r', 'p')",
            &[&table.relation],
        )
        .await
        .map_err(fail)?;
    for row in foreign {
        warnings.push(format!(
            "{}: a foreign table, whose changes triggers here don't see",
            row.get::<_, String>(0)
        ));
    }
    let subscribed: bool = client
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_subscription_rel r WHERE r.srrelid = $1::text::regclass)",
            &[&table.relation],
        )
        .await
        .map_err(fail)?
        .get(0);
    if subscribed {
        warnings.push(format!(
            "{}: filled by logical replication, which fires no statement triggers; run refarch where the rows are written",
            table.relation
        ));
    }
    Ok(warnings)
}

/// The active target of a source. Fails when the schema is missing or the settings no longer fit it.
pub async fn target(postgres: &Postgres, source: &config::Source, shape: &IndexShape) -> Result<Target> {
    let fix = "run refarch migrate";
    let client = postgres.client().await?;
    let there: bool = client
        .query_one("SELECT to_regclass('refarch.target') IS NOT NULL", &[])
        .await
        .map_err(|error| failure("look for the schema", &error))?
        .get(0);
    if !there {
        return Err(Error::fatal(
            "look for the schema",
            format!("there is no schema refarch in {}: {fix}", postgres.address()),
        ));
    }
    let table = SourceTable::find(&**client, source).await?;
    let salt = table.salt(&shape.model);
    let row = client
        .query_opt(
            "SELECT t.id, t.model, t.salt = $2 AND t.kind = $3, t.dimensions FROM refarch.target t JOIN refarch.source s ON s.name = t.source \
             WHERE t.source = $1 AND t.state = 'active' AND s.relation = $4::text::regclass",
            &[&table.name, &salt.as_str(), &shape.kind, &table.relation],
        )
        .await
        .map_err(|error| failure("look for the index", &error))?
        .ok_or_else(|| Error::fatal("look for the index", format!("{} is not kept in step yet: {fix}", table.relation)))?;
    if !row.get::<_, bool>(2) {
        return Err(Error::fatal(
            "check the index",
            format!(
                "it was made with model {} and other text columns or another model are set now: {fix}",
                row.get::<_, String>(1)
            ),
        ));
    }
    Ok(Target {
        id: row.get(0),
        table,
        salt,
        dimensions: usize::try_from(row.get::<_, i32>(3)).unwrap_or_default(),
    })
}
