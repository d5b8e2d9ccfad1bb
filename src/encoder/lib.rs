//! A BERT encoder for the CPU. Input: the tokens of texts. Output: unit vectors.
//!
//! The encoder is made for models of the size of `MiniLM`, whose weights nearly fit the caches. It loads any
//! BERT model with mean or CLS pooling by its `config.json`. Sequences are packed one after the other,
//! without padding. Attention works on one sequence at a time; all other stages work on all tokens in the
//! same way. So with the same kernel, a text's vector is the same to the bit, whichever texts are embedded
//! together with it.
//!
//! Weights are read from a safetensors file and laid out once for the kernel. The CPU's features decide the
//! kernel (see [`KernelKind`]). The file is not needed afterwards. Any number of [`ExecutionContext`]s share the
//! weights, each on its own thread, so that no thread waits for another one.
//!
//! This is the only crate of refarch with `unsafe` code, for intrinsics, assembly and pointers to matrices.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "some of it is for x86's kernels only"))]
#![allow(clippy::inline_always, reason = "code not inlined is compiled without the kernel's instructions")]

mod aligned_buffer;
mod attention;
mod batch;
mod dense_layer;
mod error;
mod execution_context;
mod forward_pass;
mod kernel;
mod kernel_selection;
mod math;
mod model_config;
mod safetensors_file;
mod simd;
mod thread_team;
mod weights;

use std::path::Path;
use std::sync::Arc;

pub use error::Error;
pub use execution_context::ExecutionContext;
use execution_context::PackedModel;
use kernel::{Float, Kernel, portable};
#[cfg(target_arch = "x86_64")]
use kernel::{amx, avx2, avx512};
pub use kernel_selection::{InstructionSet, KernelKind, Precision};
pub use model_config::{BertConfig, Description, Pooling, file};
use safetensors_file::SafetensorsFile;
use weights::Weights;

/// A loaded model.
pub struct Encoder {
    description: Description,
    kind: KernelKind,
    packed_model: Arc<dyn PackedModel>,
}

impl Encoder {
    /// Loads a model folder in the Hugging Face layout: `config.json`, `model.safetensors` and, if they
    /// exist,
    /// `1_Pooling/config.json` and `sentence_bert_config.json`.
    pub fn load(dir: &Path, kind: KernelKind) -> Result<Self, Error> {
        if !kind.is_supported() {
            return Err(Error::Cpu(format!("this CPU or system has no {kind}")));
        }
        let description = Description::read(dir)?;
        let tensors = SafetensorsFile::open(&file(dir, "model.safetensors")?)?;
        let packed_model = load_for_kernel(&description, &tensors, kind)?;
        Ok(Self { description, kind, packed_model })
    }

    /// The settings in the model folder.
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
    pub fn execution_context(&self) -> ExecutionContext {
        self.start(false)
    }

    /// Memory for a thread that embeds one short text at a time, and a second thread that helps. Most of the
    /// time goes into reading the weights, and two cores read faster. The vectors are the same.
    #[must_use]
    pub fn two_threaded_context(&self) -> ExecutionContext {
        self.start(true)
    }

    fn start(&self, helped: bool) -> ExecutionContext {
        let Description { bert, max_tokens, .. } = &self.description;
        let run = Arc::clone(&self.packed_model).execution_context(*max_tokens, helped);
        ExecutionContext::new(run, bert.hidden_size, *max_tokens, bert.vocab_size)
    }
}

/// Lays out the weights for the kernel's dense layers and for its attention. One arm for each kernel.
fn load_for_kernel(
    description: &Description,
    tensors: &SafetensorsFile,
    kind: KernelKind,
) -> Result<Arc<dyn PackedModel>, Error> {
    fn network<D: Kernel, A: Float>(
        description: &Description,
        tensors: &SafetensorsFile,
    ) -> Result<Arc<dyn PackedModel>, Error> {
        Ok(Arc::new(Weights::<D, A>::new(description, tensors)?))
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
