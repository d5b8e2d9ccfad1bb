//! The source's table as it is now.
//!
//! Tables are altered while roles run. A read by an old description may fail, and worse, it may find nothing:
//! an id that the key's old type could not hold, a table that now has another's name. So each read is followed, in
//! its own transaction, by a look at the catalog. The read holds a lock on the relation that it found, which
//! keeps everybody from altering or renaming it until the transaction ends: what the look sees is what the
//! read saw. If that is not what the description says, the description is made anew and the read is done again.
//! And what cannot be read holds the work: a row is gone only if a read that saw the table as it is says so.

use std::collections::HashSet;
use std::sync::{Arc, PoisonError, RwLock};

use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Error as PgError, GenericClient, Row, Statement};

use super::{PRINT, SourceTable, columns};
use crate::backend::postgres::{Postgres, failure, hides_rows};
use crate::pipeline::failure::{Class, Error, FailureKind, Result, chain};

/// Descriptions made anew within one read; more means that somebody alters the table all the time.
pub(crate) const MAX_LOOKS: usize = 3;

/// What came of a read.
pub(crate) enum Judged<T> {
    /// It saw the table as described.
    Read(T),
    /// The description was made anew: read again.
    Again,
    /// A value is at fault, be it an id that is asked for or what a row holds.
    Value(Error),
}

impl<T> Judged<T> {
    /// What is left to be done about a read that gave no rows.
    pub(crate) fn without_rows<U>(self) -> Judged<U> {
        match self {
            Self::Read(_) | Self::Again => Judged::Again,
            Self::Value(error) => Judged::Value(error),
        }
    }
}

/// A source's table, looked at again whenever it turns out to have changed.
pub(crate) struct Source {
    postgres: Postgres,
    current: RwLock<Arc<SourceTable>>,
}

impl Source {
    pub(crate) fn new(postgres: Postgres, table: Arc<SourceTable>) -> Self {
        Self { postgres, current: RwLock::new(table) }
    }

    /// The newest description.
    pub(crate) fn table(&self) -> Arc<SourceTable> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The look at the catalog that must follow a read, in the same transaction.
    pub(crate) fn check() -> String {
        format!(
            "WITH now AS ({PRINT}) SELECT print, oid = s.relation::oid, s.id_column, s.text_columns, s.metadata_columns \
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
        let checked: [&(dyn ToSql + Sync); 4] = [&table.place.0, &table.place.1, &names, &table.name];
        let (read, checked) =
            futures::future::join(client.query(sql, parameters), client.query_opt(check, &checked)).await;
        Ok((read?, checked?))
    }

    /// What a read by this description came to.
    pub(crate) async fn judge(
        &self,
        what: &str,
        table: &SourceTable,
        read: Result<(Vec<Row>, Option<Row>), PgError>,
    ) -> Result<Judged<Vec<Row>>> {
        let error = match read {
            Ok((rows, seen)) if table.is_as_seen(seen.as_ref()) => return Ok(Judged::Read(rows)),
            Ok((_, Some(seen))) if table.other_columns(&seen).is_some() => {
                let told = table.other_columns(&seen).unwrap_or_default();
                return Err(hold(what, table, &told));
            }
            Ok((_, Some(seen))) if seen.get::<_, &str>(0) == table.print => {
                return Err(hold(
                    what,
                    table,
                    "another table has this name than the one whose changes are captured: run refarch migrate",
                ));
            }
            Ok(_) => {
                self.look_again(what, table).await?;
                return Ok(Judged::Again);
            }
            Err(error) => error,
        };
        let Some(code) = error.code().filter(|code| is_about_table(code)) else {
            return Err(failure(what, error));
        };
        if self.look_again(what, table).await? {
            return Ok(Judged::Again);
        }
        if is_about_value(code) {
            return Ok(Judged::Value(failure(what, error)));
        }
        let role = self.postgres.user();
        let cure = if hides_rows(&error) {
            format!(
                "role {role} may not see every row: ALTER ROLE {role} BYPASSRLS; or, unless the table has FORCE ROW LEVEL SECURITY, GRANT its owner TO {role}"
            )
        } else if *code == SqlState::INSUFFICIENT_PRIVILEGE {
            format!("GRANT SELECT ON {} TO {role}", table.relation)
        } else {
            "nothing is taken for gone meanwhile".into()
        };
        Err(hold(what, table, &format!("{}; {cure}", chain(&error))).because(error))
    }

    /// Describes the table anew, unless somebody has since `seen`. Whether it is another description.
    async fn look_again(&self, what: &str, seen: &SourceTable) -> Result<bool> {
        if self.table().print != seen.print {
            return Ok(true);
        }
        let mut client = self.postgres.client().await?;
        let fail = |error: PgError| failure("look the source table up", error);
        let transaction = client.transaction().await.map_err(fail)?;
        let table = match SourceTable::find(&*transaction, &seen.settings).await {
            Ok(table) => table,
            // Whatever is missing may come back, and the changes are kept until it does.
            Err(error) if error.class() == Class::Retryable => return Err(error),
            Err(error) => {
                let told = format!(
                    "{} ({}); nothing is taken for gone meanwhile: put it back, or mend the settings, run refarch migrate and restart",
                    error.message(),
                    error.what()
                );
                return Err(hold(what, seen, &told));
            }
        };
        transaction.commit().await.map_err(fail)?;
        let changed = table.print != seen.print;
        if changed {
            tracing::info!(
                source = seen.name,
                table = table.relation,
                "the table was altered: reading it as it is now"
            );
            *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
        }
        Ok(changed)
    }

    /// Those of some ids that no row can have, since PostgreSQL refuses them for the id's type: halves are
    /// tried until each refused one stands alone.
    pub(crate) async fn impossible(&self, table: &SourceTable, ids: &[&str]) -> Result<HashSet<String>> {
        let client = self.postgres.client().await?;
        let sql = format!("SELECT cardinality($1::text[]::{}[])", table.id_type);
        let mut refused = HashSet::new();
        let mut parts = vec![ids];
        while let Some(part) = parts.pop() {
            let Err(error) = client.query_one(&sql, &[&part]).await else { continue };
            if !error.code().is_some_and(is_about_value) {
                return Err(failure("look at ids", error));
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

impl SourceTable {
    /// Whether the table is as described, and the one whose changes are captured, by what [`Source::check`] saw.
    pub(crate) fn is_as_seen(&self, seen: Option<&Row>) -> bool {
        seen.is_some_and(|row| {
            row.get::<_, &str>(0) == self.print
                && row.get::<_, Option<bool>>(1) == Some(true)
                && self.other_columns(row).is_none()
        })
    }

    /// How the columns that `refarch migrate` recorded last differ from the settings of this process, by what
    /// [`Source::check`] saw. A process with old settings would do new work in the old way, and call it done.
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
            "settings of this process differ from what refarch migrate recorded: {what} is {own:?} here and {recorded:?} there: restart it with the same settings, or run refarch migrate if these are the right ones"
        ))
    }
}

/// Whether an error may come of a description that is not true any more, or of what the table is: names, types and
/// rights (class 42), features (0A), values (22).
fn is_about_table(code: &SqlState) -> bool {
    matches!(&code.code()[..2], "42" | "0A" | "22")
}

/// Whether an error is about a value. Types of extensions raise syntax errors too, and our own SQL has none.
fn is_about_value(code: &SqlState) -> bool {
    code.code().starts_with("22") || *code == SqlState::SYNTAX_ERROR
}

fn hold(what: &str, table: &SourceTable, message: &str) -> Error {
    Error::new(FailureKind::SourceChanged, format!("{what} of {}", table.relation), message)
}

/// That a table was altered more often than a read can follow.
pub(crate) fn restless(what: &str, table: &SourceTable) -> Error {
    hold(what, table, "it is altered all the time")
}
