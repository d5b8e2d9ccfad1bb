//! Counts of a target's ledger and vectors, kept by triggers: see `schema/0012_counts.sql`.

use super::generation::Generation;
use super::{Postgres, failure};
use crate::backend::pgvector;
use crate::pipeline::failure::{Error, Result};

/// Rows of one target above which they are replaced by their sum, and rows that are replaced at a time.
const FOLD_ABOVE: i64 = 100;
const FOLDED_AT_ONCE: i64 = 50_000;

/// The sums over a target's rows.
const SUMS: &str = "coalesce(sum(d.settled), 0)::bigint AS settled, coalesce(sum(d.with_text), 0)::bigint AS with_text, \
                    coalesce(sum(d.unsettled), 0)::bigint AS unsettled, coalesce(sum(d.records), 0)::bigint AS records";

/// Counts of one target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Entries that are settled, without those of deleted rows.
    pub settled: u64,
    /// The settled entries whose row has a text.
    pub with_text: u64,
    /// Entries that are not settled.
    pub unsettled: u64,
    /// Vectors, if they are in this database.
    pub records: u64,
}

fn fail(what: &'static str) -> impl Fn(tokio_postgres::Error) -> Error {
    move |error| failure(what, error)
}

/// Reads the counts of a target. They are those of one snapshot.
pub async fn read(postgres: &Postgres, target: i32) -> Result<Counts> {
    let client = postgres.client().await?;
    let sql = format!("SELECT {SUMS} FROM refarch.count_delta d WHERE d.target = $1");
    let row = client.query_one(&sql, &[&target]).await.map_err(fail("read the kept counts"))?;
    let number = |at| u64::try_from(row.get::<_, i64>(at)).unwrap_or_default();
    Ok(Counts {
        settled: number(0),
        with_text: number(1),
        // Less than none: the counts are wrong. Nothing may look synced then.
        unsettled: row.get::<_, i64>(2).unsigned_abs(),
        records: number(3),
    })
}

/// Replaces the rows of a target by their sum if there are many, and deletes rows of targets that are gone.
pub async fn fold(postgres: &Postgres, target: i32) -> Result<()> {
    let fail = fail("sum the kept counts up");
    let client = postgres.client().await?;
    let row = client
        .query_one(
            "SELECT (SELECT count(*) FROM (SELECT FROM refarch.count_delta WHERE target = $1 LIMIT $2::bigint + 1) d) > $2::bigint, \
               EXISTS (SELECT FROM refarch.count_delta d WHERE NOT EXISTS (SELECT FROM refarch.target t WHERE t.id = d.target))",
            &[&target, &FOLD_ABOVE],
        )
        .await
        .map_err(&fail)?;
    if row.get(0) {
        // SKIP LOCKED: another worker replaces those.
        let sql = format!(
            "WITH gone AS (DELETE FROM refarch.count_delta d WHERE d.id = ANY (ARRAY( \
               SELECT k.id FROM refarch.count_delta k WHERE k.target = $1 ORDER BY k.id LIMIT $2 FOR UPDATE SKIP LOCKED)) \
               RETURNING d.*) \
             INSERT INTO refarch.count_delta (target, settled, with_text, unsettled, records) \
             SELECT $1, {SUMS} FROM gone d HAVING count(*) > 0"
        );
        client.execute(&sql, &[&target, &FOLDED_AT_ONCE]).await.map_err(&fail)?;
    }
    if row.get(1) {
        let sql = "DELETE FROM refarch.count_delta d WHERE NOT EXISTS (SELECT FROM refarch.target t WHERE t.id = d.target)";
        client.execute(sql, &[]).await.map_err(&fail)?;
    }
    Ok(())
}

/// Counts ledger and vectors anew, and corrects the kept counts. Returns whether they were wrong. Reads the whole
/// ledger.
///
/// The new counts and the kept ones are of the same snapshot, so writers need not wait: their difference is what no
/// trigger saw.
pub async fn recount(postgres: &Postgres, generation: &Generation) -> Result<bool> {
    let fail = fail("count the ledger anew");
    let mut client = postgres.client().await?;
    let transaction = client.transaction().await.map_err(&fail)?;
    // Two corrections of the same difference would be one too many. The lock comes in a statement of its own, so
    // that the next statement's snapshot has the other's correction.
    transaction
        .execute("SELECT pg_advisory_xact_lock(hashtext('refarch.counts'), $1)", &[&generation.id])
        .await
        .map_err(&fail)?;
    let vectors = pgvector::table_name(generation.id);
    let has_vectors: bool =
        transaction.query_one("SELECT to_regclass($1) IS NOT NULL", &[&vectors]).await.map_err(&fail)?.get(0);
    let records = if has_vectors { format!("SELECT count(*) FROM {vectors}") } else { "SELECT 0".into() };
    let sql = format!(
        "WITH there AS ( \
           SELECT count(*) FILTER (WHERE l.settled AND NOT l.deleted) AS settled, \
                  count(*) FILTER (WHERE l.settled AND NOT l.deleted AND l.content_hash IS DISTINCT FROM $2) AS with_text, \
                  count(*) FILTER (WHERE NOT l.settled) AS unsettled, ({records}) AS records \
           FROM (SELECT open = 0 AND NOT dirty AS settled, deleted, content_hash FROM refarch.ledger WHERE target = $1) l \
         ), kept AS (SELECT {SUMS} FROM refarch.count_delta d WHERE d.target = $1) \
         INSERT INTO refarch.count_delta (target, settled, with_text, unsettled, records) \
         SELECT $1, t.settled - k.settled, t.with_text - k.with_text, t.unsettled - k.unsettled, t.records - k.records \
         FROM there t, kept k \
         WHERE (t.settled, t.with_text, t.unsettled, t.records) IS DISTINCT FROM (k.settled, k.with_text, k.unsettled, k.records)"
    );
    let without_text = generation.salt.hash("").0.to_vec();
    let corrected = transaction.execute(&sql, &[&generation.id, &without_text]).await.map_err(&fail)?;
    transaction.commit().await.map_err(&fail)?;
    if corrected > 0 {
        tracing::warn!("the kept counts of the ledger were wrong, and are corrected");
    }
    Ok(corrected > 0)
}
