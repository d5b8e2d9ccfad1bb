//! AVX2 and FMA: `f32`, and bytes as words of 16 bits, tiles of 6 rows by 2 registers.
//!
//! 12 of the 16 registers hold sums, 2 the panel's columns and one a word of a row, spread to all lanes.

use std::arch::x86_64::{
    __m256, __m256i, _mm256_add_epi32, _mm256_add_ps, _mm256_castsi256_ps, _mm256_cvtepi32_ps,
    _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_mul_ps,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256, _mm256_storeu_ps,
};

use super::super::lanes::avx2::Avx2;
use super::rows::Rows;
use super::{Kernel, Left, Op, Quantization, Right, Sums, as_they_are, encode_whole, quantize};

/// Columns of a panel: two registers.
const COLUMNS: usize = 16;

/// Words in depth that are multiplied before pointers move on.
const UNROLLED: usize = 4;

/// Calls a tile function for a number of rows that is known only now.
macro_rules! by_rows {
    ($function:ident, $rows:expr, $left:expr, $right:expr, $sums:expr) => {
        match $rows {
            1 => $function::<1>($left, $right, $sums),
            2 => $function::<2>($left, $right, $sums),
            3 => $function::<3>($left, $right, $sums),
            4 => $function::<4>($left, $right, $sums),
            5 => $function::<5>($left, $right, $sums),
            _ => $function::<6>($left, $right, $sums),
        }
    };
}

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
    fn left(elements: *const f32, width: usize, _: *const f32, _: *const Quantization) -> Left<Self> {
        as_they_are(elements, width)
    }

    #[inline(always)]
    unsafe fn tile(left: Left<Self>, rows: usize, right: &Right<Self>, sums: Sums) {
        // SAFETY: the caller's.
        unsafe { by_rows!(tile_f32, rows, left, right, sums) }
    }
}

/// Sums to begin with: zeros, or what is there.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn begin<const ROWS: usize>(sums: Sums) -> [[__m256; 2]; ROWS] {
    let mut registers = [[_mm256_setzero_ps(); 2]; ROWS];
    if sums.add {
        for (row, registers) in registers.iter_mut().enumerate() {
            // SAFETY: the caller's sums have this many rows and 16 columns.
            unsafe {
                let from = sums.data.add(row * sums.stride);
                *registers = [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))];
            }
        }
    }
    registers
}

#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn finish<const ROWS: usize>(registers: [[__m256; 2]; ROWS], sums: Sums) {
    for (row, [low, high]) in registers.into_iter().enumerate() {
        // SAFETY: the caller's sums have this many rows and 16 columns.
        unsafe {
            let to = sums.data.add(row * sums.stride);
            _mm256_storeu_ps(to, low);
            _mm256_storeu_ps(to.add(8), high);
        }
    }
}

#[target_feature(enable = "avx2,fma")]
#[inline(never)]
unsafe fn tile_f32<const ROWS: usize>(left: Left<F32>, right: &Right<F32>, sums: Sums) {
    // SAFETY: the caller's: `ROWS` rows and 16 columns, `depth` deep.
    unsafe {
        let mut registers = begin::<ROWS>(sums);
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
        finish(registers, sums);
    }
}

/// Bytes, held and multiplied as words of 16 bits, since the instruction for bytes adds up their products in
/// 16 bits, in which they have no room. It multiplies half as many, and needs no third instruction.
pub(in crate::encoder) struct Int8;

impl Kernel for Int8 {
    type Lanes = Avx2;
    type Element = f32;
    type Operand = i16;
    type Weight = i16;
    const QUANTIZED: bool = true;
    const GROUP: usize = 2;
    const DEPTH: usize = 2 * UNROLLED;
    const ROWS: usize = 6;
    const COLUMNS: usize = COLUMNS;

    #[target_feature(enable = "avx2,fma")]
    unsafe fn vectorize<O: Op>(op: O) -> O::Output {
        // SAFETY: the caller has seen the features.
        unsafe { op.run() }
    }

    fn encode(column: &[f32], to: &mut [i16]) -> f32 {
        encode_whole(column, to)
    }

    fn units(weight: i16) -> f32 {
        f32::from(weight)
    }

    #[inline(always)]
    unsafe fn prepare(
        elements: *const f32,
        rows: usize,
        width: usize,
        operands: *mut i16,
        quantizations: *mut Quantization,
    ) {
        // SAFETY: the caller's.
        unsafe { quantize::<f32, i16, Self::Lanes>(elements, rows, width, operands, quantizations) }
    }

    #[inline(always)]
    fn left(_: *const f32, width: usize, data: *const i16, quantizations: *const Quantization) -> Left<Self> {
        Left { data, stride: width, quantizations }
    }

    #[inline(always)]
    unsafe fn tile(left: Left<Self>, rows: usize, right: &Right<Self>, sums: Sums) {
        // SAFETY: the caller's.
        unsafe { by_rows!(tile_i16, rows, left, right, sums) }
    }
}

#[target_feature(enable = "avx2,fma")]
#[inline(never)]
unsafe fn tile_i16<const ROWS: usize>(left: Left<Int8>, right: &Right<Int8>, sums: Sums) {
    // SAFETY: the caller's: `ROWS` rows and 16 columns, `depth` deep, which is even.
    unsafe {
        let mut registers = [[_mm256_setzero_si256(); 2]; ROWS];
        let mut rows = Rows::new::<ROWS>(left.data.cast(), left.stride / 2);
        let mut columns = right.data;
        for _ in 0..right.depth / (2 * UNROLLED) {
            for step in 0..UNROLLED {
                let at = columns.add(step * 2 * COLUMNS);
                let (low, high) = (_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(16).cast()));
                for (row, [to_low, to_high]) in registers.iter_mut().enumerate() {
                    let word = _mm256_set1_epi32(rows.word(row, step));
                    *to_low = _mm256_add_epi32(*to_low, _mm256_madd_epi16(word, low));
                    *to_high = _mm256_add_epi32(*to_high, _mm256_madd_epi16(word, high));
                }
            }
            rows.advance();
            columns = columns.add(UNROLLED * 2 * COLUMNS);
        }
        let mut after = begin::<ROWS>(sums);
        for (row, (after, registers)) in after.iter_mut().zip(registers).enumerate() {
            let quantization = *left.quantizations.add(row);
            *after = [
                dequantize(registers[0], quantization, right, 0, after[0]),
                dequantize(registers[1], quantization, right, 8, after[1]),
            ];
        }
        finish(after, sums);
    }
}

/// `(sum of products * row's scale + sum of units * row's least) * column's scale + before`.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn dequantize(
    products: __m256i,
    row: Quantization,
    right: &Right<Int8>,
    column: usize,
    before: __m256,
) -> __m256 {
    // SAFETY: the caller's column lies in the panel.
    unsafe {
        let least = _mm256_mul_ps(_mm256_loadu_ps(right.sums.add(column)), _mm256_set1_ps(row.least));
        let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_set1_ps(row.scale), least);
        _mm256_add_ps(_mm256_mul_ps(sum, _mm256_loadu_ps(right.scales.add(column))), before)
    }
}
