//! The table that is kept in step, and the SQL that reads it.

use std::fmt::Write as _;

use tokio_postgres::GenericClient;

use super::failure;
use crate::config;
use crate::pipeline::catalog::ContentSalt;
use crate::pipeline::failure::{Error, Result};

/// Quotes an identifier for SQL.
#[must_use]
pub fn quote_ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A source's table as the database knows it, with its columns checked and quoted.
#[derive(Clone, Debug)]
pub struct SourceTable {
    /// The source's name in settings and messages.
    pub name: String,
    /// The table, schema-qualified and quoted.
    pub relation: String,
    /// The id column, quoted.
    pub id: String,
    /// The id column's type, such as `bigint`.
    pub id_type: String,
    /// Expression over `s` that gives the text to embed.
    pub text: String,
    /// Expression over `s` that gives the metadata as jsonb.
    pub metadata: String,
    /// What of the settings decides a text, for the content salt.
    pub template: String,
    /// Columns whose change matters, not quoted.
    pub watched: Vec<String>,
}

impl SourceTable {
    /// Looks the table of the settings up and checks that it can be kept in step.
    pub async fn find(client: &impl GenericClient, source: &config::Source) -> Result<Self> {
        let what = "look the source table up";
        let wrong = |message: String| Error::fatal(format!("check source.table = {}", source.table), message);
        let (schema, table) = split_name(&source.table);
        let row = client
            .query_opt(
                "SELECT c.oid, c.relkind::text, n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.oid = to_regclass(CASE WHEN $1::text IS NULL THEN '' ELSE quote_ident($1) || '.' END || quote_ident($2))",
                &[&schema, &table],
            )
            .await
            .map_err(|error| failure(what, &error))?
            .ok_or_else(|| wrong("there is no such table".into()))?;
        let oid: u32 = row.get(0);
        let kind: String = row.get(1);
        if !matches!(kind.as_str(), "r" | "p") {
            return Err(wrong(
                "it is a view or foreign table, whose changes triggers don't see; name the table under it"
                    .into(),
            ));
        }
        let relation = format!("{}.{}", quote_ident(row.get(2)), quote_ident(row.get(3)));

        let columns = client
            .query(
                "SELECT attname, format_type(atttypid, NULL), attnotnull, \
                        EXISTS (SELECT FROM pg_index i WHERE i.indrelid = $1 AND i.indisunique AND i.indisvalid \
                                AND i.indpred IS NULL AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum) \
                 FROM pg_attribute a WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped",
                &[&oid],
            )
            .await
            .map_err(|error| failure(what, &error))?;
        let column = |name: &str| columns.iter().find(|row| row.get::<_, String>(0) == name);
        let id = column(&source.id)
            .ok_or_else(|| wrong(format!("it has no column {:?} (source.id)", source.id)))?;
        if !id.get::<_, bool>(2) || !id.get::<_, bool>(3) {
            return Err(wrong(format!(
                "its column {:?} (source.id) must be unique by itself and never null: add a primary key or name another column",
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
        let mut watched = source.text.clone();
        watched.extend(source.metadata.iter().filter(|name| !source.text.contains(name)).cloned());
        Ok(Self {
            name: source.name.clone(),
            relation,
            id: quote_ident(&source.id),
            id_type: id.get(1),
            text: text_expression(&source.text),
            metadata: metadata_expression(&source.metadata),
            template: source.text.join("\u{1f}"),
            watched,
        })
    }

    /// The salt of this table's texts under a model.
    #[must_use]
    pub fn salt(&self, model: &str) -> ContentSalt {
        ContentSalt::new(model, &self.template)
    }

    /// A query of id, text and metadata (as text) of the rows whose ids, as text, are in `$1`.
    #[must_use]
    pub fn select_by_ids(&self) -> String {
        format!(
            "SELECT s.{id}::text AS id, {text} AS text, ({metadata})::text AS metadata \
             FROM {relation} s WHERE s.{id} = ANY ($1::text[]::{id_type}[])",
            id = self.id,
            text = self.text,
            metadata = self.metadata,
            relation = self.relation,
            id_type = self.id_type,
        )
    }

    /// The same of the next rows by id, after `$1` (or from the start when it is null), `$2` of them.
    #[must_use]
    pub fn select_after(&self) -> String {
        format!(
            "SELECT s.{id}::text AS id, {text} AS text, ({metadata})::text AS metadata \
             FROM {relation} s WHERE $1::text IS NULL OR s.{id} > $1::text::{id_type} ORDER BY s.{id} LIMIT $2",
            id = self.id,
            text = self.text,
            metadata = self.metadata,
            relation = self.relation,
            id_type = self.id_type,
        )
    }

    /// Whether the id column's type can hold this text; what it can't hold can't be a row's id.
    #[must_use]
    pub fn can_hold(&self, id: &str) -> bool {
        match self.id_type.as_str() {
            "smallint" => id.parse::<i16>().is_ok(),
            "integer" => id.parse::<i32>().is_ok(),
            "bigint" => id.parse::<i64>().is_ok(),
            "uuid" => {
                id.len() == 36
                    && id.bytes().enumerate().all(|(at, byte)| match at {
                        8 | 13 | 18 | 23 => byte == b'-',
                        _ => byte.is_ascii_hexdigit(),
                    })
            }
            _ => !id.contains('\0'),
        }
    }
}

/// Splits `schema.table`; without a schema the search path decides.
fn split_name(name: &str) -> (Option<&str>, &str) {
    match name.split_once('.') {
        Some((schema, table)) => (Some(schema), table),
        None => (None, name),
    }
}

/// One column as it is; several joined by line breaks, nulls left out.
fn text_expression(columns: &[String]) -> String {
    let quoted: Vec<String> = columns.iter().map(|name| format!("s.{}::text", quote_ident(name))).collect();
    match quoted.as_slice() {
        [one] => format!("coalesce({one}, '')"),
        many => format!("concat_ws(E'\\n', {})", many.join(", ")),
    }
}

/// An object of the columns, without those that are null.
fn metadata_expression(columns: &[String]) -> String {
    let mut list = String::new();
    for name in columns {
        let separator = if list.is_empty() { "" } else { ", " };
        let literal = name.replace('\'', "''");
        let _ = write!(list, "{separator}'{literal}', s.{}", quote_ident(name));
    }
    format!("jsonb_strip_nulls(jsonb_build_object({list}))")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_quoted() {
        assert_eq!(quote_ident("a\"b; drop"), "\"a\"\"b; drop\"");
        assert_eq!(
            metadata_expression(&["it's".into()]),
            "jsonb_strip_nulls(jsonb_build_object('it''s', s.\"it's\"))"
        );
    }
}
