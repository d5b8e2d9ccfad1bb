//! Queues: pgmq's queues are made here, and a queue that still holds messages is not abandoned.

use tokio_postgres::Transaction;

use super::created;
use super::report::Report;
use super::uninstall::refuse_while_running;
use crate::backend::pgmq::Names;
use crate::backend::postgres::failure;
use crate::backend::postgres::source::quote_ident;
use crate::config;
use crate::pipeline::failure::{Error, FailureKind, Result};

/// pgmq's SQL, as published by its authors.
const PGMQ: &str = include_str!("../schema/pgmq.sql");

/// Installs pgmq and makes its queues, where they are missing.
pub(super) async fn create(
    transaction: &Transaction<'_>,
    queue: &config::Queue,
    report: &mut Report,
) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("install pgmq", error);
    let there: bool = transaction
        .query_one("SELECT to_regprocedure('pgmq.send_batch(text, jsonb[], jsonb[])') IS NOT NULL", &[])
        .await
        .map_err(fail)?
        .get(0);
    if !there {
        transaction.batch_execute(PGMQ).await.map_err(fail)?;
        created::record(transaction, created::PGMQ, "pgmq").await?;
        report.created.push("pgmq".into());
    }
    for name in Names::new(&queue.name).all() {
        let there: bool = transaction
            .query_one("SELECT EXISTS (SELECT FROM pgmq.meta WHERE queue_name = $1)", &[&name])
            .await
            .map_err(fail)?
            .get(0);
        if !there {
            transaction
                .execute("SELECT pgmq.create($1)", &[&name])
                .await
                .map_err(|error| failure("create a queue", error))?;
            created::record(transaction, created::QUEUE, name).await?;
            report.created.push(name.into());
        }
    }
    Ok(())
}

/// Records which queue is used, and refuses another queue while the old one holds messages. A queue outside
/// of the database cannot be seen from here. Returns whether the table must be read again because of that.
pub(super) async fn switch(
    transaction: &Transaction<'_>,
    queue: &config::Queue,
    report: &mut Report,
) -> Result<bool> {
    let fail = |error: tokio_postgres::Error| failure("read which queue was used", error);
    let (kind, name) = match &queue.kind {
        config::QueueKind::Pgmq => ("pgmq", queue.name.as_str()),
        config::QueueKind::Sqs(queue) => ("sqs", queue.url.as_str()),
    };
    let before = transaction
        .query_opt("SELECT kind, name FROM refarch.queue", &[])
        .await
        .map_err(fail)?
        .map(|row| (row.get::<_, String>(0), row.get::<_, String>(1)));
    if before.as_ref().is_some_and(|(was, named)| was == kind && named == name) {
        return Ok(false);
    }
    refuse_while_it_holds(transaction, queue).await?;
    // These tables show that messages went to a queue outside of the database, in a version that recorded no
    // queue.
    let shipped: bool = transaction
        .query_one(
            "SELECT EXISTS (SELECT FROM refarch.shipment) OR EXISTS (SELECT FROM refarch.packing)",
            &[],
        )
        .await
        .map_err(fail)?
        .get(0);
    let before = before.or_else(|| (shipped && kind == "pgmq").then(|| ("sqs".into(), "(not noted)".into())));
    let is_outside = before.as_ref().is_some_and(|(was, _)| was == "sqs");
    if let Some((was, named)) = &before {
        refuse_while_running(transaction, "use another queue", "stop them first").await?;
        if is_outside {
            transaction.execute("DELETE FROM refarch.shipment", &[]).await.map_err(fail)?;
            report.warnings.push(format!(
                "changes were sent to {was} {named} before: messages that are left there are no longer read, so every row is queued again"
            ));
        }
    }
    transaction
        .execute(
            "INSERT INTO refarch.queue (kind, name) VALUES ($1, $2) \
             ON CONFLICT (single) DO UPDATE SET kind = excluded.kind, name = excluded.name, noted_at = now()",
            &[&kind, &name],
        )
        .await
        .map_err(fail)?;
    Ok(is_outside)
}

/// Refuses if a pgmq queue that we made and the settings no longer name still holds messages.
async fn refuse_while_it_holds(transaction: &Transaction<'_>, queue: &config::Queue) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("count the messages in the queue that was used", error);
    let there: bool =
        transaction.query_one("SELECT to_regclass('pgmq.meta') IS NOT NULL", &[]).await.map_err(fail)?.get(0);
    if !there {
        return Ok(());
    }
    let names = Names::new(&queue.name);
    let used: Vec<&str> = if queue.is_pgmq() { names.all().into() } else { Vec::new() };
    let left = transaction
        .query(
            "SELECT m.name, c.relname::text FROM refarch.made m JOIN pgmq.meta q ON q.queue_name = m.name \
             JOIN pg_class c ON c.relname = 'q_' || lower(m.name) AND c.relnamespace = 'pgmq'::regnamespace \
             WHERE m.what = $1 AND m.name <> ALL ($2) ORDER BY 1",
            &[&created::QUEUE, &used],
        )
        .await
        .map_err(fail)?;
    for row in left {
        let (name, relation): (String, String) = (row.get(0), row.get(1));
        let sql = format!("SELECT count(*) FROM pgmq.{}", quote_ident(&relation));
        let messages: i64 = transaction.query_one(&sql, &[]).await.map_err(fail)?.get(0);
        if messages > 0 {
            return Err(Error::new(
                FailureKind::WrongSetting,
                "use another queue",
                format!(
                    "{messages} message(s) are left in the queue {name}: set queue.kind and queue.name to the old values and let \
                     refarch embed --until-idle process them (refarch redrive sends dead letters back), or delete them \
                     with SELECT pgmq.purge_queue('{name}')"
                ),
            ));
        }
    }
    Ok(())
}
