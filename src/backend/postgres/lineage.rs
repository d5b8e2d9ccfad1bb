//! Which database, and which state of it, an index outside of it belongs to.
//!
//! A restore to an earlier point leaves the index ahead of the ledger: rows that the ledger calls
//! settled may be anything there. So the database has a name and a mark that grows, and the index
//! keeps a note of both, written after the database committed them. When a worker starts, and at each mark
//! after that, the note is compared:
//!
//! - *another name*: the index was written to by another database. A worker that starts takes it over: no
//!   entry of the ledger is trusted, and every text is embedded. A worker that was running ends: two databases
//!   that write to one namespace would do the other's work over for ever;
//! - *no note*, though something was written: the index was made anew. Likewise;
//! - *a higher mark*: this database went back (a restore, or a failover to a replica that was behind). Every
//!   row is sent again; a record that carries the row's content hash lends its vector;
//! - *the same note, on another server or timeline* (see `refarch.incarnation`): a failover or a restore that
//!   may have lost what came after the last mark. The rows and the ledger went back together, so nothing in
//!   them tells which records are ahead. Every row is sent again in the same way, which costs
//!   requests and no embedding. The database gets a new name, so that the server that it came from, if that
//!   still runs, is told apart.
//!
//! In none of these is a record found whose id this database never knew: the proof and `verify`, which list
//! the index, find it.
//!
//! pgvector keeps no note: its vectors are restored with rows and ledger, and agree with them. But a queue outside
//! of the database is not restored: it may have delivered, and forgotten, what the restored outbox does not hold any
//! more. So a mark is made there too, and where the database went back (another server or timeline, or a mark lower
//! than one that this process made) every id is queued; what agrees costs a look.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{Postgres, failure};
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::index::{Notes, VectorIndex};

/// How often a mark is made, and the note compared.
const MARK_EVERY: Duration = Duration::from_mins(1);

/// After this database changed its name, how long one of its workers may still write a note with the old one.
const SHOWN_AGAIN_FOR: &str = "2 minutes";

/// An index is not taken over twice within this time: whoever had it before is alive.
const TAKEN_FOR: &str = "10 minutes";

/// A note that is missing is looked for so often, a second apart, before that is believed: an index may show what
/// was written some time later.
const LOOKS_FOR_MISSING: u32 = 4;

/// How an index and the database stand to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The index is this database's.
    Ours,
    /// The index holds no note, and nothing was written to it as far as the ledger knows.
    New,
    /// The index belongs to another database, or to a later state of this one, or was made anew.
    Foreign,
}

/// The same, with what to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Ours,
    New,
    /// The note is ours, and the database is on another server or timeline.
    Moved,
    /// The note is ours, and has a mark that the database does not have.
    Ahead(i64),
    /// The note has another name.
    Another,
    /// There is no note where one must be.
    Missing,
}

/// What the database knows.
#[derive(Clone, Debug, Default)]
struct State {
    name: String,
    mark: i64,
    /// Whether the index was ever written to as far as the ledger knows.
    written: bool,
    foreign_note: Option<String>,
    /// Whether this database changed its name just now.
    changed_now: bool,
    /// Whether an index of another database was taken over lately.
    taken_lately: bool,
    /// Server and timeline at the last mark, and now.
    recorded: Option<String>,
    current: String,
}

impl State {
    /// Whether server or timeline are others than at the last mark. A part that is not known says nothing.
    fn has_moved(&self) -> bool {
        let parts = |text: &str| {
            text.split_once('/').map(|(system, timeline)| [system.to_owned(), timeline.to_owned()])
        };
        let (Some(then), Some(now)) = (self.recorded.as_deref().and_then(parts), parts(&self.current)) else {
            return false;
        };
        then.iter().zip(&now).any(|(then, now)| !then.is_empty() && !now.is_empty() && then != now)
    }

    /// Whether a note of another name is one that was dealt with.
    fn knows(&self, note: &str) -> bool {
        let Some(known) = self.foreign_note.as_deref() else { return false };
        let name = |note: &str| note.rsplit_once('/').map(|(name, _)| name.to_owned());
        known == note || (self.changed_now && name(known).is_some() && name(known) == name(note))
    }

    fn stand(&self, note: Option<&str>) -> Found {
        let Some(note) = note else {
            // A mark alone says nothing: the note that goes with it may have failed.
            return if self.written { Found::Missing } else { Found::New };
        };
        let parsed = note.rsplit_once('/').and_then(|(name, mark)| Some((name, mark.parse::<i64>().ok()?)));
        match parsed {
            Some((name, seen)) if name == self.name && seen > self.mark => Found::Ahead(seen),
            Some((name, _)) if name != self.name && !self.knows(note) => Found::Another,
            None if !self.knows(note) => Found::Another,
            _ if self.has_moved() => Found::Moved,
            _ => Found::Ours,
        }
    }
}

async fn read(postgres: &Postgres, target: i32) -> Result<State> {
    let client = postgres.client().await?;
    let sql = format!(
        "INSERT INTO refarch.lineage AS l (target) VALUES ($1) ON CONFLICT (target) DO UPDATE SET mark = l.mark \
         RETURNING name, mark, EXISTS (SELECT FROM refarch.ledger e WHERE e.target = $1 AND e.epoch > 0), \
           foreign_note, coalesce(changed_at > clock_timestamp() - interval '{SHOWN_AGAIN_FOR}', false), \
           coalesce(taken_at > clock_timestamp() - interval '{TAKEN_FOR}', false), incarnation, refarch.incarnation()"
    );
    let row = client.query_one(&sql, &[&target]).await.map_err(|error| failure("read the lineage", error))?;
    Ok(State {
        name: row.get(0),
        mark: row.get(1),
        written: row.get(2),
        foreign_note: row.get(3),
        changed_now: row.get(4),
        taken_lately: row.get(5),
        recorded: row.get(6),
        current: row.get(7),
    })
}

/// Reads the note and compares it.
async fn look(postgres: &Postgres, target: i32, notes: &dyn Notes) -> Result<(State, Option<String>, Found)> {
    let before = read(postgres, target).await?;
    let note = notes.note().await?;
    // A worker may make a mark meanwhile. The note that was read is not ahead of what is read after
    // it, and one that was missing is missed only if something was written before.
    let state = match note {
        Some(_) => State { written: before.written, ..read(postgres, target).await? },
        None => before,
    };
    let found = state.stand(note.as_deref());
    Ok((state, note, found))
}

/// Compares the index's note with the database.
pub async fn compare(postgres: &Postgres, target: i32, index: &dyn VectorIndex) -> Result<Standing> {
    let Some(notes) = index.notes() else { return Ok(Standing::Ours) };
    Ok(match look(postgres, target, notes).await?.2 {
        // What is ahead of the ledger then is for whoever compares records to find.
        Found::Ours | Found::Moved => Standing::Ours,
        Found::New => Standing::New,
        Found::Ahead(_) | Found::Another | Found::Missing => Standing::Foreign,
    })
}

/// Whether an index holds a note of the source's database, so that it is the index that was written to,
/// whatever its address is now.
pub async fn is_known(postgres: &Postgres, source: &str, index: &dyn VectorIndex) -> Result<bool> {
    let Some(notes) = index.notes() else { return Ok(false) };
    let client = postgres.client().await?;
    let sql = "SELECT l.name FROM refarch.lineage l JOIN refarch.target t ON t.id = l.target \
               WHERE t.source = $1 AND t.state = 'active'";
    let row = client.query_opt(sql, &[&source]).await.map_err(|error| failure("read the lineage", error))?;
    let Some(name) = row.map(|row| row.get::<_, String>(0)) else { return Ok(false) };
    let note = notes.note().await?;
    Ok(note.is_some_and(|note| note.rsplit_once('/').is_some_and(|(noted, _)| noted == name)))
}

/// Makes a mark in the database; returns it with the name.
async fn grow(postgres: &Postgres, target: i32) -> Result<(String, i64)> {
    let client = postgres.client().await?;
    let row = client
        .query_one(
            "INSERT INTO refarch.lineage AS l (target, mark, incarnation) VALUES ($1, 1, refarch.incarnation()) \
             ON CONFLICT (target) DO UPDATE SET mark = l.mark + 1, incarnation = coalesce(l.incarnation, excluded.incarnation) \
             RETURNING name, mark",
            &[&target],
        )
        .await
        .map_err(|error| failure("mark the lineage", error))?;
    Ok((row.get(0), row.get(1)))
}

/// Makes a mark, first in the database and then in the index, if the index is still this database's; takes the
/// index over if it is not.
pub async fn mark(postgres: &Postgres, target: i32, notes: &dyn Notes) -> Result<()> {
    match look(postgres, target, notes).await?.2 {
        Found::Ours | Found::New => note(postgres, target, notes).await,
        // Others of the fleet may have seen it too: one of them deals with it.
        _ => take_over(postgres, target, notes).await,
    }
}

async fn note(postgres: &Postgres, target: i32, notes: &dyn Notes) -> Result<()> {
    let (name, mark) = grow(postgres, target).await?;
    notes.set_note(&format!("{name}/{mark}")).await
}

/// Sees to it that the index is this database's, before anything is written to it.
pub async fn claim(postgres: &Postgres, target: i32, index: &dyn VectorIndex) -> Result<()> {
    if let Some(notes) = index.notes() {
        return take_over(postgres, target, notes).await;
    }
    let state = read(postgres, target).await?;
    if state.has_moved() {
        queue_all(postgres, target, &state, 0).await?;
    }
    grow(postgres, target).await.map(drop)
}

async fn take_over(postgres: &Postgres, target: i32, notes: &dyn Notes) -> Result<()> {
    // A session of its own: the lock goes with it, however this ends.
    let fail = |error: tokio_postgres::Error| failure("claim the index", error);
    let (session, connection) = postgres.dedicated().await.map_err(fail)?;
    let connection = tokio::spawn(connection);
    session
        .execute("SELECT pg_advisory_lock(hashtext('refarch.lineage'), $1)", &[&target])
        .await
        .map_err(fail)?;
    let (mut state, mut seen, mut found) = look(postgres, target, notes).await?;
    for _ in 1..LOOKS_FOR_MISSING {
        if found == Found::Missing {
            tokio::time::sleep(Duration::from_secs(1)).await;
            (state, seen, found) = look(postgres, target, notes).await?;
        }
    }
    match found {
        Found::Ours | Found::New => {}
        Found::Another if state.taken_lately => return Err(shared(seen.as_deref())),
        found => distrust(postgres, target, &state, seen.as_deref(), found).await?,
    }
    note(postgres, target, notes).await?;
    drop(session);
    connection
        .await
        .map_err(|error| Error::caused(FailureKind::ConnectionLost, "claim the index", error))?
        .map_err(fail)
}

fn shared(note: Option<&str>) -> Error {
    let message = format!(
        "another database writes to this namespace too, and left the note {:?} there: give each database a namespace \
         of its own (index.namespace), or stop the other's workers and start this one again in {TAKEN_FOR}",
        note.unwrap_or_default()
    );
    Error::new(FailureKind::WrongSetting, "claim the index", message)
}

/// Queues every row and every entry of the ledger as not to be trusted, and remembers why, in one transaction.
async fn distrust(
    postgres: &Postgres,
    target: i32,
    state: &State,
    note: Option<&str>,
    found: Found,
) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("queue every row", error);
    let has_moved = state.has_moved();
    // The index's records are this database's own, if of another time.
    let keep = matches!(found, Found::Ahead(_) | Found::Moved);
    let seen = if let Found::Ahead(seen) = found { seen } else { 0 };
    let mut client = postgres.client().await?;
    let transaction = client.transaction().await.map_err(fail)?;
    let row =
        transaction.query_one("SELECT refarch.distrust($1, $2)", &[&target, &keep]).await.map_err(fail)?;
    // Beyond the mark that was seen: a note of before is then no news, however late the index shows it.
    transaction
        .execute(
            "UPDATE refarch.lineage SET name = CASE WHEN $2 THEN gen_random_uuid()::text ELSE name END, \
               mark = greatest(mark, $3) + 1, foreign_note = $4, \
               changed_at = CASE WHEN $2 THEN clock_timestamp() ELSE changed_at END, \
               taken_at = CASE WHEN $5 THEN clock_timestamp() ELSE taken_at END, incarnation = refarch.incarnation() \
             WHERE target = $1",
            &[&target, &has_moved, &seen, &note, &(found == Found::Another)],
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
            "this database went back or changed its server, as after a restore or a failover, and the index may be ahead of it: every row is written anew; no text is embedded whose vector the index holds"
        );
    } else {
        tracing::warn!(
            entries,
            "the index belongs to another database or was made anew: every row is written anew"
        );
    }
    Ok(())
}

/// Queues every id without distrusting anything, for vectors that went back with the database.
async fn queue_all(postgres: &Postgres, target: i32, state: &State, seen: i64) -> Result<()> {
    let fail = |error: tokio_postgres::Error| failure("queue every row", error);
    let mut client = postgres.client().await?;
    let transaction = client.transaction().await.map_err(fail)?;
    transaction.execute("SELECT refarch.queue_all($1)", &[&target]).await.map_err(fail)?;
    transaction
        .execute(
            "UPDATE refarch.lineage SET mark = greatest(mark, $2), incarnation = refarch.incarnation() WHERE target = $1",
            &[&target, &seen],
        )
        .await
        .map_err(fail)?;
    transaction.commit().await.map_err(fail)?;
    tracing::warn!(
        server.before = state.recorded,
        server.now = state.current,
        "this database went back or changed its server, as after a restore or a failover: every row is looked at again, for the queue may have forgotten changes"
    );
    Ok(())
}

/// How a running worker's index stands.
#[derive(Debug)]
pub enum Renewed {
    /// It is this database's, and has the newest mark.
    Ours,
    /// Another database took it over; the error says what to do.
    Taken(Error),
}

/// What a running worker knows of the database, to notice that it is another now.
#[derive(Debug)]
pub struct Known {
    name: String,
    mark: i64,
}

impl Known {
    /// What is known when the index has been claimed.
    pub async fn new(postgres: &Postgres, target: i32) -> Result<Self> {
        let State { name, mark, .. } = read(postgres, target).await?;
        Ok(Self { name, mark })
    }

    /// Compares, deals with what is found, and makes a mark.
    pub async fn renew(
        &mut self,
        postgres: &Postgres,
        target: i32,
        index: &dyn VectorIndex,
    ) -> Result<Renewed> {
        if let Some(notes) = index.notes() {
            let (state, note, found) = look(postgres, target, notes).await?;
            // With another name of its own the database itself is another one.
            if found == Found::Another && state.name == self.name {
                return Ok(Renewed::Taken(shared(note.as_deref())));
            }
            mark(postgres, target, notes).await?;
            *self = Self::new(postgres, target).await?;
        } else {
            let state = read(postgres, target).await?;
            if state.has_moved() || state.mark < self.mark || state.name != self.name {
                queue_all(postgres, target, &state, self.mark).await?;
            }
            let (name, mark) = grow(postgres, target).await?;
            *self = Self { name, mark };
        }
        Ok(Renewed::Ours)
    }
}

/// Makes a mark every now and then, until `stop`; ends early if the index is another database's now.
pub async fn keep(
    postgres: &Postgres,
    target: i32,
    index: &dyn VectorIndex,
    stop: &CancellationToken,
) -> Result<()> {
    let mut known = None;
    loop {
        let renewed = match &mut known {
            None => Known::new(postgres, target).await.map(|new| {
                known = Some(new);
                Renewed::Ours
            }),
            Some(known) => known.renew(postgres, target, index).await,
        };
        match renewed {
            Ok(Renewed::Ours) => {}
            Ok(Renewed::Taken(error)) => return Err(error),
            Err(error) => tracing::debug!(%error, "cannot mark the lineage"),
        }
        if stop.run_until_cancelled(tokio::time::sleep(MARK_EVERY)).await.is_none() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(mark: i64, written: bool) -> State {
        State { name: "a".into(), mark, written, current: "7/00000001".into(), ..State::default() }
    }

    #[test]
    fn an_index_that_is_ahead_or_not_ours_is_told_apart() {
        assert_eq!(state(0, false).stand(None), Found::New);
        assert_eq!(state(3, false).stand(None), Found::New);
        assert_eq!(state(3, true).stand(None), Found::Missing);
        assert_eq!(state(3, true).stand(Some("a/3")), Found::Ours);
        assert_eq!(state(3, true).stand(Some("a/2")), Found::Ours);
        assert_eq!(state(3, true).stand(Some("a/4")), Found::Ahead(4));
        assert_eq!(state(3, true).stand(Some("b/3")), Found::Another);
        assert_eq!(state(3, true).stand(Some("nonsense")), Found::Another);
    }

    #[test]
    fn another_server_or_timeline_is_noticed_as_far_as_it_is_known() {
        let on = |recorded: &str, current: &str| State {
            recorded: Some(recorded.into()),
            current: current.into(),
            ..state(3, true)
        };
        for (then, now, found) in [
            ("7/00000001", "7/00000001", Found::Ours),
            ("7/00000001", "7/00000002", Found::Moved),
            ("7/00000001", "8/00000001", Found::Moved),
            ("/00000001", "8/00000001", Found::Ours),
            ("7/00000001", "/", Found::Ours),
        ] {
            assert_eq!(on(then, now).stand(Some("a/3")), found, "{then} {now}");
        }
        assert_eq!(on("7/1", "7/2").stand(Some("a/4")), Found::Ahead(4), "the graver one");
    }

    #[test]
    fn a_note_that_was_dealt_with_is_no_news() {
        let dealt = State { foreign_note: Some("b/5".into()), ..state(3, true) };
        assert_eq!(dealt.stand(Some("b/5")), Found::Ours);
        assert_eq!(dealt.stand(Some("b/6")), Found::Another);
        // A worker of the time before may have been about to write it.
        let just_now = State { changed_now: true, ..dealt };
        assert_eq!(just_now.stand(Some("b/6")), Found::Ours);
        assert_eq!(just_now.stand(Some("c/6")), Found::Another);
    }
}
