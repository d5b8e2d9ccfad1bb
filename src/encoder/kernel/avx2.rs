//! AVX2 and FMA kernels: `f32` with weights in `f32` or bf16, in tiles of 6 rows by 2 registers; and bytes as
//! words of 16 bits, in tiles of 5 rows.
//!
//! Of the 16 registers, 12 hold sums, 2 hold columns of the panel, and one holds a word of a row in all
//! lanes.

use std::arch::asm;
use std::arch::x86_64::{
    __m256, __m256i, _MM_HINT_T0, _mm_prefetch, _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256,
    _mm256_castsi256_ps, _mm256_cvtepi32_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_madd_epi16, _mm256_mul_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps,
    _mm256_setzero_si256, _mm256_slli_epi32, _mm256_storeu_ps,
};

use super::super::simd::avx2::Avx2;
use super::rows::{Rows, opaque};
use super::{
    Accumulators, Kernel, LeftMatrix, Quantization, RightPanel, Tile, WithSimd, by_rows, encode_bf16,
    encode_int8, quantize, unquantized,
};

/// Columns of a panel: two registers.
const COLUMNS: usize = 16;

/// Words in depth that are multiplied before the pointers advance.
const UNROLLED: usize = 4;

/// Distance in bytes between the weights that are multiplied and the weights that are prefetched. A single
/// short text waits for memory, and the CPU's own prefetcher does not cross a page.
const AHEAD: usize = 4096;

/// `f32`.
pub(crate) struct F32;

impl Kernel for F32 {
    type Simd = Avx2;
    type Element = f32;
    type Operand = f32;
    type Weight = f32;
    const GROUP: usize = 1;
    const DEPTH: usize = UNROLLED;
    const ROWS: usize = 6;
    const COLUMNS: usize = COLUMNS;
    // A panel is half as wide as with AVX-512, so this part can be twice as deep.
    const CHUNK: usize = 384;

    #[target_feature(enable = "avx2,fma")]
    unsafe fn vectorize<O: WithSimd>(op: O) -> O::Output {
        // SAFETY: the caller has checked the CPU features.
        unsafe { op.run() }
    }

    fn encode(column: &[f32], to: &mut [f32]) -> f32 {
        to.copy_from_slice(column);
        1.0
    }

    #[inline(always)]
    fn left(elements: *const f32, width: usize, _: *const f32, _: *const Quantization) -> LeftMatrix<Self> {
        unquantized(elements, width)
    }

    #[inline(always)]
    unsafe fn tile(left: LeftMatrix<Self>, rows: usize, right: &RightPanel<Self>, sums: Accumulators) {
        // SAFETY: guaranteed by the caller.
        unsafe { TILE_F32S[rows - 1](left, right, sums) }
    }
}

/// Initial sums: zeros, or the present sums.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn begin<const ROWS: usize>(sums: Accumulators) -> [[__m256; 2]; ROWS] {
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
unsafe fn finish<const ROWS: usize>(registers: [[__m256; 2]; ROWS], sums: Accumulators) {
    for (row, [low, high]) in registers.into_iter().enumerate() {
        // SAFETY: the caller's sums have this many rows and 16 columns.
        unsafe {
            let to = sums.data.add(row * sums.stride);
            _mm256_storeu_ps(to, low);
            _mm256_storeu_ps(to.add(8), high);
        }
    }
}

/// Prefetches a cache line of weights ahead of `weights`. The line may be past the end: a prefetch of an
/// invalid address has no effect.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn fetch<W>(weights: *const W) {
    _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_byte_add(AHEAD).cast());
}

/// Returns the same sum, and fixes its place in the program. Otherwise the compiler would start later steps
/// early and run out of registers.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn held_f32(mut sum: __m256) -> __m256 {
    // SAFETY: the assembly contains no instruction.
    unsafe { asm!("/* {0} */", inout(ymm_reg) sum, options(pure, nomem, nostack, preserves_flags)) };
    sum
}

/// Returns the same sum, and hides its origin from the compiler. Otherwise the compiler would first add the
/// products of several steps and run out of registers.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn held_i32(mut sum: __m256i) -> __m256i {
    // SAFETY: the assembly contains no instruction.
    unsafe { asm!("/* {0} */", inout(ymm_reg) sum, options(pure, nomem, nostack, preserves_flags)) };
    sum
}

static TILE_F32S: [Tile<LeftMatrix<F32>, RightPanel<F32>>; 6] = by_rows!(tile_f32; 1 2 3 4 5 6);

#[target_feature(enable = "avx2,fma")]
unsafe fn tile_f32<const ROWS: usize>(left: LeftMatrix<F32>, right: &RightPanel<F32>, sums: Accumulators) {
    // SAFETY: the caller guarantees `ROWS` rows and 16 columns, `depth` deep.
    unsafe {
        let mut registers = begin::<ROWS>(sums);
        let mut rows = Rows::new::<ROWS>(left.data.cast(), left.stride);
        let mut columns = right.data;
        for _ in 0..right.depth / UNROLLED {
            for step in 0..UNROLLED {
                let at = columns.add(step * COLUMNS);
                fetch(at);
                let (low, high) = (_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8)));
                for (row, [to_low, to_high]) in registers.iter_mut().enumerate() {
                    let word = _mm256_castsi256_ps(_mm256_set1_epi32(rows.word(row, step)));
                    *to_low = held_f32(_mm256_fmadd_ps(word, low, *to_low));
                    *to_high = held_f32(_mm256_fmadd_ps(word, high, *to_high));
                }
            }
            rows.advance();
            columns = columns.add(UNROLLED * COLUMNS);
        }
        finish(registers, sums);
    }
}

/// `f32` with weights stored as bf16. This halves the memory to read, which limits the speed of a short text.
/// A word holds two neighbours in depth. Each becomes an `f32` after the bits of the other are removed.
pub(crate) struct Bf16;

impl Kernel for Bf16 {
    type Simd = Avx2;
    type Element = f32;
    type Operand = f32;
    type Weight = u16;
    const GROUP: usize = 2;
    const DEPTH: usize = UNROLLED;
    const ROWS: usize = 6;
    const COLUMNS: usize = COLUMNS;
    const CHUNK: usize = 384;

    #[target_feature(enable = "avx2,fma")]
    unsafe fn vectorize<O: WithSimd>(op: O) -> O::Output {
        // SAFETY: the caller has checked the CPU features.
        unsafe { op.run() }
    }

    fn encode(column: &[f32], to: &mut [u16]) -> f32 {
        encode_bf16(column, to)
    }

    #[inline(always)]
    fn left(elements: *const f32, width: usize, _: *const f32, _: *const Quantization) -> LeftMatrix<Self> {
        unquantized(elements, width)
    }

    #[inline(always)]
    unsafe fn tile(left: LeftMatrix<Self>, rows: usize, right: &RightPanel<Self>, sums: Accumulators) {
        // SAFETY: guaranteed by the caller.
        unsafe { TILE_BF16S[rows - 1](left, right, sums) }
    }
}

static TILE_BF16S: [Tile<LeftMatrix<Bf16>, RightPanel<Bf16>>; 6] = by_rows!(tile_bf16; 1 2 3 4 5 6);

#[target_feature(enable = "avx2,fma")]
unsafe fn tile_bf16<const ROWS: usize>(left: LeftMatrix<Bf16>, right: &RightPanel<Bf16>, sums: Accumulators) {
    // SAFETY: the caller guarantees `ROWS` rows and 16 columns, `depth` deep, which is a multiple of four.
    unsafe {
        let mut registers = begin::<ROWS>(sums);
        let mut rows = Rows::new::<ROWS>(left.data.cast(), left.stride);
        let mut pairs = right.data;
        // Each pair is read twice, because no register is free to keep it.
        let mut again = opaque(pairs);
        let upper = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
        for _ in 0..right.depth / UNROLLED {
            for step in 0..UNROLLED {
                let at = step / 2 * 2 * COLUMNS;
                let (low, high) = if step % 2 == 0 {
                    let at = pairs.add(at);
                    fetch(at);
                    let (low, high) = (_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(16).cast()));
                    (_mm256_slli_epi32::<16>(low), _mm256_slli_epi32::<16>(high))
                } else {
                    let at = again.add(at);
                    let (low, high) = (_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(16).cast()));
                    (_mm256_and_si256(low, upper), _mm256_and_si256(high, upper))
                };
                let (low, high) = (_mm256_castsi256_ps(low), _mm256_castsi256_ps(high));
                for (row, [to_low, to_high]) in registers.iter_mut().enumerate() {
                    let word = _mm256_castsi256_ps(_mm256_set1_epi32(rows.word(row, step)));
                    *to_low = held_f32(_mm256_fmadd_ps(word, low, *to_low));
                    *to_high = held_f32(_mm256_fmadd_ps(word, high, *to_high));
                }
            }
            rows.advance();
            pairs = pairs.add(UNROLLED * COLUMNS);
            again = again.add(UNROLLED * COLUMNS);
        }
        finish(registers, sums);
    }
}

/// Bytes, stored and multiplied as words of 16 bits. The instruction for bytes adds products in 16 bits,
/// which can overflow. The instruction for words multiplies half as many numbers, but needs no third
/// instruction.
pub(crate) struct Int8;

impl Kernel for Int8 {
    type Simd = Avx2;
    type Element = f32;
    type Operand = i16;
    type Weight = i16;
    const QUANTIZED: bool = true;
    const GROUP: usize = 2;
    const DEPTH: usize = 2 * UNROLLED;
    // With six rows, one sum would have no register, because a product needs a register before it is added.
    const ROWS: usize = 5;
    const COLUMNS: usize = COLUMNS;

    #[target_feature(enable = "avx2,fma")]
    unsafe fn vectorize<O: WithSimd>(op: O) -> O::Output {
        // SAFETY: the caller has checked the CPU features.
        unsafe { op.run() }
    }

    fn encode(column: &[f32], to: &mut [i16]) -> f32 {
        encode_int8(column, to)
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
        // SAFETY: guaranteed by the caller.
        unsafe { quantize::<f32, i16, Self::Simd>(elements, rows, width, operands, quantizations) }
    }

    #[inline(always)]
    fn left(
        _: *const f32,
        width: usize,
        data: *const i16,
        quantizations: *const Quantization,
    ) -> LeftMatrix<Self> {
        LeftMatrix { data, stride: width, quantizations }
    }

    #[inline(always)]
    unsafe fn tile(left: LeftMatrix<Self>, rows: usize, right: &RightPanel<Self>, sums: Accumulators) {
        // SAFETY: guaranteed by the caller.
        unsafe { TILE_I16S[rows - 1](left, right, sums) }
    }
}

static TILE_I16S: [Tile<LeftMatrix<Int8>, RightPanel<Int8>>; 5] = by_rows!(tile_i16; 1 2 3 4 5);

#[target_feature(enable = "avx2,fma")]
unsafe fn tile_i16<const ROWS: usize>(left: LeftMatrix<Int8>, right: &RightPanel<Int8>, sums: Accumulators) {
    // SAFETY: the caller guarantees `ROWS` rows and 16 columns, `depth` deep, which is even.
    unsafe {
        let mut registers = [[_mm256_setzero_si256(); 2]; ROWS];
        let mut rows = Rows::new::<ROWS>(left.data.cast(), left.stride / 2);
        let mut columns = right.data;
        for _ in 0..right.depth / (2 * UNROLLED) {
            for step in 0..UNROLLED {
                let at = columns.add(step * 2 * COLUMNS);
                fetch(at);
                let (low, high) = (_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(16).cast()));
                for (row, [to_low, to_high]) in registers.iter_mut().enumerate() {
                    let word = _mm256_set1_epi32(rows.word(row, step));
                    *to_low = held_i32(_mm256_add_epi32(*to_low, _mm256_madd_epi16(word, low)));
                    *to_high = held_i32(_mm256_add_epi32(*to_high, _mm256_madd_epi16(word, high)));
                }
            }
            rows.advance();
            columns = columns.add(UNROLLED * 2 * COLUMNS);
        }
        for (row, [low, high]) in registers.into_iter().enumerate() {
            let sums = Accumulators { data: sums.data.add(row * sums.stride), ..sums };
            let [[before_low, before_high]] = begin::<1>(sums);
            let quantization = *left.quantizations.add(row);
            let low = dequantize(low, quantization, right, 0, before_low);
            let high = dequantize(high, quantization, right, 8, before_high);
            finish([[low, high]], sums);
        }
    }
}

/// `(sum of products * row's scale + sum of units * row's least) * column's scale + before`.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn dequantize(
    products: __m256i,
    row: Quantization,
    right: &RightPanel<Int8>,
    column: usize,
    before: __m256,
) -> __m256 {
    // SAFETY: the caller's column is in the panel.
    unsafe {
        let least = _mm256_mul_ps(_mm256_loadu_ps(right.sums.add(column)), _mm256_set1_ps(row.least));
        let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_set1_ps(row.scale), least);
        _mm256_add_ps(_mm256_mul_ps(sum, _mm256_loadu_ps(right.scales.add(column))), before)
    }
}
