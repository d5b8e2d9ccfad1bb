//! Attention within one sequence.
//!
//! The keys and values of a head are laid out as panels. Scores are the products of queries and keys. The
//! context is the product of their softmax and the values. The softmax is computed in `f32`. The division by
//! its sum comes last, on the context, which has fewer numbers.

use super::aligned_buffer::Buffer;
use super::dense_layer::Tiles;
use super::kernel::{Accumulators, Float, RightPanel, SLACK, unquantized};
use super::math;
use super::simd::{Element, Simd};

/// Rows of queries that are computed together: few enough that their scores stay in a near cache.
const QUERIES: usize = 32;

/// One sequence: queries, keys and values side by side in each row.
pub(super) struct Sequence<E> {
    /// First row of the sequence.
    pub(super) projected: *const E,
    /// Elements from a row to the next.
    pub(super) stride: usize,
    /// Elements from a query to its key, and from a key to its value.
    pub(super) part: usize,
    /// Number of rows.
    pub(super) length: usize,
}

/// Memory for one head of one sequence.
pub(super) struct Workspace<A: Float> {
    keys: Buffer<A::Element>,
    values: Buffer<A::Element>,
    scores: Buffer<f32>,
    weights: Buffer<A::Element>,
    context: Buffer<f32>,
}

/// Number of keys with padding, a multiple that suits the panels and depths of all kernels.
fn padded_length(length: usize) -> usize {
    length.next_multiple_of(32)
}

impl<A: Float> Workspace<A> {
    /// Memory for sequences of at most `length` tokens, and heads of width `width`.
    pub(super) fn new(length: usize, width: usize) -> Self {
        let keys = padded_length(length);
        Self {
            keys: Buffer::zeroed(keys * width),
            values: Buffer::zeroed(keys * width),
            scores: Buffer::zeroed((QUERIES + SLACK) * keys),
            weights: Buffer::zeroed((QUERIES + SLACK) * keys),
            context: Buffer::zeroed((QUERIES + SLACK) * A::NARROW),
        }
    }

    /// Writes the context of one head to the rows of `to`, which are `to_stride` apart. The head begins at
    /// element
    /// `head` of each part and has width `width`.
    ///
    /// # Safety
    ///
    /// As [`Simd`]. The sequence and `to` must have these rows and columns, the sequence with slack. The
    /// workspace must be large enough for them.
    #[inline(always)]
    pub(super) unsafe fn head<E: Element>(
        &mut self,
        sequence: &Sequence<A::Element>,
        head: usize,
        width: usize,
        to: *mut E,
        to_stride: usize,
    ) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let Sequence { projected, stride, part, length } = *sequence;
            let keys = padded_length(length);
            let queries = projected.add(head);
            self.pack_keys(queries.add(part), stride, length, width);
            self.pack_values(queries.add(2 * part), stride, length, width);
            let (scores, weights) = (self.scores.as_mut_ptr(), self.weights.as_mut_ptr());
            let context = self.context.as_mut_ptr();
            let mut first = 0;
            while first < length {
                let rows = QUERIES.min(length - first);
                let left = unquantized::<A>(queries.add(first * stride), stride);
                for panel in (0..length).step_by(A::NARROW) {
                    let right = narrow::<A>(self.keys.as_ptr().add(panel * width), width);
                    for (row, count) in Tiles::new::<A>(0..rows) {
                        let sums =
                            Accumulators { data: scores.add(row * keys + panel), stride: keys, add: false };
                        A::tile(left.at(row, 0), count, &right, sums);
                    }
                }
                let mut shares = [0.0_f32; QUERIES];
                for (row, share) in shares[..rows].iter_mut().enumerate() {
                    *share = softmax::<A>(scores.add(row * keys), weights.add(row * keys), length, keys);
                }
                let left = unquantized::<A>(weights, keys);
                let depth = length.next_multiple_of(A::DEPTH);
                for panel in (0..width).step_by(A::NARROW) {
                    let right = narrow::<A>(self.values.as_ptr().add(panel * keys), depth);
                    for (row, count) in Tiles::new::<A>(0..rows) {
                        let sums = Accumulators {
                            data: context.add(row * A::NARROW),
                            stride: A::NARROW,
                            add: false,
                        };
                        A::tile(left.at(row, 0), count, &right, sums);
                    }
                    for (row, share) in shares[..rows].iter().enumerate() {
                        let to = to.add((first + row) * to_stride + head + panel);
                        let share = A::Simd::splat(*share);
                        for column in (0..A::NARROW).step_by(A::Simd::LANES) {
                            let sums = A::Simd::load(context.add(row * A::NARROW + column));
                            E::put(sums.mul(share), to.add(column));
                        }
                    }
                }
                first += rows;
            }
        }
    }

    /// Lays out keys in panels, one key in each column. On words of
    /// [`Kernel::GROUP`](super::kernel::Kernel::GROUP) elements this is a transposition.
    #[inline(always)]
    unsafe fn pack_keys(&mut self, keys: *const A::Element, stride: usize, length: usize, width: usize) {
        let lanes = A::Simd::LANES;
        // SAFETY: guaranteed by the caller. Rows past the last key are slack; their scores are not used.
        unsafe {
            for panel in (0..padded_length(length)).step_by(A::NARROW) {
                let to = self.keys.as_mut_ptr().add(panel * width);
                for key in (0..A::NARROW).step_by(lanes) {
                    if panel + key >= length {
                        break;
                    }
                    for word in (0..width / A::GROUP).step_by(lanes) {
                        A::Simd::transpose(
                            keys.add((panel + key) * stride + word * A::GROUP).cast(),
                            stride / A::GROUP,
                            to.cast::<u32>().add(word * A::NARROW + key),
                            A::NARROW,
                        );
                    }
                }
            }
        }
    }

    /// Lays out values in panels, one dimension in each column, and keys in depth. Past the last key the
    /// panel holds zeros, so that a weight of 0 adds nothing.
    #[inline(always)]
    unsafe fn pack_values(&mut self, values: *const A::Element, stride: usize, length: usize, width: usize) {
        let keys = padded_length(length);
        // SAFETY: guaranteed by the caller.
        unsafe {
            for panel in (0..width).step_by(A::NARROW) {
                let to = self.values.as_mut_ptr().add(panel * keys);
                let from = values.add(panel);
                for key in (0..keys).step_by(A::GROUP) {
                    let present = A::GROUP.min(length.saturating_sub(key));
                    A::Element::interleave(
                        from.add(key * stride),
                        stride,
                        present,
                        to.add(key * A::NARROW),
                        A::NARROW,
                    );
                }
            }
        }
    }
}

#[inline(always)]
fn narrow<A: Float>(data: *const A::Weight, depth: usize) -> RightPanel<A> {
    RightPanel { data, depth, columns: A::NARROW, scales: std::ptr::null(), sums: std::ptr::null() }
}

/// Writes 2 to the power of (score - largest score) as elements, and zeros past the last key. Returns 1
/// divided by their sum.
#[inline(always)]
unsafe fn softmax<A: Float>(scores: *const f32, weights: *mut A::Element, length: usize, keys: usize) -> f32 {
    let lanes = A::Simd::LANES;
    // SAFETY: the rows of the caller have `keys` numbers.
    unsafe {
        let none = A::Simd::splat(f32::NEG_INFINITY);
        let mut largest = none;
        for key in (0..length).step_by(lanes) {
            largest = largest.max(A::Simd::load(scores.add(key)).first(length - key, none));
        }
        let largest = A::Simd::splat(largest.largest());
        let mut sum = A::Simd::splat(0.0);
        for key in (0..keys).step_by(lanes) {
            let power = if key < length {
                let power = math::exp2(A::Simd::load(scores.add(key)).sub(largest));
                power.first(length - key, A::Simd::splat(0.0))
            } else {
                A::Simd::splat(0.0)
            };
            sum = sum.add(power);
            A::Element::put(power, weights.add(key));
        }
        1.0 / sum.sum()
    }
}
