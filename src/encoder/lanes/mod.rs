//! A register's worth of `f32`, and what the encoder's stages do with it.
//!
//! Stages are written once over [`Lanes`] and compiled for each instruction set: everything here is
//! inlined into a function that has the set's features switched on (see `kernel`).

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
pub(super) mod portable;

use super::buffer::Plain;

/// A register of [`Lanes::LANES`] numbers.
///
/// # Safety
///
/// All functions need a CPU that has the implementation's instructions. Pointers need no alignment, but
/// must be valid for as many numbers as are read or written.
pub(super) trait Lanes: Copy {
    /// How many numbers.
    const LANES: usize;

    unsafe fn splat(number: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// From the upper halves of `f32`.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Rounded to the nearest, ties to even.
    unsafe fn store_bf16(self, to: *mut u16);
    /// From whole numbers.
    unsafe fn load_i32(from: *const i32) -> Self;
    /// Rounded to the nearest, of numbers that lie in 0 to 255.
    unsafe fn store_u8(self, to: *mut u8);
    /// The same, in words of 16 bits.
    unsafe fn store_i16(self, to: *mut i16);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// `self * factor + addend`, rounded once where the CPU can.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    unsafe fn max(self, other: Self) -> Self;
    unsafe fn min(self, other: Self) -> Self;
    /// To the nearest whole number.
    unsafe fn round(self) -> Self;
    /// `self * 2^exponent`, of a whole exponent from -126 to 127.
    unsafe fn scale(self, exponent: Self) -> Self;
    /// The first `count` lanes, and `fill` in the others.
    unsafe fn first(self, count: usize, fill: Self) -> Self;
    /// Sum of the lanes.
    unsafe fn sum(self) -> f32;
    /// The largest lane.
    unsafe fn largest(self) -> f32;
    /// Transposes a square of 32-bit words, [`Lanes::LANES`] long on both sides. Strides are in words.
    unsafe fn transpose(from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize);
}

/// What the stages hand to each other.
pub(super) trait Element: Plain {
    /// Coefficients of [`math::gelu`](super::math::gelu), as exact as the element can show.
    const GELU: &'static [f32];
    /// Beyond this, in both directions, the normal distribution counts as 0 or 1.
    const GELU_BOUND: f32;

    unsafe fn get<V: Lanes>(from: *const Self) -> V;
    unsafe fn put<V: Lanes>(numbers: V, to: *mut Self);

    /// Lays `columns` columns of as many rows as make a word side by side: those `present`, zeros for the
    /// others.
    unsafe fn weave(from: *const Self, stride: usize, present: usize, to: *mut Self, columns: usize);
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
    unsafe fn get<V: Lanes>(from: *const Self) -> V {
        // SAFETY: the caller's.
        unsafe { V::load(from) }
    }

    #[inline(always)]
    unsafe fn put<V: Lanes>(numbers: V, to: *mut Self) {
        // SAFETY: the caller's.
        unsafe { numbers.store(to) }
    }

    #[inline(always)]
    unsafe fn weave(from: *const Self, _: usize, present: usize, to: *mut Self, columns: usize) {
        // SAFETY: the caller's.
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
    unsafe fn get<V: Lanes>(from: *const Self) -> V {
        // SAFETY: the caller's.
        unsafe { V::load_bf16(from) }
    }

    #[inline(always)]
    unsafe fn put<V: Lanes>(numbers: V, to: *mut Self) {
        // SAFETY: the caller's.
        unsafe { numbers.store_bf16(to) }
    }

    #[inline(always)]
    unsafe fn weave(from: *const Self, stride: usize, present: usize, to: *mut Self, columns: usize) {
        // The lower half of each word, and the upper one. Loops that the compiler turns into registers.
        #[allow(clippy::cast_ptr_alignment, reason = "written unaligned")]
        let to = to.cast::<u32>();
        // SAFETY: the caller's.
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

/// In pairs, as halves of a register would be added.
#[inline(always)]
fn sum_of_eight(numbers: [f32; 8]) -> f32 {
    let at = |lane: usize| numbers[lane] + numbers[lane + 4];
    (at(0) + at(2)) + (at(1) + at(3))
}

/// Whole numbers from 0 to 255 that products are made of.
pub(super) trait Whole: Plain {
    unsafe fn put<V: Lanes>(numbers: V, to: *mut Self);
}

impl Whole for u8 {
    #[inline(always)]
    unsafe fn put<V: Lanes>(numbers: V, to: *mut Self) {
        // SAFETY: the caller's.
        unsafe { numbers.store_u8(to) }
    }
}

impl Whole for i16 {
    #[inline(always)]
    unsafe fn put<V: Lanes>(numbers: V, to: *mut Self) {
        // SAFETY: the caller's.
        unsafe { numbers.store_i16(to) }
    }
}

/// The bits of the bf16 nearest to a number that is not a NaN, ties to even.
#[inline(always)]
pub(super) fn bf16(number: f32) -> u16 {
    let bits = number.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}
