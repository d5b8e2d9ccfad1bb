//! How fast workers are, from counters that only grow.

use std::time::Duration;

use super::observation::Observation;

/// A worker's speed is known after so many seconds in which all workers had more work than they could do.
const MEASURED_AFTER_S: f64 = 5.0;

/// Weight of older times: after so many seconds, a third is left.
const RATE_MEMORY_S: f64 = 30.0;
const THROUGHPUT_MEMORY_S: f64 = 10.0;

/// If work waits and nothing was applied for so long, nothing gets through.
const STALLED_AFTER: Duration = Duration::from_secs(10);

/// The counters of an observation, and when it was made.
#[derive(Clone, Copy, Debug)]
struct Seen {
    at: Duration,
    applied: u64,
    ready: usize,
    saturated: bool,
}

/// Measures the speed of one worker, and the throughput of all.
#[derive(Debug, Default)]
pub(super) struct RateMeter {
    last: Option<Seen>,
    /// Changes a second of one worker, as last measured.
    rate: Option<f64>,
    /// Changes, worker seconds and seconds of the saturated times with the present number of workers; the
    /// first two fade.
    changes: f64,
    worker_seconds: f64,
    seconds: f64,
    ready: usize,
    /// Changes a second of all workers, whether they had enough to do or not.
    throughput: f64,
    /// Since when work waits and nothing is applied.
    stalled_since: Option<Duration>,
    is_stalled: bool,
}

impl RateMeter {
    /// Takes an observation into account.
    pub(super) fn observe(&mut self, now: Duration, observed: &Observation) {
        let Observation { applied, ready, saturated, .. } = *observed;
        if ready != self.ready {
            self.ready = ready;
            (self.changes, self.worker_seconds, self.seconds) = (0.0, 0.0, 0.0);
        }
        let last = self.last.replace(Seen { at: now, applied, ready, saturated });
        let Some(last) = last.filter(|last| last.at < now && last.applied <= applied) else { return };
        let seconds = now.saturating_sub(last.at).as_secs_f64();
        let changes = (applied - last.applied) as f64;
        let kept = (-seconds / THROUGHPUT_MEMORY_S).exp();
        self.throughput = self.throughput * kept + changes / seconds * (1.0 - kept);
        let saturated = saturated && last.saturated && ready > 0;
        if saturated && changes == 0.0 {
            let since = *self.stalled_since.get_or_insert(last.at);
            self.is_stalled = now.saturating_sub(since) >= STALLED_AFTER;
        } else {
            self.stalled_since = None;
            self.is_stalled = false;
        }
        if saturated && last.ready == ready {
            let kept = (-seconds / RATE_MEMORY_S).exp();
            self.changes = self.changes * kept + changes;
            self.worker_seconds = self.worker_seconds * kept + seconds * ready as f64;
            self.seconds += seconds;
            // An outage does not make workers slow.
            if self.is_measured() && !self.is_stalled {
                self.rate = Some(self.changes / self.worker_seconds);
            }
        }
    }

    /// The next observation does not follow the last one.
    pub(super) fn interrupt(&mut self) {
        self.last = None;
        self.stalled_since = None;
        self.is_stalled = false;
    }

    /// Changes a second of one worker, as last measured.
    pub(super) fn rate(&self) -> Option<f64> {
        self.rate
    }

    /// Changes a second that all workers apply, which is also how many arrive while none wait.
    pub(super) fn throughput(&self) -> f64 {
        self.throughput
    }

    /// Changes a second that the present number of workers applies when there is enough to do, if that was
    /// measured.
    pub(super) fn throughput_if_measured(&self) -> Option<f64> {
        self.is_measured().then_some(self.changes / self.worker_seconds * self.ready as f64)
    }

    /// Whether work waits and nothing is applied.
    pub(super) fn is_stalled(&self) -> bool {
        self.is_stalled
    }

    fn is_measured(&self) -> bool {
        self.seconds >= MEASURED_AFTER_S && self.changes > 0.0
    }
}
