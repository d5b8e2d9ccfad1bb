//! Engines in this process that take padded batches.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::Result;
use tokenizers::Tokenizer;

use crate::corpus::{Corpus, tokens};
use crate::engine::{Engine, Label};

/// A model that embeds one batch at a time on each thread.
pub trait Model: Sync {
    /// State of one thread.
    type Thread: Send;

    fn label(&self) -> Label;

    /// A unit vector of length [`Model::width`] for each text of the batch, one after the other.
    fn embed(&self, thread: &mut Self::Thread, batch: &Batch) -> Result<Vec<f32>>;

    fn width(&self) -> usize;
}

/// A [`Model`] on several threads. Each thread takes the next free batch.
pub struct Padded<M: Model> {
    model: M,
    threads: Vec<M::Thread>,
    tokenizer: Tokenizer,
    texts: Arc<[Arc<str>]>,
    batches: Vec<Batch>,
    vectors: Vec<f32>,
    /// Duration of the last run.
    seconds: f64,
}

impl<M: Model> Padded<M> {
    pub fn new(model: M, threads: Vec<M::Thread>, tokenizer: Tokenizer) -> Self {
        let (batches, vectors) = (Vec::new(), Vec::new());
        Self { model, threads, tokenizer, texts: Arc::from([]), batches, vectors, seconds: 0.0 }
    }
}

impl<M: Model> Engine for Padded<M> {
    fn label(&self) -> Label {
        self.model.label()
    }

    fn settle(&mut self, corpus: &Corpus) -> Result<Option<usize>> {
        let sample = sample(corpus);
        let size = fastest(|size| {
            self.batches = batches(&sample, size);
            self.run()
        })?;
        self.texts = Arc::clone(&corpus.texts);
        self.batches = batches(&corpus.ids, size);
        Ok(Some(size))
    }

    fn run(&mut self) -> Result<f64> {
        let started = Instant::now();
        let (model, batches, width) = (&self.model, &self.batches, self.model.width());
        let texts: usize = batches.iter().map(|batch| batch.texts.len()).sum();
        let vectors = Mutex::new(vec![0.0; texts * width]);
        share(&mut self.threads, batches.len(), |thread, number| {
            let batch = &batches[number];
            let embedded = model.embed(thread, batch)?;
            let mut vectors = vectors.lock().unwrap_or_else(PoisonError::into_inner);
            for (text, vector) in batch.texts.iter().zip(embedded.chunks_exact(width)) {
                vectors[text * width..][..width].copy_from_slice(vector);
            }
            Ok(())
        })?;
        self.vectors = vectors.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.seconds = started.elapsed().as_secs_f64();
        Ok(self.seconds)
    }

    fn run_from_texts(&mut self) -> Result<f64> {
        Ok(tokenize(&self.tokenizer, &self.texts, self.threads.len())? + self.seconds)
    }

    fn vectors(&mut self) -> Result<Vec<f32>> {
        Ok(self.vectors.clone())
    }
}

/// Batch sizes to try.
pub const SIZES: [usize; 5] = [4, 8, 16, 32, 64];

/// Approximate number of tokens in the texts for this trial.
const TRIAL_TOKENS: usize = 8_000;

/// Texts of similar length, padded to the longest.
pub struct Batch {
    /// Positions of the texts in the corpus.
    pub texts: Vec<usize>,
    pub longest: usize,
    pub ids: Vec<u32>,
    /// 1 for a token, 0 for padding.
    pub mask: Vec<f32>,
}

/// All texts in batches, sorted by length so that there is little padding.
pub fn batches(ids: &[Vec<u32>], size: usize) -> Vec<Batch> {
    let mut order: Vec<usize> = (0..ids.len()).collect();
    order.sort_by_key(|text| ids[*text].len());
    order
        .chunks(size)
        .map(|texts| {
            let longest = texts.iter().map(|text| ids[*text].len()).max().unwrap_or(0);
            let mut batch = Batch { texts: texts.to_vec(), longest, ids: Vec::new(), mask: Vec::new() };
            for text in texts {
                let filled = longest - ids[*text].len();
                batch.ids.extend(ids[*text].iter().copied().chain(std::iter::repeat_n(0, filled)));
                batch.mask.extend((0..longest).map(|at| if at < longest - filled { 1.0 } else { 0.0 }));
            }
            batch
        })
        .collect()
}

/// A sample of the texts of a corpus, evenly spread.
pub fn sample(corpus: &Corpus) -> Vec<Vec<u32>> {
    let step = (corpus.mean_tokens() * corpus.len() as f64 / TRIAL_TOKENS as f64).ceil().max(1.0);
    corpus.ids.iter().step_by(step as usize).cloned().collect()
}

/// The batch size with which `run` is fastest.
pub fn fastest(mut run: impl FnMut(usize) -> Result<f64>) -> Result<usize> {
    let mut best = (f64::INFINITY, SIZES[0]);
    // A first run that does not count, because it may include setup work.
    run(SIZES[0])?;
    for size in SIZES {
        let seconds = run(size)?;
        if seconds < best.0 {
            best = (seconds, size);
        }
    }
    Ok(best.1)
}

/// Runs `work` for each number below `count`, on one thread for each state.
pub fn share<S: Send>(
    states: &mut [S],
    count: usize,
    work: impl Fn(&mut S, usize) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let threads: Vec<_> = states
            .iter_mut()
            .map(|state| {
                scope.spawn(|| {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= count {
                            return Ok(());
                        }
                        work(state, number)?;
                    }
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("a thread panicked"))
    })
}

/// Tokenizes all texts on `threads` threads. Returns the duration in seconds.
pub fn tokenize(tokenizer: &Tokenizer, texts: &[Arc<str>], threads: usize) -> Result<f64> {
    /// Texts that a thread takes at a time.
    const PART: usize = 64;
    let started = Instant::now();
    let parts: Vec<&[Arc<str>]> = texts.chunks(PART).collect();
    share(&mut vec![(); threads], parts.len(), |(), part| {
        parts[part].iter().try_for_each(|text| tokens(tokenizer, text).map(drop))
    })?;
    Ok(started.elapsed().as_secs_f64())
}
