//! Threads that embed: each alone, or two for the sake of one short text.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::kernel::{Float, Kernel};
use super::network::Network;
use super::pass::{self, Own, Pass, Places, Shared};
use super::team::Team;

/// Tokens that go through the model together. With fewer, reading the weights takes longer than
/// multiplying by them; with more, what the stages hand to each other no longer fits the cache.
const PASS: usize = 320;

/// Sequences packed end to end.
pub(super) struct Batch {
    /// Tokens.
    pub(super) ids: Vec<u32>,
    /// Each token's place in its sequence.
    pub(super) positions: Vec<u32>,
    /// Where sequences begin, and the end of the last.
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
    /// Memory for texts of at most `length` tokens, and with `helped` a second thread.
    fn worker(self: Arc<Self>, length: usize, helped: bool) -> Box<dyn Run>;
}

/// A thread's own memory, and the model that it goes through.
pub(super) trait Run: Send {
    /// One vector a sequence of the batch.
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
        // Before the helper may begin, so that whatever happens here waits until it has ended.
        let _help = self.helper.as_ref().map(|helper| helper.offer(part));
        // SAFETY: what the part points to lives until this function ends.
        unsafe { part.take(&mut self.own) };
    }
}

/// What a thread needs to take part in a pass.
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

// SAFETY: what is pointed to is shared between the threads of a pass, who write to parts of their own.
unsafe impl<D: Kernel, A: Float> Send for Part<D, A> {}

impl<D: Kernel, A: Float> Part<D, A> {
    /// Goes through the pass.
    ///
    /// # Safety
    ///
    /// What is pointed to must live until this ends.
    unsafe fn take(self, own: &mut Own<A>) {
        // SAFETY: the caller's. The CPU's instructions were looked at when the kernel was chosen; batches
        // are within `PASS` and the model's longest text, for which there is room, and one vector a
        // sequence.
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

/// A thread that takes part in another's passes, if it comes in time.
struct Helper<D: Kernel, A: Float> {
    desk: Arc<Desk<D, A>>,
    thread: Option<JoinHandle<()>>,
}

struct Desk<D: Kernel, A: Float> {
    offered: Mutex<Option<Part<D, A>>>,
    /// Set while the lock is held, so that who finds nothing offered sees it.
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
    /// None if there can be no more threads: passes then take longer.
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
                        // SAFETY: whoever offered it waits until it is no longer busy.
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
                tracing::warn!(%error, "cannot start a second thread for single texts");
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
            // It has said what it panicked about.
            let _ = thread.join();
        }
    }
}

/// Help that was asked for. Dropping it takes the offer back, or waits until the helper has left the pass.
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

/// One thread's memory for embedding.
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

    /// Embeds sequences of token ids: one unit vector each, end to end, in their order. Of longer sequences
    /// than the model reads, the beginning is embedded; of an empty one comes a zero vector.
    ///
    /// # Panics
    ///
    /// If a token is not in the model's vocabulary.
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
