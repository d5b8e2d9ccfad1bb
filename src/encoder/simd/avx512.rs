//! AVX-512: 16 numbers in a register.

use std::arch::x86_64::{
    __m256bh, __m256i, __m512, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _mm_storeu_si128,
    _mm256_loadu_si256, _mm256_storeu_si256, _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512,
    _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cvtepi32_epi16, _mm512_cvtepi32_ps,
    _mm512_cvtepu16_epi32, _mm512_cvtneps_pbh, _mm512_cvtps_epi32, _mm512_cvtusepi32_epi8, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_mov_ps, _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps,
    _mm512_reduce_add_ps, _mm512_reduce_max_ps, _mm512_roundscale_ps, _mm512_scalef_ps, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_slli_epi32, _mm512_srli_epi32,
    _mm512_storeu_ps, _mm512_storeu_si512, _mm512_sub_ps, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use super::Simd;

/// A `zmm` register. `BF16` is true if the CPU has an instruction to convert to bf16 (AVX512-BF16).
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const BF16: bool>(pub(crate) __m512);

// SAFETY of all functions: the caller has checked that the CPU has AVX-512 F, BW, DQ and VL (and BF16, if
// `BF16` is true), and that pointers are valid for 16 numbers.
impl<const BF16: bool> Simd for Avx512<BF16> {
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(number: f32) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_set1_ps(number) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: see above.
        unsafe {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves)))
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        // SAFETY: see above; a `__m256bh` is 32 bytes like a `__m256i`.
        unsafe {
            let halves: __m256i = if BF16 {
                std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(self.0))
            } else {
                let bits = _mm512_castps_si512(self.0);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
                _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded))
            };
            _mm256_storeu_si256(to.cast(), halves);
        }
    }

    #[inline(always)]
    unsafe fn load_i32(from: *const i32) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_cvtepi32_ps(_mm512_loadu_si512(from.cast())) })
    }

    #[inline(always)]
    unsafe fn store_u8(self, to: *mut u8) {
        // SAFETY: see above.
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(self.0))) }
    }

    #[inline(always)]
    unsafe fn store_i16(self, to: *mut i16) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(self.0))) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_min_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }

    #[inline(always)]
    unsafe fn scale(self, exponent: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_scalef_ps(self.0, exponent.0) })
    }

    #[inline(always)]
    unsafe fn first(self, count: usize, fill: Self) -> Self {
        let mask = if count >= 16 { u16::MAX } else { (1 << count) - 1 };
        // SAFETY: see above.
        Self(unsafe { _mm512_mask_mov_ps(fill.0, mask, self.0) })
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_add_ps(self.0) }
    }

    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_max_ps(self.0) }
    }

    /// Works in four rounds: words of two rows, pairs of four rows, and two rounds of register quarters.
    #[inline(always)]
    unsafe fn transpose(from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
        // SAFETY: see above, for 16 rows on both sides.
        unsafe {
            let mut rows = [_mm512_setzero_si512(); 16];
            for (row, words) in rows.iter_mut().enumerate() {
                *words = _mm512_loadu_si512(from.add(row * from_stride).cast());
            }
            // Each quarter of a register holds one word of two neighbouring rows, twice. Loops, because
            // closures would be compiled without the CPU features.
            let mut words = rows;
            for at in (0..16).step_by(2) {
                words[at] = _mm512_unpacklo_epi32(rows[at], rows[at + 1]);
                words[at + 1] = _mm512_unpackhi_epi32(rows[at], rows[at + 1]);
            }
            // Each quarter holds one column of four neighbouring rows.
            let mut fours = words;
            for at in (0..16).step_by(4) {
                fours[at] = _mm512_unpacklo_epi64(words[at], words[at + 2]);
                fours[at + 1] = _mm512_unpackhi_epi64(words[at], words[at + 2]);
                fours[at + 2] = _mm512_unpacklo_epi64(words[at + 1], words[at + 3]);
                fours[at + 3] = _mm512_unpackhi_epi64(words[at + 1], words[at + 3]);
            }
            for column in 0..4 {
                let (a, b, c, d) = (fours[column], fours[column + 4], fours[column + 8], fours[column + 12]);
                let (low, high) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
                let (low2, high2) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
                let out = [
                    (column, _mm512_shuffle_i32x4::<0x88>(low, low2)),
                    (column + 4, _mm512_shuffle_i32x4::<0x88>(high, high2)),
                    (column + 8, _mm512_shuffle_i32x4::<0xdd>(low, low2)),
                    (column + 12, _mm512_shuffle_i32x4::<0xdd>(high, high2)),
                ];
                for (row, words) in out {
                    _mm512_storeu_si512(to.add(row * to_stride).cast(), words);
                }
            }
        }
    }
}
