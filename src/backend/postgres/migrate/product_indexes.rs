//! The indexes for matches by SKU and name, on a table of products that an earlier version of refarch made without them.

use std::time::Duration;

use tokio_postgres::{Client, GenericClient};

use super::Report;
use crate::backend::postgres::products::INDEXES_LOWER_CASE;
use crate::backend::postgres::{Postgres, connection, failure};
use crate::config;
use crate::pipeline::failure::{Error, FailureKind, Result};

/// The table of products that refarch makes. Any other table must exist.
pub(super) const PRODUCTS_TABLE: &str = "public.products_with_increment";

/// The columns of the table that refarch makes. The id tells it from the reference architecture's own table of that name,
/// which has an `integer` and a sequence.
const OURS: [&str; 8] = [
    "id bigint d",
    "created_at timestamp without time zone ",
    "name character varying(255) ",
    "sku character varying(255) ",
    "description text ",
    "price money ",
    "last_updated date ",
    "uuid character varying(255) ",
];

/// How long a build waits for each transaction that is older than it is.
const LOCK_TIMEOUT: Duration = Duration::from_mins(1);

/// What a report calls the index.
fn describe(column: &str) -> String {
    format!("index on lower({column}) of {PRODUCTS_TABLE}")
}

/// The columns whose index is missing: none unless the source is a table that refarch made and this role can index it.
pub(super) async fn missing(
    client: &impl GenericClient,
    source: &config::Source,
) -> Result<Vec<&'static str>> {
    if source.table != PRODUCTS_TABLE {
        return Ok(Vec::new());
    }
    let sql = format!(
        "SELECT k.column_name FROM pg_class t CROSS JOIN (VALUES ('sku'), ('name')) k(column_name) \
         WHERE t.oid = to_regclass($1) AND t.relkind = 'r' AND pg_has_role(t.relowner, 'USAGE') \
           AND $2::text[] = (SELECT array_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || ' ' || a.attidentity::text \
             ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = t.oid AND a.attnum BETWEEN 1 AND 8) \
           AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = t.oid AND {INDEXES_LOWER_CASE})"
    );
    let rows = client
        .query(&sql, &[&PRODUCTS_TABLE, &OURS.as_slice()])
        .await
        .map_err(|error| failure("look for the indexes of the table of products", error))?;
    let is_missing = |column: &str| rows.iter().any(|row| row.get::<_, &str>(0) == column);
    Ok(["sku", "name"].into_iter().filter(|column| is_missing(column)).collect())
}

/// Reports the indexes that [`create`] would make.
pub(super) async fn plan(
    client: &impl GenericClient,
    source: &config::Source,
    report: &mut Report,
) -> Result<()> {
    report.created.extend(missing(client, source).await?.into_iter().map(describe));
    Ok(())
}

/// Makes the missing indexes while the application reads and writes the table. Searches work without them, so a build
/// that fails is a warning; what it leaves is dropped by the next migration.
pub(super) async fn create(postgres: &Postgres, source: &config::Source, report: &mut Report) -> Result<()> {
    let columns = missing(&**postgres.client().await?, source).await?;
    if columns.is_empty() {
        return Ok(());
    }
    match build(postgres, &columns).await {
        Ok(()) => {
            let left = missing(&**postgres.client().await?, source).await?;
            let made = columns.iter().filter(|column| !left.contains(column));
            report.created.extend(made.map(|column| describe(column)));
        }
        Err(error) => report.warnings.push(format!(
            "the indexes for matches by SKU and name are not made, so searches are slower: {error}; run refarch migrate again"
        )),
    }
    Ok(())
}

async fn build(postgres: &Postgres, columns: &[&str]) -> Result<()> {
    let what = "make the indexes of the table of products";
    let fail = |error: tokio_postgres::Error| failure(what, error);
    // A build cannot be part of a transaction, and so its settings are those of the session.
    if !postgres.supports_sessions().await? {
        return Err(Error::new(
            FailureKind::Unsupported,
            what,
            "database.url leads to a pooler in transaction mode: use the address of the server itself",
        ));
    }
    let (session, connection) = postgres.dedicated().await.map_err(fail)?;
    let connection = tokio::spawn(connection);
    session.batch_execute(connection::BUILD_SESSION).await.map_err(fail)?;
    let timeout = format!("SET lock_timeout = {}", LOCK_TIMEOUT.as_millis());
    session.batch_execute(&timeout).await.map_err(fail)?;
    // Another migration may be building them: an invalid index is no leftover then. The session's end releases the lock.
    let locked = session
        .query_one("SELECT pg_try_advisory_lock(hashtext('refarch.product_indexes'))", &[])
        .await
        .map_err(fail)?;
    if locked.get(0) {
        for column in columns {
            build_one(&session, column).await.map_err(fail)?;
        }
    }
    drop(session);
    let _ = connection.await;
    Ok(())
}

async fn build_one(session: &Client, column: &str) -> Result<(), tokio_postgres::Error> {
    let name = format!("products_with_increment_lower_{column}");
    let left: bool = session
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_index i WHERE i.indexrelid = to_regclass($1) \
               AND i.indrelid = to_regclass($2) AND NOT i.indisvalid)",
            &[&format!("public.{name}"), &PRODUCTS_TABLE],
        )
        .await?
        .get(0);
    if left {
        // An interrupted build left it.
        session.batch_execute(&format!("DROP INDEX CONCURRENTLY IF EXISTS public.{name}")).await?;
    }
    let sql = format!("CREATE INDEX CONCURRENTLY IF NOT EXISTS {name} ON {PRODUCTS_TABLE} (lower({column}))");
    session.batch_execute(&sql).await
}
