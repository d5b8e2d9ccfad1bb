//! Kernels: matrix products for one instruction set each.
//!
//! All kernels share one layout of bytes. The left matrix is row by row, as the stages write it. The right
//! matrix is in panels of [`Kernel::COLUMNS`] columns. In a panel, [`Kernel::GROUP`] neighbours in depth make
//! a 32-bit word, which one instruction usually multiplies and adds. A part of a panel, [`Kernel::CHUNK`]
//! deep, stays in the nearest cache while all rows are multiplied with it; or, with [`Kernel::KEEPS_ROWS`], a
//! tile of rows stays there while all panels stream.

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
pub(super) mod amx_emulator;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
pub(super) mod portable;
#[cfg(target_arch = "x86_64")]
mod rows;

use super::aligned_buffer::Pod;
#[cfg(target_arch = "x86_64")]
use super::simd::bf16;
use super::simd::{Element, QuantizedInteger, Simd};

/// Work that is compiled with a kernel's instructions. `run` must be inlined into its caller.
pub(super) trait WithSimd {
    /// Result of the work.
    type Output;

    /// # Safety
    ///
    /// The CPU must have the kernel's instructions.
    unsafe fn run(self) -> Self::Output;
}

/// A function that multiplies a number of rows known at compile time.
#[cfg(target_arch = "x86_64")]
type Tile<L, R> = unsafe fn(L, &R, Accumulators);

/// A table of `Tile` functions, from one row on, for a number of rows known only at run time. The calls go
/// through pointers to prevent inlining: the compiler (1.95) ignores `inline(never)` on functions with target
/// features, and an inlined function no longer keeps its sums in registers.
#[cfg(target_arch = "x86_64")]
macro_rules! by_rows {
    ($function:ident; $($rows:literal)+) => { [$($function::<$rows>),+] };
}

#[cfg(target_arch = "x86_64")]
use by_rows;

/// Quantization of a row. A whole number from 0 to 255 stands for `whole * scale + least`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Quantization {
    pub(super) scale: f32,
    pub(super) least: f32,
}

/// The left matrix of a product, from some row on. Up to [`SLACK`] rows past the last row can be read.
pub(super) struct LeftMatrix<K: Kernel> {
    pub(super) data: *const K::Operand,
    /// Operands from a row to the next.
    pub(super) stride: usize,
    /// One for each row, for quantized kernels.
    pub(super) quantizations: *const Quantization,
}

impl<K: Kernel> Clone for LeftMatrix<K> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<K: Kernel> Copy for LeftMatrix<K> {}

impl<K: Kernel> LeftMatrix<K> {
    /// The matrix from `row` and `depth` on.
    #[inline(always)]
    pub(super) unsafe fn at(self, row: usize, depth: usize) -> Self {
        // SAFETY: the caller stays within the matrix.
        unsafe {
            Self {
                data: self.data.add(row * self.stride + depth),
                stride: self.stride,
                quantizations: self.quantizations.wrapping_add(row),
            }
        }
    }
}

/// A part of a panel of the right matrix.
pub(super) struct RightPanel<K: Kernel> {
    pub(super) data: *const K::Weight,
    /// Depth, a multiple of [`Kernel::DEPTH`].
    pub(super) depth: usize,
    /// [`Kernel::COLUMNS`], except for the last or narrow panels of the portable kernel.
    pub(super) columns: usize,
    /// For quantized kernels, one for each column: the value of one unit.
    pub(super) scales: *const f32,
    /// For quantized kernels, one for each column: the sum of its units over this part.
    pub(super) sums: *const f32,
}

/// Destination of a tile's sums.
#[derive(Clone, Copy)]
pub(super) struct Accumulators {
    pub(super) data: *mut f32,
    /// Numbers from a row to the next.
    pub(super) stride: usize,
    /// Whether to add to the present numbers.
    pub(super) add: bool,
}

/// A kernel may read, and write sums to, this many rows past the last one.
pub(super) const SLACK: usize = 32;

/// Widths of matrices are multiples of this, and so of the depth of every kernel.
pub(super) const ALIGNMENT: usize = 64;

/// Matrix products with one instruction set.
pub(super) trait Kernel: Sized + Send + Sync + 'static {
    /// Registers of the stages between products.
    type Simd: Simd;
    /// Numbers that the stages pass to each other.
    type Element: Element;
    /// Left factor of a product: the element itself, or a whole number.
    type Operand: Pod;
    /// Right factor of a product.
    type Weight: Pod;
    /// Weights in a 32-bit word: neighbours in depth that are side by side in a panel.
    const GROUP: usize;
    /// Rows of a tile.
    const ROWS: usize;
    /// The rows of all tiles except the last are a multiple of this.
    const STEP: usize = 1;
    /// Columns of a panel.
    const COLUMNS: usize;
    /// Columns of the panels in attention, which has few columns.
    const NARROW: usize = Self::COLUMNS;
    /// The depth of every product is a multiple of this.
    const DEPTH: usize = Self::GROUP;
    /// Whether [`Kernel::prepare`] makes operands from elements.
    const QUANTIZED: bool = false;
    /// Depth of the part of a panel that is multiplied at a time.
    const CHUNK: usize = 768 / size_of::<Self::Operand>();
    /// Whether a tile of rows stays in the nearest cache while all panels stream, in products of many rows.
    /// Otherwise a part of a panel stays, and the rows stream.
    const KEEPS_ROWS: bool = false;

    /// Runs work that is compiled with the kernel's instructions.
    ///
    /// # Safety
    ///
    /// The CPU must have these instructions.
    unsafe fn vectorize<O: WithSimd>(op: O) -> O::Output;

    /// Writes a column of weights in the kernel's format. Returns the value of one unit.
    fn encode(column: &[f32], to: &mut [Self::Weight]) -> f32;

    /// The units of a weight, for the sums of quantized columns; 0 for other kernels.
    fn units(weight: Self::Weight) -> f32 {
        let _ = weight;
        0.0
    }

    /// Makes operands from elements, if they differ: `rows` rows of width `width`.
    ///
    /// # Safety
    ///
    /// As [`Simd`]. `elements` must hold the rows, and the destinations must have room for them.
    #[inline(always)]
    unsafe fn prepare(
        elements: *const Self::Element,
        rows: usize,
        width: usize,
        operands: *mut Self::Operand,
        quantizations: *mut Quantization,
    ) {
        let _ = (elements, rows, width, operands, quantizations);
    }

    /// The left matrix, after [`Kernel::prepare`].
    fn left(
        elements: *const Self::Element,
        width: usize,
        operands: *const Self::Operand,
        quantizations: *const Quantization,
    ) -> LeftMatrix<Self>;

    /// Multiplies `rows` rows (at most [`Kernel::ROWS`]) with a part of a panel.
    ///
    /// # Safety
    ///
    /// As [`Simd`]. The matrices must have the documented sizes.
    unsafe fn tile(left: LeftMatrix<Self>, rows: usize, right: &RightPanel<Self>, sums: Accumulators);
}

/// A kernel that multiplies elements directly, without quantization.
pub(super) trait Float:
    Kernel<Operand = <Self as Kernel>::Element, Weight = <Self as Kernel>::Element>
{
}

impl<K: Kernel<Operand = <K as Kernel>::Element, Weight = <K as Kernel>::Element>> Float for K {}

/// The left matrix for kernels that multiply elements directly.
#[inline(always)]
pub(super) fn unquantized<K: Kernel<Operand = <K as Kernel>::Element>>(
    elements: *const K::Element,
    width: usize,
) -> LeftMatrix<K> {
    LeftMatrix { data: elements, stride: width, quantizations: std::ptr::null() }
}

/// Writes the weights of a column as bf16. The value of one unit is 1.
#[cfg(target_arch = "x86_64")]
fn encode_bf16(column: &[f32], to: &mut [u16]) -> f32 {
    for (weight, to) in column.iter().zip(to) {
        *to = bf16(*weight);
    }
    1.0
}

/// Writes the weights of a column as whole numbers from -127 to 127. Returns the value of one unit.
pub(super) fn encode_int8<W: From<i8>>(column: &[f32], to: &mut [W]) -> f32 {
    let largest = column.iter().fold(0.0_f32, |largest, weight| largest.max(weight.abs()));
    let scale = if largest > 0.0 { largest / 127.0 } else { 1.0 };
    for (weight, to) in column.iter().zip(to) {
        *to = W::from((weight / scale).round_ties_even() as i8);
    }
    scale
}

/// Maps each row of elements to 0 to 255, from the smallest element of the row to the largest.
#[inline(always)]
pub(super) unsafe fn quantize<E: Element, W: QuantizedInteger, V: Simd>(
    elements: *const E,
    rows: usize,
    width: usize,
    operands: *mut W,
    quantizations: *mut Quantization,
) {
    // SAFETY: guaranteed by the caller, and widths are multiples of the lanes of every register.
    unsafe {
        for row in 0..rows {
            let (from, to) = (elements.add(row * width), operands.add(row * width));
            let first = E::get::<V>(from);
            let (mut most, mut least) = (first, first);
            for at in (V::LANES..width).step_by(V::LANES) {
                let numbers = E::get::<V>(from.add(at));
                most = most.max(numbers);
                least = least.min(numbers);
            }
            let least = -least.mul(V::splat(-1.0)).largest();
            let range = most.largest() - least;
            let scale = if range > 0.0 { range / 255.0 } else { 1.0 };
            let (shift, factor) = (V::splat(-least / scale), V::splat(1.0 / scale));
            for at in (0..width).step_by(V::LANES) {
                let numbers = E::get::<V>(from.add(at)).mul_add(factor, shift);
                W::put(numbers.max(V::splat(0.0)).min(V::splat(255.0)), to.add(at));
            }
            quantizations.add(row).write(Quantization { scale, least });
        }
    }
}
