//! The continuous proof beside an embedder's work, and what the same worker looks after: capture, and what
//! may be forgotten.

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

/// Rows of a page.
const PAGE: usize = 500;

/// Of how many looks after capture one also prunes the ledger, which has to be read for it: one an hour.
const LOOKS_A_PRUNE: u32 = 60;

/// The least time that a difference must last until it is taken for a lost message.
const MIN_PATIENCE: Duration = Duration::from_secs(30);

/// Proves until `over`, if no other worker does. What fails is tried again: nobody else waits for it.
pub async fn keep(backends: &Backends, settings: &Settings, worker: &str, over: &CancellationToken) {
    let store = PgRounds::new(backends.postgres.clone(), backends.target.id, worker);
    let visibility = Duration::from_secs(settings.queue.visibility_s);
    let settle = if backends.index_is_fenced() { Duration::ZERO } else { settings.indexer.settle() };
    let options = ProofOptions {
        period: settings.audit.period(),
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
    let look_every = (settings.audit.armed_s > 0).then(|| Duration::from_secs(settings.audit.armed_s));
    over.run_until_cancelled(prove(&mut prover, backends, worker, look_every)).await;
    if let Err(error) = prover.release().await {
        tracing::debug!(%error, "cannot give the proof back: another worker takes it over in a while");
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
                // Once; a database that is restarted is told of by others.
                if backoff.failures() == 3 || error.class == Class::Fatal && backoff.failures() == 1 {
                    tracing::warn!(%error, "the index cannot be compared with the table; trying again");
                }
                pause
            }
        };
        if let Some(every) = look_every {
            if prover.is_ours() && clock.now() >= next_look {
                next_look = clock.now() + every;
                if let Err(error) = guard.look().await {
                    tracing::warn!(%error, "cannot look after change capture");
                }
                if let Err(error) = guard.prune().await {
                    tracing::debug!(%error, "cannot delete what is old");
                }
            }
            if prover.is_ours() {
                wait = wait.min(next_look.saturating_sub(clock.now()));
            }
        }
        clock.sleep(wait).await;
    }
}

/// Looks whether changes are captured, and arms what is not.
struct Guard<'a> {
    backends: &'a Backends,
    worker: &'a str,
    /// Faults that were told.
    told: Vec<String>,
    /// Looks until the ledger is pruned again.
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
                tracing::warn!(table = source.table, "capture was armed again; every row is queued");
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
