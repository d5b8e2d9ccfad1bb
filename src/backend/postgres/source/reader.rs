//! Reads of the source's table as it is now.
//!
//! Tables are altered while roles run. A read by an old description may fail. Worse, it may find nothing: the
//! old type of the key could not hold the id, or another table has the name now. So the same transaction
//! reads the catalog after each read. The read holds a lock on its relation, and until the transaction ends
//! nobody can alter or rename the relation. So the catalog is seen in the same state as the rows. If the
//! catalog differs from the description, the description is made again and the read is repeated. A read that
//! fails stops the work: a row counts as deleted only if a read saw the table as it is and did not find the
//! row.

use std::collections::HashSet;
use std::sync::{Arc, PoisonError, RwLock};

use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Error as PgError, GenericClient, Row, Statement};

use super::table::{FINGERPRINT, SourceTable, columns};
use crate::backend::postgres::connection::{Connection, Sql as _};
use crate::backend::postgres::{Postgres, failure, hides_rows};
use crate::pipeline::failure::{Class, Error, FailureKind, Result, chain};

/// How often one read may make the description again. If this is not enough, somebody alters the table all
/// the time.
pub(crate) const MAX_REREADS: usize = 3;

/// The result of a read.
pub(crate) enum SourceRead<T> {
    /// The read saw the table as described.
    Rows(T),
    /// The description was made again: repeat the read.
    Retry,
    /// A value caused the error: an id that was asked for, or a value in a row.
    BadValue(Error),
}

impl<T> SourceRead<T> {
    /// The same for a read that gave no rows: anything but a bad value means that the read is repeated.
    pub(crate) fn without_rows<U>(self) -> SourceRead<U> {
        match self {
            Self::Rows(_) | Self::Retry => SourceRead::Retry,
            Self::BadValue(error) => SourceRead::BadValue(error),
        }
    }
}

/// A source's table. The description is made again when the table has changed.
pub(crate) struct SourceReader {
    postgres: Postgres,
    current: RwLock<Arc<SourceTable>>,
}

impl SourceReader {
    pub(crate) fn new(postgres: Postgres, table: Arc<SourceTable>) -> Self {
        Self { postgres, current: RwLock::new(table) }
    }

    /// The newest description.
    pub(crate) fn table(&self) -> Arc<SourceTable> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The read of the catalog that must follow a read of rows, in the same transaction.
    pub(crate) fn check() -> String {
        format!(
            "WITH now AS ({FINGERPRINT}) SELECT fingerprint, oid = s.relation::oid, s.id_column, s.text_columns, s.metadata_columns \
             FROM now LEFT JOIN refarch.source s ON s.name = $4"
        )
    }

    /// Runs a read together with its check; both are sent at once.
    pub(crate) async fn read(
        client: &impl GenericClient,
        table: &SourceTable,
        sql: &Statement,
        parameters: &[&(dyn ToSql + Sync)],
        check: &Statement,
    ) -> Result<(Vec<Row>, Option<Row>), PgError> {
        let names = columns(&table.settings);
        let checked: [&(dyn ToSql + Sync); 4] =
            [&table.qualified_name.0, &table.qualified_name.1, &names, &table.name];
        let (read, checked) =
            futures::future::join(client.query(sql, parameters), client.query_opt(check, &checked)).await;
        Ok((read?, checked?))
    }

    /// Compares a read with the description that was used.
    pub(crate) async fn check_read(
        &self,
        what: &str,
        table: &SourceTable,
        read: Result<(Vec<Row>, Option<Row>), PgError>,
    ) -> Result<SourceRead<Vec<Row>>> {
        let error = match read {
            Ok((rows, seen)) if table.is_as_seen(seen.as_ref()) => return Ok(SourceRead::Rows(rows)),
            Ok((_, Some(seen))) if table.other_columns(&seen).is_some() => {
                let told = table.other_columns(&seen).unwrap_or_default();
                return Err(blocked(what, table, &told));
            }
            Ok((_, Some(seen))) if seen.get::<_, &str>(0) == table.fingerprint => {
                return Err(blocked(
                    what,
                    table,
                    "another table has this name now than the one whose changes are captured: run refarch migrate",
                ));
            }
            Ok(_) => {
                self.refresh(what, table).await?;
                return Ok(SourceRead::Retry);
            }
            Err(error) => error,
        };
        let Some(code) = error.code().filter(|code| is_about_table(code)) else {
            return Err(failure(what, error));
        };
        if self.refresh(what, table).await? {
            return Ok(SourceRead::Retry);
        }
        if is_about_value(code) {
            return Ok(SourceRead::BadValue(failure(what, error)));
        }
        let role = self.postgres.user();
        let cure = if hides_rows(&error) {
            format!(
                "row security hides rows from role {role}: run ALTER ROLE {role} BYPASSRLS; or, unless the table has FORCE ROW LEVEL SECURITY, GRANT its owner TO {role}"
            )
        } else if *code == SqlState::INSUFFICIENT_PRIVILEGE {
            format!("run GRANT SELECT ON {} TO {role}", table.relation)
        } else {
            "until this is corrected, no row counts as deleted".into()
        };
        Err(blocked(what, table, &format!("{}; {cure}", chain(&error))).because(error))
    }

    /// Makes the description again, unless another task has done so since `seen`. True if the description
    /// changed.
    async fn refresh(&self, what: &str, seen: &SourceTable) -> Result<bool> {
        if self.table().fingerprint != seen.fingerprint {
            return Ok(true);
        }
        let mut client = self.postgres.client().await?;
        let fail = |error: PgError| failure("look the source table up", error);
        let transaction = client.transaction().await.map_err(fail)?;
        let table = match SourceTable::find(&*transaction, &seen.settings).await {
            Ok(table) => table,
            // Changes wait while something is missing, since it may come back.
            Err(error) if error.class() == Class::Retryable => return Err(error),
            Err(error) => {
                let told = format!(
                    "{} ({}). Until this is corrected, no row counts as deleted: undo the change of the table, or correct the settings, run refarch migrate and restart this process",
                    error.message(),
                    error.what()
                );
                return Err(blocked(what, seen, &told));
            }
        };
        transaction.commit().await.map_err(fail)?;
        let changed = table.fingerprint != seen.fingerprint;
        if changed {
            tracing::info!(
                source = seen.name,
                table = table.relation,
                "the table was altered: reading it by a new description"
            );
            *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
        }
        Ok(changed)
    }

    /// The ids that no row can have, since PostgreSQL refuses them for the id's type. The list is halved
    /// until each refused id is alone.
    pub(crate) async fn impossible(&self, table: &SourceTable, ids: &[&str]) -> Result<HashSet<String>> {
        let client = self.postgres.client().await?;
        let sql = format!("SELECT cardinality($1::text[]::{}[])", table.id_type);
        let mut refused = HashSet::new();
        let mut parts = vec![ids];
        while let Some(part) = parts.pop() {
            let Err(error) = client.query_one(&sql, &[&part]).await else { continue };
            if !error.code().is_some_and(is_about_value) {
                return Err(failure("check ids", error));
            }
            match part {
                [one] => {
                    refused.insert((*one).to_owned());
                }
                some => {
                    let (left, right) = some.split_at(some.len() / 2);
                    parts.extend([left, right]);
                }
            }
        }
        Ok(refused)
    }
}

impl Connection {
    /// Reads the source's table by a description, and the catalog to check that description.
    pub(crate) async fn read_source(
        &self,
        table: &SourceTable,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<(Vec<Row>, Option<Row>), PgError> {
        loop {
            let prepare =
                async { Ok((sql.prepared(self).await?, SourceReader::check().prepared(self).await?)) };
            let read = self
                .transact(self.settings(), prepare, |(statement, check)| async move {
                    SourceReader::read(&***self, table, &statement, parameters, &check).await
                })
                .await;
            if !self.is_outdated(sql, &read) {
                return read;
            }
        }
    }
}

impl SourceTable {
    /// Whether the catalog, as [`SourceReader::check`] read it, shows the described table, and changes of that
    /// table are captured.
    pub(crate) fn is_as_seen(&self, seen: Option<&Row>) -> bool {
        seen.is_some_and(|row| {
            row.get::<_, &str>(0) == self.fingerprint
                && row.get::<_, Option<bool>>(1) == Some(true)
                && self.other_columns(row).is_none()
        })
    }

    /// How the settings of this process differ from the columns that `refarch migrate` recorded last and
    /// [`SourceReader::check`] read. A process with old settings would index rows by the old columns and call them
    /// settled.
    fn other_columns(&self, seen: &Row) -> Option<String> {
        let id: String = seen.get::<_, Option<String>>(2)?;
        let text: Vec<String> = seen.get::<_, Option<Vec<String>>>(3)?;
        let metadata: Vec<String> = seen.get::<_, Option<Vec<String>>>(4)?;
        let settings = &self.settings;
        let is_same_set = |a: &[String], b: &[String]| {
            a.iter().all(|name| b.contains(name)) && b.iter().all(|name| a.contains(name))
        };
        let (what, recorded, own) = if id != settings.id {
            ("id", id, settings.id.clone())
        } else if text != settings.text {
            ("text", text.join(", "), settings.text.join(", "))
        } else if !is_same_set(&metadata, &settings.metadata) {
            ("metadata", metadata.join(", "), settings.metadata.join(", "))
        } else {
            return None;
        };
        Some(format!(
            "source.{what} is {own:?} in the settings of this process, and refarch migrate recorded {recorded:?}: restart this process with the recorded value, or run refarch migrate if the value of this process is right"
        ))
    }
}

/// Whether an outdated description or the table itself may cause the error: names, types and rights (class
/// 42), features (0A), values (22).
fn is_about_table(code: &SqlState) -> bool {
    matches!(&code.code()[..2], "42" | "0A" | "22")
}

/// Whether a value causes the error. Types of extensions raise syntax errors too; our own SQL has none.
fn is_about_value(code: &SqlState) -> bool {
    code.code().starts_with("22") || *code == SqlState::SYNTAX_ERROR
}

fn blocked(what: &str, table: &SourceTable, message: &str) -> Error {
    Error::new(FailureKind::SourceChanged, format!("{what} of {}", table.relation), message)
}

/// The error for a table that was altered more often than a read can follow.
pub(crate) fn altered_too_often(what: &str, table: &SourceTable) -> Error {
    blocked(what, table, "the table is altered too often to be read")
}
