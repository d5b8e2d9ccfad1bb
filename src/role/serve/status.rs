//! The status. One read serves all pages that ask.

use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::Mutex;

use super::sync_status::SyncStatus;
use crate::pipeline::failure::Result;

/// Least time that a status is reused.
const MIN_AGE: Duration = Duration::from_millis(300);

/// A status is reused for this many times as long as its read took. Counting a large table takes a while, so
/// otherwise open pages could keep the database busy.
const AGE_FOR_COST: u32 = 5;

/// The last status, and until when it is reused.
#[derive(Default)]
pub struct Cache(Mutex<Option<(Instant, Value)>>);

impl Cache {
    /// The last status, or a new one. Requests that arrive during a read wait for its result.
    pub async fn get(&self, sync_status: &dyn SyncStatus) -> Result<Value> {
        let mut last = self.0.lock().await;
        if let Some((until, status)) = &*last
            && Instant::now() < *until
        {
            return Ok(status.clone());
        }
        let started = Instant::now();
        let status = sync_status.status().await?;
        let age = (started.elapsed() * AGE_FOR_COST).max(MIN_AGE);
        *last = Some((Instant::now() + age, status.clone()));
        Ok(status)
    }
}
