//! A BERT encoder for the CPU: texts' tokens in, unit vectors out.
//!
//! Made for models of `MiniLM`'s class, whose weights nearly fit the caches: any BERT with mean or CLS
//! pooling loads by its `config.json`. Sequences are packed end to end, without padding; every stage but
//! attention works on their tokens alike, and attention on one sequence at a time. So a text's vector is
//! the same to the bit whatever it is embedded together with, as long as the kernel is the same.
//!
//! Weights are read from a memory-mapped safetensors file and laid out once for the kernel, which is chosen
//! by what the CPU has (see [`KernelKind`]). Any number of [`Worker`]s share them, each on a thread of its
//! own: that wastes no time on waiting for each other.
//!
//! This is the only module with `unsafe` code: the instructions are reached by intrinsics and assembly, and
//! matrices by pointers.
#![allow(unsafe_code, reason = "instructions and matrices are reached by intrinsics and pointers")]
#![allow(clippy::inline_always, reason = "what is not inlined is compiled without the kernel's instructions")]

mod attention;
mod buffer;
mod config;
mod kernel;
mod kind;
mod lanes;
mod math;
mod network;
mod packed;
mod team;
mod tensors;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use config::{BertConfig, Description, Pooling, file};
use kernel::{Float, Kernel, amx, avx2, avx512, portable};
pub use kind::{Instructions, KernelKind, Precision};
use network::{Network, Own, Pass, Shared};
use team::Alone;
use tensors::Tensors;

/// Why there is no encoder.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the model folder is not there.
    #[error("there is no {}", .file.display())]
    Missing {
        /// Where it should be.
        file: PathBuf,
    },
    /// A file of the model folder cannot be read.
    #[error("cannot read {}: {source}", .file.display())]
    Unreadable {
        /// Which.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file of the model folder is not what it should be.
    #[error("{}: {why}", .file.display())]
    Malformed {
        /// Which.
        file: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The model is of another kind.
    #[error("{}: {why}", .file.display())]
    Unsupported {
        /// The file that says so.
        file: PathBuf,
        /// What is not known.
        why: String,
    },
    /// The CPU cannot do what the settings ask for.
    #[error("{0}")]
    Cpu(String),
}

/// Tokens that go through the model together. With fewer, reading the weights takes longer than
/// multiplying by them; with more, what the stages hand to each other no longer fits the cache.
const PASS: usize = 320;

/// Sequences packed end to end.
pub(crate) struct Batch {
    /// Tokens.
    ids: Vec<u32>,
    /// Each token's place in its sequence.
    positions: Vec<u32>,
    /// Where sequences begin, and the end of the last.
    starts: Vec<usize>,
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
trait Laid: Send + Sync {
    fn worker(self: Arc<Self>, length: usize) -> Box<dyn Run>;
}

/// A thread's own memory, and the model it goes through.
trait Run: Send {
    /// One vector a sequence of the batch.
    fn run(&mut self, batch: &Batch, vectors: &mut [f32]);
}

impl<D: Kernel, A: Float> Laid for Network<D, A> {
    fn worker(self: Arc<Self>, length: usize) -> Box<dyn Run> {
        let tokens = PASS.max(length);
        let (shared, own) = (Shared::new(&self, tokens), Own::new(&self, tokens, length));
        Box::new(Passes { network: self, shared, own })
    }
}

struct Passes<D: Kernel, A: Float> {
    network: Arc<Network<D, A>>,
    shared: Shared<D, A>,
    own: Own<A>,
}

impl<D: Kernel, A: Float> Run for Passes<D, A> {
    fn run(&mut self, batch: &Batch, vectors: &mut [f32]) {
        let pass = Pass {
            network: &*self.network,
            batch,
            places: self.shared.places(),
            own: &mut self.own,
            team: &Alone,
            vectors: vectors.as_mut_ptr(),
        };
        // SAFETY: the CPU's instructions were looked at when the kernel was chosen; batches are within
        // `PASS` and the model's longest text, for which there is room, and one vector a sequence.
        unsafe { D::vectorize(pass) }
    }
}

/// A loaded model.
pub struct Encoder {
    description: Description,
    kind: KernelKind,
    laid: Arc<dyn Laid>,
}

impl Encoder {
    /// Loads a model folder in the Hugging Face layout: `config.json`, `model.safetensors` and, where there
    /// are, `1_Pooling/config.json` and `sentence_bert_config.json`.
    pub fn load(dir: &Path, kind: KernelKind) -> Result<Self, Error> {
        if !kind.is_supported() {
            return Err(Error::Cpu(format!("this CPU or system has no {kind}")));
        }
        let description = Description::read(dir)?;
        let tensors = Tensors::open(&file(dir, "model.safetensors")?)?;
        let laid = lay_out(&description, tensors, kind)?;
        Ok(Self { description, kind, laid })
    }

    /// What the folder says.
    #[must_use]
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The kernel in use.
    #[must_use]
    pub fn kind(&self) -> KernelKind {
        self.kind
    }

    /// Memory for a thread that embeds.
    #[must_use]
    pub fn worker(&self) -> Worker {
        let hidden = self.description.bert.hidden_size;
        let most = self.description.max_tokens;
        let vocabulary = self.description.bert.vocab_size;
        Worker { run: Arc::clone(&self.laid).worker(most), batch: Batch::new(), hidden, most, vocabulary }
    }
}

/// One arm a kernel: with the one for its dense layers, and the one for attention.
fn lay_out(description: &Description, tensors: Tensors, kind: KernelKind) -> Result<Arc<dyn Laid>, Error> {
    fn network<D: Kernel, A: Float>(
        description: &Description,
        tensors: Tensors,
    ) -> Result<Arc<dyn Laid>, Error> {
        Ok(Arc::new(Network::<D, A>::new(description, tensors)?))
    }
    match kind {
        KernelKind::Portable => network::<portable::Portable, portable::Portable>(description, tensors),
        #[cfg(target_arch = "x86_64")]
        KernelKind::Avx2 => network::<avx2::F32, avx2::F32>(description, tensors),
        #[cfg(target_arch = "x86_64")]
        KernelKind::Avx512 => network::<avx512::F32, avx512::F32>(description, tensors),
        #[cfg(target_arch = "x86_64")]
        KernelKind::Avx512Bf16 => network::<avx512::Bf16, avx512::Bf16>(description, tensors),
        #[cfg(target_arch = "x86_64")]
        KernelKind::Avx512Int8 if KernelKind::Avx512Bf16.is_supported() => {
            network::<avx512::Int8WithBf16, avx512::Bf16>(description, tensors)
        }
        #[cfg(target_arch = "x86_64")]
        KernelKind::Avx512Int8 => network::<avx512::Int8, avx512::F32>(description, tensors),
        #[cfg(target_arch = "x86_64")]
        KernelKind::AmxBf16 => network::<amx::Bf16, amx::Bf16>(description, tensors),
        #[cfg(target_arch = "x86_64")]
        KernelKind::AmxInt8 => network::<amx::Int8, amx::Bf16>(description, tensors),
        #[cfg(not(target_arch = "x86_64"))]
        _ => Err(Error::Cpu(format!("this CPU has no {kind}"))),
    }
}

/// One thread's memory for embedding.
pub struct Worker {
    run: Box<dyn Run>,
    batch: Batch,
    hidden: usize,
    most: usize,
    vocabulary: usize,
}

impl Worker {
    /// Embeds sequences of token ids: one unit vector each, end to end, in their order. Of longer sequences
    /// than the model reads, the beginning is embedded; of an empty one comes a zero vector.
    ///
    /// # Panics
    ///
    /// If a token is not in the model's vocabulary.
    pub fn embed(&mut self, sequences: &[&[u32]]) -> Vec<f32> {
        let mut vectors = vec![0.0; sequences.len() * self.hidden];
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
            let vectors = &mut vectors[first * self.hidden..end * self.hidden];
            debug_assert_eq!(vectors.len(), self.batch.sequences() * self.hidden);
            self.run.run(&self.batch, vectors);
            first = end;
        }
        vectors
    }
}
