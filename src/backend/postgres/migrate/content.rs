//! Compares the content that the settings ask for with the content of the index.

use tokio_postgres::Transaction;

use super::generation;
use super::options::MigrateOptions;
use super::report::Report;
use super::uninstall::refuse_while_running;
use crate::backend::postgres::failure;
use crate::backend::postgres::generation::IndexShape;
use crate::backend::postgres::source::SourceTable;
use crate::config;
use crate::pipeline::failure::{Error, FailureKind, Result};

/// The source as recorded, compared with the settings.
pub(super) struct RecordedSource {
    /// Whether another table was indexed.
    pub(super) is_other: bool,
    /// Whether the metadata columns changed. Their order does not matter.
    pub(super) metadata_changed: bool,
    /// Whether columns have another number or type than recorded: their values may have changed without
    /// capture.
    pub(super) columns_changed: bool,
    /// Differences in content, each with old and new value.
    differences: Vec<String>,
}

impl RecordedSource {
    /// Reads the recorded source; `None` for a new source.
    pub(super) async fn read(
        transaction: &Transaction<'_>,
        source: &config::Source,
        table: &SourceTable,
    ) -> Result<Option<Self>> {
        // A renamed column keeps its values. A column is identified by its number.
        let row = transaction
            .query_opt(
                "SELECT coalesce(s.table_name, s.relation::text), s.relation = $2::text::regclass, \
                   coalesce(to_regclass(s.table_name) = $2::text::regclass, false), $2::text::regclass::text, s.id_column, s.text_columns, s.metadata_columns, \
                   (SELECT array_agg(c.number ORDER BY k.ordinal) FROM unnest(s.id_column || s.text_columns) WITH ORDINALITY AS k(name, ordinal) \
                    LEFT JOIN refarch.source_column c ON c.source = s.name AND c.name = k.name), \
                   (SELECT array_agg(a.attnum ORDER BY k.ordinal) FROM unnest($3::text || $4::text[]) WITH ORDINALITY AS k(name, ordinal) \
                    LEFT JOIN pg_attribute a ON a.attrelid = $2::text::regclass AND a.attname = k.name AND NOT a.attisdropped), \
                   EXISTS (SELECT FROM refarch.column_faults($1, $2::text::regclass)) \
                 FROM refarch.source s WHERE s.name = $1",
                &[&table.name, &table.relation, &source.id, &source.text],
            )
            .await
            .map_err(|error| failure("read the source", error))?;
        let Some(row) = row else { return Ok(None) };
        let (name, same): (String, bool) = (row.get(0), row.get(1));
        let (same_name, wanted): (bool, String) = (row.get(2), row.get(3));
        let (id, text, metadata): (String, Vec<String>, Vec<String>) = (row.get(4), row.get(5), row.get(6));
        let was: Vec<Option<i16>> = row.get::<_, Option<Vec<_>>>(7).unwrap_or_default();
        let is: Vec<Option<i16>> = row.get::<_, Option<Vec<_>>>(8).unwrap_or_default();
        let mut differences = Vec::new();
        let mut differ = |what: &str, was: &str, is: &str| {
            differences.push(format!("{what} was {was} and is {is}"));
        };
        // Another table under the same name, such as a rebuilt copy, holds the same rows.
        if !same && !same_name {
            differ("source.table", &name, &wanted);
        }
        let renamed = |was: Option<&Option<i16>>, is: Option<&Option<i16>>| {
            same && matches!((was, is), (Some(Some(was)), Some(Some(is))) if was == is)
        };
        if id != source.id && !renamed(was.first(), is.first()) {
            differ("source.id", &id, &source.id);
        }
        let all_renamed =
            text.len() == source.text.len() && (1..=text.len()).all(|at| renamed(was.get(at), is.get(at)));
        if text != source.text && !all_renamed {
            differ("source.text", &text.join(", "), &source.text.join(", "));
        }
        let set = |names: &[String]| names.iter().cloned().collect::<std::collections::BTreeSet<_>>();
        Ok(Some(Self {
            is_other: !same,
            metadata_changed: set(&metadata) != set(&source.metadata),
            columns_changed: row.get(9),
            differences,
        }))
    }
}

/// Makes sure that there is an active target for these settings. Returns whether there was one. A target with
/// other content is deleted if it has no rows or if the options allow a rebuild.
pub(super) async fn settle_generation(
    transaction: &Transaction<'_>,
    table: &SourceTable,
    shape: &IndexShape,
    known: Option<&RecordedSource>,
    options: &MigrateOptions,
    report: &mut Report,
) -> Result<bool> {
    let fail = |error: tokio_postgres::Error| failure("look for the index", error);
    let active = transaction
        .query_opt(
            "SELECT id, kind, model, dimensions FROM refarch.target WHERE source = $1 AND state = 'active'",
            &[&table.name],
        )
        .await
        .map_err(fail)?;
    if let Some(active) = active {
        let id: i32 = active.get(0);
        let mut differences = known.map(|known| known.differences.clone()).unwrap_or_default();
        let (kind, model): (&str, &str) = (active.get(1), active.get(2));
        let (was, is) = (active.get::<_, i32>(3).to_string(), shape.dimensions.to_string());
        for (what, was, is) in [
            ("index.kind", kind, shape.kind.as_str()),
            ("the model", if shape.is_of(model) { &shape.model } else { model }, shape.model.as_str()),
            ("the number of dimensions", &was, &is),
        ] {
            if was != is {
                differences.push(format!("{what} was {was} and is {is}"));
            }
        }
        // An index of another kind is at another place anyway.
        let moved = if kind == shape.kind {
            generation::settle_location(transaction, id, shape).await?
        } else {
            None
        };
        if let Some(was) = &moved {
            differences.push(format!("the index was in {was} and is in {}", shape.location));
        }
        if differences.is_empty() {
            generation::settle_model(transaction, id, shape).await?;
            return Ok(true);
        }
        let rows: i64 = transaction
            .query_one("SELECT count(*) FROM refarch.ledger WHERE target = $1 AND NOT deleted", &[&id])
            .await
            .map_err(fail)?
            .get(0);
        let differences = differences.join("; ");
        if rows > 0 && !options.rebuild {
            return Err(Error::new(
                FailureKind::WrongShape,
                "migrate",
                format!(
                    "the settings ask for another index than the existing one: {differences}. \
                     The existing index, with {rows} rows, would be deleted, and a search would find a row only after the row is \
                     embedded again. Undo the change of the settings, or run refarch migrate --rebuild"
                ),
            ));
        }
        refuse_while_running(transaction, "migrate", "stop them first").await?;
        generation::retire(transaction, id, &differences, report).await?;
        if let Some(was) = moved {
            report.notes.push(format!("the old records stay in {was}: delete them there"));
        }
    }
    generation::create(transaction, table, shape, &table.salt(&shape.model), report).await?;
    Ok(false)
}
