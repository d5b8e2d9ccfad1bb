//! The workers of a process: loops that embed one slice at a time. Their number may change at any time.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::Indexer;

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
    /// all.
    pub(super) async fn keep_workers(self: &Arc<Self>) {
        let mut wanted = self.workers.wanted.subscribe();
        let mut loops = JoinSet::new();
        // One for each worker that is to go on. The workers at the start have their threads already.
        let mut staying: Vec<CancellationToken> = Vec::new();
        let mut threads = self.options.workers.max(1);
        loop {
            let count = *wanted.borrow_and_update();
            for surplus in staying.drain(count.min(staying.len())..) {
                surplus.cancel();
            }
            // A thread ends only after the worker that would use it.
            let needed = count.max(loops.len());
            if needed != threads {
                self.writer.scheduler.resize(needed).await;
                threads = needed;
            }
            while staying.len() < count {
                let (indexer, retired) = (Arc::clone(self), CancellationToken::new());
                staying.push(retired.clone());
                loops.spawn(async move { indexer.writer.scheduler.work(&retired).await });
            }
            self.workers.running.store(staying.len(), Ordering::Relaxed);
            tokio::select! {
                // The sender lives as long as this indexer.
                _ = wanted.changed() => {}
                Some(_) = loops.join_next() => {}
            }
        }
    }
}
