//! Deletes what is kept for a time only, as periodic work: one embed worker at a time does it for all.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::backend::Backends;
use crate::backend::postgres::{chore, pruning};
use crate::pipeline::failure::Result;

/// How often a worker looks whether there is something to do.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// How often samples and events are pruned.
const HISTORY_EVERY: Duration = Duration::from_mins(1);

/// How often the ledger is pruned; that reads all of it.
const LEDGER_EVERY: Duration = Duration::from_hours(1);

/// Deletes until `stop`. A failure is only logged, because no other work waits for this.
pub async fn run_until(backends: &Backends, stop: &CancellationToken) {
    loop {
        match stop.run_until_cancelled(prune(backends)).await {
            None => return,
            Some(Ok(())) => {}
            Some(Err(error)) => {
                tracing::debug!(%error, "cannot delete old samples, events and ledger entries");
            }
        }
        if stop.run_until_cancelled(tokio::time::sleep(LOOK_EVERY)).await.is_none() {
            return;
        }
    }
}

/// Deletes what is old, if that is due and no other worker has claimed it.
async fn prune(backends: &Backends) -> Result<()> {
    let Backends { postgres, generation, .. } = backends;
    if chore::claim(postgres, "prune history", HISTORY_EVERY).await? {
        while pruning::prune_history(postgres).await? {}
    }
    if chore::claim(postgres, &format!("prune ledger {}", generation.id), LEDGER_EVERY).await? {
        while pruning::prune_ledger(postgres, generation.id).await? {}
    }
    Ok(())
}
