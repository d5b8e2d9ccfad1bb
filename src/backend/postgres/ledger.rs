//! The ledger, and its reading together with the source in one snapshot.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use sha2::{Digest, Sha256};
use tokio_postgres::Row;

use super::source::SourceTable;
use super::{Postgres, failure};
use crate::pipeline::catalog::{ContentSalt, Hash, SourceRow};
use crate::pipeline::failure::{Error, Result};
use crate::pipeline::ledger::{Entry, Ledger, Peeked};

/// Source and ledger of one target.
#[derive(Clone)]
pub struct PgLedger {
    postgres: Postgres,
    table: Arc<SourceTable>,
    target: i32,
    salt: ContentSalt,
    peek: Arc<str>,
}

impl PgLedger {
    /// The ledger of a target over its source's table.
    #[must_use]
    pub fn new(postgres: Postgres, table: Arc<SourceTable>, target: i32, salt: ContentSalt) -> Self {
        let peek = format!(
            "SELECT k.id, s.id IS NOT NULL, s.text, s.metadata, \
                    l.id IS NOT NULL, l.open, l.epoch, l.dirty, l.content_hash, l.metadata_hash, l.deleted \
             FROM unnest($1::text[]) WITH ORDINALITY AS k(id, place) \
             LEFT JOIN ({rows}) s ON s.id = k.id \
             LEFT JOIN refarch.ledger l ON l.target = $2 AND l.id = k.id \
             ORDER BY k.place",
            rows = table.select_by_ids(),
        );
        Self { postgres, table, target, salt, peek: peek.into() }
    }
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

#[async_trait]
impl Ledger for PgLedger {
    async fn peek(&self, ids: &[String]) -> Result<Vec<Peeked>> {
        let fail = |error: tokio_postgres::Error| failure("read rows and ledger", &error);
        let (possible, impossible): (Vec<&String>, Vec<&String>) =
            ids.iter().partition(|id| self.table.can_hold(id));
        let client = self.postgres.client().await?;
        let statement = client.prepare_cached(&self.peek).await.map_err(fail)?;
        let rows = client.query(&statement, &[&possible, &self.target]).await.map_err(fail)?;
        let peeked = rows.iter().map(|row| self.read(row)).collect::<Result<Vec<_>>>()?;
        if impossible.is_empty() {
            return Ok(peeked);
        }
        let mut by_id: HashMap<String, Peeked> = peeked.into_iter().map(|p| (p.id.clone(), p)).collect();
        let nothing = |id: &String| Peeked { id: id.clone(), row: None, entry: None };
        Ok(ids.iter().map(|id| by_id.remove(id).unwrap_or_else(|| nothing(id))).collect())
    }
}

impl PgLedger {
    fn read(&self, row: &Row) -> Result<Peeked> {
        let id: String = row.get(0);
        let source = row.get::<_, bool>(1).then(|| {
            source_row(&self.salt, id.clone(), row.get(2), row.get::<_, Option<&str>>(3).unwrap_or("{}"))
        });
        let hash = |at: usize| -> Result<Option<Hash>> {
            row.get::<_, Option<&[u8]>>(at)
                .map(|bytes| {
                    Hash::from_bytes(bytes).ok_or_else(|| {
                        Error::permanent("read the ledger", format!("row {id} has a hash of another length"))
                    })
                })
                .transpose()
        };
        let entry = if row.get(4) {
            Some(Entry {
                open: row.get(5),
                epoch: row.get(6),
                dirty: row.get(7),
                content_hash: hash(8)?,
                metadata_hash: hash(9)?,
                deleted: row.get(10),
            })
        } else {
            None
        };
        Ok(Peeked { id, row: source, entry })
    }
}
