//! Puts ids back into the outbox.

use std::collections::HashMap;

use tokio_postgres::Transaction;

use super::entry::Entries;
use crate::backend::postgres::{Postgres, fail};
use crate::pipeline::change::MAX_CHANGES_PER_JOB;
use crate::pipeline::failure::Result;
use crate::pipeline::ledger::Entry;

/// Marks the entries of these ids as not to be trusted, and puts the ids into the outbox.
pub(super) async fn requeue(
    postgres: &Postgres,
    source: &str,
    generation: i32,
    ids: &[String],
) -> Result<()> {
    let fail = fail("queue ids again");
    let mut client = postgres.client().await?;
    let transaction = client.transaction().await.map_err(&fail)?;
    // DO UPDATE locks existing entries in id order. With DO NOTHING, the new entries would be locked
    // first, whatever their ids, and could deadlock with a transaction that opens both kinds.
    transaction
        .execute(
            "INSERT INTO refarch.ledger AS l (target, id) \
                 SELECT $1, k FROM (SELECT DISTINCT unnest($2::text[]) COLLATE \"C\") u(k) ORDER BY k \
                 ON CONFLICT (target, id) DO UPDATE SET epoch = l.epoch WHERE false",
            &[&generation, &ids],
        )
        .await
        .map_err(&fail)?;
    let entries_of = Entries(generation);
    let refs: Vec<&str> = ids.iter().map(String::as_str).collect();
    let mut entries = entries_of.lock(&transaction, &refs).await?;
    entries.values_mut().for_each(Entry::invalidate);
    entries_of.put(&transaction, &entries, &HashMap::new()).await?;
    put_into_outbox(&transaction, source, ids).await?;
    transaction.commit().await.map_err(&fail)
}

/// Puts ids into the outbox. Without a wake-up, the relay finds them at its next poll.
pub(super) async fn put_into_outbox(
    transaction: &Transaction<'_>,
    source: &str,
    ids: &[String],
) -> Result<()> {
    for ids in ids.chunks(MAX_CHANGES_PER_JOB) {
        transaction
            .execute("INSERT INTO refarch.outbox (source, op, ids) VALUES ($1, 'u', $2)", &[&source, &ids])
            .await
            .map_err(fail("put ids into the outbox"))?;
    }
    Ok(())
}
