//! Taking over from the reference architecture's own capture.
//!
//! Its triggers send each row, old and new, through NOTIFY: an update whose description nears 8,000 bytes
//! fails with them, and so does everything that marks rows as processed fire them again. They are taken
//! off in the transaction that puts ours on, so that no change falls in between. Nothing else of it is
//! touched: its tables may be of use to somebody.

use tokio_postgres::Transaction;

use super::Report;
use crate::backend::postgres::failure;
use crate::backend::postgres::source::SourceTable;
use crate::pipeline::failure::Result;

/// The channel that the reference architecture's function notifies.
const CHANNEL: &str = "table_change";

/// Its tables beside that of the products.
const TABLES: [&str; 3] = ["bootstrapping_state", "last_record_processed", "locks"];

/// Takes its triggers off the table, known by the function that they call.
pub(super) async fn take_over(
    transaction: &Transaction<'_>,
    table: &SourceTable,
    report: &mut Report,
) -> Result<()> {
    let fail =
        |error: tokio_postgres::Error| failure("look for the reference architecture's triggers", &error);
    let triggers = transaction
        .query(
            "WITH RECURSIVE tree(oid) AS ( \
               SELECT $1::text::regclass::oid UNION SELECT i.inhrelid FROM tree JOIN pg_inherits i ON i.inhparent = tree.oid) \
             SELECT t.tgname::text, c.oid::regclass::text, format('%I', t.tgname), p.oid::regprocedure::text \
             FROM tree JOIN pg_class c USING (oid) JOIN pg_trigger t ON t.tgrelid = c.oid JOIN pg_proc p ON p.oid = t.tgfoid \
             WHERE NOT t.tgisinternal AND t.tgparentid = 0 AND p.proname = 'notify_change' \
               AND p.prosrc LIKE '%pg_notify%' AND p.prosrc LIKE '%''' || $2 || '''%' ORDER BY 2, 1",
            &[&table.relation, &CHANNEL],
        )
        .await
        .map_err(fail)?;
    let mut function = None;
    for row in &triggers {
        let (name, relation, quoted): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        // Both come from the catalog, quoted.
        transaction
            .batch_execute(&format!("DROP TRIGGER {quoted} ON {relation}"))
            .await
            .map_err(|error| failure("take the reference architecture's triggers off", &error))?;
        report.removed.push(format!("trigger {name} on {relation}"));
        function = Some(row.get::<_, String>(3));
    }
    let Some(function) = function else { return Ok(()) };
    let left = transaction
        .query(
            "SELECT c.oid::regclass::text FROM pg_class c WHERE c.oid IN ( \
               SELECT to_regclass(name) FROM unnest($1::text[]) AS name) AND c.relkind = 'r' ORDER BY 1",
            &[&TABLES.as_slice()],
        )
        .await
        .map_err(fail)?;
    let tables: Vec<String> = left.iter().map(|row| row.get(0)).collect();
    let mut drop = format!("DROP FUNCTION {function};");
    if !tables.is_empty() {
        drop = format!("{drop} DROP TABLE {};", tables.join(", "));
    }
    report.notes.push(format!("left of the reference architecture, and not used any more: {drop}"));
    let listening: i64 = transaction
        .query_one(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() \
             AND query ILIKE 'listen%' || $1 || '%'",
            &[&CHANNEL],
        )
        .await
        .map_err(fail)?
        .get(0);
    if listening > 0 {
        report.warnings.push(format!(
            "{listening} session(s) still LISTEN to {CHANNEL}, which is silent from now on: stop the reference architecture's listener"
        ));
    }
    Ok(())
}
