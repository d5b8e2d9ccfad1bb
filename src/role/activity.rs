//! What a worker did lately, as a line in its log: counts, at most one line in ten seconds.
//!
//! The dashboard of the reference architecture asks for these lines by their `action`.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::admin::Observed;
use crate::backend::postgres::worker_registry::WorkerRegistration;
use crate::pipeline::metrics::{Metrics, RelayMetrics};

/// Time between two lines.
const EVERY: Duration = Duration::from_secs(10);

/// Counts since the start.
type Totals = [u64; 4];

/// Logs what the worker did, until `done`, and then the rest.
pub async fn log_until(done: &CancellationToken, worker: &WorkerRegistration, observed: &Observed) {
    let mut last = Totals::default();
    loop {
        let over = done.run_until_cancelled(tokio::time::sleep(EVERY)).await.is_none();
        match worker.role() {
            "listen" => log_queued(&observed.relay, &worker.id, &mut last),
            "embed" => log_applied(&observed.indexer, &worker.id, &mut last),
            _ => {}
        }
        if over {
            return;
        }
    }
}

/// Replaces the last totals, and returns by how much they grew; none if they did not.
fn growth(last: &mut Totals, now: Totals) -> Option<Totals> {
    let mut grown = now;
    for (grown, last) in grown.iter_mut().zip(*last) {
        *grown = grown.saturating_sub(last);
    }
    *last = now;
    grown.iter().any(|count| *count > 0).then_some(grown)
}

fn log_queued(relay: &RelayMetrics, worker: &str, last: &mut Totals) {
    let lag = relay.capture_lag.get();
    let [live, bulk] = crate::pipeline::change::Lane::ALL.map(|lane| relay.queued[lane].get());
    let lag_ms = (lag.sum * 1000.0) as u64;
    let Some([live, bulk, claims, lag_ms]) = growth(last, [live, bulk, lag.count(), lag_ms]) else { return };
    tracing::info!(
        worker.id = worker,
        action = "record_write",
        changes = live + bulk,
        live,
        bulk,
        claims,
        capture_lag_ms = lag_ms.checked_div(claims).unwrap_or_default(),
        "changes queued"
    );
}

fn log_applied(indexer: &Metrics, worker: &str, last: &mut Totals) {
    let (applied, embedded) = indexer.totals();
    let avoided = indexer.unchanged.get() + indexer.same_text.get();
    let dead: u64 = indexer.dead_letters().map(|(_, count)| count).sum();
    let Some([applied, embedded, avoided, dead]) = growth(last, [applied, embedded, avoided, dead]) else {
        return;
    };
    tracing::info!(
        worker.id = worker,
        action = "embedding_completed",
        applied,
        embedded,
        avoided,
        dead_lettered = dead,
        "changes applied"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_new_is_told() {
        let mut last = Totals::default();
        assert_eq!(growth(&mut last, [0; 4]), None);
        assert_eq!(growth(&mut last, [5, 1, 0, 0]), Some([5, 1, 0, 0]));
        assert_eq!(growth(&mut last, [5, 1, 0, 0]), None);
        assert_eq!(growth(&mut last, [5, 3, 0, 0]), Some([0, 2, 0, 0]));
    }
}
