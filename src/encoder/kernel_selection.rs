//! The kernels, and the choice of a kernel for a CPU.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::error::Error;
#[cfg(target_arch = "x86_64")]
use super::kernel::amx;

/// The newest instructions that an encoder may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum InstructionSet {
    /// Instructions of every CPU of this architecture, with NEON on aarch64.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512, with bf16 and VNNI if the CPU has them.
    Avx512,
    /// The best instructions of the CPU, AMX included.
    #[default]
    Auto,
}

/// Precision of an encoder's arithmetic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// bf16 if it is at least as fast as `f32`, otherwise `f32`. Their vectors agree to a cosine of 0.9999.
    #[default]
    Auto,
    /// 32 bits.
    F32,
    /// 16 bits for weights and, if the CPU multiplies bf16, for the numbers that they are multiplied with. 32
    /// bits for sums.
    Bf16,
    /// 8 bits in the products of dense layers. Faster, but the vectors differ from `f32`, and on different
    /// kinds of CPUs they differ from each other as much.
    Int8,
}

impl Precision {
    /// The class of precision in a model's name. `f32` and bf16 are one class, so that machines with either
    /// can share an index.
    #[must_use]
    pub fn class(self) -> &'static str {
        match self {
            Self::Auto | Self::F32 | Self::Bf16 => "f32",
            Self::Int8 => "int8",
        }
    }
}

/// A kernel: instructions and precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelKind {
    /// `f32` on any CPU.
    Portable,
    /// `f32` with AVX2 and FMA.
    Avx2,
    /// `f32` with AVX2 and FMA, with weights stored as bf16.
    Avx2Bf16,
    /// Bytes with AVX2, multiplied as words; attention in `f32`.
    Avx2Int8,
    /// `f32` with AVX-512.
    Avx512,
    /// bf16 with AVX-512.
    Avx512Bf16,
    /// Bytes with AVX-512; attention in bf16 if the CPU has it, otherwise in `f32`.
    Avx512Int8,
    /// bf16 with AMX.
    AmxBf16,
    /// Bytes with AMX; attention in bf16.
    AmxInt8,
}

impl KernelKind {
    /// All kernels.
    pub const ALL: [Self; 9] = [
        Self::Portable,
        Self::Avx2,
        Self::Avx2Bf16,
        Self::Avx2Int8,
        Self::Avx512,
        Self::Avx512Bf16,
        Self::Avx512Int8,
        Self::AmxBf16,
        Self::AmxInt8,
    ];

    /// The name, such as `avx512-bf16`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable-f32",
            Self::Avx2 => "avx2-f32",
            Self::Avx2Bf16 => "avx2-bf16",
            Self::Avx2Int8 => "avx2-int8",
            Self::Avx512 => "avx512-f32",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Avx512Int8 => "avx512-int8",
            Self::AmxBf16 => "amx-bf16",
            Self::AmxInt8 => "amx-int8",
        }
    }

    /// The precision of the kernel.
    #[must_use]
    pub fn precision(self) -> Precision {
        match self {
            Self::Portable | Self::Avx2 | Self::Avx512 => Precision::F32,
            Self::Avx2Bf16 | Self::Avx512Bf16 | Self::AmxBf16 => Precision::Bf16,
            Self::Avx2Int8 | Self::Avx512Int8 | Self::AmxInt8 => Precision::Int8,
        }
    }

    /// The instructions that the kernel needs.
    #[must_use]
    pub fn instructions(self) -> InstructionSet {
        match self {
            Self::Portable => InstructionSet::Portable,
            Self::Avx2 | Self::Avx2Bf16 | Self::Avx2Int8 => InstructionSet::Avx2,
            Self::Avx512 | Self::Avx512Bf16 | Self::Avx512Int8 => InstructionSet::Avx512,
            Self::AmxBf16 | Self::AmxInt8 => InstructionSet::Auto,
        }
    }

    /// Whether this CPU and system support the kernel.
    #[cfg(target_arch = "x86_64")]
    #[must_use]
    pub fn is_supported(self) -> bool {
        let avx512 = || {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("fma")
        };
        let bf16 = || avx512() && is_x86_feature_detected!("avx512bf16");
        match self {
            Self::Portable => true,
            Self::Avx2 | Self::Avx2Bf16 | Self::Avx2Int8 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
            }
            Self::Avx512 => avx512(),
            Self::Avx512Bf16 => bf16(),
            Self::Avx512Int8 => avx512() && is_x86_feature_detected!("avx512vnni"),
            Self::AmxBf16 | Self::AmxInt8 => bf16() && amx::is_available(),
        }
    }

    /// Whether this CPU and system support the kernel.
    #[cfg(not(target_arch = "x86_64"))]
    #[must_use]
    pub fn is_supported(self) -> bool {
        self == Self::Portable
    }

    /// The fastest kernel of this machine with this precision that uses at most these instructions.
    ///
    /// # Errors
    ///
    /// [`Error::Cpu`] if there is none.
    pub fn select(precision: Precision, most: InstructionSet) -> Result<Self, Error> {
        let wanted: &[Self] = match precision {
            // With AVX2, bf16 multiplies no faster than `f32`, but a single text reads less memory.
            Precision::Auto => {
                &[Self::AmxBf16, Self::Avx512Bf16, Self::Avx512, Self::Avx2Bf16, Self::Portable]
            }
            Precision::F32 => &[Self::Avx512, Self::Avx2, Self::Portable],
            Precision::Bf16 => &[Self::AmxBf16, Self::Avx512Bf16, Self::Avx2Bf16],
            Precision::Int8 => &[Self::AmxInt8, Self::Avx512Int8, Self::Avx2Int8],
        };
        let usable = |kind: &&Self| kind.instructions() <= most && kind.is_supported();
        wanted.iter().find(usable).copied().ok_or_else(|| {
            let (name, needs) = match precision {
                Precision::Int8 => ("int8", "AVX2, AVX512-VNNI or AMX"),
                _ => ("bf16", "AVX2, AVX512-BF16 or AMX"),
            };
            Error::Cpu(format!(
                "embedder.precision = \"{name}\" needs {needs}, but this CPU does not have them or \
                 embedder.instructions excludes them: use \"auto\""
            ))
        })
    }
}

impl fmt::Display for KernelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
