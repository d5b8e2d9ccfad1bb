//! The status, read once for all pages that ask.

use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::Mutex;

use super::Probe;
use crate::pipeline::failure::Result;

/// How long a status is shown at least.
const MIN_AGE: Duration = Duration::from_millis(300);

/// The counts of a large table take a while: a status is shown for this many times as long as it took
/// to read, so that open pages never make it the database's main work.
const AGE_FOR_COST: u32 = 5;

/// The last status, and until when it is shown.
#[derive(Default)]
pub struct Cache(Mutex<Option<(Instant, Value)>>);

impl Cache {
    /// A status read lately, or a new one; who asks while it is read waits for the same one.
    pub async fn get(&self, probe: &dyn Probe) -> Result<Value> {
        let mut last = self.0.lock().await;
        if let Some((until, status)) = &*last
            && Instant::now() < *until
        {
            return Ok(status.clone());
        }
        let started = Instant::now();
        let status = probe.status().await?;
        let age = (started.elapsed() * AGE_FOR_COST).max(MIN_AGE);
        *last = Some((Instant::now() + age, status.clone()));
        Ok(status)
    }
}
