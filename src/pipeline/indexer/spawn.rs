//! Where the batches of a lane run.

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio_util::task::AbortOnDropHandle;

use crate::pipeline::failure::{Error, FailureKind, Result};

/// The work of a batch, or a future that waits for its end.
pub type Task = BoxFuture<'static, Result<()>>;

/// Runs batches beside the receive loop that started them.
///
/// A seam, so that a simulation runs the receive loop without the tokio runtime.
pub trait Spawn: Send + Sync {
    /// Starts a task. The returned future ends when the task ends, with the task's result. The task runs even
    /// if the future is not polled. If the future is dropped, the task may be dropped too.
    fn spawn(&self, task: Task) -> Task;
}

/// Tasks of the tokio runtime: batches of one lane run on several threads.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokioTasks;

impl Spawn for TokioTasks {
    fn spawn(&self, task: Task) -> Task {
        let handle = AbortOnDropHandle::new(tokio::spawn(task));
        // A panic is treated as a broken process.
        let broken = |error| Err(Error::caused(FailureKind::ProcessBroken, "apply changes", error));
        async move { handle.await.unwrap_or_else(broken) }.boxed()
    }
}
