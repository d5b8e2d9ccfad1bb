//! The workers of a process: loops that embed one slice at a time. Their number may change at any time.

use std::future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use super::Indexer;
use crate::pipeline::failure::{Error, FailureKind};
use crate::pipeline::retry::Backoff;

/// So many panics, with no slice embedded in between, end the role. The pauses before take some seconds.
const MAX_PANICS: u32 = 6;

/// What a worker is called when it panicked.
const WORKER: &str = "an embedding worker";

impl Indexer {
    /// Sets the number of workers, one at least. Surplus workers finish the slice that they embed.
    pub fn set_workers(&self, wanted: usize) {
        self.workers.wanted.send_replace(wanted.max(1));
    }

    /// Workers that are running.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.workers.running.load(Ordering::Relaxed)
    }

    /// Workers that embed a slice, or are about to, because slices wait.
    #[must_use]
    pub fn busy_workers(&self) -> usize {
        self.writer.scheduler.slices().min(self.workers())
    }

    /// Keeps as many workers running as are wanted, for as long as the future is polled. A drop ends them
    /// all. A worker that panicked is started again after a pause.
    ///
    /// Ends with an error after [`MAX_PANICS`] panics in a row: another process may do better.
    pub(super) async fn keep_workers(self: &Arc<Self>) -> Error {
        let mut wanted = self.workers.wanted.subscribe();
        let mut loops = JoinSet::new();
        // One for each worker that is to go on. The workers at the start have their threads already.
        let mut staying: Vec<(Id, CancellationToken)> = Vec::new();
        let mut threads = self.options.workers.max(1);
        let (mut backoff, mut embedded) = (Backoff::default(), 0);
        let mut resume_at: Option<Duration> = None;
        loop {
            let count = *wanted.borrow_and_update();
            for (_, surplus) in staying.drain(count.min(staying.len())..) {
                surplus.cancel();
            }
            // A thread ends only after the worker that would use it.
            let needed = count.max(loops.len());
            if needed != threads {
                self.writer.scheduler.resize(needed).await;
                threads = needed;
            }
            while resume_at.is_none() && staying.len() < count {
                let (indexer, retired) = (Arc::clone(self), CancellationToken::new());
                let until = retired.clone();
                let worker = loops.spawn(async move { indexer.writer.scheduler.work(&until).await });
                staying.push((worker.id(), retired));
            }
            self.workers.running.store(staying.len(), Ordering::Relaxed);
            let resume = async {
                match resume_at {
                    Some(at) => self.clock.sleep(at.saturating_sub(self.clock.now())).await,
                    None => future::pending().await,
                }
            };
            tokio::select! {
                // The sender lives as long as this indexer.
                _ = wanted.changed() => {}
                () = resume => resume_at = None,
                Some(ended) = loops.join_next_with_id() => {
                    let (id, result) = match ended {
                        Ok(ended) => ended,
                        Err(error) => (error.id(), Err(broken(error))),
                    };
                    staying.retain(|(worker, _)| *worker != id);
                    let Err(error) = result else { continue };
                    let done = self.writer.scheduler.embedded();
                    if std::mem::replace(&mut embedded, done) != done {
                        backoff.reset();
                    }
                    let pause = backoff.next(&*self.clock);
                    if backoff.failures() >= MAX_PANICS {
                        self.tell_panic(WORKER, &error, None);
                        let said = format!("the embedder panicked {MAX_PANICS} times in a row, the last time so: {error}");
                        return Error::new(FailureKind::ProcessBroken, "embed texts", said);
                    }
                    self.tell_panic(WORKER, &error, Some(pause));
                    resume_at = Some(self.clock.now() + pause);
                }
            }
        }
    }
}

/// The end of a worker that did not end by itself.
fn broken(error: JoinError) -> Error {
    match error.try_into_panic() {
        Ok(payload) => Error::panicked("embed texts", &*payload),
        Err(error) => Error::caused(FailureKind::ProcessBroken, "embed texts", error),
    }
}
