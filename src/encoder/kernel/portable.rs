//! The kernel for any CPU: `f32` products by the crate matrixmultiply, which has NEON code for aarch64.

use super::super::simd::portable::Portable as Registers;
use super::{Accumulators, Kernel, LeftMatrix, Quantization, RightPanel, WithSimd, unquantized};

/// `f32` on any CPU.
pub(crate) struct Portable;

impl Kernel for Portable {
    type Simd = Registers;
    type Element = f32;
    type Operand = f32;
    type Weight = f32;
    const GROUP: usize = 1;
    const ROWS: usize = 64;
    // The crate copies both matrices into its own layout at each call, so few large calls are best.
    const COLUMNS: usize = 128;
    const NARROW: usize = 32;
    const CHUNK: usize = usize::MAX;

    unsafe fn vectorize<O: WithSimd>(op: O) -> O::Output {
        // SAFETY: this kernel needs no CPU features.
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

    unsafe fn tile(left: LeftMatrix<Self>, rows: usize, right: &RightPanel<Self>, sums: Accumulators) {
        // SAFETY: the caller's matrices have the stated sizes. The crate adds in the same order for any
        // number of rows, so that a row does not depend on the other rows.
        unsafe {
            matrixmultiply::sgemm(
                rows,
                right.depth,
                right.columns,
                1.0,
                left.data,
                left.stride as isize,
                1,
                right.data,
                right.columns as isize,
                1,
                if sums.add { 1.0 } else { 0.0 },
                sums.data,
                sums.stride as isize,
                1,
            );
        }
    }
}
