//! Plain Rust, for CPUs without a special kernel. The compiler may vectorize it.

use super::{Simd, bf16};

/// Eight numbers.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 8]);

/// Evaluates an expression for each lane. A macro, because closures are not inlined at this depth.
macro_rules! each {
    ($lane:ident: $number:expr) => {{
        let mut numbers = [0.0_f32; 8];
        let mut $lane = 0;
        while $lane < 8 {
            numbers[$lane] = $number;
            $lane += 1;
        }
        Self(numbers)
    }};
}

// SAFETY of all functions: the caller's pointers are valid for eight numbers, in the transposition for eight
// rows of eight numbers.
impl Simd for Portable {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(number: f32) -> Self {
        Self([number; 8])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see above.
        Self(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see above.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: see above.
        let halves = unsafe { from.cast::<[u16; 8]>().read_unaligned() };
        each!(lane: f32::from_bits(u32::from(halves[lane]) << 16))
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        // SAFETY: see above.
        unsafe { to.cast::<[u16; 8]>().write_unaligned(self.0.map(bf16)) }
    }

    #[inline(always)]
    unsafe fn load_i32(from: *const i32) -> Self {
        // SAFETY: see above.
        let whole = unsafe { from.cast::<[i32; 8]>().read_unaligned() };
        each!(lane: whole[lane] as f32)
    }

    #[inline(always)]
    unsafe fn store_u8(self, to: *mut u8) {
        let bytes = self.0.map(|number| number.round_ties_even() as u8);
        // SAFETY: see above.
        unsafe { to.cast::<[u8; 8]>().write_unaligned(bytes) }
    }

    #[inline(always)]
    unsafe fn store_i16(self, to: *mut i16) {
        let words = self.0.map(|number| number.round_ties_even() as i16);
        // SAFETY: see above.
        unsafe { to.cast::<[i16; 8]>().write_unaligned(words) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        each!(lane: self.0[lane] + other.0[lane])
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        each!(lane: self.0[lane] - other.0[lane])
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        each!(lane: self.0[lane] * other.0[lane])
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        // `f32::mul_add` is a slow library call on a CPU without such an instruction.
        each!(lane: self.0[lane] * factor.0[lane] + addend.0[lane])
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        each!(lane: if self.0[lane] > other.0[lane] { self.0[lane] } else { other.0[lane] })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        each!(lane: if self.0[lane] < other.0[lane] { self.0[lane] } else { other.0[lane] })
    }

    #[inline(always)]
    unsafe fn round(self) -> Self {
        // Adding and subtracting 1.5 * 2^23 removes the bits below one. The numbers here are small enough.
        each!(lane: (self.0[lane] + 12_582_912.0) - 12_582_912.0)
    }

    #[inline(always)]
    unsafe fn scale(self, exponent: Self) -> Self {
        each!(lane: self.0[lane] * f32::from_bits(((exponent.0[lane] as i32 + 127) << 23) as u32))
    }

    #[inline(always)]
    unsafe fn first(self, count: usize, fill: Self) -> Self {
        each!(lane: if lane < count { self.0[lane] } else { fill.0[lane] })
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        super::sum_of_eight(self.0)
    }

    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    unsafe fn transpose(from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
        for row in 0..8 {
            for column in 0..8 {
                // SAFETY: see above.
                unsafe {
                    let word = from.add(row * from_stride + column).read_unaligned();
                    to.add(column * to_stride + row).write_unaligned(word);
                }
            }
        }
    }
}
