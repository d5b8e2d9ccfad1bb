//! Index ownership: which database, and which epoch of that database, an index outside of the database
//! belongs to.
//!
//! After a restore to an earlier point, the index is ahead of the ledger: the index may hold anything for a
//! row that the ledger calls settled. So the database has an epoch: a name, and a number that grows. The
//! index keeps an ownership record with the same two, written after the database committed them. A worker
//! compares the record with the database when the worker starts, and each time that the number grows:
//!
//! - *Another name*: another database wrote to the index. A worker that starts takes the index over: it
//!   trusts no entry of the ledger, and every text is embedded. A worker that was running ends, since two
//!   databases that write to one namespace would overwrite each other for ever.
//! - *No record*, though something was written: the index was created again. The worker does the same.
//! - *A higher number*: this database went back to an earlier state (a restore, or a failover to a replica
//!   that was behind). Every row is sent again. A record that carries the row's content hash supplies its
//!   vector.
//! - *The same record, on another server or timeline* (see `refarch.incarnation`): a failover or a restore,
//!   which may have lost what came after the number last grew. Rows and ledger went back together, so they do
//!   not show which records are ahead. Every row is sent again in the same way, which costs requests and no
//!   embedding. The database gets a new name. So the old server, if it still runs, is recognised as another
//!   database.
//!
//! The number grows once a minute, so it does not show a restore to a state of less than a minute ago, if server
//! and timeline stay the same (a storage snapshot, or a copy of the files). A running worker shows it: it wrote
//! a heartbeat each second to `refarch.worker`, and the restored database does not hold the last one. That cannot
//! be overtaken by what is written after the restore, as a position in the write-ahead log could be. The workers
//! of a fleet notice it each, and the first to hold the lock queues every row: `changed_at` is then later than
//! the lost heartbeats of all the others. If no worker ran at the restore, only the number tells. A state that
//! holds the last heartbeats of all workers is not told apart from the newest.
//!
//! The index may apply a write up to the settling time after it accepted the write. While that may still
//! happen, the ledger keeps the row open. But the ledger of the lost time is gone, and so is what it knew of
//! such writes. If a row were written anew at once, a write of the lost time could still replace it, and
//! nothing would tell. So a worker that finds that the database went back or moved, or that the index is
//! another database's, first waits for the settling time, and only then queues every row. Whatever running
//! workers write meanwhile does no harm, since it is written again. An index that was created again needs no
//! waiting, and neither does pgvector: its writes are part of the transactions that went back.
//!
//! None of these cases finds a record whose id this database never had. The proof and `verify`, which list
//! the index, find such a record.
//!
//! pgvector keeps no ownership record: its vectors are restored together with rows and ledger, and agree with
//! them. But a queue outside of the database is not restored: it may have delivered and deleted messages
//! about changes that the restored outbox does not hold any more. So the number grows with pgvector too. If
//! the database went back (another server or timeline, or a number lower than one that this process set),
//! every id is queued. A row that agrees with the index costs one comparison.

use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::{Postgres, failure};
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::index::{OwnershipStore, VectorIndex};

/// How often the database epoch grows, and the ownership record is compared.
const RENEW_EVERY: Duration = Duration::from_mins(1);

/// After this database changed its name, how long one of its workers may still write a record with the old
/// name.
const OLD_NAME_SEEN_FOR: &str = "2 minutes";

/// An index is not taken over twice within this time: its previous owner still runs.
const TAKEN_FOR: &str = "10 minutes";

/// How many times a missing record is looked for, a second apart, before it counts as missing: an index may
/// show a write some time later.
const CHECKS_BEFORE_MISSING: u32 = 4;

/// How soon a worker tries again to handle that the database went back.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// How often a worker that waits for late writes uses its session.
const BEAT_EVERY: Duration = Duration::from_secs(1);

/// Whether the index belongs to the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// The index belongs to this database.
    Owned,
    /// The index holds no record, and the ledger knows of no write to the index.
    Unclaimed,
    /// The index belongs to another database or to a later state of this one, or it was created again.
    NotOwned,
}

/// The same in more detail: it decides what is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    Owned,
    Unclaimed,
    /// The record has this database's name, and the database is on another server or timeline.
    ServerChanged,
    /// The record has this database's name and a higher number, or the database lost a heartbeat.
    IndexAhead(i64),
    /// The record has another name.
    OtherDatabase,
    /// There is no record, though something was written.
    RecordMissing,
}

impl Check {
    /// Why the index may still apply writes that the ledger does not know of.
    fn why_wait(self) -> Option<&'static str> {
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
struct DatabaseEpoch {
    name: String,
    epoch: i64,
    /// Whether the index was ever written to, by the ledger.
    written: bool,
    handled_record: Option<String>,
    /// Whether this database changed its name within [`OLD_NAME_SEEN_FOR`].
    changed_now: bool,
    /// When every row was last queued because this database went back or moved.
    changed_at: Option<SystemTime>,
    /// Whether an index of another database was taken over within [`TAKEN_FOR`].
    taken_lately: bool,
    /// Server and timeline when the epoch last grew, and now.
    recorded: Option<String>,
    current: String,
}

impl DatabaseEpoch {
    /// Whether server or timeline differ from those of the last epoch. A part that is unknown is not
    /// compared.
    fn has_changed_server(&self) -> bool {
        let parts = |text: &str| {
            text.split_once('/').map(|(system, timeline)| [system.to_owned(), timeline.to_owned()])
        };
        let (Some(then), Some(now)) = (self.recorded.as_deref().and_then(parts), parts(&self.current)) else {
            return false;
        };
        then.iter().zip(&now).any(|(then, now)| !then.is_empty() && !now.is_empty() && then != now)
    }

    /// Whether the database went back to before this heartbeat, and nobody has queued every row since.
    fn went_back(&self, lost: Option<SystemTime>) -> bool {
        lost.is_some_and(|lost| self.changed_at.is_none_or(|at| at <= lost))
    }

    /// Whether a record of another name was handled already.
    fn has_handled(&self, record: &str) -> bool {
        let Some(known) = self.handled_record.as_deref() else { return false };
        let name = |record: &str| record.rsplit_once('/').map(|(name, _)| name.to_owned());
        known == record || (self.changed_now && name(known).is_some() && name(known) == name(record))
    }

    fn check(&self, record: Option<&str>) -> Check {
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

async fn read(postgres: &Postgres, generation: i32) -> Result<DatabaseEpoch> {
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

/// Reads the record and compares it. `lost` is a heartbeat that the database has lost.
async fn read_and_check(
    postgres: &Postgres,
    generation: i32,
    store: &dyn OwnershipStore,
    lost: Option<SystemTime>,
) -> Result<(DatabaseEpoch, Option<String>, Check)> {
    let before = read(postgres, generation).await?;
    let record = store.record().await?;
    // A worker may advance the epoch meanwhile. So the database is read again after the record: the record is
    // not ahead of that state. A missing record counts as missing only if something was written before.
    let state = match record {
        Some(_) => DatabaseEpoch { written: before.written, ..read(postgres, generation).await? },
        None => before,
    };
    let found = match state.check(record.as_deref()) {
        Check::Owned if state.went_back(lost) => Check::IndexAhead(state.epoch),
        found => found,
    };
    Ok((state, record, found))
}

/// Compares the ownership record of the index with the database.
pub async fn compare(postgres: &Postgres, generation: i32, index: &dyn VectorIndex) -> Result<Ownership> {
    let Some(store) = index.ownership_store() else { return Ok(Ownership::Owned) };
    Ok(match read_and_check(postgres, generation, store, None).await?.2 {
        // After a change of server, records may be ahead of the ledger. The caller compares records and finds
        // them.
        Check::Owned | Check::ServerChanged => Ownership::Owned,
        Check::Unclaimed => Ownership::Unclaimed,
        Check::IndexAhead(_) | Check::OtherDatabase | Check::RecordMissing => Ownership::NotOwned,
    })
}

/// Whether the index holds a record of the source's database: then this database wrote to the index, whatever
/// the address of the index is now.
pub async fn is_owned_by(postgres: &Postgres, source: &str, index: &dyn VectorIndex) -> Result<bool> {
    let Some(store) = index.ownership_store() else { return Ok(false) };
    let client = postgres.client().await?;
    let sql = "SELECT l.name FROM refarch.lineage l JOIN refarch.target t ON t.id = l.target \
               WHERE t.source = $1 AND t.state = 'active'";
    let row = client
        .query_opt(sql, &[&source])
        .await
        .map_err(|error| failure("read the owner of the index", error))?;
    let Some(name) = row.map(|row| row.get::<_, String>(0)) else { return Ok(false) };
    let record = store.record().await?;
    Ok(record.is_some_and(|record| {
        record.rsplit_once('/').is_some_and(|(recorded_name, _)| recorded_name == name)
    }))
}

/// Advances the epoch in the database. Returns name and number.
async fn advance_epoch(postgres: &Postgres, generation: i32) -> Result<(String, i64)> {
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

/// Advances the epoch, first in the database and then in the index, if the index still belongs to this
/// database. Takes the index over otherwise, after waiting for `settle` as [`claim`] does.
pub async fn renew(
    postgres: &Postgres,
    generation: i32,
    store: &dyn OwnershipStore,
    settle: Duration,
) -> Result<()> {
    advance(postgres, generation, store, settle, None).await
}

async fn advance(
    postgres: &Postgres,
    generation: i32,
    store: &dyn OwnershipStore,
    settle: Duration,
    lost: Option<SystemTime>,
) -> Result<()> {
    match read_and_check(postgres, generation, store, lost).await?.2 {
        Check::Owned | Check::Unclaimed => write_record(postgres, generation, store).await,
        // Another worker may have seen the same: the lock lets one worker handle it.
        _ => take_over(postgres, generation, store, settle, lost, &|_| ()).await,
    }
}

async fn write_record(postgres: &Postgres, generation: i32, store: &dyn OwnershipStore) -> Result<()> {
    let (name, epoch) = advance_epoch(postgres, generation).await?;
    store.set_record(&format!("{name}/{epoch}")).await
}

/// Makes sure that the index belongs to this database, before anything is written to the index.
///
/// If the index may still apply writes that the ledger does not know of, waits for `settle`, the time within
/// which it applies them. `report` gets the reason as a sentence. To end the waiting early, drop the future.
pub async fn claim(
    postgres: &Postgres,
    generation: i32,
    index: &dyn VectorIndex,
    settle: Duration,
    report: &(dyn Fn(&str) + Sync),
) -> Result<()> {
    if let Some(store) = index.ownership_store() {
        return take_over(postgres, generation, store, settle, None, report).await;
    }
    let state = read(postgres, generation).await?;
    if state.has_changed_server() {
        requeue_all(postgres, generation, &state, 0).await?;
    }
    advance_epoch(postgres, generation).await.map(drop)
}

async fn take_over(
    postgres: &Postgres,
    generation: i32,
    store: &dyn OwnershipStore,
    settle: Duration,
    lost: Option<SystemTime>,
    report: &(dyn Fn(&str) + Sync),
) -> Result<()> {
    // Before the lock: if another worker has the lock and waits, so does this one.
    let (state, _, found) = read_and_check(postgres, generation, store, lost).await?;
    if let Some(why) = found.why_wait().filter(|_| !is_shared(&state, found)) {
        report(&format!(
            "{why}, and writes that the ledger does not know of may still be applied to the index: every row is \
             written anew after {} s",
            settle.as_secs_f64()
        ));
    }
    // A session of its own: the session's end releases the lock, whatever happens.
    let fail = |error: tokio_postgres::Error| failure("claim the index", error);
    let (session, connection) = postgres.dedicated().await.map_err(fail)?;
    let connection = tokio::spawn(connection);
    // The role's timeouts must not apply, since the lock is held for long. It outlives the transaction.
    session.batch_execute(&postgres.begin()).await.map_err(fail)?;
    session
        .execute("SELECT pg_advisory_lock(hashtext('refarch.lineage'), $1)", &[&generation])
        .await
        .map_err(fail)?;
    session.batch_execute("COMMIT").await.map_err(fail)?;
    let (mut state, mut seen, mut found) = read_and_check(postgres, generation, store, lost).await?;
    for _ in 1..CHECKS_BEFORE_MISSING {
        if found == Check::RecordMissing {
            tokio::time::sleep(Duration::from_secs(1)).await;
            (state, seen, found) = read_and_check(postgres, generation, store, lost).await?;
        }
    }
    if let Some(why) = found.why_wait().filter(|_| !is_shared(&state, found)) {
        tracing::info!(
            why,
            wait_s = settle.as_secs_f64(),
            "waiting until the index has applied every write that the ledger does not know of"
        );
        wait(&session, settle).await.map_err(fail)?;
        (state, seen, found) = read_and_check(postgres, generation, store, lost).await?;
    }
    match found {
        Check::Owned | Check::Unclaimed => {}
        found if is_shared(&state, found) => return Err(shared_namespace(seen.as_deref())),
        found => invalidate_all(postgres, generation, &state, seen.as_deref(), found).await?,
    }
    write_record(postgres, generation, store).await?;
    drop(session);
    connection
        .await
        .map_err(|error| Error::caused(FailureKind::ConnectionLost, "claim the index", error))?
        .map_err(fail)
}

/// Waits, and fails if the session that holds the lock ends meanwhile: the database may have gone back again, and
/// the time begins anew. Using the session keeps a timeout for idle sessions from ending it.
async fn wait(session: &Client, settle: Duration) -> Result<(), tokio_postgres::Error> {
    let mut left = settle;
    while !left.is_zero() {
        let pause = left.min(BEAT_EVERY);
        tokio::time::sleep(pause).await;
        session.simple_query("SELECT 1").await?;
        left -= pause;
    }
    Ok(())
}

/// Whether two running databases write to the index.
fn is_shared(state: &DatabaseEpoch, found: Check) -> bool {
    found == Check::OtherDatabase && state.taken_lately
}

fn shared_namespace(record: Option<&str>) -> Error {
    let message = format!(
        "another database writes to this namespace too; its ownership record is {:?}. Give each database a namespace \
         of its own (index.namespace). Or stop the other database's workers and start this worker again in {TAKEN_FOR}",
        record.unwrap_or_default()
    );
    Error::new(FailureKind::WrongSetting, "claim the index", message)
}

/// Marks every row and every entry of the ledger as not to be trusted, queues them, and records why, in one
/// transaction.
async fn invalidate_all(
    postgres: &Postgres,
    generation: i32,
    state: &DatabaseEpoch,
    record: Option<&str>,
    found: Check,
) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("queue every row", error);
    let has_changed_server = state.has_changed_server();
    // This database wrote the records of the index, at another time.
    let keep = matches!(found, Check::IndexAhead(_) | Check::ServerChanged);
    let seen = if let Check::IndexAhead(seen) = found { seen } else { 0 };
    let mut client = postgres.client().await?;
    let transaction = client.transaction().await.map_err(fail)?;
    let row = transaction
        .query_one("SELECT refarch.distrust($1, $2)", &[&generation, &keep])
        .await
        .map_err(fail)?;
    // Higher than the number that was seen: an older record that the index shows later is then not handled
    // again.
    transaction
        .execute(
            "UPDATE refarch.lineage SET name = CASE WHEN $2 THEN gen_random_uuid()::text ELSE name END, \
               mark = greatest(mark, $3) + 1, foreign_note = $4, \
               changed_at = CASE WHEN $6 THEN clock_timestamp() ELSE changed_at END, \
               taken_at = CASE WHEN $5 THEN clock_timestamp() ELSE taken_at END, incarnation = refarch.incarnation() \
             WHERE target = $1",
            &[&generation, &has_changed_server, &seen, &record, &(found == Check::OtherDatabase), &keep],
        )
        .await
        .map_err(fail)?;
    transaction.commit().await.map_err(fail)?;
    let entries: i64 = row.get(0);
    if keep {
        tracing::warn!(
            entries,
            server.before = state.recorded,
            server.now = state.current,
            "the database went back to an earlier state or changed its server (a restore or a failover), and the index may be ahead of it: every row is written anew; a text whose vector is in the index is not embedded again"
        );
    } else {
        tracing::warn!(
            entries,
            "the index belongs to another database, or it is new: every row is written anew"
        );
    }
    Ok(())
}

/// Queues every id and keeps the entries, for vectors that went back together with the database.
async fn requeue_all(postgres: &Postgres, generation: i32, state: &DatabaseEpoch, seen: i64) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("queue every row", error);
    let mut client = postgres.client().await?;
    let transaction = client.transaction().await.map_err(fail)?;
    transaction.execute("SELECT refarch.queue_all($1)", &[&generation]).await.map_err(fail)?;
    transaction
        .execute(
            "UPDATE refarch.lineage SET mark = greatest(mark, $2), changed_at = clock_timestamp(), \
             incarnation = refarch.incarnation() WHERE target = $1",
            &[&generation, &seen],
        )
        .await
        .map_err(fail)?;
    transaction.commit().await.map_err(fail)?;
    tracing::warn!(
        server.before = state.recorded,
        server.now = state.current,
        "the database went back to an earlier state or changed its server (a restore or a failover), and the queue may have lost changes: every row is compared with the index again"
    );
    Ok(())
}

/// What a running worker found out about its index.
#[derive(Debug)]
pub enum Renewal {
    /// The index belongs to this database and has the newest epoch.
    Owned,
    /// Another database took the index over. The error says what to do.
    Lost(Error),
}

/// The epoch that a running worker knows, to notice that the database went back or was replaced.
#[derive(Debug)]
pub struct KnownEpoch {
    name: String,
    epoch: i64,
    /// A heartbeat that the database has lost, until that is handled.
    lost: Option<SystemTime>,
}

impl KnownEpoch {
    /// The epoch after the index has been claimed.
    pub async fn new(postgres: &Postgres, generation: i32) -> Result<Self> {
        let DatabaseEpoch { name, epoch, .. } = read(postgres, generation).await?;
        Ok(Self { name, epoch, lost: None })
    }

    /// The database does not hold a heartbeat that a worker wrote at `lost`. The next renewal handles it.
    pub fn went_back(&mut self, lost: SystemTime) {
        self.lost = Some(lost);
    }

    /// Compares, handles the result, and advances the epoch. May wait for `settle` as [`claim`] does.
    pub async fn renew(
        &mut self,
        postgres: &Postgres,
        generation: i32,
        index: &dyn VectorIndex,
        settle: Duration,
    ) -> Result<Renewal> {
        if let Some(store) = index.ownership_store() {
            let (state, record, found) = read_and_check(postgres, generation, store, self.lost).await?;
            // If the name in the database changed too, the database itself is another one.
            if found == Check::OtherDatabase && state.name == self.name {
                return Ok(Renewal::Lost(shared_namespace(record.as_deref())));
            }
            advance(postgres, generation, store, settle, self.lost).await?;
            *self = Self::new(postgres, generation).await?;
        } else {
            let state = read(postgres, generation).await?;
            if state.has_changed_server()
                || state.epoch < self.epoch
                || state.name != self.name
                || state.went_back(self.lost)
            {
                requeue_all(postgres, generation, &state, self.epoch).await?;
            }
            let (name, epoch) = advance_epoch(postgres, generation).await?;
            *self = Self { name, epoch, lost: None };
        }
        Ok(Renewal::Owned)
    }
}

/// Advances the epoch every `RENEW_EVERY`, and at once when the database `lost` a heartbeat, until `stop`, which also
/// ends the waiting for `settle`. Ends early with an error if another database took the index over.
pub async fn keep(
    postgres: &Postgres,
    generation: i32,
    index: &dyn VectorIndex,
    settle: Duration,
    mut lost: watch::Receiver<Option<SystemTime>>,
    stop: &CancellationToken,
) -> Result<()> {
    let mut known = None;
    let mut unhandled: Option<SystemTime> = None;
    loop {
        let renew = async {
            let Some(known) = &mut known else {
                known = Some(KnownEpoch::new(postgres, generation).await?);
                return Ok(Renewal::Owned);
            };
            if let Some(lost) = unhandled {
                known.went_back(lost);
            }
            let renewed = known.renew(postgres, generation, index, settle).await?;
            unhandled = None;
            Ok::<_, Error>(renewed)
        };
        let Some(renewed) = stop.run_until_cancelled(renew).await else { return Ok(()) };
        match renewed {
            Ok(Renewal::Owned) => {}
            Ok(Renewal::Lost(error)) => return Err(error),
            Err(error) => tracing::debug!(%error, "cannot renew the ownership of the index"),
        }
        let pause = if unhandled.is_some() { AGAIN_AFTER } else { RENEW_EVERY };
        let next = async {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                Ok(()) = lost.changed() => unhandled = *lost.borrow(),
            }
        };
        if stop.run_until_cancelled(next).await.is_none() {
            return Ok(());
        }
    }
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
