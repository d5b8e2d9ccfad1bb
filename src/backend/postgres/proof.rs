//! The state of the continuous proof in the database: which worker runs it, how far the round is, and the rounds
//! that ended.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::Serialize;
use tokio_postgres::types::Json;

use super::{Postgres, fail};
use crate::pipeline::audit::{Round, RoundStore, SavedProgress};
use crate::pipeline::failure::Result;

/// Rounds that are kept.
const MAX_ROUNDS: i64 = 1_000;

/// A clock that is set back by less is normal.
const CLOCK_SLACK_S: f64 = 60.0;

/// The proof's state of one target, as one worker reads and writes it.
pub struct PgRounds {
    postgres: Postgres,
    generation: i32,
    worker: String,
}

impl PgRounds {
    /// The proof's state of a target, for a worker of that name.
    #[must_use]
    pub fn new(postgres: Postgres, generation: i32, worker: &str) -> Self {
        Self { postgres, generation, worker: worker.into() }
    }
}

fn count(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[async_trait]
impl RoundStore for PgRounds {
    async fn acquire(&self, lease: Duration) -> Result<Option<SavedProgress>> {
        let fail = fail("claim the proof");
        let client = self.postgres.client().await?;
        let row = client
            .query_opt(
                "INSERT INTO refarch.proof AS p (target, worker_id, held_until) \
                 VALUES ($1, $2, clock_timestamp() + make_interval(secs => $3)) \
                 ON CONFLICT (target) DO UPDATE SET worker_id = excluded.worker_id, held_until = excluded.held_until \
                 WHERE p.worker_id IS NULL OR p.worker_id = excluded.worker_id OR p.held_until < clock_timestamp() \
                   OR p.held_until > clock_timestamp() + make_interval(secs => 2 * $3) \
                 RETURNING clock_timestamp(), round",
                &[&self.generation, &self.worker, &lease.as_secs_f64()],
            )
            .await
            .map_err(&fail)?;
        let Some(row) = row else { return Ok(None) };
        // A round that another build stored in another form starts again.
        let round = row.get::<_, Option<Json<serde_json::Value>>>(1).map(|round| round.0);
        let round = round.and_then(|round| serde_json::from_value(round).ok());
        let last = client
            .query_opt(
                "SELECT began_at, rows + records + entries FROM refarch.proof_round \
                 WHERE target = $1 ORDER BY round_id DESC LIMIT 1",
                &[&self.generation],
            )
            .await
            .map_err(&fail)?;
        let last = last.map(|row| (row.get(0), row.get::<_, i64>(1).max(0).cast_unsigned()));
        Ok(Some(SavedProgress { now: row.get(0), round, last }))
    }

    async fn release(&self) -> Result<()> {
        let client = self.postgres.client().await?;
        client
            .execute(
                "UPDATE refarch.proof SET worker_id = NULL WHERE target = $1 AND worker_id = $2",
                &[&self.generation, &self.worker],
            )
            .await
            .map(drop)
            .map_err(fail("release the proof"))
    }

    async fn save(&self, round: &Round) -> Result<bool> {
        let client = self.postgres.client().await?;
        let saved = client
            .execute(
                "UPDATE refarch.proof SET round = $3 WHERE target = $1 AND worker_id = $2",
                &[&self.generation, &self.worker, &Json(round)],
            )
            .await
            .map_err(fail("save the progress of the proof"))?;
        Ok(saved == 1)
    }

    async fn end(&self, round: &Round) -> Result<bool> {
        let fail = fail("record the end of a round of the proof");
        let client = self.postgres.client().await?;
        let kind = if round.full { "full" } else { "sample" };
        let counts = [round.rows, round.records, round.entries, round.differences, round.mended];
        let [rows, records, entries, differences, mended] = counts.map(count);
        let ended = client
            .execute(
                "WITH ended AS (UPDATE refarch.proof SET round = NULL WHERE target = $1 AND worker_id = $2 RETURNING target) \
                 INSERT INTO refarch.proof_round \
                   (target, index_check, began_at, rows, records, entries, differences, mended, unreadable) \
                 SELECT target, $3, $4, $5, $6, $7, $8, $9, $10 FROM ended",
                &[
                    &self.generation,
                    &self.worker,
                    &kind,
                    &round.began_at,
                    &rows,
                    &records,
                    &entries,
                    &differences,
                    &mended,
                    &count(round.unreadable),
                ],
            )
            .await
            .map_err(&fail)?;
        client
            .execute(
                "DELETE FROM refarch.proof_round WHERE target = $1 AND round_id <= ( \
                   SELECT round_id FROM refarch.proof_round WHERE target = $1 ORDER BY round_id DESC OFFSET $2 LIMIT 1)",
                &[&self.generation, &MAX_ROUNDS],
            )
            .await
            .map_err(&fail)?;
        Ok(ended == 1)
    }

    async fn record_listed(&self, ids: &[String]) -> Result<()> {
        let client = self.postgres.client().await?;
        client
            .execute(
                "INSERT INTO refarch.listed (target, id_hash) \
                 SELECT DISTINCT $1::integer, hashtextextended(k, 0) FROM unnest($2::text[]) k ON CONFLICT DO NOTHING",
                &[&self.generation, &storable(ids)],
            )
            .await
            .map(drop)
            .map_err(fail("record the ids that the index listed"))
    }

    async fn listed(&self, ids: &[String]) -> Result<HashSet<String>> {
        let client = self.postgres.client().await?;
        let rows = client
            .query(
                "SELECT k FROM unnest($2::text[]) k JOIN refarch.listed l ON l.target = $1 AND l.id_hash = hashtextextended(k, 0)",
                &[&self.generation, &storable(ids)],
            )
            .await
            .map_err(fail("read the ids that the index listed"))?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    async fn forget_listed(&self) -> Result<()> {
        let client = self.postgres.client().await?;
        client
            .execute("DELETE FROM refarch.listed WHERE target = $1", &[&self.generation])
            .await
            .map(drop)
            .map_err(fail("delete the ids that the index listed"))
    }
}

/// Text in PostgreSQL cannot hold a NUL, so no row has such an id.
fn storable(ids: &[String]) -> Vec<&String> {
    ids.iter().filter(|id| !id.contains('\0')).collect()
}

/// The state of the proof.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Proof {
    /// Whether the proof is off (`audit.period_h = 0`).
    pub off: bool,
    /// When the last round ended. The counts are of that round.
    pub ended_at: Option<Timestamp>,
    /// Seconds since then.
    pub age_s: Option<i64>,
    /// How the index was compared: `full` or `sample`.
    pub index_check: Option<String>,
    /// Rows that were compared.
    pub rows: i64,
    /// Records that the index held.
    pub records: i64,
    /// Ids that differed.
    pub differences: i64,
    /// Ids that were queued again.
    pub mended: i64,
    /// Rows that could not be read.
    pub unreadable: i64,
    /// Whether no round has ended for two periods.
    pub overdue: bool,
    /// The round under way.
    pub running: Option<RunningProof>,
}

/// A round under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RunningProof {
    /// When it began.
    pub began_at: Timestamp,
    /// Rows that were compared so far.
    pub rows: u64,
}

impl Proof {
    /// Reads the state of a target's proof. A round takes `period`; `None`: the proof is off.
    pub async fn read(postgres: &Postgres, generation: i32, period: Option<Duration>) -> Result<Self> {
        let client = postgres.client().await?;
        let row = client
            .query_opt(
                "SELECT clock_timestamp(), t.created_at, p.round, r.ended_at, r.index_check, r.rows, r.records, \
                        r.differences, r.mended, r.unreadable \
                 FROM refarch.target t LEFT JOIN refarch.proof p ON p.target = t.id LEFT JOIN LATERAL ( \
                   SELECT * FROM refarch.proof_round r WHERE r.target = t.id ORDER BY r.round_id DESC LIMIT 1) r ON true \
                 WHERE t.id = $1",
                &[&generation],
            )
            .await;
        let row = match row.map_err(fail("read the state of the proof")) {
            Ok(Some(row)) => row,
            Ok(None) => return Ok(Self::default()),
            Err(error) => return Err(error),
        };
        let now: Timestamp = row.get(0);
        let ended_at: Option<Timestamp> = row.get(3);
        let since = now.duration_since(ended_at.unwrap_or_else(|| row.get(1)));
        // An end in the future comes of a wrong clock: the age of the proof is unknown.
        let is_ahead = since.as_secs_f64() < -CLOCK_SLACK_S;
        let overdue =
            period.is_some_and(|period| is_ahead || since.as_secs_f64() > 2.0 * period.as_secs_f64());
        let round = row.get::<_, Option<Json<serde_json::Value>>>(2).map(|round| round.0);
        let round: Option<Round> = round.and_then(|round| serde_json::from_value(round).ok());
        let number = |at| row.get::<_, Option<i64>>(at).unwrap_or_default();
        Ok(Self {
            off: period.is_none(),
            ended_at,
            age_s: ended_at.map(|_| since.as_secs().max(0)),
            index_check: row.get(4),
            rows: number(5),
            records: number(6),
            differences: number(7),
            mended: number(8),
            unreadable: number(9),
            overdue,
            running: round.map(|round| RunningProof { began_at: round.began_at, rows: round.rows }),
        })
    }

    /// The proof in a few words.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = match self.age_s {
            None if self.off => return "the proof is off".into(),
            None => "not proved yet".into(),
            Some(age) => {
                let plural = if self.differences == 1 { "" } else { "s" };
                format!("proved {} ago: {} difference{plural}", span(age), self.differences)
            }
        };
        if self.differences > 0 {
            // Writing to a string can't fail.
            let _ = write!(text, ", {} queued again", self.mended);
        }
        if self.unreadable > 0 {
            let _ = write!(text, ", {} not readable", self.unreadable);
        }
        if self.overdue {
            text += ", overdue";
        }
        text
    }
}

/// A time in its largest unit.
fn span(seconds: i64) -> String {
    match seconds {
        ..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_is_told_in_a_few_words() {
        assert_eq!(Proof::default().describe(), "not proved yet");
        assert_eq!(Proof { off: true, ..Proof::default() }.describe(), "the proof is off");
        let proved = |age_s| Proof { age_s: Some(age_s), ..Proof::default() };
        assert_eq!(proved(3 * 3_600 + 5).describe(), "proved 3 h ago: 0 differences");
        assert_eq!(proved(119).describe(), "proved 119 s ago: 0 differences");
        assert_eq!(proved(5 * 86_400).describe(), "proved 5 days ago: 0 differences");
        let bad = Proof { differences: 1, mended: 1, unreadable: 2, overdue: true, ..proved(600) };
        assert_eq!(
            bad.describe(),
            "proved 10 min ago: 1 difference, 1 queued again, 2 not readable, overdue"
        );
    }
}
