//! Capture: the triggers on the source's table, and the changes that triggers cannot see.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio_postgres::GenericClient;

use super::source::SourceTable;
use super::{Postgres, fail, failure};
use crate::config;
use crate::pipeline::failure::{Class, Result};

/// Tables of a source, down to every leaf, whose changes are not captured: they were attached after the
/// triggers were installed, or a trigger is missing, is disabled, or calls another function.
pub(super) async fn tables_without_triggers_in(
    client: &impl GenericClient,
    table: &SourceTable,
) -> Result<Vec<String>> {
    let rows = client
        .query(
            "SELECT l.relation::text FROM refarch.leaves($1, $2::text::regclass) l WHERE l.state <> 'gone' ORDER BY 1",
            &[&table.name, &table.relation],
        )
        .await
        .map_err(|error| failure("read the capture triggers", error))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// How long [`LastLook`] relies on a look that found no fault.
const FAULTLESS_FOR: Duration = Duration::from_secs(5);

/// When capture was last seen without a fault. A page asks for the status all the time, and a look costs some 10 ms.
#[derive(Debug, Default)]
pub(super) struct LastLook(Mutex<Option<Instant>>);

impl LastLook {
    /// [`faults`], or none if there was none a few seconds ago. A fault is looked at again each time.
    pub(super) async fn faults(&self, postgres: &Postgres, source: &config::Source) -> Result<Vec<String>> {
        let now = Instant::now();
        if self.was_faultless(now) {
            return Ok(Vec::new());
        }
        let faults = faults(postgres, source).await?;
        self.note(now, faults.is_empty());
        Ok(faults)
    }

    /// Notes a look that began at `began`.
    fn note(&self, began: Instant, is_faultless: bool) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = is_faultless.then_some(began);
    }

    fn was_faultless(&self, now: Instant) -> bool {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.is_some_and(|began| now.saturating_duration_since(began) < FAULTLESS_FOR)
    }
}

/// What differs between capture and the table. Each difference is a sentence that says what to do.
#[derive(Clone, Debug, Default)]
pub struct CaptureState {
    /// Why changes are not all captured.
    pub faults: Vec<String>,
    /// Tables that are a part of the source's table only now. The worker that runs the proof captures and queues
    /// them by itself.
    pub new_parts: Vec<NewPart>,
}

/// A partition or inheritance child that is new.
#[derive(Clone, Debug)]
pub struct NewPart {
    /// Its name.
    pub table: String,
    /// What is not done yet.
    pub fault: String,
}

/// All faults of [`check`], new parts included.
pub async fn faults(postgres: &Postgres, source: &config::Source) -> Result<Vec<String>> {
    let CaptureState { mut faults, new_parts } = check(postgres, source).await?;
    faults.extend(new_parts.into_iter().map(|part| part.fault));
    Ok(faults)
}

/// Compares the triggers and recorded columns with the table. Cheap enough to be called every few seconds.
pub async fn check(postgres: &Postgres, source: &config::Source) -> Result<CaptureState> {
    let fail = |error: tokio_postgres::Error| failure("compare capture with the table", error);
    let mut client = postgres.client().await?;
    let transaction = client.transaction().await.map_err(fail)?;
    let CaptureState { mut faults, mut new_parts } = CaptureState::default();
    let noted = transaction
        .query_opt(
            "SELECT s.relation::oid, s.relation::text, \
               (s.id_column, s.text_columns) IS DISTINCT FROM ($2::text, $3::text[]) \
                 OR NOT (s.metadata_columns @> $4::text[] AND s.metadata_columns <@ $4::text[]) \
             FROM refarch.source s WHERE s.name = $1",
            &[&source.name, &source.id, &source.text, &source.metadata],
        )
        .await
        .map_err(fail)?;
    let Some(noted) = noted else {
        faults.push(format!("{} is not indexed yet: run refarch migrate", source.table));
        return Ok(CaptureState { faults, new_parts });
    };
    let (captured, captured_name): (u32, String) = (noted.get(0), noted.get(1));
    if noted.get::<_, bool>(2) {
        faults.push(
            "the settings name other columns than those whose changes are captured: run refarch migrate"
                .into(),
        );
    }
    let columns = transaction
        .query("SELECT f FROM refarch.column_faults($1, $2::oid::regclass) f", &[&source.name, &captured])
        .await
        .map_err(fail)?;
    let mut columns: Vec<String> = columns.iter().map(|row| row.get(0)).collect();
    let mut cure = "refarch verify --repair reads the table again";
    match SourceTable::find_by_search_path(&transaction, source).await {
        Ok(table) => {
            let row = transaction
                .query_one(
                    "SELECT $1::text::regclass::oid, row_security_active($1::text::regclass), current_user::text, $1::text::regclass::text",
                    &[&table.relation],
                )
                .await
                .map_err(fail)?;
            let name: String = row.get(3);
            if row.get::<_, u32>(0) == captured {
                check_leaves(&*transaction, &table, &name, &mut faults, &mut new_parts).await?;
            } else {
                columns.clear();
                faults.push(format!(
                    "{name} is another table than the one whose changes are captured, which is now {captured_name}: \
                     refarch verify --repair captures changes of {name} and reads it"
                ));
            }
            if row.get(1) {
                faults.push(format!(
                    "row security on {name} hides rows from the role {0}: run ALTER ROLE {0} BYPASSRLS; or, unless the table has FORCE ROW LEVEL SECURITY, GRANT its owner TO {0}",
                    row.get::<_, String>(2)
                ));
            }
        }
        Err(error) if error.class() == Class::Retryable => return Err(error),
        Err(error) => {
            faults.push(format!(
                "{error}; until the settings are corrected and refarch migrate has run, capture records no ids, and the table is read again afterwards"
            ));
            cure = "correct the name in the settings and run refarch migrate";
        }
    }
    faults.extend(columns.into_iter().map(|fault| format!("{captured_name}: {fault}: {cure}")));
    let held = transaction
        .query(
            "SELECT CASE b.leaf WHEN '-'::regclass THEN s.relation ELSE b.leaf END::text, b.held, b.leaf <> '-'::regclass \
             FROM refarch.backfill b JOIN refarch.source s ON s.name = b.source \
             WHERE b.source = $1 AND b.held IS NOT NULL ORDER BY b.leaf",
            &[&source.name],
        )
        .await
        .map_err(fail)?;
    for row in held {
        let (table, held): (String, &str) = (row.get(0), row.get(1));
        let fault = format!("{table} must be read again, but cannot be read: {held}");
        if row.get(2) { new_parts.push(NewPart { table, fault }) } else { faults.push(fault) }
    }
    Ok(CaptureState { faults, new_parts })
}

/// Installs missing capture triggers and queues rows that may have changed without capture. False if there
/// was nothing to repair.
pub async fn restore(
    postgres: &Postgres,
    source: &config::Source,
    worker: &str,
    faults: &[String],
) -> Result<bool> {
    let fail = fail("restore change capture");
    let mut changed = false;
    // One table in a transaction, so that the application waits for one table at most.
    loop {
        let mut client = postgres.client().await?;
        let transaction = client.transaction().await.map_err(&fail)?;
        let more: bool =
            transaction.query_one("SELECT refarch.rearm($1)", &[&source.name]).await.map_err(&fail)?.get(0);
        if !more {
            return Ok(changed);
        }
        if changed {
            transaction.commit().await.map_err(&fail)?;
            continue;
        }
        transaction
            .execute(
                "INSERT INTO refarch.event (worker_id, kind, detail) \
                 VALUES ($1, 'rearmed', jsonb_build_object('faults', $2::text[]))",
                &[&worker, &faults],
            )
            .await
            .map_err(&fail)?;
        transaction.commit().await.map_err(&fail)?;
        changed = true;
    }
}

/// Checks the single tables in the tree under `root`.
async fn check_leaves(
    client: &impl GenericClient,
    table: &SourceTable,
    root: &str,
    faults: &mut Vec<String>,
    new_parts: &mut Vec<NewPart>,
) -> Result<()> {
    let rows = client
        .query(
            "SELECT l.relation::text, l.state, EXISTS (SELECT FROM pg_class c WHERE c.oid = l.relation) \
             FROM refarch.leaves($1, $2::text::regclass) l ORDER BY 2, 1",
            &[&table.name, &table.relation],
        )
        .await
        .map_err(|error| failure("read the capture triggers", error))?;
    for row in rows {
        let (leaf, state, is_there): (&str, &str, bool) = (row.get(0), row.get(1), row.get(2));
        match state {
            "new" => new_parts.push(NewPart {
                table: leaf.to_owned(),
                fault: format!(
                    "changes of {leaf} are not captured yet, since it became a part of {root} later: refarch verify --repair installs the triggers"
                ),
            }),
            "gone" if is_there => faults.push(format!(
                "{leaf} is no part of {root} any more, and its rows are still in the index: refarch verify --repair queues them"
            )),
            "gone" => faults.push(format!(
                "a part of {root} was dropped, and its rows are still in the index: refarch verify --repair queues them"
            )),
            _ => faults.push(format!(
                "changes of {leaf} are not captured, since a trigger is missing or disabled: refarch verify --repair installs the triggers"
            )),
        }
    }
    Ok(())
}

/// Changes of the table that capture cannot see, and what to do about them.
pub(super) async fn warnings(client: &impl GenericClient, table: &SourceTable) -> Result<Vec<String>> {
    let fail = |error: tokio_postgres::Error| failure("look for changes that capture cannot see", error);
    let mut warnings = Vec::new();
    let foreign = client
        .query(
            "WITH RECURSIVE tree(oid) AS ( \
               SELECT $1::text::regclass::oid UNION SELECT i.inhrelid FROM tree JOIN pg_inherits i ON i.inhparent = tree.oid) \
             SELECT c.oid::regclass::text FROM tree JOIN pg_class c USING (oid) WHERE c.relkind NOT IN ('r', 'p')",
            &[&table.relation],
        )
        .await
        .map_err(fail)?;
    for row in foreign {
        warnings.push(format!(
            "{} is a foreign table: its changes are not captured, since triggers here do not see them",
            row.get::<_, String>(0)
        ));
    }
    let subscribed: bool = client
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_subscription_rel r WHERE r.srrelid = $1::text::regclass)",
            &[&table.relation],
        )
        .await
        .map_err(fail)?
        .get(0);
    if subscribed {
        warnings.push(format!(
            "{} is filled by logical replication, which fires no statement triggers, so changes are not captured: run refarch on the database where the rows are written",
            table.relation
        ));
    }
    Ok(warnings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_without_a_fault_is_relied_on_for_some_seconds() {
        let (last, began) = (LastLook::default(), Instant::now());
        assert!(!last.was_faultless(began), "nobody has looked");
        last.note(began, true);
        assert!(last.was_faultless(began + FAULTLESS_FOR / 2));
        assert!(!last.was_faultless(began + FAULTLESS_FOR));
        last.note(began, false);
        assert!(!last.was_faultless(began), "a fault is looked at again");
    }
}
