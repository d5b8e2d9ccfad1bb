//! A BERT encoder for the CPU: texts' tokens in, unit vectors out.
//!
//! Made for models of `MiniLM`'s class, whose weights nearly fit the caches: any BERT with mean or CLS
//! pooling loads by its `config.json`. Sequences are packed end to end, without padding; every stage but
//! attention works on their tokens alike, and attention on one sequence at a time. So a text's vector is
//! the same to the bit whatever it is embedded together with, as long as the kernel is the same.
//!
//! Weights are read from a safetensors file and laid out once for the kernel, which is chosen by what the CPU
//! has (see [`KernelKind`]). Nothing of the file is needed afterwards. Any number of [`Worker`]s share them, each on a thread of its
//! own: that wastes no time on waiting for each other.
//!
//! This is the only crate here with `unsafe` code: the instructions are reached by intrinsics and assembly, and
//! matrices by pointers.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "some of it is for x86's kernels only"))]
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
mod pass;
mod team;
mod tensors;
mod worker;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use config::{BertConfig, Description, Pooling, file};
use kernel::{Float, Kernel, portable};
#[cfg(target_arch = "x86_64")]
use kernel::{amx, avx2, avx512};
pub use kind::{Instructions, KernelKind, Precision};
use network::Network;
use tensors::Tensors;
use worker::Laid;
pub use worker::Worker;

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
        let laid = lay_out(&description, &tensors, kind)?;
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
        self.start(false)
    }

    /// Memory for a thread that embeds one short text at a time, and a second thread that helps it: most
    /// of that time goes into reading the weights, which two cores do sooner. Vectors are the same.
    #[must_use]
    pub fn pair(&self) -> Worker {
        self.start(true)
    }

    fn start(&self, helped: bool) -> Worker {
        let Description { bert, max_tokens, .. } = &self.description;
        let run = Arc::clone(&self.laid).worker(*max_tokens, helped);
        Worker::new(run, bert.hidden_size, *max_tokens, bert.vocab_size)
    }
}

/// One arm a kernel: with the one for its dense layers, and the one for attention.
fn lay_out(description: &Description, tensors: &Tensors, kind: KernelKind) -> Result<Arc<dyn Laid>, Error> {
    fn network<D: Kernel, A: Float>(
        description: &Description,
        tensors: &Tensors,
    ) -> Result<Arc<dyn Laid>, Error> {
        Ok(Arc::new(Network::<D, A>::new(description, tensors)?))
    }
    match kind {
        KernelKind::Portable => network::<portable::Portable, portable::Portable>(description, tensors),
        #[cfg(target_arch = "x86_64")]
        KernelKind::Avx2 => network::<avx2::F32, avx2::F32>(description, tensors),
        #[cfg(target_arch = "x86_64")]
        KernelKind::Avx2Bf16 => network::<avx2::Bf16, avx2::F32>(description, tensors),
        #[cfg(target_arch = "x86_64")]
        KernelKind::Avx2Int8 => network::<avx2::Int8, avx2::F32>(description, tensors),
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
