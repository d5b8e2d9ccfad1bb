//! Where the batches of a lane run.

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio_util::task::AbortOnDropHandle;

use crate::pipeline::failure::{Error, FailureKind, Result};

/// A batch's work, or what waits for its end.
pub type Task = BoxFuture<'static, Result<()>>;

/// Runs batches beside the receive loop that started them.
///
/// A seam, so that a simulation runs the receive loop without the tokio runtime.
pub trait Spawn: Send + Sync {
    /// Starts a task. What is returned ends when the task ends, with the task's result. It need not be
    /// polled for the task to go on. If it is dropped, the task may be dropped too.
    fn spawn(&self, task: Task) -> Task;
}

/// Tasks of the tokio runtime: batches of one lane run on several threads.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokioTasks;

impl Spawn for TokioTasks {
    fn spawn(&self, task: Task) -> Task {
        let handle = AbortOnDropHandle::new(tokio::spawn(task));
        // One that panicked is as bad as one that failed for good.
        let broken = |error| Err(Error::caused(FailureKind::ProcessBroken, "apply changes", error));
        async move { handle.await.unwrap_or_else(broken) }.boxed()
    }
}
