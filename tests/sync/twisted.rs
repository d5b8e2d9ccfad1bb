//! PostgreSQL's ledger with reads that a test replaces.

use std::time::Duration;

use async_trait::async_trait;
use refarch::backend::Backends;
use refarch::backend::postgres::ledger::PgLedger;
use refarch::pipeline::audit::{AuditOptions, Auditor, Report};
use refarch::pipeline::clock::BootClock;
use refarch::pipeline::failure::Result;
use refarch::pipeline::ledger::{Closed, Ledger, Opened, Outcome, Peeked, Pending, Swept};

/// The reads that a test may replace.
#[async_trait]
pub trait Twist: Send + Sync {
    /// The ledger that does the rest.
    fn ledger(&self) -> &PgLedger;

    async fn peek(&self, ids: &[String]) -> Result<Vec<Peeked>> {
        self.ledger().peek(ids).await
    }

    async fn rows_after(&self, id: Option<&str>, limit: usize) -> Result<Vec<Peeked>> {
        self.ledger().rows_after(id, limit).await
    }
}

/// The ledger with the twist.
pub struct Twisted<T>(pub T);

impl<T: Twist> Twisted<T> {
    /// Audits by this ledger, without a look at vectors.
    pub async fn audit(&self, backends: &Backends) -> Report {
        let auditor = Auditor {
            ledger: self,
            index: &*backends.index,
            queue: &*backends.queue.stats,
            embedder: None,
            clock: &BootClock,
            options: AuditOptions { sample: 0, wait: Duration::from_secs(1), repair: false },
        };
        auditor.run(&|_| ()).await.unwrap()
    }
}

#[async_trait]
impl<T: Twist> Ledger for Twisted<T> {
    async fn peek(&self, ids: &[String]) -> Result<Vec<Peeked>> {
        self.0.peek(ids).await
    }

    async fn rows_after(&self, id: Option<&str>, limit: usize) -> Result<Vec<Peeked>> {
        self.0.rows_after(id, limit).await
    }

    async fn open(&self, attempt: &str, worker: &str, ids: &[String]) -> Result<Vec<Opened>> {
        self.0.ledger().open(attempt, worker, ids).await
    }

    async fn close(&self, attempt: &str, worker: &str, closing: &[(Opened, Outcome)]) -> Result<Closed> {
        self.0.ledger().close(attempt, worker, closing).await
    }

    async fn abandon_orphans(&self, worker: &str, in_hand: &[String]) -> Result<u64> {
        self.0.ledger().abandon_orphans(worker, in_hand).await
    }

    async fn sweep(&self, settle: Duration, limit: usize) -> Result<Swept> {
        self.0.ledger().sweep(settle, limit).await
    }

    async fn requeue(&self, ids: &[String]) -> Result<()> {
        self.0.ledger().requeue(ids).await
    }

    async fn pending(&self) -> Result<Pending> {
        self.0.ledger().pending().await
    }

    async fn count_try(&self, id: &str, by: i32) -> Result<u32> {
        self.0.ledger().count_try(id, by).await
    }

    async fn park(&self, id: &str) -> Result<()> {
        self.0.ledger().park(id).await
    }
}
