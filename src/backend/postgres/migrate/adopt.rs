//! Replaces the reference architecture's own capture.
//!
//! Its triggers send each row, old and new, through NOTIFY. An update whose description nears 8,000 bytes
//! fails because of them. Statements that mark rows as processed fire them again. The triggers are removed in
//! the transaction that installs ours, so that no change is missed. Nothing else of the reference
//! architecture is touched: its tables may still be in use.

use tokio_postgres::Transaction;

use super::report::Report;
use crate::backend::postgres::failure;
use crate::backend::postgres::source::{SourceTable, quote_ident};
use crate::pipeline::failure::Result;

/// The channel that the reference architecture's function notifies.
const CHANNEL: &str = "table_change";

/// The reference architecture's tables other than the products.
const TABLES: [&str; 3] = ["bootstrapping_state", "last_record_processed", "locks"];

/// A trigger of the reference architecture.
pub(super) struct Trigger {
    name: String,
    /// The table, qualified and quoted.
    pub(super) relation: String,
}

/// Parts of the reference architecture that were found.
#[derive(Default)]
pub(super) struct Found {
    pub(super) triggers: Vec<Trigger>,
    function: Option<String>,
    tables: Vec<String>,
    listening: i64,
}

/// Looks for the reference architecture's triggers on the table. They are identified by the function that
/// they call.
pub(super) async fn find(transaction: &Transaction<'_>, table: &SourceTable) -> Result<Found> {
    let fail =
        |error: tokio_postgres::Error| failure("look for the reference architecture's triggers", error);
    let triggers = transaction
        .query(
            "WITH RECURSIVE tree(oid) AS ( \
               SELECT $1::text::regclass::oid UNION SELECT i.inhrelid FROM tree JOIN pg_inherits i ON i.inhparent = tree.oid) \
             SELECT t.tgname::text, c.oid::regclass::text, p.oid::regprocedure::text \
             FROM tree JOIN pg_class c USING (oid) JOIN pg_trigger t ON t.tgrelid = c.oid JOIN pg_proc p ON p.oid = t.tgfoid \
             WHERE NOT t.tgisinternal AND t.tgparentid = 0 AND p.proname = 'notify_change' \
               AND p.prosrc LIKE '%pg_notify%' AND p.prosrc LIKE '%''' || $2 || '''%' ORDER BY 2, 1",
            &[&table.relation, &CHANNEL],
        )
        .await
        .map_err(fail)?;
    let Some(last) = triggers.last() else { return Ok(Found::default()) };
    let function = Some(last.get(2));
    let left = transaction
        .query(
            "SELECT c.oid::regclass::text FROM pg_class c WHERE c.relname = ANY ($1) AND c.relkind = 'r' \
               AND c.relnamespace IN (SELECT relnamespace FROM pg_class WHERE oid = $2::text::regclass) ORDER BY 1",
            &[&TABLES.as_slice(), &table.relation],
        )
        .await
        .map_err(fail)?;
    let listening = transaction
        .query_one(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() \
             AND query ILIKE 'listen%' || $1 || '%'",
            &[&CHANNEL],
        )
        .await
        .map_err(fail)?
        .get(0);
    Ok(Found {
        triggers: triggers.iter().map(|row| Trigger { name: row.get(0), relation: row.get(1) }).collect(),
        function,
        tables: left.iter().map(|row| row.get(0)).collect(),
        listening,
    })
}

/// Removes the reference architecture's triggers from one table. DROP TRIGGER takes the strongest lock that
/// is needed and comes first: two transactions that both raise the strength of their locks can deadlock.
pub(super) async fn take_over(transaction: &Transaction<'_>, found: &Found, relation: &str) -> Result<()> {
    let on_it = found.triggers.iter().filter(|trigger| trigger.relation == relation);
    for Trigger { name, relation } in on_it {
        // The relation's name comes from the catalog and is quoted.
        let sql = format!("DROP TRIGGER IF EXISTS {} ON {relation}", quote_ident(name));
        transaction
            .batch_execute(&sql)
            .await
            .map_err(|error| failure("remove the reference architecture's triggers", error))?;
    }
    Ok(())
}

/// Reports the triggers that were removed, or would be, and the parts that are left.
pub(super) fn report(found: &Found, report: &mut Report) {
    let Some(function) = &found.function else { return };
    for Trigger { name, relation } in &found.triggers {
        report.removed.push(format!("trigger {name} on {relation}"));
    }
    let mut drop = format!("DROP FUNCTION {function};");
    if !found.tables.is_empty() {
        drop = format!("{drop} DROP TABLE {};", found.tables.join(", "));
    }
    report.notes.push(format!("these parts of the reference architecture are left and refarch does not use them; to remove them, run: {drop}"));
    if found.listening > 0 {
        report.warnings.push(format!(
            "{} session(s) still LISTEN to {CHANNEL}, and no trigger notifies that channel now: stop the reference architecture's listener",
            found.listening
        ));
    }
}
