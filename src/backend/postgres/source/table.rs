//! The description of a source's table, and the SQL that reads the table.

use tokio_postgres::{GenericClient, Row, Transaction};

use super::key::Key;
use super::quote::quote_ident;
use super::{casts, expression, name};
use crate::backend::postgres::failure;
use crate::config;
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::source_row::ContentSalt;

/// A fingerprint of what a description depends on, of the table that has schema `$1` and name `$2` now: the
/// relation, and numbers, types, collations and names of the columns in `$3`.
pub(super) const FINGERPRINT: &str = "SELECT c.oid, c.oid::text || coalesce((SELECT string_agg(' ' || a.attnum || '/' || a.atttypid \
      || '/' || a.attcollation || '/' || a.attname, '' ORDER BY a.attnum) FROM pg_catalog.pg_attribute a \
      WHERE a.attrelid = c.oid AND a.attname = ANY ($3) AND NOT a.attisdropped), '') AS fingerprint \
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
    WHERE n.nspname = $1 AND c.relname = $2";

/// A source's table, looked up in the database; its columns are checked and quoted.
#[derive(Clone, Debug)]
pub struct SourceTable {
    /// The source's name in settings and messages.
    pub name: String,
    /// The table, schema-qualified and quoted.
    pub relation: String,
    /// The id column, quoted.
    pub id: String,
    /// The type that ids are compared as, schema-qualified and quoted, such as `"pg_catalog"."int8"`. It is
    /// the id column's type without domains and without a length, so that a cast to it cuts nothing.
    pub id_type: String,
    /// Expression over `s` that gives the text to embed.
    pub text: String,
    /// Expression over `s` that gives the metadata as jsonb.
    pub metadata: String,
    /// The settings that decide a text, for the content salt.
    pub template: String,
    /// Columns whose change matters, not quoted.
    pub watched: Vec<String>,
    /// The settings by which the table was found, to look it up again.
    pub(super) settings: config::Source,
    /// Schema and name, not quoted.
    pub(super) qualified_name: (String, String),
    key: Key,
    /// The result of [`FINGERPRINT`] when the table was found.
    pub(super) fingerprint: String,
}

impl SourceTable {
    /// The same as [`Self::find`]. A name without a schema is looked up in the role's own search path.
    pub(crate) async fn find_by_search_path(
        transaction: &Transaction<'_>,
        source: &config::Source,
    ) -> Result<Self> {
        let fail = |error: tokio_postgres::Error| failure("look the source table up", error);
        transaction.batch_execute("SET LOCAL search_path TO DEFAULT").await.map_err(fail)?;
        let table = Self::find(transaction, source).await?;
        transaction.batch_execute("SET LOCAL search_path = pg_catalog, pg_temp").await.map_err(fail)?;
        Ok(table)
    }

    /// Looks up the table of the settings and checks that it can be indexed.
    pub async fn find(client: &impl GenericClient, source: &config::Source) -> Result<Self> {
        let fail = |error: tokio_postgres::Error| failure("look the source table up", error);
        let wrong = |message: String| {
            Error::new(FailureKind::WrongSetting, format!("check source.table = {}", source.table), message)
        };
        let found = name::find(client, &source.table).await?;
        if !matches!(found.kind.as_str(), "r" | "p") {
            return Err(wrong(
                "it is a view or a foreign table, and triggers cannot see its changes: name the table that holds the rows"
                    .into(),
            ));
        }
        let names = columns(source);
        // Before the columns are read: a change in between then shows as another fingerprint at the first
        // read.
        let fingerprint: Option<Row> =
            client.query_opt(FINGERPRINT, &[&found.schema, &found.table, &names]).await.map_err(fail)?;
        let (oid, fingerprint): (u32, String) = fingerprint
            .map(|row| (row.get(0), row.get(1)))
            .ok_or_else(|| wrong("the table was renamed or dropped just now: try again".into()))?;
        let columns = client
            .query(
                "SELECT attname, atttypid, attnotnull, \
                        EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = $1 AND i.indisunique AND i.indisvalid \
                                AND i.indpred IS NULL AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum) \
                 FROM pg_catalog.pg_attribute a WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped",
                &[&oid],
            )
            .await
            .map_err(fail)?;
        let column = |name: &str| columns.iter().find(|row| row.get::<_, String>(0) == name);
        let id = column(&source.id)
            .ok_or_else(|| wrong(format!("it has no column {:?} (source.id)", source.id)))?;
        if !id.get::<_, bool>(2) || !id.get::<_, bool>(3) {
            return Err(wrong(format!(
                "its column {:?} (source.id) must be unique by itself and never null: add a primary key, or name another column",
                source.id
            )));
        }
        for (setting, names) in [("source.text", &source.text), ("source.metadata", &source.metadata)] {
            for name in names {
                if column(name).is_none() {
                    return Err(wrong(format!("it has no column {name:?} ({setting})")));
                }
            }
        }
        if let Some(refused) = casts::refused(client, oid, source).await? {
            return Err(wrong(refused));
        }
        let key = Key::find(client, id.get(1))
            .await?
            .map_err(|reason| wrong(format!("its column {:?} (source.id) {reason}", source.id)))?;
        let mut watched = source.text.clone();
        watched.extend(source.metadata.iter().filter(|name| !source.text.contains(name)).cloned());
        Ok(Self {
            name: source.name.clone(),
            relation: format!("{}.{}", quote_ident(&found.schema), quote_ident(&found.table)),
            id: quote_ident(&source.id),
            id_type: key.sql_type(),
            text: expression::text(&source.text),
            metadata: expression::metadata(&source.metadata),
            template: source.text.join("\u{1f}"),
            watched,
            settings: source.clone(),
            qualified_name: (found.schema, found.table),
            key,
            fingerprint,
        })
    }

    /// The salt of this table's texts under a model.
    #[must_use]
    pub fn salt(&self, model: &str) -> ContentSalt {
        ContentSalt::new(model, &self.template)
    }

    /// Id, text and metadata (as text) over `s`. An id as text is compared byte by byte, whatever the
    /// collation of its column.
    fn columns(&self) -> String {
        format!(
            "s.{id}::text COLLATE \"default\" AS id, {text} AS text, ({metadata})::text AS metadata",
            id = self.id,
            text = self.text,
            metadata = self.metadata
        )
    }

    /// A query of id, text and metadata (as text) for the rows whose ids, as text, are in `$1`. The result
    /// may include rows whose ids are equal for the id's type but have another spelling.
    #[must_use]
    pub fn select_by_ids(&self) -> String {
        format!(
            "SELECT {columns} FROM {relation} s WHERE s.{id} {equal} ANY ($1::text[]::{id_type}[])",
            columns = self.columns(),
            relation = self.relation,
            id = self.id,
            equal = self.key.equal,
            id_type = self.id_type,
        )
    }

    /// A query of the same columns for the next `$2` rows by id after `$1`, or from the start if `$1` is
    /// null. The column `key` is the id as stored, to order by.
    #[must_use]
    pub fn select_after(&self) -> String {
        format!(
            "SELECT {columns}, s.{id} AS key FROM {relation} s \
             WHERE $1::text IS NULL OR s.{id} {greater} $1::text::{id_type} ORDER BY s.{id} LIMIT $2",
            columns = self.columns(),
            relation = self.relation,
            id = self.id,
            greater = self.key.greater,
            id_type = self.id_type,
        )
    }

    /// Whether the id column's type may hold this text. If not, no row has this id.
    #[must_use]
    pub fn can_hold(&self, id: &str) -> bool {
        self.key.can_hold(id)
    }
}

/// Columns that a description depends on.
pub(super) fn columns(source: &config::Source) -> Vec<&str> {
    let mut names: Vec<&str> = vec![&source.id];
    names.extend(source.text.iter().chain(&source.metadata).map(String::as_str));
    names
}
