//! AVX2 and FMA: `f32`, tiles of 6 rows by 2 registers.
//!
//! 12 of the 16 registers hold sums, 2 the panel's columns and one a number of a row, spread to all lanes.

use std::arch::x86_64::{
    _mm256_castsi256_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_epi32, _mm256_setzero_ps, _mm256_storeu_ps,
};

use super::super::lanes::avx2::Avx2;
use super::rows::Rows;
use super::{Kernel, Left, Op, Quantization, Right, Sums, as_they_are};

/// Columns of a panel: two registers.
const COLUMNS: usize = 16;

/// Words in depth that are multiplied before pointers move on.
const UNROLLED: usize = 4;

/// `f32`.
pub(in crate::encoder) struct F32;

impl Kernel for F32 {
    type Lanes = Avx2;
    type Element = f32;
    type Operand = f32;
    type Weight = f32;
    const GROUP: usize = 1;
    const DEPTH: usize = UNROLLED;
    const ROWS: usize = 6;
    const COLUMNS: usize = COLUMNS;
    // A panel is half as wide as AVX-512's.
    const CHUNK: usize = 384;

    #[target_feature(enable = "avx2,fma")]
    unsafe fn vectorize<O: Op>(op: O) -> O::Output {
        // SAFETY: the caller has seen the features.
        unsafe { op.run() }
    }

    fn encode(column: &[f32], to: &mut [f32]) -> f32 {
        to.copy_from_slice(column);
        1.0
    }

    fn units(weight: f32) -> f32 {
        weight
    }

    #[inline(always)]
    fn left(elements: *const f32, width: usize, _: *const u8, _: *const Quantization) -> Left<Self> {
        as_they_are(elements, width)
    }

    #[inline(always)]
    unsafe fn tile(left: Left<Self>, rows: usize, right: &Right<Self>, sums: Sums) {
        // SAFETY: the caller's.
        unsafe {
            match rows {
                1 => tile::<1>(left, right, sums),
                2 => tile::<2>(left, right, sums),
                3 => tile::<3>(left, right, sums),
                4 => tile::<4>(left, right, sums),
                5 => tile::<5>(left, right, sums),
                _ => tile::<6>(left, right, sums),
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
#[inline(never)]
unsafe fn tile<const ROWS: usize>(left: Left<F32>, right: &Right<F32>, sums: Sums) {
    // SAFETY: the caller's: `ROWS` rows and 16 columns, `depth` deep.
    unsafe {
        let mut registers = [[_mm256_setzero_ps(); 2]; ROWS];
        if sums.add {
            for (row, registers) in registers.iter_mut().enumerate() {
                let from = sums.data.add(row * sums.stride);
                *registers = [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))];
            }
        }
        let mut rows = Rows::new::<ROWS>(left.data.cast(), left.stride);
        let mut columns = right.data;
        for _ in 0..right.depth / UNROLLED {
            for step in 0..UNROLLED {
                let at = columns.add(step * COLUMNS);
                let (low, high) = (_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8)));
                for (row, [to_low, to_high]) in registers.iter_mut().enumerate() {
                    let word = _mm256_castsi256_ps(_mm256_set1_epi32(rows.word(row, step)));
                    *to_low = _mm256_fmadd_ps(word, low, *to_low);
                    *to_high = _mm256_fmadd_ps(word, high, *to_high);
                }
            }
            rows.advance();
            columns = columns.add(UNROLLED * COLUMNS);
        }
        for (row, [low, high]) in registers.into_iter().enumerate() {
            let to = sums.data.add(row * sums.stride);
            _mm256_storeu_ps(to, low);
            _mm256_storeu_ps(to.add(8), high);
        }
    }
}
