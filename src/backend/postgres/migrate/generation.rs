//! Makes, adjusts and deletes generations.

use tokio_postgres::Transaction;

use super::report::Report;
use crate::backend::pgvector;
use crate::backend::postgres::failure;
use crate::backend::postgres::generation::{IndexLocation, IndexShape, PGVECTOR, location_of};
use crate::backend::postgres::source::SourceTable;
use crate::pipeline::failure::Result;
use crate::pipeline::source_row::ContentSalt;

/// Compares the recorded place of an active target with the place in the settings. Records the latter if both
/// are the same or none was recorded. Otherwise returns the recorded place: the index must be rebuilt.
pub(super) async fn settle_location(
    transaction: &Transaction<'_>,
    generation: i32,
    shape: &IndexShape,
) -> Result<Option<IndexLocation>> {
    if shape.kind == PGVECTOR {
        return Ok(None);
    }
    let fail = |error: tokio_postgres::Error| failure("compare the location of the index", error);
    let sql = "SELECT name, host, namespace FROM refarch.target WHERE id = $1";
    let row = transaction.query_one(sql, &[&generation]).await.map_err(fail)?;
    let location = &shape.location;
    if let Some(recorded) =
        location_of(&row, 0).filter(|recorded| !recorded.is(location) && !location.is_same_index)
    {
        return Ok(Some(recorded));
    }
    transaction
        .execute(
            "UPDATE refarch.target SET name = $2, host = $3, namespace = $4 \
             WHERE id = $1 AND (name, host, namespace) IS DISTINCT FROM ($2, $3, $4)",
            &[&generation, &location.name, &location.host, &location.namespace],
        )
        .await
        .map_err(fail)?;
    Ok(None)
}

/// Replaces a model's former name by the present one. The salt stays, so hashes are as before.
pub(super) async fn settle_model(
    transaction: &Transaction<'_>,
    generation: i32,
    shape: &IndexShape,
) -> Result<()> {
    let sql = "UPDATE refarch.target SET model = $2 WHERE id = $1 AND model <> $2";
    let done = transaction.execute(sql, &[&generation, &shape.model]).await;
    done.map(drop).map_err(|error| failure("record the model", error))
}

/// Deletes a target whose content changed, such as the model or the text template. The old vectors are
/// useless at once, since a query's vector is of the new model.
pub(super) async fn retire(
    transaction: &Transaction<'_>,
    generation: i32,
    differences: &str,
    report: &mut Report,
) -> Result<()> {
    let sql = format!("DROP TABLE IF EXISTS {}", pgvector::table_name(generation));
    let fail = |error: tokio_postgres::Error| failure("delete the old index", error);
    transaction.batch_execute(&sql).await.map_err(fail)?;
    transaction.execute("DELETE FROM refarch.target WHERE id = $1", &[&generation]).await.map_err(fail)?;
    transaction
        .execute("DELETE FROM refarch.count_delta WHERE target = $1", &[&generation])
        .await
        .map_err(fail)?;
    report.warnings.push(format!(
        "{differences}: every row is embedded again, and a search finds a row only after that"
    ));
    Ok(())
}

/// Makes a target, and for pgvector the table of its vectors.
pub(super) async fn create(
    transaction: &Transaction<'_>,
    table: &SourceTable,
    shape: &IndexShape,
    salt: &ContentSalt,
    report: &mut Report,
) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("create the index", error);
    let dimensions = shape.dimensions as i32;
    let location = &shape.location;
    let is_outside = shape.kind != PGVECTOR;
    let id: i32 = transaction
        .query_one(
            "INSERT INTO refarch.target (source, kind, name, host, namespace, model, dimensions, salt) \
             VALUES ($1, $2, $6, $7, $8, $3, $4, $5) RETURNING id",
            &[
                &table.name,
                &shape.kind,
                &shape.model,
                &dimensions,
                &salt.as_str(),
                &if is_outside { location.name.as_str() } else { "vector" },
                &is_outside.then_some(location.host.as_str()),
                &location.namespace,
            ],
        )
        .await
        .map_err(fail)?
        .get(0);
    if shape.kind != PGVECTOR {
        return Ok(());
    }
    let name = pgvector::table_name(id);
    let schema: String = transaction
        .query_one(
            "SELECT quote_ident(n.nspname) FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'",
            &[],
        )
        .await
        .map_err(fail)?
        .get(0);
    // EXTERNAL would move vectors out of line; MAIN keeps 776 bytes in the row, where a scan reads them.
    let sql = format!(
        "CREATE TABLE {name} (id text PRIMARY KEY, embedding {schema}.halfvec({dimensions}) NOT NULL, content_hash bytea NOT NULL); \
         ALTER TABLE {name} ALTER embedding SET STORAGE MAIN"
    );
    transaction.batch_execute(&sql).await.map_err(fail)?;
    transaction.execute("SELECT refarch.begin_count($1)", &[&id]).await.map_err(fail)?;
    report.created.push(name);
    Ok(())
}
