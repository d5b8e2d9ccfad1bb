//! Registers of `f32`, and the operations of the encoder's stages on them.
//!
//! Each stage is written once, generic over [`Simd`], and compiled for each instruction set. Everything here
//! is inlined into a function with the features of the instruction set enabled (see `kernel`).

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
pub(super) mod portable;

use super::aligned_buffer::Pod;

/// A register of [`Simd::LANES`] numbers.
///
/// # Safety
///
/// All functions need a CPU with the instructions of the implementation. Pointers need no alignment, but must
/// be valid for all numbers that are read or written.
pub(super) trait Simd: Copy {
    /// Numbers in a register.
    const LANES: usize;

    unsafe fn splat(number: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// Loads numbers whose `f32` bits have these upper halves.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Rounds to the nearest bf16, ties to even, and stores it.
    unsafe fn store_bf16(self, to: *mut u16);
    /// Loads whole numbers.
    unsafe fn load_i32(from: *const i32) -> Self;
    /// Rounds to the nearest whole number and stores it as a byte. The numbers must be in 0 to 255.
    unsafe fn store_u8(self, to: *mut u8);
    /// As `store_u8`, but stores words of 16 bits.
    unsafe fn store_i16(self, to: *mut i16);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// `self * factor + addend`, rounded only once if the CPU can.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    unsafe fn max(self, other: Self) -> Self;
    unsafe fn min(self, other: Self) -> Self;
    /// Rounds to the nearest whole number.
    unsafe fn round(self) -> Self;
    /// `self * 2^exponent`, for a whole exponent from -126 to 127.
    unsafe fn scale(self, exponent: Self) -> Self;
    /// Keeps the first `count` lanes, and takes all other lanes from `fill`.
    unsafe fn first(self, count: usize, fill: Self) -> Self;
    /// Sum of the lanes.
    unsafe fn sum(self) -> f32;
    /// The largest lane.
    unsafe fn largest(self) -> f32;
    /// Transposes a square of 32-bit words, with [`Simd::LANES`] rows and columns. Strides are in words.
    unsafe fn transpose(from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize);
}

/// A number that the stages pass to each other.
pub(super) trait Element: Pod {
    /// Coefficients of [`math::gelu`](super::math::gelu), with the precision of the element.
    const GELU: &'static [f32];
    /// Beyond this bound, in both directions, the normal distribution counts as 0 or 1.
    const GELU_BOUND: f32;

    unsafe fn get<V: Simd>(from: *const Self) -> V;
    unsafe fn put<V: Simd>(numbers: V, to: *mut Self);

    /// Interleaves the rows of one word: puts their numbers side by side, for each of `columns` columns. Only
    /// the first `present` rows exist; the numbers of all other rows are zeros.
    unsafe fn interleave(from: *const Self, stride: usize, present: usize, to: *mut Self, columns: usize);
}

impl Element for f32 {
    // Within 4.5e-5 of x * Phi(x).
    const GELU: &'static [f32] = &[
        0.398_893_2,
        -0.066_269_636,
        0.009_747_065,
        -0.001_083_102_4,
        8.858_582_4e-5,
        -5.112_003e-6,
        1.945_112_7e-7,
        -4.336_822_5e-9,
        4.263_475e-11,
    ];
    const GELU_BOUND: f32 = 4.35;

    #[inline(always)]
    unsafe fn get<V: Simd>(from: *const Self) -> V {
        // SAFETY: guaranteed by the caller.
        unsafe { V::load(from) }
    }

    #[inline(always)]
    unsafe fn put<V: Simd>(numbers: V, to: *mut Self) {
        // SAFETY: guaranteed by the caller.
        unsafe { numbers.store(to) }
    }

    #[inline(always)]
    unsafe fn interleave(from: *const Self, _: usize, present: usize, to: *mut Self, columns: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            match present {
                0 => to.write_bytes(0, columns),
                _ => to.copy_from_nonoverlapping(from, columns),
            }
        }
    }
}

/// The bits of a bf16: the upper half of an `f32`.
impl Element for u16 {
    // Within 1.7e-4 of x * Phi(x): a bf16 has 8 bits.
    const GELU: &'static [f32] = &[
        0.397_986_68,
        -0.064_722_75,
        0.008_842_918,
        -0.000_829_039_5,
        4.955_195_3e-5,
        -1.681_153_2e-6,
        2.443_579_6e-8,
    ];
    const GELU_BOUND: f32 = 3.95;

    #[inline(always)]
    unsafe fn get<V: Simd>(from: *const Self) -> V {
        // SAFETY: guaranteed by the caller.
        unsafe { V::load_bf16(from) }
    }

    #[inline(always)]
    unsafe fn put<V: Simd>(numbers: V, to: *mut Self) {
        // SAFETY: guaranteed by the caller.
        unsafe { numbers.store_bf16(to) }
    }

    #[inline(always)]
    unsafe fn interleave(from: *const Self, stride: usize, present: usize, to: *mut Self, columns: usize) {
        // One row gives the lower half of each word, the next row the upper half. The compiler vectorizes the
        // loops.
        #[allow(clippy::cast_ptr_alignment, reason = "written unaligned")]
        let to = to.cast::<u32>();
        // SAFETY: guaranteed by the caller.
        unsafe {
            match present {
                0 => to.write_bytes(0, columns),
                1 => {
                    for column in 0..columns {
                        to.add(column).write_unaligned(u32::from(*from.add(column)));
                    }
                }
                _ => {
                    let next = from.add(stride);
                    for column in 0..columns {
                        let word = u32::from(*from.add(column)) | u32::from(*next.add(column)) << 16;
                        to.add(column).write_unaligned(word);
                    }
                }
            }
        }
    }
}

/// Adds in pairs, in the same order as an addition of register halves.
#[inline(always)]
fn sum_of_eight(numbers: [f32; 8]) -> f32 {
    let at = |lane: usize| numbers[lane] + numbers[lane + 4];
    (at(0) + at(2)) + (at(1) + at(3))
}

/// Whole numbers from 0 to 255, as operands of products.
pub(super) trait QuantizedInteger: Pod {
    unsafe fn put<V: Simd>(numbers: V, to: *mut Self);
}

impl QuantizedInteger for u8 {
    #[inline(always)]
    unsafe fn put<V: Simd>(numbers: V, to: *mut Self) {
        // SAFETY: guaranteed by the caller.
        unsafe { numbers.store_u8(to) }
    }
}

impl QuantizedInteger for i16 {
    #[inline(always)]
    unsafe fn put<V: Simd>(numbers: V, to: *mut Self) {
        // SAFETY: guaranteed by the caller.
        unsafe { numbers.store_i16(to) }
    }
}

/// The bits of the nearest bf16, ties to even. The number must not be a NaN.
#[inline(always)]
pub(super) fn bf16(number: f32) -> u16 {
    let bits = number.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}
