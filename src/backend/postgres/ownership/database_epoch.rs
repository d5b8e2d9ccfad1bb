//! The database epoch, and its comparison with the ownership record of the index.

use std::time::SystemTime;

use crate::backend::postgres::{Postgres, failure};
use crate::pipeline::failure::Result;

/// After this database changed its name, how long one of its workers may still write a record with the old
/// name.
const OLD_NAME_SEEN_FOR: &str = "2 minutes";

/// An index is not taken over twice within this time: its previous owner still runs.
pub(super) const TAKEN_FOR: &str = "10 minutes";

/// The result of the comparison of record and database. It decides what is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    Owned,
    Unclaimed,
    /// The record has this database's name, and the database is on another server or timeline.
    ServerChanged,
    /// The record has this database's name and a higher number, or the database lost a heartbeat.
    IndexAhead(i64),
    /// The record has another name.
    OtherDatabase,
    /// There is no record, although the ledger has writes to the index.
    RecordMissing,
}

impl Check {
    /// Why the index may still apply writes that the ledger does not know of.
    pub(super) fn why_wait(self) -> Option<&'static str> {
        match self {
            Self::ServerChanged | Self::IndexAhead(_) => {
                Some("the database went back to an earlier state or changed its server")
            }
            Self::OtherDatabase => Some("the index belonged to another database"),
            Self::Owned | Self::Unclaimed | Self::RecordMissing => None,
        }
    }
}

/// The database epoch, and what the database recorded about the index.
#[derive(Clone, Debug, Default)]
pub(super) struct DatabaseEpoch {
    pub(super) name: String,
    pub(super) epoch: i64,
    /// Whether the ledger has a write to the index.
    pub(super) written: bool,
    pub(super) handled_record: Option<String>,
    /// Whether this database changed its name within [`OLD_NAME_SEEN_FOR`].
    pub(super) changed_now: bool,
    /// When every row was last queued because this database went back or moved.
    pub(super) changed_at: Option<SystemTime>,
    /// Whether an index of another database was taken over within [`TAKEN_FOR`].
    pub(super) taken_lately: bool,
    /// Server and timeline when the epoch last grew, and now.
    pub(super) recorded: Option<String>,
    pub(super) current: String,
}

impl DatabaseEpoch {
    /// Whether server or timeline differ from those of the last epoch. A part that is unknown is not
    /// compared.
    pub(super) fn has_changed_server(&self) -> bool {
        let parts = |text: &str| {
            text.split_once('/').map(|(system, timeline)| [system.to_owned(), timeline.to_owned()])
        };
        let (Some(then), Some(now)) = (self.recorded.as_deref().and_then(parts), parts(&self.current)) else {
            return false;
        };
        then.iter().zip(&now).any(|(then, now)| !then.is_empty() && !now.is_empty() && then != now)
    }

    /// Whether the database went back to before this heartbeat, and nobody has queued every row since.
    pub(super) fn went_back(&self, lost: Option<SystemTime>) -> bool {
        lost.is_some_and(|lost| self.changed_at.is_none_or(|at| at <= lost))
    }

    /// Whether a record of another name was handled already.
    fn has_handled(&self, record: &str) -> bool {
        let Some(known) = self.handled_record.as_deref() else { return false };
        let name = |record: &str| record.rsplit_once('/').map(|(name, _)| name.to_owned());
        known == record || (self.changed_now && name(known).is_some() && name(known) == name(record))
    }

    pub(super) fn check(&self, record: Option<&str>) -> Check {
        let Some(record) = record else {
            // The number in the database alone proves nothing: writing the record may have failed.
            return if self.written { Check::RecordMissing } else { Check::Unclaimed };
        };
        let parsed =
            record.rsplit_once('/').and_then(|(name, epoch)| Some((name, epoch.parse::<i64>().ok()?)));
        match parsed {
            Some((name, seen)) if name == self.name && seen > self.epoch => Check::IndexAhead(seen),
            Some((name, _)) if name != self.name && !self.has_handled(record) => Check::OtherDatabase,
            None if !self.has_handled(record) => Check::OtherDatabase,
            _ if self.has_changed_server() => Check::ServerChanged,
            _ => Check::Owned,
        }
    }
}

/// Reads the epoch of a target.
pub(super) async fn read(postgres: &Postgres, generation: i32) -> Result<DatabaseEpoch> {
    let client = postgres.client().await?;
    let sql = format!(
        "INSERT INTO refarch.lineage AS l (target) VALUES ($1) ON CONFLICT (target) DO UPDATE SET mark = l.mark \
         RETURNING name, mark, EXISTS (SELECT FROM refarch.ledger e WHERE e.target = $1 AND e.epoch > 0), \
           foreign_note, coalesce(changed_at > clock_timestamp() - interval '{OLD_NAME_SEEN_FOR}', false), \
           coalesce(taken_at > clock_timestamp() - interval '{TAKEN_FOR}', false), incarnation, refarch.incarnation(), \
           changed_at"
    );
    let row = client
        .query_one(&sql, &[&generation])
        .await
        .map_err(|error| failure("read the owner of the index", error))?;
    Ok(DatabaseEpoch {
        name: row.get(0),
        epoch: row.get(1),
        written: row.get(2),
        handled_record: row.get(3),
        changed_now: row.get(4),
        taken_lately: row.get(5),
        recorded: row.get(6),
        current: row.get(7),
        changed_at: row.get(8),
    })
}

/// Advances the epoch in the database. Returns name and number.
pub(super) async fn advance_epoch(postgres: &Postgres, generation: i32) -> Result<(String, i64)> {
    let client = postgres.client().await?;
    let row = client
        .query_one(
            "INSERT INTO refarch.lineage AS l (target, mark, incarnation) VALUES ($1, 1, refarch.incarnation()) \
             ON CONFLICT (target) DO UPDATE SET mark = l.mark + 1, incarnation = coalesce(l.incarnation, excluded.incarnation) \
             RETURNING name, mark",
            &[&generation],
        )
        .await
        .map_err(|error| failure("advance the database epoch", error))?;
    Ok((row.get(0), row.get(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(epoch: i64, written: bool) -> DatabaseEpoch {
        DatabaseEpoch {
            name: "a".into(),
            epoch,
            written,
            current: "7/00000001".into(),
            ..DatabaseEpoch::default()
        }
    }

    #[test]
    fn an_index_that_is_ahead_or_not_owned_is_told_apart() {
        assert_eq!(state(0, false).check(None), Check::Unclaimed);
        assert_eq!(state(3, false).check(None), Check::Unclaimed);
        assert_eq!(state(3, true).check(None), Check::RecordMissing);
        assert_eq!(state(3, true).check(Some("a/3")), Check::Owned);
        assert_eq!(state(3, true).check(Some("a/2")), Check::Owned);
        assert_eq!(state(3, true).check(Some("a/4")), Check::IndexAhead(4));
        assert_eq!(state(3, true).check(Some("b/3")), Check::OtherDatabase);
        assert_eq!(state(3, true).check(Some("nonsense")), Check::OtherDatabase);
    }

    #[test]
    fn another_server_or_timeline_is_noticed_as_far_as_it_is_known() {
        let on = |recorded: &str, current: &str| DatabaseEpoch {
            recorded: Some(recorded.into()),
            current: current.into(),
            ..state(3, true)
        };
        for (then, now, found) in [
            ("7/00000001", "7/00000001", Check::Owned),
            ("7/00000001", "7/00000002", Check::ServerChanged),
            ("7/00000001", "8/00000001", Check::ServerChanged),
            ("/00000001", "8/00000001", Check::Owned),
            ("7/00000001", "/", Check::Owned),
        ] {
            assert_eq!(on(then, now).check(Some("a/3")), found, "{then} {now}");
        }
        assert_eq!(on("7/1", "7/2").check(Some("a/4")), Check::IndexAhead(4), "the graver one");
    }

    #[test]
    fn a_record_that_was_handled_is_not_handled_again() {
        let dealt = DatabaseEpoch { handled_record: Some("b/5".into()), ..state(3, true) };
        assert_eq!(dealt.check(Some("b/5")), Check::Owned);
        assert_eq!(dealt.check(Some("b/6")), Check::OtherDatabase);
        // A worker that still used the old name may have been about to write this record.
        let just_now = DatabaseEpoch { changed_now: true, ..dealt };
        assert_eq!(just_now.check(Some("b/6")), Check::Owned);
        assert_eq!(just_now.check(Some("c/6")), Check::OtherDatabase);
    }
}
