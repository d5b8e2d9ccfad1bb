//! A BERT laid out for a pair of kernels, and one pass of packed sequences through it.

use super::attention::{self, Sequence};
use super::buffer::Buffer;
use super::config::{Description, Pooling};
use super::kernel::{ALIGNMENT, Float, Kernel, Op, Quantization, SLACK};
use super::lanes::{Element, Lanes};
use super::packed::{Dense, Gelu, Store};
use super::team::Team;
use super::tensors::{Table, Tensors};
use super::{Batch, Error};

/// Rows that stages between the products take at a time.
const ROWS: usize = 16;

/// Widths after filling up to what all kernels divide. What fills up is zero everywhere.
#[derive(Clone, Copy, Debug)]
struct Widths {
    /// Of a token's vector, before and after filling up.
    hidden: usize,
    filled: usize,
    heads: usize,
    head: usize,
    /// Of all heads.
    context: usize,
    inner: usize,
}

/// Scale and shift of a layer normalisation, and what is added for the product that follows.
struct Norm {
    weight: Buffer<f32>,
    bias: Buffer<f32>,
    /// The bias of the next dense layer that adds to the same numbers, so that it need not.
    next: Buffer<f32>,
}

struct Layer<D: Kernel> {
    project: Dense<D>,
    output: Dense<D>,
    attended: Norm,
    widen: Dense<D>,
    narrow: Dense<D>,
    fed: Norm,
}

/// A BERT for one kernel `D` in dense layers and one `A` in attention.
pub(super) struct Network<D: Kernel, A: Float> {
    widths: Widths,
    epsilon: f32,
    pooling: Pooling,
    max_tokens: usize,
    tensors: Tensors,
    words: Table,
    /// Of each position, with the first token type's added.
    positions: Buffer<f32>,
    embedded: Norm,
    layers: Vec<Layer<D>>,
    attention: std::marker::PhantomData<A>,
}

impl<D: Kernel, A: Float> Network<D, A> {
    /// Lays out the weights of a mapped file.
    pub(super) fn new(description: &Description, tensors: Tensors) -> Result<Self, Error> {
        let bert = &description.bert;
        let (hidden, heads) = (bert.hidden_size, bert.num_attention_heads);
        let head = (hidden / heads).next_multiple_of(32);
        let widths = Widths {
            hidden,
            filled: hidden.next_multiple_of(ALIGNMENT),
            heads,
            head,
            context: (heads * head).next_multiple_of(ALIGNMENT),
            inner: bert.intermediate_size.next_multiple_of(ALIGNMENT),
        };
        let reader = Reader { tensors: &tensors, widths, inner: bert.intermediate_size };
        let mut layers = Vec::with_capacity(bert.num_hidden_layers);
        let mut next = Buffer::zeroed(widths.filled);
        // From the last one back: each norm wants to know the bias that comes after it.
        for number in (0..bert.num_hidden_layers).rev() {
            let (layer, bias) = reader.layer::<D>(&format!("encoder.layer.{number}."), next)?;
            layers.push(layer);
            next = bias;
            tensors.forget_pages();
        }
        layers.reverse();
        let embedded = reader.norm("embeddings.LayerNorm", next)?;
        let positions = reader.positions(bert.max_position_embeddings)?;
        let words = tensors.table("embeddings.word_embeddings.weight", [bert.vocab_size, hidden])?;
        tensors.forget_pages();
        Ok(Self {
            widths,
            epsilon: bert.layer_norm_eps,
            pooling: description.pooling,
            max_tokens: description.max_tokens,
            tensors,
            words,
            positions,
            embedded,
            layers,
            attention: std::marker::PhantomData,
        })
    }

    /// Stages of a pass, which a team counts.
    pub(super) fn stages(&self) -> usize {
        let of_a_layer = if D::QUANTIZED { 8 } else { 6 };
        2 + (of_a_layer + 1) * self.layers.len()
    }
}

/// Reads weights and fills them up.
struct Reader<'a> {
    tensors: &'a Tensors,
    widths: Widths,
    inner: usize,
}

impl Reader<'_> {
    /// A layer, and the bias of its attention's output, which the norm before it adds.
    fn layer<D: Kernel>(&self, name: &str, next: Buffer<f32>) -> Result<(Layer<D>, Buffer<f32>), Error> {
        let Widths { hidden, filled, heads, head, context, inner } = self.widths;
        let dimensions = hidden / heads;
        // Where the numbers of a head go.
        let of_heads = |at: usize| at / dimensions * head + at % dimensions;
        let mut project = Matrix::zeroed(3 * context, filled);
        for (part, which) in ["query", "key", "value"].into_iter().enumerate() {
            let weight = self.read(&format!("{name}attention.self.{which}.weight"), &[hidden, hidden])?;
            let bias = self.read(&format!("{name}attention.self.{which}.bias"), &[hidden])?;
            // Scores are divided by the root of the dimensions, and powers of two are cheaper than of e.
            let factor = match part {
                0 => std::f32::consts::LOG2_E / (dimensions as f32).sqrt(),
                _ => 1.0,
            };
            for (column, weights) in weight.chunks_exact(hidden).enumerate() {
                let to = part * context + of_heads(column);
                project.set(to, weights.iter().map(|weight| weight * factor).enumerate(), bias[column] * factor);
            }
        }
        let dense = |name: &str, rows: usize, depth: usize| -> Result<(Vec<f32>, Vec<f32>), Error> {
            Ok((
                self.read(&format!("{name}.weight"), &[rows, depth])?,
                self.read(&format!("{name}.bias"), &[rows])?,
            ))
        };
        let (weight, bias) = dense(&format!("{name}attention.output.dense"), hidden, hidden)?;
        let mut output = Matrix::zeroed(filled, context);
        for (column, weights) in weight.chunks_exact(hidden).enumerate() {
            let weights = weights.iter().enumerate().map(|(at, weight)| (of_heads(at), *weight));
            output.set(column, weights, bias[column]);
        }
        let (weight, bias) = dense(&format!("{name}intermediate.dense"), self.inner, hidden)?;
        let mut widen = Matrix::zeroed(inner, filled);
        for (column, weights) in weight.chunks_exact(hidden).enumerate() {
            widen.set(column, weights.iter().copied().enumerate(), bias[column]);
        }
        let (weight, bias) = dense(&format!("{name}output.dense"), hidden, self.inner)?;
        let mut narrow = Matrix::zeroed(filled, inner);
        for (column, weights) in weight.chunks_exact(self.inner).enumerate() {
            narrow.set(column, weights.iter().copied().enumerate(), bias[column]);
        }
        let (output, output_bias) = output.without_bias::<D>();
        let (narrow, narrow_bias) = narrow.without_bias::<D>();
        let layer = Layer {
            project: project.with_bias(),
            output,
            attended: self.norm(&format!("{name}attention.output.LayerNorm"), narrow_bias)?,
            widen: widen.with_bias(),
            narrow,
            fed: self.norm(&format!("{name}output.LayerNorm"), next)?,
        };
        Ok((layer, output_bias))
    }

    fn norm(&self, name: &str, next: Buffer<f32>) -> Result<Norm, Error> {
        let filled = |numbers: &[f32]| {
            let mut buffer = Buffer::zeroed(self.widths.filled);
            buffer.as_mut_slice()[..numbers.len()].copy_from_slice(numbers);
            buffer
        };
        let read = |part: &str| self.read(&format!("{name}.{part}"), &[self.widths.hidden]);
        Ok(Norm { weight: filled(&read("weight")?), bias: filled(&read("bias")?), next })
    }

    fn positions(&self, count: usize) -> Result<Buffer<f32>, Error> {
        let Widths { hidden, filled, .. } = self.widths;
        let positions = self.read("embeddings.position_embeddings.weight", &[count, hidden])?;
        // Texts are of the first type; how many there are differs.
        let types = self.tensors.read_first_row("embeddings.token_type_embeddings.weight", hidden)?;
        let mut table = Buffer::zeroed(count * filled);
        let rows = table.as_mut_slice().chunks_exact_mut(filled).zip(positions.chunks_exact(hidden));
        for (to, from) in rows {
            for ((to, from), kind) in to.iter_mut().zip(from).zip(&types) {
                *to = from + kind;
            }
        }
        Ok(table)
    }

    fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        self.tensors.read(name, shape)
    }
}

/// A dense layer before it is laid out: column after column.
struct Matrix {
    numbers: Vec<f32>,
    depth: usize,
    bias: Buffer<f32>,
}

impl Matrix {
    fn zeroed(columns: usize, depth: usize) -> Self {
        Self { numbers: vec![0.0; columns * depth], depth, bias: Buffer::zeroed(columns) }
    }

    fn set(&mut self, column: usize, weights: impl Iterator<Item = (usize, f32)>, bias: f32) {
        let to = &mut self.numbers[column * self.depth..][..self.depth];
        for (at, weight) in weights {
            to[at] = weight;
        }
        self.bias.as_mut_slice()[column] = bias;
    }

    fn with_bias<D: Kernel>(self) -> Dense<D> {
        Dense::new(&self.numbers, self.depth, self.bias)
    }

    /// The layer, and the bias for whoever adds it before.
    fn without_bias<D: Kernel>(self) -> (Dense<D>, Buffer<f32>) {
        let none = Buffer::zeroed(self.bias.len());
        (Dense::new(&self.numbers, self.depth, none), self.bias)
    }
}

/// What the threads of one pass share: all tokens' numbers at one stage or another.
pub(super) struct Shared<D: Kernel, A: Float> {
    /// Sums of what layers add.
    residual: Buffer<f32>,
    /// The same, normalised, for products.
    normal: Buffer<D::Element>,
    projected: Buffer<A::Element>,
    context: Buffer<D::Element>,
    inner: Buffer<D::Element>,
    bytes: Buffer<u8>,
    quantizations: Vec<Quantization>,
}

impl<D: Kernel, A: Float> Shared<D, A> {
    /// Room for passes of at most `tokens`.
    pub(super) fn new(network: &Network<D, A>, tokens: usize) -> Self {
        let Widths { filled, context, inner, .. } = network.widths;
        let rows = tokens + SLACK;
        let bytes = if D::QUANTIZED { rows * inner.max(filled).max(context) } else { 0 };
        Self {
            residual: Buffer::zeroed(rows * filled),
            normal: Buffer::zeroed(rows * filled),
            projected: Buffer::zeroed(rows * 3 * context),
            context: Buffer::zeroed(rows * context),
            inner: Buffer::zeroed(rows * inner),
            bytes: Buffer::zeroed(bytes),
            quantizations: vec![Quantization::default(); if D::QUANTIZED { rows } else { 0 }],
        }
    }

    /// Where it all lies.
    pub(super) fn places(&mut self) -> Places<D, A> {
        Places {
            residual: self.residual.as_mut_ptr(),
            normal: self.normal.as_mut_ptr(),
            projected: self.projected.as_mut_ptr(),
            context: self.context.as_mut_ptr(),
            inner: self.inner.as_mut_ptr(),
            bytes: self.bytes.as_mut_ptr(),
            quantizations: self.quantizations.as_mut_ptr(),
        }
    }
}

/// Where [`Shared`] lies, for threads that write to different parts of it.
pub(super) struct Places<D: Kernel, A: Float> {
    residual: *mut f32,
    normal: *mut D::Element,
    projected: *mut A::Element,
    context: *mut D::Element,
    inner: *mut D::Element,
    bytes: *mut u8,
    quantizations: *mut Quantization,
}

impl<D: Kernel, A: Float> Clone for Places<D, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Kernel, A: Float> Copy for Places<D, A> {}

// SAFETY: threads write to parts of their own, as the units of a stage divide them, and a stage begins
// when the one before it has ended.
unsafe impl<D: Kernel, A: Float> Send for Places<D, A> {}

/// What each thread of a pass has for itself.
pub(super) struct Own<A: Float> {
    partial: Buffer<f32>,
    attention: attention::Workspace<A>,
}

impl<A: Float> Own<A> {
    /// Room for passes of at most `tokens` with sequences of at most `length`.
    pub(super) fn new<D: Kernel>(network: &Network<D, A>, tokens: usize, length: usize) -> Self {
        Self {
            partial: Buffer::zeroed((tokens + SLACK) * D::COLUMNS),
            attention: attention::Workspace::new(length, network.widths.head),
        }
    }
}

/// One pass: a thread's part of it.
pub(super) struct Pass<'a, D: Kernel, A: Float, T: Team> {
    pub(super) network: &'a Network<D, A>,
    pub(super) batch: &'a Batch,
    pub(super) places: Places<D, A>,
    pub(super) own: &'a mut Own<A>,
    pub(super) team: &'a T,
    /// Room for a vector for each sequence, one after the other.
    pub(super) vectors: *mut f32,
}

impl<D: Kernel, A: Float, T: Team> Op for Pass<'_, D, A, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run(mut self) {
        // SAFETY: the caller has seen the instructions; the places have room for the batch.
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

impl<D: Kernel, A: Float, T: Team> Pass<'_, D, A, T> {
    /// Embeddings of tokens and positions, normalised.
    #[inline(always)]
    unsafe fn embed(&mut self, stage: &mut usize) {
        let Widths { hidden, filled, .. } = self.network.widths;
        let tokens = self.batch.ids.len();
        let blocks = tokens.div_ceil(ROWS);
        for block in self.team.units(*stage, blocks) {
            let rows = block * ROWS..tokens.min((block + 1) * ROWS);
            for row in rows.clone() {
                let position = self.batch.positions[row] as usize * filled;
                // SAFETY: the row is this unit's alone, and there is room for it.
                let to = unsafe { std::slice::from_raw_parts_mut(self.places.residual.add(row * filled), filled) };
                to.copy_from_slice(&self.network.positions.as_slice()[position..][..filled]);
                let id = self.batch.ids[row] as usize;
                self.network.tensors.add_row(&self.network.words, id, &mut to[..hidden]);
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
        let Widths { filled, heads, head, context, inner, .. } = self.network.widths;
        let Batch { ids, starts, .. } = self.batch;
        let (rows, places) = (ids.len(), self.places);
        let partial = self.own.partial.as_mut_ptr();
        // SAFETY: the places have room for the rows; units write to panels, heads or rows of their own.
        unsafe {
            let left = D::left(places.normal, filled, places.bytes, places.quantizations);
            let store = Store { to: places.projected, stride: 3 * context };
            for panel in self.team.units(*stage, layer.project.panels()) {
                layer.project.finish(panel, left, rows, partial, &store);
            }
            self.finish_stage(stage, layer.project.panels());

            let units = (starts.len() - 1) * heads;
            for unit in self.team.units(*stage, units) {
                let (first, end) = (starts[unit / heads], starts[unit / heads + 1]);
                let sequence = Sequence {
                    projected: places.projected.add(first * 3 * context).cast_const(),
                    stride: 3 * context,
                    part: context,
                    length: end - first,
                };
                let to = places.context.add(first * context);
                self.own.attention.head(&sequence, unit % heads * head, head, to, context);
            }
            self.finish_stage(stage, units);

            self.prepare(places.context, context, stage);
            let left = D::left(places.context, context, places.bytes, places.quantizations);
            for panel in self.team.units(*stage, layer.output.panels()) {
                layer.output.add_to(panel, left, rows, places.residual, filled);
            }
            self.finish_stage(stage, layer.output.panels());
            self.normalise_all(&layer.attended, stage);

            let left = D::left(places.normal, filled, places.bytes, places.quantizations);
            let gelu = Gelu { to: places.inner, stride: inner };
            for panel in self.team.units(*stage, layer.widen.panels()) {
                layer.widen.finish(panel, left, rows, partial, &gelu);
            }
            self.finish_stage(stage, layer.widen.panels());

            self.prepare(places.inner, inner, stage);
            let left = D::left(places.inner, inner, places.bytes, places.quantizations);
            for panel in self.team.units(*stage, layer.narrow.panels()) {
                layer.narrow.add_to(panel, left, rows, places.residual, filled);
            }
            self.finish_stage(stage, layer.narrow.panels());
            self.normalise_all(&layer.fed, stage);
        }
    }

    /// Operands of all rows of a matrix, where they are not its elements.
    #[inline(always)]
    unsafe fn prepare(&mut self, elements: *const D::Element, width: usize, stage: &mut usize) {
        if !D::QUANTIZED {
            return;
        }
        let tokens = self.batch.ids.len();
        let blocks = tokens.div_ceil(ROWS);
        for block in self.team.units(*stage, blocks) {
            let (first, rows) = (block * ROWS, ROWS.min(tokens - block * ROWS));
            // SAFETY: the caller's; the rows are this unit's alone.
            unsafe {
                let bytes = self.places.bytes.add(first * width);
                let quantizations = self.places.quantizations.add(first);
                D::prepare(elements.add(first * width), rows, width, bytes, quantizations);
            }
        }
        self.finish_stage(stage, blocks);
    }

    #[inline(always)]
    unsafe fn normalise_all(&mut self, norm: &Norm, stage: &mut usize) {
        let tokens = self.batch.ids.len();
        let blocks = tokens.div_ceil(ROWS);
        for block in self.team.units(*stage, blocks) {
            // SAFETY: the caller's; the rows are this unit's alone.
            unsafe { self.normalise(norm, block * ROWS, ROWS.min(tokens - block * ROWS)) };
        }
        self.finish_stage(stage, blocks);
    }

    /// Layer normalisation of some rows of the residual, in place with the next bias, and as operands.
    #[inline(always)]
    unsafe fn normalise(&self, norm: &Norm, first: usize, rows: usize) {
        let Widths { hidden, filled, .. } = self.network.widths;
        let lanes = D::Lanes::LANES;
        // SAFETY: the caller's; the norm's buffers are as wide as a row.
        unsafe {
            let zero = D::Lanes::splat(0.0);
            for row in first..first + rows {
                let numbers = self.places.residual.add(row * filled);
                let mut sum = zero;
                for at in (0..filled).step_by(lanes) {
                    sum = sum.add(D::Lanes::load(numbers.add(at)));
                }
                let mean = D::Lanes::splat(sum.sum() / hidden as f32);
                let mut squares = zero;
                for at in (0..filled).step_by(lanes) {
                    let mut off = D::Lanes::load(numbers.add(at)).sub(mean);
                    if at + lanes > hidden {
                        off = off.first(hidden.saturating_sub(at), zero);
                    }
                    squares = off.mul_add(off, squares);
                }
                let deviation = (squares.sum() / hidden as f32 + self.network.epsilon).sqrt();
                let factor = D::Lanes::splat(1.0 / deviation);
                let normal = self.places.normal.add(row * filled);
                for at in (0..filled).step_by(lanes) {
                    let off = D::Lanes::load(numbers.add(at)).sub(mean).mul(factor);
                    let weight = D::Lanes::load(norm.weight.as_ptr().add(at));
                    let number = off.mul_add(weight, D::Lanes::load(norm.bias.as_ptr().add(at)));
                    D::Element::put(number, normal.add(at));
                    number.add(D::Lanes::load(norm.next.as_ptr().add(at))).store(numbers.add(at));
                }
            }
            let bytes = self.places.bytes.wrapping_add(first * filled);
            let quantizations = self.places.quantizations.wrapping_add(first);
            D::prepare(self.places.normal.add(first * filled), rows, filled, bytes, quantizations);
        }
    }

    /// One unit vector a sequence.
    #[inline(always)]
    unsafe fn pool(&mut self, stage: &mut usize) {
        let Widths { hidden, filled, .. } = self.network.widths;
        let sequences = self.batch.starts.len() - 1;
        for sequence in self.team.units(*stage, sequences) {
            let first = self.batch.starts[sequence];
            let rows = match self.network.pooling {
                Pooling::Mean => self.batch.starts[sequence + 1] - first,
                Pooling::Cls => 1,
            };
            // SAFETY: the vector is this unit's alone; the rows are there.
            unsafe {
                let vector = std::slice::from_raw_parts_mut(self.vectors.add(sequence * hidden), hidden);
                vector.fill(0.0);
                for row in first..first + rows {
                    let numbers = std::slice::from_raw_parts(self.places.residual.add(row * filled), hidden);
                    for (to, number) in vector.iter_mut().zip(numbers) {
                        *to += number;
                    }
                }
                // A vector's length takes care of the mean's divisor.
                let length = vector.iter().map(|number| number * number).sum::<f32>().sqrt();
                let factor = if length > 0.0 { 1.0 / length } else { 0.0 };
                vector.iter_mut().for_each(|number| *number *= factor);
            }
        }
        self.finish_stage(stage, sequences);
    }

    /// For whoever checks a batch against it.
    pub(super) fn max_tokens(&self) -> usize {
        self.network.max_tokens
    }
}
