//! The state of the sync, as the page shows it.

use async_trait::async_trait;
use serde_json::Value;

use crate::backend::{Backends, postgres};
use crate::pipeline::failure::{Error, FailureKind, Result};
use crate::pipeline::ledger::Ledger as _;

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
    /// Faults that make results wrong until somebody mends them, and the state of the continuous proof.
    async fn health(&self) -> Result<(Vec<String>, String)> {
        Ok((Vec::new(), String::new()))
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

    async fn health(&self) -> Result<(Vec<String>, String)> {
        let faults = postgres::capture::faults(&self.postgres, &self.source).await?;
        let faults = faults.into_iter().map(|fault| format!("not captured: {fault}")).collect();
        Ok((faults, self.proof().await?.describe()))
    }
}
