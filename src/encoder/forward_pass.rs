//! One pass of a batch of packed sequences through the model.

use super::aligned_buffer::Buffer;
use super::attention::{self, Sequence};
use super::batch::Batch;
use super::dense_layer::{GeluEpilogue, StoreEpilogue};
use super::kernel::{Float, Kernel, Quantization, SLACK, WithSimd};
use super::model_config::Pooling;
use super::simd::{Element, Simd};
use super::thread_team::ThreadTeam;
use super::weights::{Layer, Norm, Weights, Widths};

/// Rows in a unit of the stages between the products.
const ROWS: usize = 16;

/// Number of stages of a pass. Each layer has products, attention, norms and, for quantized kernels, the
/// preparation of operands. One more stage is at the start, and one at the end.
pub(super) fn stages<D: Kernel, A: Float>(network: &Weights<D, A>) -> usize {
    let of_a_layer = if D::QUANTIZED { 9 } else { 7 };
    2 + of_a_layer * network.layers.len()
}

/// Memory that the threads of one pass share: the numbers of all tokens, at different stages.
pub(super) struct SharedBuffers<D: Kernel, A: Float> {
    /// The sum of the outputs of the layers so far.
    residual: Buffer<f32>,
    /// The residual after normalisation, as input of products.
    normal: Buffer<D::Element>,
    projected: Buffer<A::Element>,
    context: Buffer<D::Element>,
    inner: Buffer<D::Element>,
    operands: Buffer<D::Operand>,
    quantizations: Vec<Quantization>,
}

impl<D: Kernel, A: Float> SharedBuffers<D, A> {
    /// Memory for passes of at most `tokens` tokens.
    pub(super) fn new(network: &Weights<D, A>, tokens: usize) -> Self {
        let Widths { padded, context, inner, .. } = network.widths;
        let rows = tokens + SLACK;
        let operands = if D::QUANTIZED { rows * inner.max(padded).max(context) } else { 0 };
        Self {
            residual: Buffer::zeroed(rows * padded),
            normal: Buffer::zeroed(rows * padded),
            projected: Buffer::zeroed(rows * 3 * context),
            context: Buffer::zeroed(rows * context),
            inner: Buffer::zeroed(rows * inner),
            operands: Buffer::zeroed(operands),
            quantizations: vec![Quantization::default(); if D::QUANTIZED { rows } else { 0 }],
        }
    }

    /// Pointers to all buffers.
    pub(super) fn pointers(&mut self) -> SharedPointers<D, A> {
        SharedPointers {
            residual: self.residual.as_mut_ptr(),
            normal: self.normal.as_mut_ptr(),
            projected: self.projected.as_mut_ptr(),
            context: self.context.as_mut_ptr(),
            inner: self.inner.as_mut_ptr(),
            operands: self.operands.as_mut_ptr(),
            quantizations: self.quantizations.as_mut_ptr(),
        }
    }
}

/// Pointers into [`SharedBuffers`], for threads that write to different parts.
pub(super) struct SharedPointers<D: Kernel, A: Float> {
    residual: *mut f32,
    normal: *mut D::Element,
    projected: *mut A::Element,
    context: *mut D::Element,
    inner: *mut D::Element,
    operands: *mut D::Operand,
    quantizations: *mut Quantization,
}

impl<D: Kernel, A: Float> Clone for SharedPointers<D, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Kernel, A: Float> Copy for SharedPointers<D, A> {}

// SAFETY: each unit of a stage has its own part of the memory, one thread does the unit, and a stage begins
// after the end of the stage before it.
unsafe impl<D: Kernel, A: Float> Send for SharedPointers<D, A> {}

/// Memory of one thread of a pass.
pub(super) struct ThreadBuffers<A: Float> {
    partial: Buffer<f32>,
    attention: attention::Workspace<A>,
}

impl<A: Float> ThreadBuffers<A> {
    /// Memory for passes of at most `tokens` tokens, with sequences of at most `length` tokens.
    pub(super) fn new<D: Kernel>(network: &Weights<D, A>, tokens: usize, length: usize) -> Self {
        Self {
            partial: Buffer::zeroed((tokens + SLACK) * D::COLUMNS),
            attention: attention::Workspace::new(length, network.widths.head),
        }
    }
}

/// The part of one thread in one pass.
pub(super) struct ForwardPass<'a, D: Kernel, A: Float> {
    pub(super) network: &'a Weights<D, A>,
    pub(super) batch: &'a Batch,
    pub(super) pointers: SharedPointers<D, A>,
    pub(super) own: &'a mut ThreadBuffers<A>,
    pub(super) team: &'a ThreadTeam,
    /// Memory for one vector for each sequence, one after the other.
    pub(super) vectors: *mut f32,
}

impl<D: Kernel, A: Float> WithSimd for ForwardPass<'_, D, A> {
    type Output = ();

    #[inline(always)]
    unsafe fn run(mut self) {
        // SAFETY: the caller has checked the CPU features; the places have room for the batch.
        unsafe {
            let mut stage = 0;
            self.embed(&mut stage);
            let network = self.network;
            for layer in &network.layers {
                self.layer(layer, &mut stage);
            }
            self.pool(&mut stage);
        }
    }
}

impl<D: Kernel, A: Float> ForwardPass<'_, D, A> {
    /// Computes the normalised embeddings of tokens and positions.
    #[inline(always)]
    unsafe fn embed(&mut self, stage: &mut usize) {
        let Widths { hidden, padded, .. } = self.network.widths;
        let tokens = self.batch.ids.len();
        let blocks = tokens.div_ceil(ROWS);
        for block in self.team.units(*stage, blocks) {
            let rows = block * ROWS..tokens.min((block + 1) * ROWS);
            for row in rows.clone() {
                let position = self.batch.positions[row] as usize * padded;
                // SAFETY: only this unit uses the row, and there is room for it.
                let to = unsafe {
                    std::slice::from_raw_parts_mut(self.pointers.residual.add(row * padded), padded)
                };
                to.copy_from_slice(&self.network.positions.as_slice()[position..][..padded]);
                let id = self.batch.ids[row] as usize;
                self.network.words.add_row(id, &mut to[..hidden]);
            }
            // SAFETY: the same rows.
            unsafe { self.normalise(&self.network.embedded, rows.start, rows.len()) };
        }
        self.finish_stage(stage, blocks);
    }

    #[inline(always)]
    fn finish_stage(&self, stage: &mut usize, units: usize) {
        self.team.wait(*stage, units);
        *stage += 1;
    }

    #[inline(always)]
    unsafe fn layer(&mut self, layer: &Layer<D>, stage: &mut usize) {
        let Widths { padded, heads, head, context, inner, .. } = self.network.widths;
        let Batch { ids, starts, .. } = self.batch;
        let (rows, pointers) = (ids.len(), self.pointers);
        let partial = self.own.partial.as_mut_ptr();
        // SAFETY: the places have room for the rows; each unit writes only to its own columns, head or rows.
        unsafe {
            let left = D::left(pointers.normal, padded, pointers.operands, pointers.quantizations);
            let store = StoreEpilogue { to: pointers.projected, stride: 3 * context };
            let product = layer.project.divide(rows);
            for unit in self.team.units(*stage, product.units()) {
                layer.project.finish(&product.unit(unit), left, partial, &store);
            }
            self.finish_stage(stage, product.units());

            let units = (starts.len() - 1) * heads;
            for unit in self.team.units(*stage, units) {
                let (first, end) = (starts[unit / heads], starts[unit / heads + 1]);
                let sequence = Sequence {
                    projected: pointers.projected.add(first * 3 * context).cast_const(),
                    stride: 3 * context,
                    part: context,
                    length: end - first,
                };
                let to = pointers.context.add(first * context);
                self.own.attention.head(&sequence, unit % heads * head, head, to, context);
            }
            self.finish_stage(stage, units);

            self.prepare(pointers.context, context, stage);
            let left = D::left(pointers.context, context, pointers.operands, pointers.quantizations);
            let product = layer.output.divide(rows);
            for unit in self.team.units(*stage, product.units()) {
                layer.output.add_to(&product.unit(unit), left, pointers.residual, padded);
            }
            self.finish_stage(stage, product.units());
            self.normalise_all(&layer.attended, stage);

            let left = D::left(pointers.normal, padded, pointers.operands, pointers.quantizations);
            let gelu = GeluEpilogue { to: pointers.inner, stride: inner };
            let product = layer.widen.divide(rows);
            for unit in self.team.units(*stage, product.units()) {
                layer.widen.finish(&product.unit(unit), left, partial, &gelu);
            }
            self.finish_stage(stage, product.units());

            self.prepare(pointers.inner, inner, stage);
            let left = D::left(pointers.inner, inner, pointers.operands, pointers.quantizations);
            let product = layer.narrow.divide(rows);
            for unit in self.team.units(*stage, product.units()) {
                layer.narrow.add_to(&product.unit(unit), left, pointers.residual, padded);
            }
            self.finish_stage(stage, product.units());
            self.normalise_all(&layer.fed, stage);
        }
    }

    /// Makes the operands of all rows of a matrix, if the kernel is quantized.
    #[inline(always)]
    unsafe fn prepare(&mut self, elements: *const D::Element, width: usize, stage: &mut usize) {
        if !D::QUANTIZED {
            return;
        }
        let tokens = self.batch.ids.len();
        let blocks = tokens.div_ceil(ROWS);
        for block in self.team.units(*stage, blocks) {
            let (first, rows) = (block * ROWS, ROWS.min(tokens - block * ROWS));
            // SAFETY: guaranteed by the caller; only this unit uses the rows.
            unsafe {
                let operands = self.pointers.operands.add(first * width);
                let quantizations = self.pointers.quantizations.add(first);
                D::prepare(elements.add(first * width), rows, width, operands, quantizations);
            }
        }
        self.finish_stage(stage, blocks);
    }

    #[inline(always)]
    unsafe fn normalise_all(&mut self, norm: &Norm, stage: &mut usize) {
        let tokens = self.batch.ids.len();
        let blocks = tokens.div_ceil(ROWS);
        for block in self.team.units(*stage, blocks) {
            // SAFETY: guaranteed by the caller; only this unit uses the rows.
            unsafe { self.normalise(norm, block * ROWS, ROWS.min(tokens - block * ROWS)) };
        }
        self.finish_stage(stage, blocks);
    }

    /// Normalises some rows of the residual. Writes them back with the next bias added, and makes operands.
    #[inline(always)]
    unsafe fn normalise(&self, norm: &Norm, first: usize, rows: usize) {
        let Widths { hidden, padded, .. } = self.network.widths;
        let lanes = D::Simd::LANES;
        // SAFETY: guaranteed by the caller; the buffers of the norm have the width of a row.
        unsafe {
            let zero = D::Simd::splat(0.0);
            for row in first..first + rows {
                let numbers = self.pointers.residual.add(row * padded);
                let mut sum = zero;
                for at in (0..padded).step_by(lanes) {
                    sum = sum.add(D::Simd::load(numbers.add(at)));
                }
                let mean = D::Simd::splat(sum.sum() / hidden as f32);
                let mut squares = zero;
                for at in (0..padded).step_by(lanes) {
                    let mut off = D::Simd::load(numbers.add(at)).sub(mean);
                    if at + lanes > hidden {
                        off = off.first(hidden.saturating_sub(at), zero);
                    }
                    squares = off.mul_add(off, squares);
                }
                let deviation = (squares.sum() / hidden as f32 + self.network.epsilon).sqrt();
                let factor = D::Simd::splat(1.0 / deviation);
                let normal = self.pointers.normal.add(row * padded);
                for at in (0..padded).step_by(lanes) {
                    let off = D::Simd::load(numbers.add(at)).sub(mean).mul(factor);
                    let weight = D::Simd::load(norm.weight.as_ptr().add(at));
                    let number = off.mul_add(weight, D::Simd::load(norm.bias.as_ptr().add(at)));
                    D::Element::put(number, normal.add(at));
                    number.add(D::Simd::load(norm.next.as_ptr().add(at))).store(numbers.add(at));
                }
            }
            let operands = self.pointers.operands.wrapping_add(first * padded);
            let quantizations = self.pointers.quantizations.wrapping_add(first);
            D::prepare(self.pointers.normal.add(first * padded), rows, padded, operands, quantizations);
        }
    }

    /// Computes one unit vector for each sequence.
    #[inline(always)]
    unsafe fn pool(&mut self, stage: &mut usize) {
        let Widths { hidden, padded, .. } = self.network.widths;
        let sequences = self.batch.starts.len() - 1;
        for sequence in self.team.units(*stage, sequences) {
            let first = self.batch.starts[sequence];
            let rows = match self.network.pooling {
                Pooling::Mean => self.batch.starts[sequence + 1] - first,
                Pooling::Cls => 1,
            };
            // SAFETY: only this unit uses the vector; the rows exist.
            unsafe {
                let vector = std::slice::from_raw_parts_mut(self.vectors.add(sequence * hidden), hidden);
                vector.fill(0.0);
                for row in first..first + rows {
                    let numbers =
                        std::slice::from_raw_parts(self.pointers.residual.add(row * padded), hidden);
                    for (to, number) in vector.iter_mut().zip(numbers) {
                        *to += number;
                    }
                }
                // The mean needs no division, because the vector is scaled to length 1.
                let length = vector.iter().map(|number| number * number).sum::<f32>().sqrt();
                let factor = if length > 0.0 { 1.0 / length } else { 0.0 };
                for number in vector {
                    *number *= factor;
                }
            }
        }
        self.finish_stage(stage, sequences);
    }
}
