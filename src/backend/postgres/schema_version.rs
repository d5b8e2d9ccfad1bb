//! The version of the schema `refarch`: which migrations are applied, and whether they have this build's content.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use sha2::{Digest as _, Sha256};
use tokio_postgres::Transaction;

use super::failure;
use crate::pipeline::failure::{Error, FailureKind, Result};

/// The migrations of schema `refarch`, in order. Never edit a released migration.
const MIGRATIONS: &[(i32, &str, &str)] = &[
    (1, "core", include_str!("schema/0001_core.sql")),
    (2, "attempts", include_str!("schema/0002_attempts.sql")),
    (3, "shipments", include_str!("schema/0003_shipments.sql")),
    (4, "made", include_str!("schema/0004_made.sql")),
    (5, "capture", include_str!("schema/0005_capture.sql")),
    (6, "faults", include_str!("schema/0006_faults.sql")),
    (7, "proof", include_str!("schema/0007_proof.sql")),
    (8, "ownership", include_str!("schema/0008_ownership.sql")),
    (9, "leaves", include_str!("schema/0009_leaves.sql")),
    (10, "checksums", include_str!("schema/0010_checksums.sql")),
    (11, "search_index", include_str!("schema/0011_search_index.sql")),
    (12, "counts", include_str!("schema/0012_counts.sql")),
    (13, "scaling", include_str!("schema/0013_scaling.sql")),
    (14, "outliers", include_str!("schema/0014_outliers.sql")),
    (15, "rights", include_str!("schema/0015_rights.sql")),
];

/// The applied migrations: version and checksum. Earlier builds recorded no checksum.
type Applied = BTreeMap<i32, Option<String>>;

/// The version of the schema that this build works with.
fn newest_version() -> i32 {
    MIGRATIONS.last().map_or(0, |(version, _, _)| *version)
}

fn checksum(sql: &str) -> String {
    Sha256::digest(sql).iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Reads the applied migrations. The column for the checksum exists since migration 10.
async fn applied(client: &Transaction<'_>, what: &str) -> Result<Applied> {
    let rows = client
        .query("SELECT version, to_jsonb(m) ->> 'checksum' FROM refarch.migration m", &[])
        .await
        .map_err(|error| failure(what, error))?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Refuses a database in which a migration has other content than in this build.
fn refuse_other_content(applied: &Applied, what: &str) -> Result<()> {
    for (version, name, sql) in MIGRATIONS {
        let (Some(Some(there)), ours) = (applied.get(version), checksum(sql)) else { continue };
        if *there != ours {
            return Err(Error::new(
                FailureKind::WrongVersion,
                what,
                format!(
                    "migration {version:04}_{name} was applied to this database with other content than this build's \
                     (checksum {there:.12}, and {ours:.12} here): use the refarch that applied it"
                ),
            ));
        }
    }
    Ok(())
}

/// Refuses a database whose schema is older than this build's, or has other content.
pub(super) async fn check(client: &Transaction<'_>) -> Result<()> {
    let what = "look for the schema";
    let applied = applied(client, what).await?;
    let version = applied.keys().last().copied().unwrap_or_default();
    let needed = newest_version();
    if version < needed {
        return Err(Error::new(
            FailureKind::WrongVersion,
            what,
            format!(
                "the schema refarch has version {version}, and this build needs version {needed}: run refarch migrate"
            ),
        ));
    }
    refuse_other_content(&applied, what)
}

/// Applies the migrations that are missing, and returns their names.
pub(super) async fn apply(transaction: &Transaction<'_>) -> Result<Vec<String>> {
    let what = "migrate the schema";
    let fail = |error: tokio_postgres::Error| failure(what, error);
    let there: bool = transaction
        .query_one("SELECT to_regclass('refarch.migration') IS NOT NULL", &[])
        .await
        .map_err(fail)?
        .get(0);
    if !there {
        transaction
            .batch_execute(
                "CREATE SCHEMA IF NOT EXISTS refarch; \
                 CREATE TABLE refarch.migration ( \
                   version integer PRIMARY KEY, name text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())",
            )
            .await
            .map_err(fail)?;
    }
    refuse_another_owner(transaction).await?;
    let applied = applied(transaction, what).await?;
    let (newest, known) = (applied.keys().last().copied().unwrap_or_default(), newest_version());
    if newest > known {
        return Err(Error::new(
            FailureKind::WrongVersion,
            what,
            format!(
                "the schema refarch has version {newest}, and this build knows versions up to {known}: use a newer refarch"
            ),
        ));
    }
    refuse_other_content(&applied, what)?;
    let mut names = Vec::new();
    for (version, name, sql) in MIGRATIONS.iter().filter(|(version, _, _)| !applied.contains_key(version)) {
        transaction.batch_execute(sql).await.map_err(fail)?;
        transaction
            .execute("INSERT INTO refarch.migration (version, name) VALUES ($1, $2)", &[version, name])
            .await
            .map_err(fail)?;
        names.push(format!("{version:04}_{name}"));
    }
    // Earlier builds recorded no checksum for the migrations that they applied.
    let (versions, checksums): (Vec<i32>, Vec<String>) =
        MIGRATIONS.iter().map(|(version, _, sql)| (version, checksum(sql))).unzip();
    transaction
        .execute(
            "UPDATE refarch.migration m SET checksum = known.checksum \
             FROM unnest($1::int[], $2::text[]) AS known (version, checksum) \
             WHERE m.version = known.version AND m.checksum IS NULL",
            &[&versions, &checksums],
        )
        .await
        .map_err(fail)?;
    Ok(names)
}

/// Refuses a role that does not own the existing schema. Replaced functions keep their owner, who may not
/// write to tables that another role makes. The application's statements would then fail in the triggers.
async fn refuse_another_owner(transaction: &Transaction<'_>) -> Result<()> {
    let (owner, user): (String, String) = transaction
        .query_one(
            "SELECT r.rolname::text, current_user::text FROM pg_class c JOIN pg_roles r ON r.oid = c.relowner \
             WHERE c.oid = 'refarch.migration'::regclass",
            &[],
        )
        .await
        .map(|row| (row.get(0), row.get(1)))
        .map_err(|error| failure("look for the owner of the schema refarch", error))?;
    if owner == user {
        return Ok(());
    }
    Err(Error::new(
        FailureKind::RefusedCredentials,
        "migrate the schema",
        format!(
            "the schema refarch belongs to the role {owner}, and this login is {user}: run refarch migrate as {owner}. \
             If {owner} may not create an extension that is missing, create the extension as {user} first"
        ),
    ))
}
