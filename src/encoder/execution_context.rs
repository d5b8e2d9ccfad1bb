//! Threads that embed: one thread alone, or two threads to embed one short text faster.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::batch::Batch;
use super::forward_pass::{self, ForwardPass, SharedBuffers, SharedPointers, ThreadBuffers};
use super::kernel::{Float, Kernel};
use super::thread_team::ThreadTeam;
use super::weights::Weights;

/// Tokens in a pass. With fewer tokens, reading the weights takes longer than multiplying by them. With more
/// tokens, the data between the stages no longer fits the cache.
const MAX_BATCH_TOKENS: usize = 320;

/// A model laid out for a kernel.
pub(super) trait PackedModel: Send + Sync {
    /// Memory for texts of at most `length` tokens. With `helped`, also starts a second thread.
    fn execution_context(self: Arc<Self>, length: usize, helped: bool) -> Box<dyn RunBatch>;
}

/// The memory of a thread, and the model.
pub(super) trait RunBatch: Send {
    /// Computes one vector for each sequence of the batch.
    fn run(&mut self, batch: &Batch, vectors: &mut [f32]);
}

impl<D: Kernel, A: Float> PackedModel for Weights<D, A> {
    fn execution_context(self: Arc<Self>, length: usize, helped: bool) -> Box<dyn RunBatch> {
        let tokens = MAX_BATCH_TOKENS.max(length);
        let own = || ThreadBuffers::new(&self, tokens, length);
        Box::new(KernelContext {
            shared: SharedBuffers::new(&self, tokens),
            own: own(),
            team: ThreadTeam::new(forward_pass::stages(&self)),
            helper: if helped { HelperThread::start(own()) } else { None },
            network: self,
        })
    }
}

struct KernelContext<D: Kernel, A: Float> {
    network: Arc<Weights<D, A>>,
    shared: SharedBuffers<D, A>,
    own: ThreadBuffers<A>,
    team: ThreadTeam,
    helper: Option<HelperThread<D, A>>,
}

impl<D: Kernel, A: Float> RunBatch for KernelContext<D, A> {
    fn run(&mut self, batch: &Batch, vectors: &mut [f32]) {
        self.team.reset();
        let part = PassTask {
            network: &raw const *self.network,
            batch,
            pointers: self.shared.pointers(),
            team: &raw const self.team,
            vectors: vectors.as_mut_ptr(),
        };
        // The guard waits on drop until the helper has left the pass, even if this function panics.
        let _help = self.helper.as_ref().map(|helper| helper.offer(part));
        // SAFETY: the targets of the part's pointers live until the end of this function.
        unsafe { part.take(&mut self.own) };
    }
}

/// The data of a pass, for a thread that takes part.
struct PassTask<D: Kernel, A: Float> {
    network: *const Weights<D, A>,
    batch: *const Batch,
    pointers: SharedPointers<D, A>,
    team: *const ThreadTeam,
    vectors: *mut f32,
}

impl<D: Kernel, A: Float> Clone for PassTask<D, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Kernel, A: Float> Copy for PassTask<D, A> {}

// SAFETY: the threads of a pass share the targets of the pointers, and each thread writes only to its own
// parts.
unsafe impl<D: Kernel, A: Float> Send for PassTask<D, A> {}

impl<D: Kernel, A: Float> PassTask<D, A> {
    /// Takes part in the pass.
    ///
    /// # Safety
    ///
    /// The targets of the pointers must live until this function returns.
    unsafe fn take(self, own: &mut ThreadBuffers<A>) {
        // SAFETY: guaranteed by the caller. The CPU features were checked when the kernel was chosen. A batch
        // has at most `MAX_BATCH_TOKENS` tokens, or one text of the model's maximum length. There is room for both, and
        // for one vector for each sequence.
        unsafe {
            D::vectorize(ForwardPass {
                network: &*self.network,
                batch: &*self.batch,
                pointers: self.pointers,
                own,
                team: &*self.team,
                vectors: self.vectors,
            });
        }
    }
}

/// A thread that takes part in the passes of another thread, if it wakes up in time.
struct HelperThread<D: Kernel, A: Float> {
    handoff: Arc<Handoff<D, A>>,
    thread: Option<JoinHandle<()>>,
}

struct Handoff<D: Kernel, A: Float> {
    offered: Mutex<Option<PassTask<D, A>>>,
    /// Set under the lock, so that a thread that finds no offer sees this flag.
    busy: AtomicBool,
    over: AtomicBool,
}

impl<D: Kernel, A: Float> Handoff<D, A> {
    fn take(&self, begin: bool) -> Option<PassTask<D, A>> {
        let mut offered = self.offered.lock().unwrap_or_else(PoisonError::into_inner);
        let part = offered.take();
        if begin && part.is_some() {
            self.busy.store(true, Ordering::Relaxed);
        }
        part
    }
}

impl<D: Kernel, A: Float> HelperThread<D, A> {
    /// None if the system cannot start a thread. Passes then take longer.
    fn start(mut own: ThreadBuffers<A>) -> Option<Self> {
        let handoff = Arc::new(Handoff {
            offered: Mutex::new(None),
            busy: AtomicBool::new(false),
            over: AtomicBool::new(false),
        });
        let help = Arc::clone(&handoff);
        let work = move || {
            while !help.over.load(Ordering::Acquire) {
                match help.take(true) {
                    Some(part) => {
                        // SAFETY: the thread that made the offer waits until `busy` is false.
                        unsafe { part.take(&mut own) };
                        help.busy.store(false, Ordering::Release);
                    }
                    None => thread::park(),
                }
            }
        };
        match thread::Builder::new().name("embed-help".into()).spawn(work) {
            Ok(thread) => Some(Self { handoff, thread: Some(thread) }),
            Err(error) => {
                tracing::warn!(%error, "cannot start a second thread: embedding a single text takes longer");
                None
            }
        }
    }

    fn offer(&self, part: PassTask<D, A>) -> HelperGuard<'_, D, A> {
        *self.handoff.offered.lock().unwrap_or_else(PoisonError::into_inner) = Some(part);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
        HelperGuard(&self.handoff)
    }
}

impl<D: Kernel, A: Float> Drop for HelperThread<D, A> {
    fn drop(&mut self) {
        self.handoff.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // The panic hook has already printed a panic of the thread.
            let _ = thread.join();
        }
    }
}

/// An offer to the helper. On drop, withdraws the offer, or waits until the helper has left the pass.
struct HelperGuard<'a, D: Kernel, A: Float>(&'a Handoff<D, A>);

impl<D: Kernel, A: Float> Drop for HelperGuard<'_, D, A> {
    fn drop(&mut self) {
        if self.0.take(false).is_none() {
            while self.0.busy.load(Ordering::Acquire) {
                thread::yield_now();
            }
        }
    }
}

/// Memory of one thread for embedding.
pub struct ExecutionContext {
    run: Box<dyn RunBatch>,
    batch: Batch,
    dimensions: usize,
    most: usize,
    vocabulary: usize,
}

impl ExecutionContext {
    pub(super) fn new(run: Box<dyn RunBatch>, dimensions: usize, most: usize, vocabulary: usize) -> Self {
        Self { run, batch: Batch::new(), dimensions, most, vocabulary }
    }

    /// Embeds sequences of token ids. Returns one unit vector for each sequence, one after the other, in the
    /// same order. Cuts a sequence that is longer than the model's maximum. An empty sequence gives a zero
    /// vector.
    ///
    /// # Panics
    ///
    /// If a token id is not in the model's vocabulary.
    pub fn embed(&mut self, sequences: &[&[u32]]) -> Vec<f32> {
        let mut vectors = vec![0.0; sequences.len() * self.dimensions];
        let mut first = 0;
        while first < sequences.len() {
            self.batch.clear();
            let mut end = first;
            while end < sequences.len() {
                let sequence = &sequences[end][..sequences[end].len().min(self.most)];
                let known = sequence.iter().all(|id| (*id as usize) < self.vocabulary);
                assert!(known, "tokens are in the vocabulary");
                if end > first && self.batch.ids.len() + sequence.len() > MAX_BATCH_TOKENS {
                    break;
                }
                self.batch.push(sequence);
                end += 1;
            }
            let vectors = &mut vectors[first * self.dimensions..end * self.dimensions];
            debug_assert_eq!(vectors.len(), self.batch.sequences() * self.dimensions);
            self.run.run(&self.batch, vectors);
            first = end;
        }
        vectors
    }
}
