//! Threads that embed: one thread alone, or two threads to embed one short text faster.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::kernel::{Float, Kernel};
use super::network::Network;
use super::pass::{self, Own, Pass, Places, Shared};
use super::team::Team;

/// Tokens in a pass. With fewer tokens, reading the weights takes longer than multiplying by them. With more
/// tokens, the data between the stages no longer fits the cache.
const PASS: usize = 320;

/// Sequences packed end to end.
pub(super) struct Batch {
    /// Token ids.
    pub(super) ids: Vec<u32>,
    /// Position of each token in its sequence.
    pub(super) positions: Vec<u32>,
    /// Start of each sequence, and the end of the last sequence.
    pub(super) starts: Vec<usize>,
}

impl Batch {
    fn new() -> Self {
        Self { ids: Vec::new(), positions: Vec::new(), starts: vec![0] }
    }

    fn push(&mut self, sequence: &[u32]) {
        self.ids.extend_from_slice(sequence);
        self.positions.extend(0..sequence.len() as u32);
        self.starts.push(self.ids.len());
    }

    fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.starts.truncate(1);
    }

    fn sequences(&self) -> usize {
        self.starts.len() - 1
    }
}

/// A model laid out for a kernel.
pub(super) trait Laid: Send + Sync {
    /// Memory for texts of at most `length` tokens. With `helped`, also starts a second thread.
    fn worker(self: Arc<Self>, length: usize, helped: bool) -> Box<dyn Run>;
}

/// The memory of a thread, and the model.
pub(super) trait Run: Send {
    /// Computes one vector for each sequence of the batch.
    fn run(&mut self, batch: &Batch, vectors: &mut [f32]);
}

impl<D: Kernel, A: Float> Laid for Network<D, A> {
    fn worker(self: Arc<Self>, length: usize, helped: bool) -> Box<dyn Run> {
        let tokens = PASS.max(length);
        let own = || Own::new(&self, tokens, length);
        Box::new(Passes {
            shared: Shared::new(&self, tokens),
            own: own(),
            team: Team::new(pass::stages(&self)),
            helper: if helped { Helper::start(own()) } else { None },
            network: self,
        })
    }
}

struct Passes<D: Kernel, A: Float> {
    network: Arc<Network<D, A>>,
    shared: Shared<D, A>,
    own: Own<A>,
    team: Team,
    helper: Option<Helper<D, A>>,
}

impl<D: Kernel, A: Float> Run for Passes<D, A> {
    fn run(&mut self, batch: &Batch, vectors: &mut [f32]) {
        self.team.reset();
        let part = Part {
            network: &raw const *self.network,
            batch,
            places: self.shared.places(),
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
struct Part<D: Kernel, A: Float> {
    network: *const Network<D, A>,
    batch: *const Batch,
    places: Places<D, A>,
    team: *const Team,
    vectors: *mut f32,
}

impl<D: Kernel, A: Float> Clone for Part<D, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Kernel, A: Float> Copy for Part<D, A> {}

// SAFETY: the threads of a pass share the targets of the pointers, and each thread writes only to its own
// parts.
unsafe impl<D: Kernel, A: Float> Send for Part<D, A> {}

impl<D: Kernel, A: Float> Part<D, A> {
    /// Takes part in the pass.
    ///
    /// # Safety
    ///
    /// The targets of the pointers must live until this function returns.
    unsafe fn take(self, own: &mut Own<A>) {
        // SAFETY: guaranteed by the caller. The CPU features were checked when the kernel was chosen. A batch
        // has at most `PASS` tokens, or one text of the model's maximum length. There is room for both, and
        // for one vector for each sequence.
        unsafe {
            D::vectorize(Pass {
                network: &*self.network,
                batch: &*self.batch,
                places: self.places,
                own,
                team: &*self.team,
                vectors: self.vectors,
            });
        }
    }
}

/// A thread that takes part in the passes of another thread, if it wakes up in time.
struct Helper<D: Kernel, A: Float> {
    desk: Arc<Desk<D, A>>,
    thread: Option<JoinHandle<()>>,
}

struct Desk<D: Kernel, A: Float> {
    offered: Mutex<Option<Part<D, A>>>,
    /// Set under the lock, so that a thread that finds no offer sees this flag.
    busy: AtomicBool,
    over: AtomicBool,
}

impl<D: Kernel, A: Float> Desk<D, A> {
    fn take(&self, begin: bool) -> Option<Part<D, A>> {
        let mut offered = self.offered.lock().unwrap_or_else(PoisonError::into_inner);
        let part = offered.take();
        if begin && part.is_some() {
            self.busy.store(true, Ordering::Relaxed);
        }
        part
    }
}

impl<D: Kernel, A: Float> Helper<D, A> {
    /// None if the system cannot start a thread. Passes then take longer.
    fn start(mut own: Own<A>) -> Option<Self> {
        let desk = Arc::new(Desk {
            offered: Mutex::new(None),
            busy: AtomicBool::new(false),
            over: AtomicBool::new(false),
        });
        let help = Arc::clone(&desk);
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
            Ok(thread) => Some(Self { desk, thread: Some(thread) }),
            Err(error) => {
                tracing::warn!(%error, "cannot start a second thread: embedding a single text takes longer");
                None
            }
        }
    }

    fn offer(&self, part: Part<D, A>) -> Help<'_, D, A> {
        *self.desk.offered.lock().unwrap_or_else(PoisonError::into_inner) = Some(part);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
        Help(&self.desk)
    }
}

impl<D: Kernel, A: Float> Drop for Helper<D, A> {
    fn drop(&mut self) {
        self.desk.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // The panic hook has already printed a panic of the thread.
            let _ = thread.join();
        }
    }
}

/// An offer to the helper. On drop, withdraws the offer, or waits until the helper has left the pass.
struct Help<'a, D: Kernel, A: Float>(&'a Desk<D, A>);

impl<D: Kernel, A: Float> Drop for Help<'_, D, A> {
    fn drop(&mut self) {
        if self.0.take(false).is_none() {
            while self.0.busy.load(Ordering::Acquire) {
                thread::yield_now();
            }
        }
    }
}

/// Memory of one thread for embedding.
pub struct Worker {
    run: Box<dyn Run>,
    batch: Batch,
    dimensions: usize,
    most: usize,
    vocabulary: usize,
}

impl Worker {
    pub(super) fn new(run: Box<dyn Run>, dimensions: usize, most: usize, vocabulary: usize) -> Self {
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
                if end > first && self.batch.ids.len() + sequence.len() > PASS {
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
