//! Kernels: how one instruction set multiplies matrices.
//!
//! All share one geometry, in bytes. The left matrix lies row by row as the stages wrote it; the right one
//! lies in panels of [`Kernel::COLUMNS`] columns, in which [`Kernel::GROUP`] neighbours in depth, which most
//! often one instruction multiplies and adds up, make a 32-bit word. A panel's part of [`Kernel::CHUNK`] in depth
//! stays in the nearest cache while all rows stream past it.

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
pub(super) mod portable;
#[cfg(target_arch = "x86_64")]
mod rows;

use super::buffer::Plain;
#[cfg(target_arch = "x86_64")]
use super::lanes::bf16;
use super::lanes::{Element, Lanes, Whole};

/// Work that is compiled with a kernel's instructions: `run` must be inlined into its caller.
pub(super) trait Op {
    /// What it gives back.
    type Output;

    /// # Safety
    ///
    /// The CPU must have the kernel's instructions.
    unsafe fn run(self) -> Self::Output;
}

/// Multiplies a number of rows that is known when it is compiled.
#[cfg(target_arch = "x86_64")]
type Tile<L, R> = unsafe fn(L, &R, Sums);

/// A table of such functions, from one row on, for a number that is known only when they run. They are called
/// by pointer because nothing else keeps them apart: the compiler (1.95) takes no notice of `inline(never)` on
/// functions with target features, and inlined into the stages their sums are no longer held in registers.
#[cfg(target_arch = "x86_64")]
macro_rules! by_rows {
    ($function:ident; $($rows:literal)+) => { [$($function::<$rows>),+] };
}

#[cfg(target_arch = "x86_64")]
use by_rows;

/// How a row of whole numbers from 0 to 255 stands for others: `whole * scale + least`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Quantization {
    pub(super) scale: f32,
    pub(super) least: f32,
}

/// The left matrix of a product, from some row on. Rows past the last one that matters can be read, up to
/// [`SLACK`].
pub(super) struct Left<K: Kernel> {
    pub(super) data: *const K::Operand,
    /// Operands from a row to the next.
    pub(super) stride: usize,
    /// One a row, for quantized kernels.
    pub(super) quantizations: *const Quantization,
}

impl<K: Kernel> Clone for Left<K> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<K: Kernel> Copy for Left<K> {}

impl<K: Kernel> Left<K> {
    /// From `row` and `depth` on.
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
pub(super) struct Right<K: Kernel> {
    pub(super) data: *const K::Weight,
    /// Its length in depth, a multiple of [`Kernel::DEPTH`].
    pub(super) depth: usize,
    /// [`Kernel::COLUMNS`], but for the portable kernel's last or narrow panels.
    pub(super) columns: usize,
    /// Of quantized kernels, one a column: what one unit stands for.
    pub(super) scales: *const f32,
    /// Of quantized kernels, one a column: the sum of its units over this part.
    pub(super) sums: *const f32,
}

/// Where a tile's sums go.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    pub(super) data: *mut f32,
    /// Numbers from a row to the next.
    pub(super) stride: usize,
    /// Whether to add to what is there.
    pub(super) add: bool,
}

/// Rows past the last that a kernel may read, or write sums to.
pub(super) const SLACK: usize = 32;

/// Widths of matrices are multiples of this, so that any kernel's depth divides them.
pub(super) const ALIGNMENT: usize = 64;

/// An instruction set's way to multiply matrices.
pub(super) trait Kernel: Sized + Send + Sync + 'static {
    /// Registers of the stages between products.
    type Lanes: Lanes;
    /// What the stages hand to each other.
    type Element: Element;
    /// What is multiplied, on the left; the element itself, or a whole number.
    type Operand: Plain;
    /// What is multiplied, on the right.
    type Weight: Plain;
    /// Neighbours in depth that lie side by side in a panel: what of the weights one 32-bit word holds.
    const GROUP: usize;
    /// Rows of a tile.
    const ROWS: usize;
    /// What the rows of all tiles but the last are a multiple of.
    const STEP: usize = 1;
    /// Columns of a panel.
    const COLUMNS: usize;
    /// Columns of the panels that attention makes, which are few.
    const NARROW: usize = Self::COLUMNS;
    /// Every product's depth is a multiple of this.
    const DEPTH: usize = Self::GROUP;
    /// Whether operands are made of elements by [`Kernel::prepare`].
    const QUANTIZED: bool = false;
    /// How deep a panel is multiplied at a time.
    const CHUNK: usize = 768 / size_of::<Self::Operand>();

    /// Runs work with the instructions switched on.
    ///
    /// # Safety
    ///
    /// The CPU must have them.
    unsafe fn vectorize<O: Op>(op: O) -> O::Output;

    /// A column of weights as this kernel multiplies it, and what one unit stands for.
    fn encode(column: &[f32], to: &mut [Self::Weight]) -> f32;

    /// What a weight counts, for the sums of quantized columns; others have none.
    fn units(weight: Self::Weight) -> f32 {
        let _ = weight;
        0.0
    }

    /// Makes operands of elements, where they are not the same: `rows` rows, `width` wide.
    ///
    /// # Safety
    ///
    /// As [`Lanes`]; `elements` holds the rows, the others have room for as much.
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

    /// The matrix of what [`Kernel::prepare`] has seen.
    fn left(
        elements: *const Self::Element,
        width: usize,
        operands: *const Self::Operand,
        quantizations: *const Quantization,
    ) -> Left<Self>;

    /// Multiplies `rows` rows (at most [`Kernel::ROWS`]) with a part of a panel.
    ///
    /// # Safety
    ///
    /// As [`Lanes`]; the matrices are as large as their documentation says.
    unsafe fn tile(left: Left<Self>, rows: usize, right: &Right<Self>, sums: Sums);
}

/// A kernel that multiplies elements.
pub(super) trait Float:
    Kernel<Operand = <Self as Kernel>::Element, Weight = <Self as Kernel>::Element>
{
}

impl<K: Kernel<Operand = <K as Kernel>::Element, Weight = <K as Kernel>::Element>> Float for K {}

/// Elements as they are, for kernels that multiply them.
#[inline(always)]
pub(super) fn as_they_are<K: Kernel<Operand = <K as Kernel>::Element>>(
    elements: *const K::Element,
    width: usize,
) -> Left<K> {
    Left { data: elements, stride: width, quantizations: std::ptr::null() }
}

/// The weights of a column as bf16; one unit stands for itself.
#[cfg(target_arch = "x86_64")]
fn encode_bf16(column: &[f32], to: &mut [u16]) -> f32 {
    for (weight, to) in column.iter().zip(to) {
        *to = bf16(*weight);
    }
    1.0
}

/// Whole numbers for the weights of a column, -127 to 127, and what one stands for.
pub(super) fn encode_whole<W: From<i8>>(column: &[f32], to: &mut [W]) -> f32 {
    let largest = column.iter().fold(0.0_f32, |largest, weight| largest.max(weight.abs()));
    let scale = if largest > 0.0 { largest / 127.0 } else { 1.0 };
    for (weight, to) in column.iter().zip(to) {
        *to = W::from((weight / scale).round_ties_even() as i8);
    }
    scale
}

/// 0 to 255 for each row of elements, from the row's least to its largest.
#[inline(always)]
pub(super) unsafe fn quantize<E: Element, W: Whole, V: Lanes>(
    elements: *const E,
    rows: usize,
    width: usize,
    operands: *mut W,
    quantizations: *mut Quantization,
) {
    // SAFETY: the caller's, and widths are multiples of any register's lanes.
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
