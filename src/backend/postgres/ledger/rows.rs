//! Rows of the source with their ledger entries, read in one snapshot.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use sha2::{Digest, Sha256};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::entry::{ENTRY, read_entry};
use crate::backend::postgres::source::{
    MAX_REREADS, SourceRead, SourceReader, SourceTable, altered_too_often,
};
use crate::backend::postgres::{Postgres, fail, failure};
use crate::pipeline::failure::{Class, FailureKind, Result};
use crate::pipeline::ledger::Peeked;
use crate::pipeline::source_row::{ContentSalt, Hash, SourceRow};

/// Reads the source's rows together with the entries of one target.
#[derive(Clone)]
pub(super) struct RowReader {
    postgres: Postgres,
    source: Arc<SourceReader>,
    generation: i32,
    salt: ContentSalt,
}

/// Rows and entries of the ids in `$1`; the ledger's target is `$2`.
fn peek_sql(table: &SourceTable) -> String {
    format!(
        "SELECT k.id, s.id IS NOT NULL, s.text, s.metadata, l.id IS NOT NULL, {ENTRY} \
         FROM unnest($1::text[]) WITH ORDINALITY AS k(id, ordinal) \
         LEFT JOIN ({rows}) s ON s.id = k.id \
         LEFT JOIN refarch.ledger l ON l.target = $2 AND l.id = k.id \
         ORDER BY k.ordinal",
        rows = table.select_by_ids(),
    )
}

/// The next rows with their entries; the ledger's target is `$3`. The outer ORDER BY is needed: a join need
/// not keep the order of the rows, and the next page begins after the last row.
fn page_sql(table: &SourceTable) -> String {
    format!(
        "SELECT s.id, true, s.text, s.metadata, l.id IS NOT NULL, {ENTRY} \
         FROM ({rows}) s LEFT JOIN refarch.ledger l ON l.target = $3 AND l.id = s.id ORDER BY s.key",
        rows = table.select_after(),
    )
}

/// A row of the source from its text and metadata as selected by [`SourceTable::select_by_ids`].
pub(crate) fn source_row(salt: &ContentSalt, id: String, text: &str, metadata: &str) -> SourceRow {
    SourceRow {
        id,
        content_hash: salt.hash(text),
        text: text.into(),
        metadata_hash: Hash(Sha256::digest(metadata.as_bytes()).into()),
        metadata: metadata.into(),
    }
}

impl RowReader {
    pub(super) fn new(
        postgres: Postgres,
        table: Arc<SourceTable>,
        generation: i32,
        salt: ContentSalt,
    ) -> Self {
        let source = Arc::new(SourceReader::new(postgres.clone(), table));
        Self { postgres, source, generation, salt }
    }

    pub(super) async fn peek(&self, ids: &[String]) -> Result<Vec<Peeked>> {
        let what = "read rows and ledger";
        // Ids that no row can have. The index may hold such a record all the same, if another program wrote
        // it.
        let mut impossible: HashSet<String> = HashSet::new();
        for _ in 0..MAX_REREADS {
            let table = self.source.table();
            let possible: Vec<&str> = ids
                .iter()
                .map(String::as_str)
                .filter(|id| table.can_hold(id) && !impossible.contains(*id))
                .collect();
            let client = self.postgres.client().await?;
            let read = client.read_source(&table, &peek_sql(&table), &[&possible, &self.generation]).await;
            drop(client);
            match self.source.check_read(what, &table, read).await? {
                SourceRead::Rows(rows) => {
                    let peeked = rows.iter().map(|row| self.read(row)).collect::<Result<Vec<_>>>()?;
                    return if possible.len() == ids.len() {
                        Ok(peeked)
                    } else {
                        self.with_impossible(ids, peeked).await
                    };
                }
                SourceRead::Retry => impossible.clear(),
                SourceRead::BadValue(error) => {
                    let more = self.source.impossible(&table, &possible).await?;
                    if more.is_empty() {
                        return Err(error);
                    }
                    impossible.extend(more);
                }
            }
        }
        Err(altered_too_often(what, &self.source.table()))
    }

    pub(super) async fn fits(&self, ids: &[String], bytes: u64) -> Result<usize> {
        let table = self.source.table();
        let possible: Vec<&String> = ids.iter().filter(|id| table.can_hold(id)).collect();
        // Sizes come from the query that reads the rows, so that its expressions decide.
        let sql = format!(
            "SELECT p.id, coalesce(octet_length(p.text)::bigint + octet_length(p.metadata), 0) FROM ({}) p",
            table.select_by_ids()
        );
        let client = self.postgres.client().await?;
        let (rows, _) = match client.read_source(&table, &sql, &[&possible]).await {
            Ok(read) => read,
            Err(error) => {
                let error = failure("read the sizes of rows", error);
                // Reading the rows gives an error about the table again, with a better message.
                let is_about_table =
                    error.class() != Class::Retryable || error.kind() == FailureKind::HiddenRows;
                return if is_about_table { Ok(ids.len()) } else { Err(error) };
            }
        };
        let sizes: HashMap<&str, i64> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let mut sum = 0_u64;
        let fitting = ids.iter().take_while(|id| {
            let size = sizes.get(id.as_str()).copied().unwrap_or_default();
            sum = sum.saturating_add(size.try_into().unwrap_or_default());
            sum <= bytes
        });
        Ok(fitting.count().max(1))
    }

    pub(super) async fn rows_after(&self, id: Option<&str>, limit: usize) -> Result<Vec<Peeked>> {
        let what = "read a page of rows";
        for _ in 0..MAX_REREADS {
            let table = self.source.table();
            let client = self.postgres.client().await?;
            let parameters: [&(dyn ToSql + Sync); 3] = [&id, &(limit as i64), &self.generation];
            let read = client.read_source(&table, &page_sql(&table), &parameters).await;
            drop(client);
            match self.source.check_read(what, &table, read).await? {
                SourceRead::Rows(rows) => return rows.iter().map(|row| self.read(row)).collect(),
                SourceRead::Retry => {}
                SourceRead::BadValue(error) => return Err(error),
            }
        }
        Err(altered_too_often(what, &self.source.table()))
    }

    pub(super) async fn ids_after(&self, id: Option<&str>, limit: usize) -> Result<Vec<String>> {
        let what = "read a page of ids";
        for _ in 0..MAX_REREADS {
            let table = self.source.table();
            // The query selects only ids. So it computes no text, and a row that cannot be read does no harm.
            let sql = format!("SELECT s.id FROM ({rows}) s ORDER BY s.key", rows = table.select_after());
            let client = self.postgres.client().await?;
            let read = client.read_source(&table, &sql, &[&id, &(limit as i64)]).await;
            drop(client);
            match self.source.check_read(what, &table, read).await? {
                SourceRead::Rows(rows) => return Ok(rows.iter().map(|row| row.get(0)).collect()),
                SourceRead::Retry => {}
                SourceRead::BadValue(error) => return Err(error),
            }
        }
        Err(altered_too_often(what, &self.source.table()))
    }

    /// Adds the entries of ids that no row can have, in the order of `ids`.
    async fn with_impossible(&self, ids: &[String], peeked: Vec<Peeked>) -> Result<Vec<Peeked>> {
        let mut by_id: HashMap<String, Peeked> = peeked.into_iter().map(|p| (p.id.clone(), p)).collect();
        // Text in PostgreSQL cannot hold a NUL.
        let held: Vec<&String> =
            ids.iter().filter(|id| !by_id.contains_key(*id) && !id.contains('\0')).collect();
        let sql =
            format!("SELECT l.id, {ENTRY} FROM refarch.ledger l WHERE l.target = $1 AND l.id = ANY ($2)");
        let client = self.postgres.client().await?;
        let entries =
            client.query(&sql, &[&self.generation, &held]).await.map_err(fail("read rows and ledger"))?;
        for row in &entries {
            let id: String = row.get(0);
            let entry = Some(read_entry(row, 1, &id)?);
            by_id.insert(id.clone(), Peeked { id, row: None, entry });
        }
        let nothing = |id: &String| Peeked { id: id.clone(), row: None, entry: None };
        // `ids` may hold an id twice.
        Ok(ids.iter().map(|id| by_id.get(id).cloned().unwrap_or_else(|| nothing(id))).collect())
    }

    fn read(&self, row: &Row) -> Result<Peeked> {
        let id: String = row.get(0);
        let source = row.get::<_, bool>(1).then(|| {
            source_row(&self.salt, id.clone(), row.get(2), row.get::<_, Option<&str>>(3).unwrap_or("{}"))
        });
        let entry = if row.get(4) { Some(read_entry(row, 5, &id)?) } else { None };
        Ok(Peeked { id, row: source, entry })
    }
}
