//! Readiness: whether requests can be answered. One check serves all clients that ask.

use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use super::caller_trust;
use super::sync_status::SyncStatus;
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
    /// The state of the continuous proof, in words.
    pub proof: String,
}

/// The last result, and until when it is reused.
#[derive(Default)]
pub struct Cache(Mutex<Option<(Instant, Readiness)>>);

impl Cache {
    /// The last result, or that of a new check. Requests that arrive during a check wait for its result.
    pub async fn get(&self, parts: Parts<'_>) -> Readiness {
        let mut last = self.0.lock().await;
        if let Some((until, found)) = &*last
            && Instant::now() < *until
        {
            return found.clone();
        }
        let started = Instant::now();
        let found = check_readiness(parts).await;
        let age = (started.elapsed() * AGE_FOR_COST).max(MIN_AGE);
        *last = Some((Instant::now() + age, found.clone()));
        found
    }
}

async fn check_readiness(parts: Parts<'_>) -> Readiness {
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
    let (faults, proof) = health.and_then(Result::ok).unwrap_or_default();
    reasons.extend(faults.into_iter().map(|fault| Reason {
        kind: "capture",
        general: "not every change to the table is captured",
        detail: Some(fault),
    }));
    Readiness { reasons, proof }
}

/// The result, if it arrives within [`TIMEOUT`].
async fn in_time<T>(work: impl Future<Output = Result<T>>) -> Option<Result<T>> {
    tokio::time::timeout(TIMEOUT, work).await.ok()
}
