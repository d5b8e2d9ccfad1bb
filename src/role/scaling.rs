//! Scaling: looks at backlog and workers once a second, and carries out what [`Scaler`] decides.
//!
//! The workers are embedding threads ([`Threads`]) or processes ([`super::fleet`]). Each decision is logged,
//! recorded as an event, and counted.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::backend::Backends;
use crate::backend::postgres::event;
use crate::backend::postgres::worker_registry::{self, EmbedWorker, WorkerRegistration};
use crate::config::Scaling;
use crate::pipeline::clock::{BootClock, Clock as _};
use crate::pipeline::failure::Result;
use crate::pipeline::indexer::Indexer;
use crate::pipeline::metrics::Metrics;
use crate::pipeline::scaling::{Decision, Observation, Policy, Scaler};

/// Time between two looks while there is work, and while there is none: with SQS, a look costs two calls.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const LOOK_EVERY_IDLE: Duration = Duration::from_secs(5);

/// The policy of the settings, for so many workers.
pub(super) fn policy(settings: &Scaling, least: usize, most: usize) -> Policy {
    Policy {
        cooldown_out: settings.cooldown_out,
        cooldown_in: settings.cooldown_in,
        growth: settings.growth,
        ..Policy::backlog(settings.backlog.as_secs_f64(), least, most)
    }
}

/// Workers whose number can be set.
pub(super) trait Scaled {
    /// What the workers are: `threads` or `processes`.
    const WORKERS: &'static str;

    /// Workers that are asked for.
    fn current(&self) -> usize;

    /// What these workers do. `embedders` are all embed processes there are, those of others included;
    /// `queued` tells whether changes wait in the queue.
    fn look(&mut self, embedders: &[EmbedWorker], queued: bool) -> Seen;

    /// Sets the number of workers.
    async fn scale_to(&mut self, desired: usize) -> anyhow::Result<()>;

    /// Waits for the next look.
    async fn wait(&mut self, pause: Duration) {
        tokio::time::sleep(pause).await;
    }
}

/// What was seen of workers.
pub(super) struct Seen {
    /// Changes applied, ready workers, workers that hold work, and whether they are saturated.
    pub(super) applied: u64,
    pub(super) ready: usize,
    pub(super) holding: usize,
    pub(super) saturated: bool,
    /// Their part of all embedding threads, and so of the backlog.
    pub(super) share: f64,
}

/// Scales until `stop`. `worker` is the name under which decisions are recorded.
pub(super) async fn run_until<S: Scaled>(
    scaled: &mut S,
    policy: Policy,
    backends: &Backends,
    worker: &str,
    metrics: &Metrics,
    stop: &CancellationToken,
) {
    let mut target = Scaler::new(policy);
    loop {
        let Some(seen) = stop.run_until_cancelled(observe(scaled, backends)).await else { return };
        let observation = seen.inspect_err(|error| tracing::debug!(%error, "cannot read the backlog")).ok();
        let decision = target.decide(BootClock.now(), scaled.current(), observation.as_ref());
        metrics.scaling.note(&decision, observation.map_or(0, |observation| observation.ready));
        tracing::debug!(workers = S::WORKERS, reason = %decision, rate = target.rate(), "looked at the load");
        if decision.is_change() {
            carry_out(scaled, &decision, backends, worker).await;
        }
        let is_idle = observation.is_some_and(|observation| observation.backlog() == 0);
        let pause = if is_idle { LOOK_EVERY_IDLE } else { LOOK_EVERY };
        if stop.run_until_cancelled(scaled.wait(pause)).await.is_none() {
            return;
        }
    }
}

async fn carry_out<S: Scaled>(scaled: &mut S, decision: &Decision, backends: &Backends, worker: &str) {
    if let Err(error) = scaled.scale_to(decision.desired).await {
        tracing::warn!(workers = S::WORKERS, %error, "cannot change the number of workers: trying again");
        return;
    }
    tracing::info!(workers = S::WORKERS, reason = %decision, "scaled");
    if let Err(error) = event::record_scaling(&backends.postgres, worker, S::WORKERS, decision).await {
        tracing::warn!(%error, "cannot record a decision about the number of workers");
    }
}

async fn observe(scaled: &mut impl Scaled, backends: &Backends) -> Result<Observation> {
    let (pending, queue) = backends.backlog().await?;
    let embedders = worker_registry::embed_workers(&backends.postgres).await?;
    let Seen { applied, ready, holding, saturated, share } = scaled.look(&embedders, queue.visible > 0);
    let part = |changes: u64| (changes as f64 * share).ceil() as u64;
    Ok(Observation {
        pending: part(pending),
        queued: part(queue.visible),
        in_flight: part(queue.in_flight),
        applied,
        ready,
        holding,
        saturated,
        cpu: None,
    })
}

/// The part of all embedding threads that `ours` are, if `others` are elsewhere.
pub(super) fn share(ours: usize, others: usize) -> f64 {
    let ours = ours.max(1);
    ours as f64 / (ours + others) as f64
}

/// The embedding threads of this process.
pub(super) struct Threads<'a> {
    pub(super) indexer: &'a Indexer,
    pub(super) worker: &'a WorkerRegistration,
    pub(super) metrics: &'a Metrics,
    pub(super) current: usize,
}

impl Scaled for Threads<'_> {
    const WORKERS: &'static str = "threads";

    fn current(&self) -> usize {
        self.current
    }

    fn look(&mut self, embedders: &[EmbedWorker], queued: bool) -> Seen {
        let others = embedders.iter().filter(|other| other.id != self.worker.id).map(|other| other.threads);
        let (ready, busy) = (self.indexer.workers(), self.indexer.busy_workers());
        Seen {
            applied: self.metrics.totals().0,
            ready,
            holding: busy,
            saturated: queued || busy >= ready,
            share: share(self.current, others.sum()),
        }
    }

    async fn scale_to(&mut self, desired: usize) -> anyhow::Result<()> {
        self.current = desired;
        self.indexer.set_workers(desired);
        self.worker.set_threads(desired);
        Ok(())
    }
}
