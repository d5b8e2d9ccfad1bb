//! AVX2 and FMA: 8 numbers in a register.

use std::arch::x86_64::{
    __m256, _CMP_GT_OQ, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _mm_loadu_si128, _mm_storeu_si128,
    _mm256_add_epi32, _mm256_add_ps, _mm256_blendv_ps, _mm256_castsi256_ps, _mm256_castsi256_si128,
    _mm256_cmp_ps, _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32, _mm256_cvtps_epi32, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_loadu_si256, _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps, _mm256_packs_epi32,
    _mm256_permute2f128_ps, _mm256_permute4x64_epi64, _mm256_round_ps, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setr_ps, _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_slli_epi32, _mm256_storeu_ps, _mm256_sub_ps,
    _mm256_unpackhi_ps, _mm256_unpacklo_ps,
};

use super::{Simd, bf16};

/// A `ymm` register.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(pub(crate) __m256);

impl Avx2 {
    #[inline(always)]
    unsafe fn to_array(self) -> [f32; 8] {
        let mut numbers = [0.0; 8];
        // SAFETY: the array has room for eight numbers.
        unsafe { _mm256_storeu_ps(numbers.as_mut_ptr(), self.0) };
        numbers
    }
}

// SAFETY of all functions: the caller has checked that the CPU has AVX2 and FMA, and that pointers are valid
// for 8 numbers.
impl Simd for Avx2 {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(number: f32) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_set1_ps(number) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: see above.
        unsafe {
            let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves)))
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        // This need not be fast, because no kernel with these registers stores bf16.
        // SAFETY: see above.
        unsafe { to.cast::<[u16; 8]>().write_unaligned(self.to_array().map(bf16)) }
    }

    #[inline(always)]
    unsafe fn load_i32(from: *const i32) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_cvtepi32_ps(_mm256_loadu_si256(from.cast())) })
    }

    #[inline(always)]
    unsafe fn store_u8(self, to: *mut u8) {
        // This need not be fast, because no kernel with these registers multiplies bytes.
        // SAFETY: see above.
        unsafe {
            let bytes = self.to_array().map(|number| number.round_ties_even() as u8);
            to.cast::<[u8; 8]>().write_unaligned(bytes);
        }
    }

    #[inline(always)]
    unsafe fn store_i16(self, to: *mut i16) {
        // SAFETY: see above. The pack instruction turns each half of the register into a quarter, twice.
        unsafe {
            let words = _mm256_cvtps_epi32(self.0);
            let halves = _mm256_permute4x64_epi64::<0b1000>(_mm256_packs_epi32(words, words));
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(halves));
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_sub_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, addend.0) })
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_min_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }

    #[inline(always)]
    unsafe fn scale(self, exponent: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(exponent.0), _mm256_set1_epi32(127));
            Self(_mm256_mul_ps(self.0, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))))
        }
    }

    #[inline(always)]
    unsafe fn first(self, count: usize, fill: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            let lanes = _mm256_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0);
            let mask = _mm256_cmp_ps::<_CMP_GT_OQ>(_mm256_set1_ps(count as f32), lanes);
            Self(_mm256_blendv_ps(fill.0, self.0, mask))
        }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see above.
        let numbers = unsafe { self.to_array() };
        super::sum_of_eight(numbers)
    }

    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        // SAFETY: see above.
        unsafe { self.to_array() }.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    unsafe fn transpose(from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
        // SAFETY: see above, for 8 rows on both sides; loads and shuffles do not change the bits.
        unsafe {
            // Loops, because closures would be compiled without the CPU features.
            let mut rows = [_mm256_setzero_ps(); 8];
            for (row, words) in rows.iter_mut().enumerate() {
                *words = _mm256_loadu_ps(from.add(row * from_stride).cast());
            }
            let mut words = rows;
            for at in (0..8).step_by(2) {
                words[at] = _mm256_unpacklo_ps(rows[at], rows[at + 1]);
                words[at + 1] = _mm256_unpackhi_ps(rows[at], rows[at + 1]);
            }
            let mut fours = words;
            for at in (0..8).step_by(4) {
                fours[at] = _mm256_shuffle_ps::<0x44>(words[at], words[at + 2]);
                fours[at + 1] = _mm256_shuffle_ps::<0xee>(words[at], words[at + 2]);
                fours[at + 2] = _mm256_shuffle_ps::<0x44>(words[at + 1], words[at + 3]);
                fours[at + 3] = _mm256_shuffle_ps::<0xee>(words[at + 1], words[at + 3]);
            }
            for column in 0..4 {
                let (a, b) = (fours[column], fours[column + 4]);
                _mm256_storeu_ps(to.add(column * to_stride).cast(), _mm256_permute2f128_ps::<0x20>(a, b));
                let other = _mm256_permute2f128_ps::<0x31>(a, b);
                _mm256_storeu_ps(to.add((column + 4) * to_stride).cast(), other);
            }
        }
    }
}
