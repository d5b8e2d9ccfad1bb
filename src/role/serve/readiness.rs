//! Readiness: whether requests can be answered. One check serves all clients that ask.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use super::caller_trust;
use super::sync_status::{Health, SyncStatus};
use crate::backend::postgres::capture::NewPart;
use crate::backend::postgres::products::Products;
use crate::pipeline::failure::{Class, Error, Result};
use crate::pipeline::index::VectorIndex;

/// How long readiness waits for a backend.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Least time that a result is reused, so that many requests cause few checks.
const MIN_AGE: Duration = Duration::from_secs(1);

/// A result is reused for this many times as long as its check took.
const AGE_FOR_COST: u32 = 5;

/// Why requests cannot be answered correctly.
#[derive(Clone, Debug)]
pub struct Reason {
    /// The part at fault, for machines.
    pub kind: &'static str,
    /// The reason in words that any client may read.
    general: &'static str,
    /// The reason in detail, for clients that may see everything.
    detail: Option<String>,
}

impl Reason {
    fn new(kind: &'static str, general: &'static str) -> Self {
        Self { kind, general, detail: None }
    }

    fn failed(kind: &'static str, general: &'static str, error: &Error) -> Self {
        Self { kind, general, detail: Some(error.to_string()) }
    }

    /// The reason in detail, if there is one.
    pub(super) fn in_full(&self) -> &str {
        self.detail.as_deref().unwrap_or(self.general)
    }

    /// The reason, as this request's client may read it.
    pub fn shown(&self) -> String {
        match &self.detail {
            Some(detail) if caller_trust::is_trusted() => format!("{}: {detail}", self.kind),
            _ => format!("{}: {}", self.kind, self.general),
        }
    }
}

/// What a check asks.
#[derive(Clone, Copy)]
pub struct Parts<'a> {
    /// The table.
    pub products: &'a Products,
    /// The index that is searched.
    pub index: &'a dyn VectorIndex,
    /// A query vector of the index's length.
    pub zero: &'a [f32],
    /// The state of the sync.
    pub sync_status: &'a dyn SyncStatus,
}

/// The result of one check.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    /// Why requests cannot be answered correctly; empty if they can.
    pub reasons: Vec<Reason>,
    /// What a worker is about to do, and is no reason as long as it does not last.
    pub notes: Vec<Reason>,
    /// The state of the continuous proof, in words.
    pub proof: String,
}

/// New parts of the table, as the checks found them.
///
/// A part counts as new since the last check that did not find it, because it may have come right after that
/// check. The first check of a process excuses no part.
#[derive(Debug, Default)]
struct NewParts {
    checked_at: Option<Instant>,
    /// By table: the last check without it.
    since: HashMap<String, Option<Instant>>,
}

impl NewParts {
    /// Divides the parts that a check found: those that are new for longer than `timeout`, and the others.
    fn divide(
        &mut self,
        found: Vec<NewPart>,
        timeout: Duration,
        now: Instant,
    ) -> (Vec<NewPart>, Vec<NewPart>) {
        self.since.retain(|table, _| found.iter().any(|part| part.table == *table));
        for part in &found {
            self.since.entry(part.table.clone()).or_insert(self.checked_at);
        }
        self.checked_at = Some(now);
        found.into_iter().partition(|part| {
            let since = self.since.get(&part.table).copied().flatten();
            since.is_none_or(|since| now.saturating_duration_since(since) > timeout)
        })
    }
}

/// The last result, and until when it is reused.
#[derive(Default)]
struct State {
    last: Option<(Instant, Readiness)>,
    new_parts: NewParts,
}

/// The last result. One check at a time makes a new one.
#[derive(Default)]
pub struct Cache(Mutex<State>);

impl Cache {
    /// The last result, or that of a new check. Requests that arrive during a check wait for its result.
    pub async fn get(&self, parts: Parts<'_>) -> Readiness {
        let mut state = self.0.lock().await;
        if let Some((until, found)) = &state.last
            && Instant::now() < *until
        {
            return found.clone();
        }
        let started = Instant::now();
        let found = check_readiness(parts, &mut state.new_parts).await;
        let age = (started.elapsed() * AGE_FOR_COST).max(MIN_AGE);
        state.last = Some((Instant::now() + age, found.clone()));
        found
    }
}

async fn check_readiness(parts: Parts<'_>, new_parts: &mut NewParts) -> Readiness {
    let (table, index, target, health) = tokio::join!(
        in_time(parts.products.check()),
        in_time(parts.index.query(parts.zero, 1)),
        in_time(parts.sync_status.check_generation()),
        in_time(parts.sync_status.health()),
    );
    let mut reasons = Vec::new();
    match table {
        Some(Ok(())) => {}
        None => reasons.push(Reason::new("database", "it does not answer")),
        Some(Err(error)) if error.class() == Class::Retryable => {
            reasons.push(Reason::failed("database", "it does not answer", &error));
        }
        Some(Err(error)) => {
            reasons.push(Reason::failed("database", "the table cannot be read", &error));
        }
    }
    match index {
        Some(Ok(_)) => {}
        None => reasons.push(Reason::new("index", "it does not answer")),
        Some(Err(error)) => reasons.push(Reason::failed("index", "it does not answer", &error)),
    }
    // The reason `database` already covers a database that does not answer.
    if let Some(Err(error)) = target
        && error.class() != Class::Retryable
    {
        reasons.push(Reason::failed("schema", "it is missing, or was migrated to another index", &error));
    }
    let capture = |general, detail| Reason { kind: "capture", general, detail };
    let health = match health {
        Some(Ok(health)) => health,
        // The reason `database` says more.
        _ if reasons.iter().any(|reason| reason.kind == "database") => {
            return Readiness { reasons, ..Readiness::default() };
        }
        unknown => {
            let detail = unknown.and_then(Result::err).map(|error| error.to_string());
            reasons.push(capture("whether changes are captured cannot be checked", detail));
            return Readiness { reasons, ..Readiness::default() };
        }
    };
    let Health { faults, new_parts: found, new_part_timeout, proof } = health;
    let (lasting, new) = new_parts.divide(found, new_part_timeout, Instant::now());
    let lasting = lasting.into_iter().map(|part| format!("not captured: {}", part.fault));
    let uncaptured = "not every change to the table is captured";
    reasons.extend(faults.into_iter().chain(lasting).map(|fault| capture(uncaptured, Some(fault))));
    let uncaptured = "a new part of the table is not captured yet";
    let notes = new.into_iter().map(|part| capture(uncaptured, Some(part.fault))).collect();
    Readiness { reasons, notes, proof }
}

/// The result, if it arrives within [`TIMEOUT`].
async fn in_time<T>(work: impl Future<Output = Result<T>>) -> Option<Result<T>> {
    tokio::time::timeout(TIMEOUT, work).await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_part_counts_from_the_last_check_without_it() {
        let mut parts = NewParts::default();
        let start = Instant::now();
        // Tables that last, and tables that are new, by checks of these tables after so many seconds.
        let mut check = |after: u64, tables: &[&str]| {
            let found = tables.iter().map(|table| NewPart { table: (*table).into(), fault: String::new() });
            let now = start + Duration::from_secs(after);
            let (lasting, new) = parts.divide(found.collect(), Duration::from_secs(70), now);
            let names = |parts: Vec<NewPart>| parts.into_iter().map(|part| part.table).collect::<Vec<_>>();
            (names(lasting).join(","), names(new).join(","))
        };
        let told = |lasting: &str, new: &str| (lasting.to_owned(), new.to_owned());
        assert_eq!(check(0, &["a"]), told("a", ""), "nobody knows since when");
        assert_eq!(check(10, &[]), told("", ""));
        assert_eq!(check(20, &["a", "b"]), told("", "a,b"));
        assert_eq!(check(80, &["a", "b", "c"]), told("", "a,b,c"));
        assert_eq!(check(81, &["b", "c"]), told("b", "c"));
        assert_eq!(check(90, &["a"]), told("", "a"), "it was captured meanwhile");
        assert_eq!(check(5000, &["a", "d"]), told("a,d", ""), "nobody checked for long");
    }
}
