//! The kernels there are, and which of them a CPU gets.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Error;
#[cfg(target_arch = "x86_64")]
use super::kernel::amx;

/// Which instructions, at most, an encoder uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Instructions {
    /// Those that any CPU of this architecture has, NEON on aarch64.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 with what the CPU has of bf16 and VNNI.
    Avx512,
    /// AMX as well: the best there is.
    #[default]
    Auto,
}

/// How exact an encoder computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// bf16 where it is at least as fast, `f32` elsewhere: their vectors agree to a cosine of 0.9999.
    #[default]
    Auto,
    /// 32 bits.
    F32,
    /// 16 bits for weights and, where the CPU multiplies such numbers, for what they are multiplied with; 32 in
    /// sums.
    Bf16,
    /// 8 bits in the products of dense layers: faster, and other vectors, which on CPUs of different kinds
    /// agree no better than with `f32`'s.
    Int8,
}

impl Precision {
    /// What counts in a vector's origin: `f32` and bf16 as one, since machines of both kinds may share an
    /// index.
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
    /// `f32` by AVX2 and FMA.
    Avx2,
    /// `f32` by AVX2 and FMA, with weights held as bf16.
    Avx2Bf16,
    /// Bytes by AVX2, which multiplies them as words; attention in `f32`.
    Avx2Int8,
    /// `f32` by AVX-512.
    Avx512,
    /// bf16 by AVX-512.
    Avx512Bf16,
    /// Bytes by AVX-512, attention in the best float.
    Avx512Int8,
    /// bf16 by AMX.
    AmxBf16,
    /// Bytes by AMX, attention in bf16.
    AmxInt8,
}

impl KernelKind {
    /// All of them.
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

    /// Its name, such as `avx512-bf16`.
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

    /// What it computes in.
    #[must_use]
    pub fn precision(self) -> Precision {
        match self {
            Self::Portable | Self::Avx2 | Self::Avx512 => Precision::F32,
            Self::Avx2Bf16 | Self::Avx512Bf16 | Self::AmxBf16 => Precision::Bf16,
            Self::Avx2Int8 | Self::Avx512Int8 | Self::AmxInt8 => Precision::Int8,
        }
    }

    /// What it needs.
    #[must_use]
    pub fn instructions(self) -> Instructions {
        match self {
            Self::Portable => Instructions::Portable,
            Self::Avx2 | Self::Avx2Bf16 | Self::Avx2Int8 => Instructions::Avx2,
            Self::Avx512 | Self::Avx512Bf16 | Self::Avx512Int8 => Instructions::Avx512,
            Self::AmxBf16 | Self::AmxInt8 => Instructions::Auto,
        }
    }

    /// Whether this CPU and system have it.
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

    /// Whether this CPU and system have it.
    #[cfg(not(target_arch = "x86_64"))]
    #[must_use]
    pub fn is_supported(self) -> bool {
        self == Self::Portable
    }

    /// The fastest kernel of this precision that this machine has, with no more than these instructions.
    pub fn choose(precision: Precision, most: Instructions) -> Result<Self, Error> {
        let wanted: &[Self] = match precision {
            // By AVX2, bf16 multiplies no faster than `f32`, but a single text need not wait for so much memory.
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
                "embedder.precision = \"{name}\" needs {needs}, which this CPU has not or \
                 embedder.instructions rules out: use \"auto\""
            ))
        })
    }
}

impl fmt::Display for KernelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
