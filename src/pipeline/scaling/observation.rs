//! What a scaler observes.

/// What was seen of the work and the workers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Observation {
    /// Changes in the outbox.
    pub pending: u64,
    /// Changes in the queue that no worker has received.
    pub queued: u64,
    /// Changes that workers have received and not acknowledged.
    pub in_flight: u64,
    /// Changes that these workers have applied since some fixed moment: a counter, from which the rates are
    /// made.
    pub applied: u64,
    /// Workers that work. The others that were asked for are starting.
    pub ready: usize,
    /// Workers that hold work just now.
    pub holding: usize,
    /// Whether every worker has more work than it can do just now. Only such times tell how fast a worker is.
    pub saturated: bool,
    /// Average CPU use of the workers that work, in percent of what each may use. For [`Metric::Cpu`](super::Metric::Cpu).
    pub cpu: Option<f64>,
}

impl Observation {
    /// Changes that are not in the index yet.
    #[must_use]
    pub fn backlog(&self) -> u64 {
        self.pending + self.queued + self.in_flight
    }
}
