//! The state of the sync, as the page shows it.

use std::time::Duration;

use async_trait::async_trait;
use serde_json::Value;

use crate::backend::postgres::capture::{CaptureState, NewPart};
use crate::backend::{Backends, postgres};
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::ledger::Ledger as _;

/// How long a worker may take, after its check of capture is due, until a new part of the table is captured.
const CAPTURE_TIME: Duration = Duration::from_secs(10);

/// Why results may be wrong, beyond what an answer of table and index shows.
#[derive(Clone, Debug, Default)]
pub struct Health {
    /// Faults that make results wrong until somebody repairs them.
    pub faults: Vec<String>,
    /// New parts of the table (partitions, for example), which a worker captures and queues by itself.
    pub new_parts: Vec<NewPart>,
    /// A new part that is still not captured after this time is a fault.
    pub new_part_timeout: Duration,
    /// The state of the continuous proof, in words.
    pub proof: String,
}

/// The state of the sync, as the page shows it.
#[async_trait]
pub trait SyncStatus: Send + Sync {
    /// Checks that the index which is searched is the one that is kept in step.
    async fn check_generation(&self) -> Result<()> {
        Ok(())
    }
    /// The output of `refarch status --json`.
    async fn status(&self) -> Result<Value>;
    /// Whether the index holds the row as it is now.
    async fn is_searchable(&self, id: &str) -> Result<bool>;
    /// What readiness shows of capture and proof.
    async fn health(&self) -> Result<Health> {
        Ok(Health::default())
    }
}

#[async_trait]
impl SyncStatus for Backends {
    async fn check_generation(&self) -> Result<()> {
        if postgres::generation::is_active(&self.postgres, self.generation.id).await? {
            return Ok(());
        }
        let message = "refarch migrate made another index after this process started: restart this process";
        Err(Error::new(FailureKind::WrongShape, "look for the index", message))
    }

    async fn status(&self) -> Result<Value> {
        let status = Self::status(self).await?;
        Ok(serde_json::to_value(status).unwrap_or_default())
    }

    async fn is_searchable(&self, id: &str) -> Result<bool> {
        let peeked = self.ledger.peek(&[id.to_owned()]).await?;
        Ok(peeked.iter().any(|p| p.entry.as_ref().is_some_and(|entry| entry.matches(p.row.as_ref()))))
    }

    async fn health(&self) -> Result<Health> {
        let CaptureState { faults, new_parts } =
            postgres::capture::check(&self.postgres, &self.source).await?;
        Ok(Health {
            faults: faults.into_iter().map(|fault| format!("not captured: {fault}")).collect(),
            new_parts,
            // If no worker checks capture, nothing is done by itself.
            new_part_timeout: self.capture_check().map_or(Duration::ZERO, |every| every + CAPTURE_TIME),
            proof: self.proof().await?.describe(),
        })
    }
}
