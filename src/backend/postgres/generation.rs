//! The target: one content of one index that is fed from a source. A change of the content makes a new
//! target.

use tokio_postgres::Transaction;

use super::migrate::report::Report;
use super::source::SourceTable;
use super::{Postgres, failure};
use crate::backend::pgvector;
use crate::config;
use crate::pipeline::failure::{Class, Error, FailureKind, Result};
use crate::pipeline::source_row::ContentSalt;

/// The kind of index whose vectors are in this database.
pub(super) const PGVECTOR: &str = "pgvector";

/// The content of the index by the settings.
#[derive(Clone, Debug)]
pub struct IndexShape {
    /// The index's kind, such as `pgvector`.
    pub kind: String,
    /// The model and its precision.
    pub model: String,
    /// The name of the same model in an earlier release: an index by that name has the same content.
    pub former_model: Option<String>,
    /// Length of a vector.
    pub dimensions: usize,
    /// Where the records are.
    pub location: IndexLocation,
}

impl IndexShape {
    /// Whether this is the model of the shape, by its present or former name.
    pub(super) fn is_of(&self, model: &str) -> bool {
        self.model == model || self.former_model.as_deref() == Some(model)
    }
}

/// Where the records of an index outside of the database are; all empty for an index inside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IndexLocation {
    /// The index's name; empty if the settings give the host.
    pub name: String,
    /// The index's host; empty if the index does not exist yet.
    pub host: String,
    /// The namespace; empty for the default namespace.
    pub namespace: String,
    /// Whether the ownership record shows that this is the index that was written to, whatever its address.
    pub is_same_index: bool,
}

impl IndexLocation {
    /// Whether both are the same index and namespace, by name or by host.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        let same = |a: &str, b: &str| !a.is_empty() && a == b;
        // An index inside of the database has neither name nor host.
        let is_inside = |location: &Self| location.name.is_empty() && location.host.is_empty();
        self.namespace == other.namespace
            && (same(&self.name, &other.name)
                || same(&self.host, &other.host)
                || (is_inside(self) && is_inside(other)))
    }
}

impl std::fmt::Display for IndexLocation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "the default namespace")?,
            named => write!(f, "namespace {named:?}")?,
        }
        match self.name.as_str() {
            "" => write!(f, " of the index at {}", self.host),
            named => write!(f, " of index {named}"),
        }
    }
}

/// The recorded place of a source's active target. `None` if there is no target, if its index is inside of
/// the database, or if the place was never recorded.
pub async fn recorded_location(postgres: &Postgres, source: &str) -> Result<Option<IndexLocation>> {
    let fail = |error: tokio_postgres::Error| failure("look for the index", error);
    let client = postgres.client().await?;
    // There is no schema before the first migration, and no such column before an upgrade.
    let there = client
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('refarch.target') AND attname = 'host')",
            &[],
        )
        .await
        .map_err(fail)?;
    if !there.get::<_, bool>(0) {
        return Ok(None);
    }
    let sql = "SELECT name, host, namespace FROM refarch.target WHERE source = $1 AND state = 'active'";
    let row = client.query_opt(sql, &[&source]).await.map_err(fail)?;
    Ok(row.and_then(|row| location_of(&row, 0)))
}

/// The model that the index of a source was made with, and its number of dimensions. None before the first
/// migration.
pub async fn recorded_model(postgres: &Postgres, source: &str) -> Result<Option<(String, usize)>> {
    let fail = |error: tokio_postgres::Error| failure("look for the index", error);
    let client = postgres.client().await?;
    let there =
        client.query_one("SELECT to_regclass('refarch.target') IS NOT NULL", &[]).await.map_err(fail)?;
    if !there.get::<_, bool>(0) {
        return Ok(None);
    }
    let sql = "SELECT model, dimensions FROM refarch.target WHERE source = $1 AND state = 'active'";
    let row = client.query_opt(sql, &[&source]).await.map_err(fail)?;
    Ok(row.map(|row| (row.get(0), usize::try_from(row.get::<_, i32>(1)).unwrap_or_default())))
}

/// Reads name, host and namespace, beginning at column `at`.
fn location_of(row: &tokio_postgres::Row, at: usize) -> Option<IndexLocation> {
    let host: Option<String> = row.get(at + 1);
    host.map(|host| IndexLocation {
        name: row.get(at),
        host,
        namespace: row.get(at + 2),
        is_same_index: false,
    })
}

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

/// Whether a target is still active. If `refarch migrate` made another target after a process started, that
/// process searches an index that is no longer written to.
pub async fn is_active(postgres: &Postgres, generation: i32) -> Result<bool> {
    let row = postgres
        .client()
        .await?
        .query_opt("SELECT FROM refarch.target WHERE id = $1 AND state = 'active'", &[&generation])
        .await
        .map_err(|error| failure("look for the index", error))?;
    Ok(row.is_some())
}

/// The active target and its source, as recorded in the database.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The target's id.
    pub id: i32,
    /// The source's table.
    pub table: SourceTable,
    /// The salt of the content hashes.
    pub salt: ContentSalt,
    /// Length of a vector.
    pub dimensions: usize,
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

/// The active target of a source. Fails if the schema is missing or the settings do not fit it any more.
pub async fn find(postgres: &Postgres, source: &config::Source, shape: &IndexShape) -> Result<Generation> {
    let fix = "run refarch migrate";
    let mut client = postgres.client().await?;
    let client = client.transaction().await.map_err(|error| failure("look for the schema", error))?;
    let there: bool = client
        .query_one("SELECT to_regclass('refarch.target') IS NOT NULL", &[])
        .await
        .map_err(|error| failure("look for the schema", error))?
        .get(0);
    if !there {
        return Err(Error::new(
            FailureKind::MissingResource,
            "look for the schema",
            format!("there is no schema refarch in {}: {fix}", postgres.address()),
        ));
    }
    super::migrate::check(&client).await?;
    let table = match find_table(&client, source).await {
        // The settings are as recorded, so somebody is altering the table just now.
        Err(error) if error.class() == Class::Fatal && is_as_recorded(&client, source).await? => {
            return Err(error.of_kind(FailureKind::SourceChanged));
        }
        found => found?,
    };
    // A renamed column keeps its content, so the salt of the target is used and not one made from the
    // settings.
    let row = client
        .query_opt(
            "SELECT t.id, t.model, t.dimensions, t.salt, t.kind, s.id_column = $2 AND s.text_columns = $3, t.name, t.host, t.namespace \
             FROM refarch.target t JOIN refarch.source s ON s.name = t.source \
             WHERE t.source = $1 AND t.state = 'active' AND s.relation = $4::text::regclass",
            &[&table.name, &source.id, &source.text, &table.relation],
        )
        .await
        .map_err(|error| failure("look for the index", error))?;
    let Some(row) = row else {
        let message = format!("{} is not indexed yet: {fix}", table.relation);
        return Err(if is_swapped(&client, &table.name).await? {
            // Another table has the name now (a swap by rename). The worker that runs the proof captures it
            // soon.
            Error::new(FailureKind::SourceChanged, "look for the index", message)
        } else {
            Error::new(FailureKind::MissingResource, "look for the index", message)
        });
    };
    let (model, kind, same_columns): (String, String, bool) = (row.get(1), row.get(4), row.get(5));
    if !shape.is_of(&model) || kind != shape.kind || !same_columns {
        return Err(Error::new(
            FailureKind::WrongShape,
            "check the index",
            format!(
                "the index was made with model {model}; the settings name another model, other columns or another kind of index: {fix}"
            ),
        ));
    }
    if let Some(recorded) = location_of(&row, 6).filter(|recorded| !recorded.is(&shape.location)) {
        let message = format!(
            "the records are in {recorded}, and the settings name {}: correct the settings, or {fix}",
            shape.location
        );
        return Err(Error::new(FailureKind::WrongShape, "check the index", message));
    }
    Ok(Generation {
        id: row.get(0),
        table,
        salt: ContentSalt::stored(row.get(3)),
        dimensions: usize::try_from(row.get::<_, i32>(2)).unwrap_or_default(),
    })
}

/// Whether the columns in the settings are as recorded when capture was installed.
async fn is_as_recorded(transaction: &Transaction<'_>, source: &config::Source) -> Result<bool> {
    let row = transaction
        .query_opt(
            "SELECT id_column = $2 AND text_columns = $3 AND metadata_columns <@ $4 AND metadata_columns @> $4 \
             FROM refarch.source WHERE name = $1",
            &[&source.name, &source.id, &source.text, &source.metadata],
        )
        .await
        .map_err(|error| failure("look for the index", error))?;
    Ok(row.is_some_and(|row| row.get::<_, bool>(0)))
}

/// Whether another table has the name that the source's table had when capture was installed.
async fn is_swapped(transaction: &Transaction<'_>, source: &str) -> Result<bool> {
    let row = transaction
        .query_opt(
            "SELECT to_regclass(table_name) IS NOT NULL AND relation <> to_regclass(table_name) \
             FROM refarch.source WHERE name = $1",
            &[&source],
        )
        .await
        .map_err(|error| failure("look for the index", error))?;
    Ok(row.is_some_and(|row| row.get::<_, Option<bool>>(0).unwrap_or_default()))
}

/// Captures the table that now has the source's name, so that a role that starts after a swap need not wait
/// for a running role. Does nothing if there was no swap. A missing right is only logged.
pub async fn follow_swap(postgres: &Postgres, source: &str) {
    let followed = async {
        let mut client = postgres.client().await?;
        let transaction =
            client.transaction().await.map_err(|error| failure("look for the schema", error))?;
        if !is_swapped(&transaction, source).await? {
            return Ok(());
        }
        transaction
            .query_one("SELECT refarch.rearm($1)", &[&source])
            .await
            .map_err(|error| failure("capture the table that has the name now", error))?;
        transaction.commit().await.map_err(|error| failure("capture the table that has the name now", error))
    };
    if let Err::<(), Error>(error) = followed.await {
        tracing::debug!(%error, "cannot capture the table that has the source's name now");
    }
}

/// Looks the table up. A name without a schema is looked up in the role's own search path.
pub(super) async fn find_table(
    transaction: &Transaction<'_>,
    source: &config::Source,
) -> Result<SourceTable> {
    let fail = |error: tokio_postgres::Error| failure("look the source table up", error);
    transaction.batch_execute("SET LOCAL search_path TO DEFAULT").await.map_err(fail)?;
    let table = SourceTable::find(transaction, source).await?;
    transaction.batch_execute("SET LOCAL search_path = pg_catalog, pg_temp").await.map_err(fail)?;
    Ok(table)
}
