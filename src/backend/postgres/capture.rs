//! Capture: the triggers on the source's table, and what they can't see.

use tokio_postgres::GenericClient;

use super::source::SourceTable;
use super::{Postgres, failure};
use crate::pipeline::failure::Result;

/// Tables of a source, down to every leaf, whose changes are not captured: a trigger is missing, is
/// disabled, or calls something else.
pub async fn unarmed(postgres: &Postgres, table: &SourceTable) -> Result<Vec<String>> {
    let client = postgres.client().await?;
    let rows = client
        .query(
            "WITH RECURSIVE tree(oid) AS ( \
               SELECT $1::text::regclass::oid UNION SELECT i.inhrelid FROM tree JOIN pg_inherits i ON i.inhparent = tree.oid) \
             SELECT c.oid::regclass::text FROM tree JOIN pg_class c USING (oid) \
             WHERE c.relkind IN ('r', 'p') AND EXISTS ( \
               SELECT FROM unnest(ARRAY['insert', 'update', 'delete', 'truncate']) AS kind WHERE NOT EXISTS ( \
                 SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid \
                 WHERE t.tgrelid = c.oid AND t.tgname = 'refarch_' || $2 || '_' || kind \
                   AND p.proname = 'capture_' || $2 || '_' || kind \
                   AND p.pronamespace = 'refarch'::regnamespace AND t.tgenabled IN ('O', 'A'))) \
             ORDER BY 1",
            &[&table.relation, &table.name],
        )
        .await
        .map_err(|error| failure("look at the capture triggers", &error))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// What of the table capture can't see, and what to do about it.
pub(super) async fn warnings(client: &impl GenericClient, table: &SourceTable) -> Result<Vec<String>> {
    let fail = |error: tokio_postgres::Error| failure("look for changes that capture can't see", &error);
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
            "{}: a foreign table, whose changes triggers here don't see",
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
            "{}: filled by logical replication, which fires no statement triggers; run refarch where the rows are written",
            table.relation
        ));
    }
    Ok(warnings)
}
