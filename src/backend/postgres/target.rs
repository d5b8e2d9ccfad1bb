//! The target: which index is fed from a source, and what decides that it must be made anew.

use tokio_postgres::Transaction;

use super::migrate::Report;
use super::source::SourceTable;
use super::{Postgres, failure};
use crate::backend::pgvector;
use crate::config;
use crate::pipeline::catalog::ContentSalt;
use crate::pipeline::failure::{Error, Result};

/// The kind of index whose vectors are in this database.
pub(super) const PGVECTOR: &str = "pgvector";

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

/// Whether a target is still the one that is fed. A process that was started before `refarch migrate` made
/// another one searches an index that nobody writes to.
pub async fn is_active(postgres: &Postgres, target: i32) -> Result<bool> {
    let row = postgres
        .client()
        .await?
        .query_opt("SELECT FROM refarch.target WHERE id = $1 AND state = 'active'", &[&target])
        .await
        .map_err(|error| failure("look for the index", &error))?;
    Ok(row.is_some())
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

/// A model or text template that changed needs all vectors anew; the old ones are no use meanwhile,
/// since a query's vector is of the new model.
pub(super) async fn retire(transaction: &Transaction<'_>, target: i32, report: &mut Report) -> Result<()> {
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

/// Makes a target, and the table of its vectors if that is where they are kept.
pub(super) async fn create(
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

/// The active target of a source. Fails when the schema is missing or the settings no longer fit it.
pub async fn find(postgres: &Postgres, source: &config::Source, shape: &IndexShape) -> Result<Target> {
    let fix = "run refarch migrate";
    let mut client = postgres.client().await?;
    let client = client.transaction().await.map_err(|error| failure("look for the schema", &error))?;
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
    let table = SourceTable::find(&*client, source).await?;
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
