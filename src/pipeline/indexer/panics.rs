//! Panics of the tasks beside the lanes: told, counted, and the task started again.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use super::step::Indexer;
use crate::pipeline::failure::Error;
use crate::pipeline::fault::redacted;
use crate::pipeline::retry::Backoff;

impl Indexer {
    /// Panics from now on, each as a sentence.
    #[must_use]
    pub fn panics(&self) -> broadcast::Receiver<String> {
        self.panics.subscribe()
    }

    /// Tells that a task panicked, and is started again after a pause; without a pause, the role ends.
    pub(super) fn tell_panic(&self, task: &str, error: &Error, pause: Option<Duration>) {
        self.metrics().panics.add(1);
        let next = pause.map_or_else(
            || "the role ends".to_owned(),
            |pause| format!("it is started again in {:.1} s", pause.as_secs_f64()),
        );
        let text = format!("{task} ended, and {next}: {}", redacted(&error.to_string()));
        tracing::error!(task, reason = redacted(&error.to_string()), "a task panicked: {next}");
        self.panics.send(text);
    }

    /// Runs a task until `done`, which drops it. If it panics, it is started again after a pause.
    pub(super) async fn keep_running<F>(
        self: Arc<Self>,
        task: &'static str,
        done: CancellationToken,
        work: impl Fn(Arc<Self>) -> F,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut backoff = Backoff::default();
        loop {
            let (work, until) = (work(Arc::clone(&self)), done.clone());
            let ended = tokio::spawn(async move { until.run_until_cancelled(work).await.is_some() }).await;
            let Err(Ok(payload)) = ended.map_err(tokio::task::JoinError::try_into_panic) else { return };
            let pause = backoff.next(&*self.clock);
            self.tell_panic(task, &Error::panicked(task, &*payload), Some(pause));
            if done.run_until_cancelled(self.clock.sleep(pause)).await.is_none() {
                return;
            }
        }
    }
}
