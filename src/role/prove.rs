//! The continuous proof, which runs in an embed worker. The same worker checks change capture, and deletes
//! old rows of the ledger, the freshness samples and the events.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::backend::Backends;
use crate::backend::postgres::proof::{self, PgRounds};
use crate::config::{IndexCheck, Settings};
use crate::pipeline::audit::{ProofOptions, Prover};
use crate::pipeline::clock::{BootClock, Clock as _};
use crate::pipeline::failure::{Class, Result};
use crate::pipeline::retry::Backoff;

/// Rows in a page.
const PAGE: usize = 500;

/// Capture checks between two prunings of the ledger: an hour, because pruning reads the ledger.
const LOOKS_A_PRUNE: u32 = 60;

/// A difference counts as a lost message only after it has lasted at least this long.
const MIN_PATIENCE: Duration = Duration::from_secs(30);

/// Runs the continuous proof until `over`, unless another worker runs it. Retries after a failure, because no
/// other work waits for the proof.
pub async fn keep(backends: &Backends, settings: &Settings, worker: &str, over: &CancellationToken) {
    let store = PgRounds::new(backends.postgres.clone(), backends.target.id, worker);
    let visibility = settings.queue.visibility;
    let settle = if backends.index_is_fenced() { Duration::ZERO } else { settings.indexer.attempt() };
    let options = ProofOptions {
        period: settings.audit.period,
        full: settings.audit.index == IndexCheck::Full,
        patience: settle.max(visibility * 2).max(MIN_PATIENCE),
        read_letters: backends.dead_letters_are_open(),
        page: PAGE,
    };
    let mut prover = Prover::new(
        Arc::clone(&backends.ledger) as _,
        Arc::clone(&backends.index),
        Arc::clone(&backends.queue.stats),
        Arc::clone(&backends.queue.dead_letters),
        Arc::new(BootClock),
        Arc::new(store),
        options,
    );
    over.run_until_cancelled(prove(&mut prover, backends, worker, settings.audit.armed)).await;
    if let Err(error) = prover.release().await {
        tracing::debug!(%error, "cannot release the continuous proof: another worker takes it over later");
    }
}

async fn prove(prover: &mut Prover, backends: &Backends, worker: &str, look_every: Option<Duration>) {
    let clock = BootClock;
    let mut backoff = Backoff::default();
    let mut next_look = clock.now();
    let mut guard = Guard { backends, worker, told: Vec::new(), looks: 0 };
    loop {
        let mut wait = match prover.step().await {
            Ok(wait) => {
                backoff.reset();
                wait
            }
            Err(error) => {
                let pause = backoff.next(&error, &clock);
                // Log once, and not before the third failure: a restart of the database is logged elsewhere.
                if backoff.failures() == 3 || error.class == Class::Fatal && backoff.failures() == 1 {
                    tracing::warn!(%error, "the continuous proof cannot compare index and table; retrying");
                }
                pause
            }
        };
        if let Some(every) = look_every {
            if prover.is_ours() && clock.now() >= next_look {
                next_look = clock.now() + every;
                if let Err(error) = guard.look().await {
                    tracing::warn!(%error, "cannot check change capture");
                }
                if let Err(error) = guard.prune().await {
                    tracing::debug!(%error, "cannot delete old rows of the ledger, the samples and the events");
                }
            }
            if prover.is_ours() {
                wait = wait.min(next_look.saturating_sub(clock.now()));
            }
        }
        clock.sleep(wait).await;
    }
}

/// Checks that changes are captured, and arms capture where a trigger is missing or disabled.
struct Guard<'a> {
    backends: &'a Backends,
    worker: &'a str,
    /// Faults that are already logged.
    told: Vec<String>,
    /// Checks until the ledger is pruned again.
    looks: u32,
}

impl Guard<'_> {
    async fn prune(&mut self) -> Result<()> {
        let Backends { postgres, target, .. } = self.backends;
        proof::prune_books(postgres).await?;
        if self.looks == 0 {
            let may_be_more = proof::prune_ledger(postgres, target.id).await?;
            self.looks = if may_be_more { 0 } else { LOOKS_A_PRUNE };
        } else {
            self.looks -= 1;
        }
        Ok(())
    }

    async fn look(&mut self) -> Result<()> {
        let Backends { postgres, source, .. } = self.backends;
        let faults = proof::capture_faults(postgres, source).await?;
        if faults.is_empty() {
            if !std::mem::take(&mut self.told).is_empty() {
                tracing::info!(table = source.table, "changes are captured again");
            }
            return Ok(());
        }
        let is_new = self.told != faults;
        if is_new {
            tracing::warn!(?faults, "changes of the table are not captured");
            self.told.clone_from(&faults);
        }
        match proof::rearm(postgres, source, self.worker, &faults).await {
            Ok(true) => {
                tracing::warn!(
                    table = source.table,
                    "capture was armed again; rows that may have changed unseen are queued"
                );
                Ok(())
            }
            Ok(false) => Ok(()),
            Err(error) if is_new => Err(error),
            Err(error) => {
                tracing::debug!(%error, "cannot arm change capture yet");
                Ok(())
            }
        }
    }
}
