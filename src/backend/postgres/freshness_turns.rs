//! Whose turn it is to measure freshness, in the whole fleet.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;

use super::{Postgres, chore};
use crate::pipeline::change::Lane;
use crate::pipeline::clock::{BootClock, Clock as _};
use crate::pipeline::failure::Result;
use crate::pipeline::index::FreshnessTurns;

/// A worker asks for a turn this often in the time between two turns, so that many workers do not ask the
/// database all the time.
const TRIES: u32 = 10;

/// One turn for each lane and `every`, for all workers of a generation.
pub struct SharedTurns {
    postgres: Postgres,
    generation: i32,
    every: Duration,
    /// When this worker asks next, by lane.
    next_try: Mutex<[Duration; Lane::ALL.len()]>,
}

impl SharedTurns {
    /// The turns of a generation.
    #[must_use]
    pub fn new(postgres: Postgres, generation: i32, every: Duration) -> Self {
        Self { postgres, generation, every, next_try: Mutex::default() }
    }
}

#[async_trait]
impl FreshnessTurns for SharedTurns {
    async fn take(&self, lane: Lane) -> Result<bool> {
        let now = BootClock.now();
        {
            let mut next_try = self.next_try.lock().unwrap_or_else(PoisonError::into_inner);
            if now < next_try[lane as usize] {
                return Ok(false);
            }
            next_try[lane as usize] = now + self.every / TRIES;
        }
        let name = format!("measure freshness {} {}", self.generation, lane.name());
        chore::claim(&self.postgres, &name, self.every).await
    }
}
