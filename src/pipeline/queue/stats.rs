//! What can be asked about a queue without taking anything from it.

use async_trait::async_trait;
use jiff::Timestamp;
use serde::Serialize;

use crate::pipeline::change::Lane;
use crate::pipeline::failure::Result;

/// Changes (not messages) in a lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Backlog {
    /// Changes that can be received now.
    pub visible: u64,
    /// Changes that were received and are not acknowledged.
    pub in_flight: u64,
    /// Whether the numbers are estimates.
    pub estimated: bool,
}

impl Backlog {
    /// Changes that were counted.
    #[must_use]
    pub fn counted(visible: u64, in_flight: u64) -> Self {
        Self { visible, in_flight, estimated: false }
    }

    /// Changes by an estimate. None is no estimate.
    #[must_use]
    pub fn estimated(visible: u64, in_flight: u64) -> Self {
        Self { visible, in_flight, estimated: visible + in_flight > 0 }
    }

    /// Changes in both lanes.
    pub async fn of_both_lanes(stats: &dyn QueueStats) -> Result<Self> {
        let mut sum = Self::default();
        for lane in Lane::ALL {
            let backlog = stats.backlog(lane).await?;
            sum.visible += backlog.visible;
            sum.in_flight += backlog.in_flight;
            sum.estimated |= backlog.estimated;
        }
        Ok(sum)
    }

    /// Changes that are visible or in flight.
    #[must_use]
    pub fn total(self) -> u64 {
        self.visible + self.in_flight
    }
}

/// How full the lanes are.
///
/// Counts may be estimates, with one exception. Once a lane stays empty, it is counted as empty after a
/// while; and one that stays filled never is.
#[async_trait]
pub trait QueueStats: Send + Sync {
    /// Changes in a lane. May cost a call that is paid for.
    async fn backlog(&self, lane: Lane) -> Result<Backlog>;

    /// When the oldest change in the lanes was made, by the database's clock, whether it is visible or in
    /// flight; none when the lanes are empty. A queue that cannot tell answers with the beginning of time
    /// while it holds anything.
    async fn oldest(&self) -> Result<Option<Timestamp>>;

    /// How many changes may be in a queue that both lanes share before bulk changes are best kept out: from
    /// such a queue nobody can receive the live messages first. None where each lane has a queue of its own.
    fn shared_bound(&self) -> Option<u64> {
        None
    }
}
