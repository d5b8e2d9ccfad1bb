//! Removes everything that refarch made, and nothing else.

use serde::Serialize;
use tokio_postgres::Transaction;

use super::created;
use super::lock_retry::LockRetrySession;
use crate::backend::pgmq::Names;
use crate::backend::postgres::source::quote_ident;
use crate::backend::postgres::worker_registry::WORKER_GONE_S;
use crate::backend::postgres::{Postgres, failure};
use crate::config;
use crate::pipeline::failure::{Error, FailureKind, Result};

/// What was removed, or would be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Uninstalled {
    /// Triggers, queues, schemas and extensions, in the order of their removal.
    pub removed: Vec<String>,
    /// What stays, and why.
    pub notes: Vec<String>,
}

/// How to uninstall.
#[derive(Clone, Copy, Debug)]
pub struct UninstallOptions {
    /// Only report what would be removed.
    pub is_plan: bool,
    /// Uninstall even if roles are running.
    pub force: bool,
}

/// Removes our triggers, schema and queues, and everything that was made for them. The triggers are removed
/// first, table by table, so that no writer waits while another table is waited for. The rest is removed in
/// one transaction.
pub async fn uninstall(
    postgres: &Postgres,
    queue: &config::Queue,
    options: UninstallOptions,
) -> Result<Uninstalled> {
    postgres.check().await?;
    let mut session = LockRetrySession::open(postgres).await?;
    let found = session
        .with_lock_retry(None, true, async |transaction| {
            if !exists(transaction, "refarch").await? {
                return Ok(None);
            }
            if !options.force {
                refuse_while_running(transaction, "uninstall", "stop them first, or add --force").await?;
            }
            triggers(transaction).await.map(Some)
        })
        .await?;
    let Some(found) = found else { return Ok(Uninstalled::default()) };
    let mut done = Uninstalled::default();
    for (name, relation) in &found {
        if !options.is_plan {
            let sql = format!("DROP TRIGGER IF EXISTS {} ON {relation}", quote_ident(name));
            let fail = |error: tokio_postgres::Error| failure("remove the capture triggers", error);
            session
                .with_lock_retry(Some(relation), false, async |transaction| {
                    transaction.batch_execute(&sql).await.map_err(fail)
                })
                .await?;
        }
        done.removed.push(format!("trigger {name} on {relation}"));
    }
    let rest = session
        .with_lock_retry(None, options.is_plan, async |transaction| {
            take_away(transaction, queue, options).await
        })
        .await?;
    session.close().await;
    done.removed.extend(rest.removed);
    done.notes.extend(rest.notes);
    Ok(done)
}

/// Removes everything but the triggers. A plan does not drop the schema, since that would need to drop the
/// triggers.
async fn take_away(
    transaction: &Transaction<'_>,
    queue: &config::Queue,
    options: UninstallOptions,
) -> Result<Uninstalled> {
    let fail = |error: tokio_postgres::Error| failure("uninstall", error);
    let mut done = Uninstalled::default();
    let created = created::read(transaction).await?;
    let granted = granted(transaction).await?;
    drop_queues(transaction, queue, created.as_deref(), &mut done).await?;
    save_extension(transaction).await?;
    if !options.is_plan {
        transaction.batch_execute("DROP SCHEMA refarch CASCADE").await.map_err(fail)?;
    }
    done.removed.push("schema refarch".into());
    drop_extension(transaction, created.as_deref(), options.is_plan, &mut done).await?;
    done.notes.push("the table and its rows stay as they are".into());
    if !granted.is_empty() {
        done.notes.push(format!(
            "roles that keep their rights on the table: {}; REVOKE the rights that they no longer need",
            granted.join(", ")
        ));
    }
    if !queue.is_pgmq() {
        done.notes.push("messages in SQS stay: purge the queues if nothing else uses them".into());
    }
    Ok(done)
}

/// Roles of the database that migrations gave rights to.
async fn granted(transaction: &Transaction<'_>) -> Result<Vec<String>> {
    let fail = |error: tokio_postgres::Error| failure("look for the rights that were granted", error);
    let there: bool = transaction
        .query_one("SELECT to_regclass('refarch.granted') IS NOT NULL", &[])
        .await
        .map_err(fail)?
        .get(0);
    if !there {
        return Ok(Vec::new());
    }
    let rows =
        transaction.query("SELECT DISTINCT name FROM refarch.granted ORDER BY 1", &[]).await.map_err(fail)?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

async fn exists(transaction: &Transaction<'_>, schema: &str) -> Result<bool> {
    transaction
        .query_one("SELECT to_regnamespace($1) IS NOT NULL", &[&schema])
        .await
        .map(|row| row.get(0))
        .map_err(|error| failure("look for a schema", error))
}

/// Refuses to remove something that running roles use.
pub(super) async fn refuse_while_running(
    transaction: &Transaction<'_>,
    what: &'static str,
    cure: &str,
) -> Result<()> {
    let there = transaction
        .query(
            "SELECT format('%s on %s (%s)', role, host, pid) FROM refarch.worker \
             WHERE heartbeat_at > now() - make_interval(secs => $1) ORDER BY 1",
            &[&f64::from(WORKER_GONE_S)],
        )
        .await
        .map_err(|error| failure("look for running roles", error))?;
    if there.is_empty() {
        return Ok(());
    }
    let roles: Vec<String> = there.iter().map(|row| row.get(0)).collect();
    Err(Error::new(
        FailureKind::WrongSetting,
        what,
        format!("these roles are running: {}; {cure}", roles.join(", ")),
    ))
}

/// Triggers that call our functions, on any table outside of our schema: names of triggers and tables.
async fn triggers(transaction: &Transaction<'_>) -> Result<Vec<(String, String)>> {
    let triggers = transaction
        .query(
            "SELECT t.tgname::text, t.tgrelid::regclass::text FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid \
             JOIN pg_class c ON c.oid = t.tgrelid AND c.relnamespace <> 'refarch'::regnamespace \
             WHERE p.pronamespace = 'refarch'::regnamespace AND NOT t.tgisinternal AND t.tgparentid = 0 ORDER BY 2, 1",
            &[],
        )
        .await
        .map_err(|error| failure("look for the capture triggers", error))?;
    Ok(triggers.iter().map(|row| (row.get(0), row.get(1))).collect())
}

async fn drop_queues(
    transaction: &Transaction<'_>,
    queue: &config::Queue,
    created: Option<&[(String, String)]>,
    done: &mut Uninstalled,
) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("drop the queues", error);
    if !exists(transaction, "pgmq").await? {
        return Ok(());
    }
    let there = transaction.query("SELECT queue_name FROM pgmq.meta ORDER BY 1", &[]).await.map_err(fail)?;
    // If nothing was recorded, the queues that the settings name are ours.
    let ours = |name: &str| match created {
        Some(_) => created::contains(created, created::QUEUE, name),
        None => Names::new(&queue.name).all().contains(&name),
    };
    let mut left = 0;
    for row in there {
        let name: String = row.get(0);
        if !ours(&name) {
            left += 1;
            continue;
        }
        transaction.execute("SELECT pgmq.drop_queue($1::text)", &[&name]).await.map_err(fail)?;
        done.removed.push(format!("queue {name}"));
    }
    if left > 0 {
        done.notes.push(format!("schema pgmq stays: {left} queue(s) in it were not made by refarch"));
    } else if created::contains(created, created::PGMQ, "pgmq") {
        transaction.batch_execute("DROP SCHEMA pgmq CASCADE").await.map_err(fail)?;
        done.removed.push("schema pgmq".into());
    } else {
        done.notes.push(
            "schema pgmq stays: refarch has no record of making it; DROP SCHEMA pgmq CASCADE removes it"
                .into(),
        );
    }
    Ok(())
}

/// Moves the extension out of our schema. Dropping the schema would otherwise drop every column of the
/// extension's types.
async fn save_extension(transaction: &Transaction<'_>) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("move the extension vector out of our schema", error);
    let ours: bool = transaction
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'vector' AND extnamespace = 'refarch'::regnamespace)",
            &[],
        )
        .await
        .map_err(fail)?
        .get(0);
    if ours {
        transaction.batch_execute("ALTER EXTENSION vector SET SCHEMA public").await.map_err(fail)
    } else {
        Ok(())
    }
}

/// Drops the extension, if refarch made it and nothing else uses it.
async fn drop_extension(
    transaction: &Transaction<'_>,
    created: Option<&[(String, String)]>,
    is_plan: bool,
    done: &mut Uninstalled,
) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("drop the extension vector", error);
    if !created::contains(created, created::EXTENSION, "vector") {
        return Ok(());
    }
    let used: bool = transaction
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_class c ON c.oid = a.attrelid \
               WHERE t.typname IN ('vector', 'halfvec', 'sparsevec') AND c.relkind IN ('r', 'p', 'm', 'f') AND NOT a.attisdropped \
               AND c.relnamespace IS DISTINCT FROM to_regnamespace('refarch'))",
            &[],
        )
        .await
        .map_err(fail)?
        .get(0);
    if used {
        done.notes.push("the extension vector stays: other tables use it".into());
        return Ok(());
    }
    if !is_plan {
        transaction.batch_execute("DROP EXTENSION vector").await.map_err(fail)?;
    }
    done.removed.push("extension vector".into());
    Ok(())
}
