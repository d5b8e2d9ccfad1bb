//! What is watched of a process: the counts of its parts, its workers, its pools, and what it knows of the fleet.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use deadpool_postgres::Pool;
use tokio_util::sync::CancellationToken;

use super::catalogue::{
    APPLIED, AVOIDED, BATCHES, BUILD_INFO, CAPTURE_LAG, CLAIMS, CONFLICTS, DEAD_LETTERED, EMBEDDED, EMBEDDER,
    EMBEDDER_TEXTS, FAULT, FRESHNESS, GENERATED, HEARTBEAT_AGE, HEARTBEAT_FAILURES, IN_FLIGHT, INDEX, LEASE,
    PANICS, POOL, POOL_MAX, POOL_WAITING, QUEUED, READY, RECEIVED, RETRIES, SCALED, TOKENS, WORKER_INFO,
    WORKERS_DESIRED, WORKERS_READY,
};
use super::exposition::Samples;
use super::fleet::Fleet;
use super::page_metrics::PageMetrics;
use super::{fleet, process};
use crate::backend::Backends;
use crate::backend::postgres::worker_registry::{Heartbeat, WORKER_GONE_S, WorkerRegistration};
use crate::pipeline::fault::{self, FaultBoard};
use crate::pipeline::lease::Lease;
use crate::pipeline::metrics::{Counter, Metrics, RelayMetrics, Retries};

/// Why a process does not do its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// The kind, for machines.
    pub kind: String,
    /// In words.
    pub message: String,
}

impl Reason {
    /// A reason.
    pub fn new(kind: &str, message: impl Into<String>) -> Self {
        Self { kind: kind.into(), message: message.into() }
    }
}

/// A check of a role's own, whether it can do its work.
#[async_trait]
pub trait ReadinessCheck: Send + Sync {
    /// Why it cannot; empty if it can.
    async fn reasons(&self) -> Vec<Reason>;
}

/// A worker of this process.
struct Worker {
    id: String,
    faults: Arc<FaultBoard>,
    heartbeat: Arc<Heartbeat>,
}

/// The parts that a role adds while it starts.
#[derive(Default)]
struct Parts {
    /// By role.
    workers: BTreeMap<String, Worker>,
    pools: Vec<(&'static str, Pool)>,
    lease: Option<Arc<Lease>>,
    check: Option<Arc<dyn ReadinessCheck>>,
    backends: Option<Backends>,
}

/// What is watched of a process.
pub struct Observed {
    /// The process's role.
    pub role: &'static str,
    /// Counts of its indexer.
    pub indexer: Arc<Metrics>,
    /// Counts of its relay.
    pub relay: Arc<RelayMetrics>,
    /// Counts of its page.
    pub page: Arc<PageMetrics>,
    /// Products that it generated.
    pub generated: Arc<Counter>,
    source: String,
    pub(super) started: SystemTime,
    stop: CancellationToken,
    fleet: fleet::Cache,
    parts: Mutex<Parts>,
}

/// A worker that is watched, for as long as this lives.
pub struct Watched<'a> {
    observed: &'a Observed,
    role: String,
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.observed.parts().workers.remove(&self.role);
    }
}

impl Observed {
    /// A process of this role that has no parts yet. `stop` is cancelled when it drains.
    #[must_use]
    pub fn new(role: &'static str, source: &str, stop: CancellationToken) -> Self {
        Self {
            role,
            indexer: Arc::default(),
            relay: Arc::default(),
            page: Arc::default(),
            generated: Arc::default(),
            source: source.into(),
            started: SystemTime::now(),
            stop,
            fleet: fleet::Cache::default(),
            parts: Mutex::default(),
        }
    }

    /// Watches a worker.
    #[must_use]
    pub fn watch(&self, worker: &WorkerRegistration) -> Watched<'_> {
        let watched = Worker {
            id: worker.id.clone(),
            faults: Arc::clone(&worker.faults),
            heartbeat: Arc::clone(&worker.heartbeat),
        };
        self.parts().workers.insert(worker.role().into(), watched);
        Watched { observed: self, role: worker.role().into() }
    }

    /// Watches a pool of connections.
    pub fn watch_pool(&self, name: &'static str, pool: &Pool) {
        self.parts().pools.push((name, pool.clone()));
    }

    /// Watches the lease of a worker whose index is outside of the database.
    pub fn watch_lease(&self, lease: &Arc<Lease>) {
        self.parts().lease = Some(Arc::clone(lease));
    }

    /// Watches the backends, and their pool.
    pub fn watch_backends(&self, backends: &Backends) {
        self.watch_pool("work", &backends.postgres.pool);
        self.parts().backends = Some(backends.clone());
    }

    /// Asks this too whether the process is ready.
    pub fn watch_readiness(&self, check: Arc<dyn ReadinessCheck>) {
        self.parts().check = Some(check);
    }

    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Roles of workers that this process has once it has started.
    fn expected(&self) -> &'static [&'static str] {
        match self.role {
            "up" => &["listen", "embed", "serve"],
            "listen" => &["listen"],
            "embed" => &["embed"],
            "serve" => &["serve"],
            _ => &[],
        }
    }

    /// Why the process does not do its work; empty if it does.
    pub async fn reasons(&self) -> Vec<Reason> {
        let mut reasons = Vec::new();
        if self.stop.is_cancelled() {
            reasons.push(Reason::new("stopping", "it finishes the work that it holds, and ends"));
        }
        let check = {
            let parts = self.parts();
            for role in self.expected() {
                match parts.workers.get(*role) {
                    Some(worker) => worker.reasons(role, &mut reasons),
                    None if self.stop.is_cancelled() => {}
                    None => reasons.push(Reason::new("starting", format!("{role} has not started yet"))),
                }
            }
            parts.check.clone()
        };
        if let Some(check) = check {
            reasons.extend(check.reasons().await);
        }
        reasons
    }

    /// The state of the whole fleet, or why it cannot be read. Whoever asks within some seconds gets the same state.
    pub(in crate::role) async fn fleet(&self, backends: &Backends) -> Result<Arc<Fleet>, Arc<str>> {
        self.fleet.get(backends).await
    }

    /// All metrics.
    pub async fn collect(&self) -> Samples {
        let mut samples = Samples::default();
        samples.count(&BUILD_INFO, &[env!("CARGO_PKG_VERSION"), self.role], 1);
        samples.count(&READY, &[], u64::from(self.reasons().await.is_empty()));
        process::collect(&mut samples, self.started);
        let backends = self.collect_parts(&mut samples);
        let has = |role| self.expected().contains(&role);
        if has("listen") {
            self.collect_relay(&mut samples);
        }
        if has("embed") {
            let generation = backends.as_ref().map_or(0, |backends| backends.generation.id).to_string();
            self.collect_indexer(&mut samples, &generation);
        }
        if has("serve") {
            self.page.collect(&mut samples);
        }
        if self.role == "generate" {
            samples.count(&GENERATED, &[], self.generated.get());
        }
        if has("listen") || has("serve") {
            match backends {
                Some(backends) => self.fleet.collect(&backends, &mut samples).await,
                None => samples.count(&super::catalogue::STATE_READABLE, &[], 0),
            }
        }
        samples
    }

    /// Adds workers and pools. Returns the backends.
    fn collect_parts(&self, samples: &mut Samples) -> Option<Backends> {
        let parts = self.parts();
        for (role, worker) in &parts.workers {
            samples.count(&WORKER_INFO, &[role, &worker.id], 1);
            if let Some(age) = worker.heartbeat.age() {
                samples.number(&HEARTBEAT_AGE, &[role], age.as_secs_f64());
            }
            samples.count(&HEARTBEAT_FAILURES, &[role], worker.heartbeat.failures.get());
            let faults = worker.faults.current();
            for kind in fault::KINDS {
                let has = faults.iter().any(|fault| fault.kind == kind);
                samples.count(&FAULT, &[role, kind], u64::from(has));
            }
        }
        for (name, pool) in &parts.pools {
            let status = pool.status();
            samples.count(&POOL, &[name, "used"], status.size.saturating_sub(status.available) as u64);
            samples.count(&POOL, &[name, "idle"], status.available as u64);
            samples.count(&POOL_MAX, &[name], status.max_size as u64);
            samples.count(&POOL_WAITING, &[name], status.waiting as u64);
        }
        if let Some(lease) = &parts.lease {
            samples.number(&LEASE, &[], lease.remaining().as_secs_f64());
        }
        parts.backends.clone()
    }

    fn collect_relay(&self, samples: &mut Samples) {
        let (source, relay) = (self.source.as_str(), &self.relay);
        for (lane, queued) in relay.queued.iter() {
            samples.count(&QUEUED, &[source, lane.name()], queued.get());
        }
        samples.distribution(&CLAIMS, &[source], relay.claims.get());
        samples.distribution(&CAPTURE_LAG, &[source], relay.capture_lag.get());
        self.collect_retries(samples, "queue", &relay.retries);
    }

    fn collect_indexer(&self, samples: &mut Samples, generation: &str) {
        let (source, indexer) = (self.source.as_str(), &self.indexer);
        for (metric, counters) in
            [(&RECEIVED, &indexer.received), (&APPLIED, &indexer.applied), (&EMBEDDED, &indexer.embedded)]
        {
            for (lane, counter) in counters.iter() {
                samples.count(metric, &[source, lane.name()], counter.get());
            }
        }
        for (lane, level) in indexer.in_flight.iter() {
            samples.count(&IN_FLIGHT, &[source, lane.name()], level.get());
        }
        let scaling = &indexer.scaling;
        samples.count(&WORKERS_DESIRED, &[source], scaling.desired() as u64);
        samples.count(&WORKERS_READY, &[source], scaling.ready() as u64);
        let (steps_out, steps_in) = scaling.steps();
        samples.count(&SCALED, &[source, "out"], steps_out);
        samples.count(&SCALED, &[source, "in"], steps_in);
        for (metric, lanes) in [(&BATCHES, &indexer.batches), (&FRESHNESS, &indexer.freshness)] {
            for (lane, seen) in lanes.iter() {
                samples.distribution(metric, &[source, lane.name()], seen.get());
            }
        }
        samples.count(&AVOIDED, &[source, "unchanged"], indexer.unchanged.get());
        samples.count(&AVOIDED, &[source, "same_text"], indexer.same_text.get());
        samples.distribution(&EMBEDDER, &[], indexer.embedder.get());
        samples.distribution(&EMBEDDER_TEXTS, &[], indexer.slices.get());
        samples.count(&TOKENS, &[], indexer.tokens.get());
        samples.count(&PANICS, &[source], indexer.panics.get());
        samples.distribution(&INDEX, &[source, generation, "write"], indexer.writes.get());
        samples.distribution(&INDEX, &[source, generation, "delete"], indexer.deletes.get());
        samples.count(&CONFLICTS, &[source], indexer.conflicts.get());
        self.collect_retries(samples, "receive", &indexer.receive_retries);
        self.collect_retries(samples, "apply", &indexer.apply_retries);
        for (reason, count) in indexer.dead_letters() {
            samples.count(&DEAD_LETTERED, &[source, reason.name()], count);
        }
    }

    fn collect_retries(&self, samples: &mut Samples, step: &str, retries: &Retries) {
        for (kind, count) in retries.iter() {
            samples.count(&RETRIES, &[&self.source, step, kind.name()], count);
        }
    }
}

impl Worker {
    fn reasons(&self, role: &str, reasons: &mut Vec<Reason>) {
        match self.heartbeat.age() {
            None => reasons.push(Reason::new("starting", format!("{role} has written no heartbeat yet"))),
            Some(age) if age > Duration::from_secs(WORKER_GONE_S as u64) => {
                let message = format!("the last heartbeat of {role} is {} s old", age.as_secs());
                reasons.push(Reason::new("heartbeat", message));
            }
            Some(_) => {}
        }
        reasons.extend(self.faults.current().into_iter().map(|fault| Reason::new(fault.kind, fault.message)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn kinds(observed: &Observed) -> Vec<String> {
        observed.reasons().await.into_iter().map(|reason| reason.kind).collect()
    }

    #[tokio::test]
    async fn a_process_is_not_ready_while_it_starts_or_stops() {
        let stop = CancellationToken::new();
        let up = Observed::new("up", "products", stop.clone());
        assert_eq!(kinds(&up).await, ["starting"; 3]);
        let generate = Observed::new("generate", "products", stop.clone());
        assert_eq!(kinds(&generate).await, [""; 0]);
        stop.cancel();
        assert_eq!(kinds(&up).await, ["stopping"]);
        assert_eq!(kinds(&generate).await, ["stopping"]);
    }
}
