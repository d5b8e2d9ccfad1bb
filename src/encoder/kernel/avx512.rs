//! AVX-512 kernels: `f32`, bf16 (AVX512-BF16) and bytes (AVX512-VNNI), in tiles of 12 rows by 2 registers.
//!
//! Of the 32 registers, 24 hold sums, 2 hold columns of the panel, and one holds a word of a row in all
//! lanes.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_add_ps, _mm512_castsi512_ps,
    _mm512_cvtepi32_ps, _mm512_dpbf16_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_storeu_ps,
};

use super::super::simd::avx512::Avx512;
use super::rows::Rows;
use super::{
    Accumulators, Kernel, LeftMatrix, Quantization, RightPanel, Tile, WithSimd, by_rows, encode_bf16,
    encode_int8, quantize, unquantized,
};

/// Columns of a panel: two registers.
const COLUMNS: usize = 32;

/// Words in depth that are multiplied before the pointers advance.
const UNROLLED: usize = 4;

/// Distance in bytes between the weights that are multiplied and the weights that are prefetched. A single
/// short text waits for memory, and the CPU's own prefetcher does not cross a page. Batches lose nothing.
const AHEAD: usize = 4096;

/// `f32`.
pub(crate) struct F32;

impl Kernel for F32 {
    type Simd = Avx512<false>;
    type Element = f32;
    type Operand = f32;
    type Weight = f32;
    const GROUP: usize = 1;
    const DEPTH: usize = UNROLLED;
    const ROWS: usize = 12;
    const CHUNK: usize = 384;
    const COLUMNS: usize = COLUMNS;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
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

/// Prefetches the weights of a later step: two cache lines, as one step reads. They may be past the end: a
/// prefetch of an invalid address has no effect.
#[target_feature(enable = "avx512f")]
#[inline]
fn fetch<W>(weights: *const W) {
    _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_byte_add(AHEAD).cast());
    _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_byte_add(AHEAD + 64).cast());
}

/// Initial sums: zeros, or the present sums.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn begin<const ROWS: usize>(sums: Accumulators) -> [[__m512; 2]; ROWS] {
    let mut registers = [[_mm512_setzero_ps(); 2]; ROWS];
    if sums.add {
        for (row, registers) in registers.iter_mut().enumerate() {
            // SAFETY: the caller's sums have this many rows and 32 columns.
            unsafe {
                let from = sums.data.add(row * sums.stride);
                *registers = [_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16))];
            }
        }
    }
    registers
}

#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn finish<const ROWS: usize>(registers: [[__m512; 2]; ROWS], sums: Accumulators) {
    for (row, [low, high]) in registers.into_iter().enumerate() {
        // SAFETY: the caller's sums have this many rows and 32 columns.
        unsafe {
            let to = sums.data.add(row * sums.stride);
            _mm512_storeu_ps(to, low);
            _mm512_storeu_ps(to.add(16), high);
        }
    }
}

static TILE_F32S: [Tile<LeftMatrix<F32>, RightPanel<F32>>; 12] =
    by_rows!(tile_f32; 1 2 3 4 5 6 7 8 9 10 11 12);

#[target_feature(enable = "avx512f")]
unsafe fn tile_f32<const ROWS: usize>(left: LeftMatrix<F32>, right: &RightPanel<F32>, sums: Accumulators) {
    // SAFETY: the caller guarantees `ROWS` rows and 32 columns, `depth` deep.
    unsafe {
        let mut registers = begin::<ROWS>(sums);
        let mut rows = Rows::new::<ROWS>(left.data.cast(), left.stride);
        let mut columns = right.data;
        for _ in 0..right.depth / UNROLLED {
            for step in 0..UNROLLED {
                let at = columns.add(step * COLUMNS);
                fetch(at);
                let (low, high) = (_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16)));
                for (row, [to_low, to_high]) in registers.iter_mut().enumerate() {
                    let word = _mm512_castsi512_ps(_mm512_set1_epi32(rows.word(row, step)));
                    *to_low = _mm512_fmadd_ps(word, low, *to_low);
                    *to_high = _mm512_fmadd_ps(word, high, *to_high);
                }
            }
            rows.advance();
            columns = columns.add(UNROLLED * COLUMNS);
        }
        finish(registers, sums);
    }
}

/// bf16 products, added as `f32`.
pub(crate) struct Bf16;

impl Kernel for Bf16 {
    type Simd = Avx512<true>;
    type Element = u16;
    type Operand = u16;
    type Weight = u16;
    const GROUP: usize = 2;
    const DEPTH: usize = 2 * UNROLLED;
    const ROWS: usize = 12;
    const COLUMNS: usize = COLUMNS;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
    unsafe fn vectorize<O: WithSimd>(op: O) -> O::Output {
        // SAFETY: the caller has checked the CPU features.
        unsafe { op.run() }
    }

    fn encode(column: &[f32], to: &mut [u16]) -> f32 {
        encode_bf16(column, to)
    }

    #[inline(always)]
    fn left(elements: *const u16, width: usize, _: *const u16, _: *const Quantization) -> LeftMatrix<Self> {
        unquantized(elements, width)
    }

    #[inline(always)]
    unsafe fn tile(left: LeftMatrix<Self>, rows: usize, right: &RightPanel<Self>, sums: Accumulators) {
        // SAFETY: guaranteed by the caller.
        unsafe { TILE_BF16S[rows - 1](left, right, sums) }
    }
}

static TILE_BF16S: [Tile<LeftMatrix<Bf16>, RightPanel<Bf16>>; 12] =
    by_rows!(tile_bf16; 1 2 3 4 5 6 7 8 9 10 11 12);

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tile_bf16<const ROWS: usize>(left: LeftMatrix<Bf16>, right: &RightPanel<Bf16>, sums: Accumulators) {
    // SAFETY: the caller guarantees `ROWS` rows and 32 columns, `depth` deep, which is even. A `__m512bh` is
    // 64 bytes like the other registers.
    unsafe {
        let mut registers = begin::<ROWS>(sums);
        let mut rows = Rows::new::<ROWS>(left.data.cast(), left.stride / 2);
        let mut columns = right.data;
        for _ in 0..right.depth / (2 * UNROLLED) {
            for step in 0..UNROLLED {
                let at = columns.add(step * 2 * COLUMNS);
                fetch(at);
                let low = std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(at.cast()));
                let high = std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(at.add(32).cast()));
                for (row, [to_low, to_high]) in registers.iter_mut().enumerate() {
                    let word = _mm512_set1_epi32(rows.word(row, step));
                    let word = std::mem::transmute::<__m512i, __m512bh>(word);
                    *to_low = _mm512_dpbf16_ps(*to_low, word, low);
                    *to_high = _mm512_dpbf16_ps(*to_high, word, high);
                }
            }
            rows.advance();
            columns = columns.add(UNROLLED * 2 * COLUMNS);
        }
        finish(registers, sums);
    }
}

/// Products of bytes, added as whole numbers. The stages between the products use bf16 instructions if the
/// CPU has them. A macro writes both variants, because attributes take no parameters.
macro_rules! int8 {
    ($(#[$about:meta])* $name:ident, $bf16:literal, $features:literal) => {
        $(#[$about])*
        pub(crate) struct $name;

impl Kernel for $name {
    type Simd = Avx512<$bf16>;
    type Element = u16;
    type Operand = u8;
    type Weight = i8;
    const QUANTIZED: bool = true;
    const GROUP: usize = 4;
    const DEPTH: usize = 4 * UNROLLED;
    const ROWS: usize = 12;
    const COLUMNS: usize = COLUMNS;

    #[target_feature(enable = $features)]
    unsafe fn vectorize<O: WithSimd>(op: O) -> O::Output {
        // SAFETY: the caller has checked the CPU features.
        unsafe { op.run() }
    }

    fn encode(column: &[f32], to: &mut [i8]) -> f32 {
        encode_int8(column, to)
    }

    fn units(weight: i8) -> f32 {
        f32::from(weight)
    }

    #[inline(always)]
    unsafe fn prepare(
        elements: *const u16,
        rows: usize,
        width: usize,
        operands: *mut u8,
        quantizations: *mut Quantization,
    ) {
        // SAFETY: guaranteed by the caller.
        unsafe { quantize::<u16, u8, Self::Simd>(elements, rows, width, operands, quantizations) }
    }

    #[inline(always)]
    fn left(
        _: *const u16,
        width: usize,
        data: *const u8,
        quantizations: *const Quantization,
    ) -> LeftMatrix<Self> {
        LeftMatrix { data, stride: width, quantizations }
    }

    #[inline(always)]
    unsafe fn tile(left: LeftMatrix<Self>, rows: usize, right: &RightPanel<Self>, sums: Accumulators) {
        let left = Bytes { data: left.data, stride: left.stride, quantizations: left.quantizations };
        let right = Units { data: right.data, depth: right.depth, scales: right.scales, sums: right.sums };
        // SAFETY: guaranteed by the caller.
        unsafe { TILE_I8S[rows - 1](left, &right, sums) }
    }
}
    };
}

int8!(
    /// Bytes, on a CPU that has no bf16.
    Int8,
    false,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma"
);
int8!(
    /// Bytes, on a CPU that converts to bf16 itself.
    Int8WithBf16,
    true,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma"
);

/// [`LeftMatrix`], whatever the kernel.
#[derive(Clone, Copy)]
struct Bytes {
    data: *const u8,
    stride: usize,
    quantizations: *const Quantization,
}

/// [`RightPanel`], whatever the kernel.
struct Units {
    data: *const i8,
    depth: usize,
    scales: *const f32,
    sums: *const f32,
}

static TILE_I8S: [Tile<Bytes, Units>; 12] = by_rows!(tile_i8; 1 2 3 4 5 6 7 8 9 10 11 12);

#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn tile_i8<const ROWS: usize>(left: Bytes, right: &Units, sums: Accumulators) {
    // SAFETY: the caller guarantees `ROWS` rows and 32 columns, `depth` deep, a multiple of four.
    unsafe {
        let mut registers = [[_mm512_setzero_si512(); 2]; ROWS];
        let mut rows = Rows::new::<ROWS>(left.data.cast(), left.stride / 4);
        let mut columns = right.data;
        for _ in 0..right.depth / (4 * UNROLLED) {
            for step in 0..UNROLLED {
                let at = columns.add(step * 4 * COLUMNS);
                fetch(at);
                let (low, high) = (_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(64).cast()));
                for (row, [to_low, to_high]) in registers.iter_mut().enumerate() {
                    let word = _mm512_set1_epi32(rows.word(row, step));
                    *to_low = _mm512_dpbusd_epi32(*to_low, word, low);
                    *to_high = _mm512_dpbusd_epi32(*to_high, word, high);
                }
            }
            rows.advance();
            columns = columns.add(UNROLLED * 4 * COLUMNS);
        }
        for (row, [low, high]) in registers.into_iter().enumerate() {
            let sums = Accumulators { data: sums.data.add(row * sums.stride), ..sums };
            let [[before_low, before_high]] = begin::<1>(sums);
            let quantization = *left.quantizations.add(row);
            let low = dequantize(low, quantization, right, 0, before_low);
            let high = dequantize(high, quantization, right, 16, before_high);
            finish([[low, high]], sums);
        }
    }
}

/// `(sum of products * row's scale + sum of units * row's least) * column's scale + before`.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn dequantize(
    products: __m512i,
    row: Quantization,
    right: &Units,
    column: usize,
    before: __m512,
) -> __m512 {
    // SAFETY: the caller's column is in the panel.
    unsafe {
        let least = _mm512_mul_ps(_mm512_loadu_ps(right.sums.add(column)), _mm512_set1_ps(row.least));
        let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_set1_ps(row.scale), least);
        _mm512_add_ps(_mm512_mul_ps(sum, _mm512_loadu_ps(right.scales.add(column))), before)
    }
}
