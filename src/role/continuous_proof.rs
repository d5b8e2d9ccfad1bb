//! The continuous proof, which runs in an embed worker. The same worker checks change capture, and counts the
//! ledger anew once an hour.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::backend::Backends;
use crate::backend::postgres::proof::PgRounds;
use crate::backend::postgres::{capture, counts};
use crate::config::{IndexCheck, Settings};
use crate::pipeline::audit::{ProofOptions, Prover};
use crate::pipeline::clock::{BootClock, Clock as _};
use crate::pipeline::failure::{Class, Result};
use crate::pipeline::retry::Backoff;

/// Rows in a page.
const PAGE: usize = 500;

/// Capture checks between two counts of the ledger: an hour, because a count reads all of it.
const CHECKS_PER_COUNT: u32 = 60;

/// A difference counts as a lost message only after it has lasted at least this long.
const MIN_LOST_AFTER: Duration = Duration::from_secs(30);

/// Runs the continuous proof until `work_ended`, unless another worker runs it. Retries after a failure,
/// because no other work waits for the proof.
pub async fn run_until(
    backends: &Backends,
    settings: &Settings,
    worker: &str,
    work_ended: &CancellationToken,
) {
    let store = PgRounds::new(backends.postgres.clone(), backends.generation.id, worker);
    let visibility = settings.queue.visibility;
    let settle = if backends.index_is_transactional() { Duration::ZERO } else { settings.indexer.attempt() };
    let options = ProofOptions {
        period: settings.audit.period,
        full: settings.audit.index == IndexCheck::Full,
        lost_after: settle.max(visibility * 2).max(MIN_LOST_AFTER),
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
    work_ended.run_until_cancelled(prove(&mut prover, backends, worker, settings.audit.armed)).await;
    if let Err(error) = prover.release().await {
        tracing::debug!(%error, "cannot release the continuous proof: another worker takes it over later");
    }
}

async fn prove(prover: &mut Prover, backends: &Backends, worker: &str, check_interval: Option<Duration>) {
    let clock = BootClock;
    let mut backoff = Backoff::default();
    let mut next_check = clock.now();
    let mut monitor = CaptureMonitor { backends, worker, reported_faults: Vec::new(), checks_until_count: 0 };
    loop {
        let mut wait = match prover.step().await {
            Ok(wait) => {
                backoff.reset();
                wait
            }
            Err(error) => {
                let pause = backoff.next(&clock);
                // Log once, and not before the third failure: a restart of the database is logged elsewhere.
                if backoff.failures() == 3 || error.class() == Class::Fatal && backoff.failures() == 1 {
                    tracing::warn!(%error, "the continuous proof cannot compare index and table; retrying");
                }
                pause
            }
        };
        if let Some(every) = check_interval {
            if prover.is_ours() && clock.now() >= next_check {
                next_check = clock.now() + every;
                if let Err(error) = monitor.check().await {
                    tracing::warn!(%error, "cannot check change capture");
                }
                if let Err(error) = monitor.recount().await {
                    tracing::debug!(%error, "cannot count the ledger anew");
                }
            }
            if prover.is_ours() {
                wait = wait.min(next_check.saturating_sub(clock.now()));
            }
        }
        clock.sleep(wait).await;
    }
}

/// Checks that changes are captured, and arms capture where a trigger is missing or disabled.
struct CaptureMonitor<'a> {
    backends: &'a Backends,
    worker: &'a str,
    /// Faults that are already logged.
    reported_faults: Vec<String>,
    /// Checks until the ledger is counted again.
    checks_until_count: u32,
}

impl CaptureMonitor<'_> {
    async fn recount(&mut self) -> Result<()> {
        let Backends { postgres, generation, .. } = self.backends;
        if self.checks_until_count == 0 {
            counts::recount(postgres, generation).await?;
            self.checks_until_count = CHECKS_PER_COUNT;
        } else {
            self.checks_until_count -= 1;
        }
        Ok(())
    }

    async fn check(&mut self) -> Result<()> {
        let Backends { postgres, source, .. } = self.backends;
        let faults = capture::faults(postgres, source).await?;
        if faults.is_empty() {
            if !std::mem::take(&mut self.reported_faults).is_empty() {
                tracing::info!(table = source.table, "changes are captured again");
            }
            return Ok(());
        }
        let is_new = self.reported_faults != faults;
        if is_new {
            tracing::warn!(?faults, "changes of the table are not captured");
            self.reported_faults.clone_from(&faults);
        }
        match capture::restore(postgres, source, self.worker, &faults).await {
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
