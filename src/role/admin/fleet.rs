//! The state of the whole fleet, read from the database when somebody asks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::Mutex;

use super::catalogue::{
    BACKLOG, BACKLOG_SECONDS, CAPTURE_FAULTS, DEAD_LETTERS, DEGRADED, EXPECTED, FLEET_FAULTS, IN_SYNC,
    OLDEST, OUTLIERS, PROOF_AGE, PROOF_DIFFERENCES, PROOF_ON, PROOF_OVERDUE, PROOF_UNREADABLE, RATE, RECALL,
    RECORDS, ROWS, STATE_READABLE, SYNCED, UNSETTLED, WORKER_THREADS, WORKERS_ALIVE,
};
use super::exposition::Samples;
use crate::backend::Backends;
use crate::backend::postgres::status::Status;
use crate::backend::postgres::throughput;
use crate::pipeline::backlog::backlog_seconds;
use crate::pipeline::failure;
use crate::pipeline::fault;
use crate::pipeline::ledger::Ledger as _;

/// Least time that a state is used again, so that scrapers, a collector and `CloudWatch` together cost as much as
/// one scraper.
const MIN_AGE: Duration = Duration::from_secs(10);

/// How long a read may take. A scrape is given up after ten seconds.
const TIMEOUT: Duration = Duration::from_secs(8);

/// Roles whose workers are counted, also when there are none.
const ROLES: [&str; 3] = ["listen", "embed", "serve"];

/// The state of the fleet at one moment.
#[derive(Debug)]
pub(in crate::role) struct Fleet {
    pub(in crate::role) status: Status,
    /// Changes a second.
    pub(in crate::role) rate: Option<f64>,
    /// Age of the oldest change in seconds; 0 if there is none, none if it is not known.
    oldest_s: Option<f64>,
    source: String,
    generation: String,
}

/// The state at one moment, or why it could not be read.
type Read = Result<Arc<Fleet>, Arc<str>>;

/// The last state, and when it was read.
#[derive(Debug, Default)]
pub struct Cache(Mutex<Option<(Instant, Read)>>);

impl Cache {
    /// Adds the state. Those who ask while it is read wait for the same read.
    pub async fn collect(&self, backends: &Backends, samples: &mut Samples) {
        let fleet = self.get(backends).await;
        samples.count(&STATE_READABLE, &[], u64::from(fleet.is_ok()));
        if let Ok(fleet) = fleet {
            fleet.collect(samples);
        }
    }

    pub(super) async fn get(&self, backends: &Backends) -> Read {
        let mut last = self.0.lock().await;
        if let Some((at, fleet)) = &*last
            && at.elapsed() < MIN_AGE
        {
            return fleet.clone();
        }
        let read = tokio::time::timeout(TIMEOUT, Fleet::read(backends)).await;
        let fleet: Read = match read {
            Ok(Ok(fleet)) => Ok(Arc::new(fleet)),
            Ok(Err(error)) => Err(error.to_string().into()),
            Err(_) => Err(format!("no answer within {} s", TIMEOUT.as_secs()).into()),
        };
        if let Err(error) = &fleet {
            tracing::debug!(error = &**error, "cannot read the state of the fleet");
        }
        *last = Some((Instant::now(), fleet.clone()));
        fleet
    }
}

impl Fleet {
    async fn read(backends: &Backends) -> failure::Result<Self> {
        let status = backends.status().await?;
        // In the order in which changes travel, so that one that moves on meanwhile is not missed.
        let pending = backends.ledger.pending().await?;
        let queued = backends.queue.stats.oldest().await?;
        Ok(Self {
            oldest_s: oldest_age(pending.now, pending.oldest, queued),
            rate: throughput::recent(&backends.postgres).await?,
            source: backends.generation.table.name.clone(),
            generation: backends.generation.id.to_string(),
            status,
        })
    }

    fn collect(&self, samples: &mut Samples) {
        let Self { status, rate, oldest_s, source, generation } = self;
        let of_source = &[source.as_str()][..];
        let of_generation = &[source.as_str(), generation.as_str()][..];
        for (lane, backlog) in [("live", status.queue.live), ("bulk", status.queue.bulk)] {
            samples.count(&BACKLOG, &[source, "queue", lane], backlog.visible);
            samples.count(&BACKLOG, &[source, "in_flight", lane], backlog.in_flight);
        }
        samples.count(&BACKLOG, &[source, "outbox", ""], status.pending);
        let seconds = backlog_seconds(status.outstanding(), *rate, *oldest_s);
        samples.number(&BACKLOG_SECONDS, of_source, seconds);
        if let Some(rate) = rate {
            samples.number(&RATE, of_source, *rate);
        }
        if let Some(oldest) = oldest_s {
            samples.number(&OLDEST, of_source, *oldest);
        }
        samples.count(&DEAD_LETTERS, of_source, status.dead_letters);
        samples.count(&ROWS, of_source, status.source_rows);
        samples.count(&IN_SYNC, of_source, status.in_sync);
        samples.count(&SYNCED, of_source, u64::from(status.synced));
        samples.count(&CAPTURE_FAULTS, of_source, status.capture_faults.len() as u64);
        samples.count(&UNSETTLED, of_generation, status.unsettled);
        if let Some(indexed) = status.indexed {
            samples.count(&RECORDS, of_generation, indexed);
        }
        samples.count(&EXPECTED, of_generation, status.expected);
        if let Some(search) = &status.search {
            if let Some(recall) = search.recall {
                samples.number(&RECALL, of_generation, recall.into());
            }
            samples.count(&DEGRADED, of_generation, u64::from(search.is_degraded));
            if let Some(outliers) = search.outliers {
                samples.count(&OUTLIERS, of_generation, outliers.unsigned_abs());
            }
        }
        let proof = &status.proof;
        samples.count(&PROOF_ON, of_generation, u64::from(!proof.off));
        if let Some(age) = proof.age_s {
            samples.number(&PROOF_AGE, of_generation, age as f64);
            samples.number(&PROOF_DIFFERENCES, of_generation, proof.differences as f64);
            samples.number(&PROOF_UNREADABLE, of_generation, proof.unreadable as f64);
        }
        samples.count(&PROOF_OVERDUE, of_generation, u64::from(proof.overdue));
        for role in ROLES {
            let alive = || status.workers.iter().filter(|worker| worker.role == role);
            samples.count(&WORKERS_ALIVE, &[role], alive().count() as u64);
            let threads: i32 = alive().map(|worker| worker.threads).sum();
            samples.number(&WORKER_THREADS, &[role], threads.into());
        }
        for kind in fault::KINDS {
            let workers: i64 =
                status.faults.iter().filter(|fault| fault.kind == kind).map(|fault| fault.workers).sum();
            samples.number(&FLEET_FAULTS, &[kind], workers as f64);
        }
    }
}

/// Age of the oldest change in seconds. A queue that cannot tell answers with the beginning of time.
fn oldest_age(now: Timestamp, pending: Option<Timestamp>, queued: Option<Timestamp>) -> Option<f64> {
    if queued.is_some_and(|at| at <= Timestamp::UNIX_EPOCH) {
        return None;
    }
    let oldest = [pending, queued].into_iter().flatten().min();
    Some(oldest.map_or(0.0, |at| now.duration_since(at).as_secs_f64().max(0.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_is_that_of_the_oldest_change_or_not_known() {
        let at = |second: i64| Timestamp::from_second(1_000_000 + second).unwrap();
        assert_eq!(oldest_age(at(9), None, None), Some(0.0));
        assert_eq!(oldest_age(at(9), Some(at(5)), Some(at(2))), Some(7.0));
        assert_eq!(oldest_age(at(9), Some(at(5)), None), Some(4.0));
        assert_eq!(oldest_age(at(1), Some(at(5)), None), Some(0.0), "a clock that went back");
        assert_eq!(oldest_age(at(9), Some(at(5)), Some(Timestamp::UNIX_EPOCH)), None);
    }
}
